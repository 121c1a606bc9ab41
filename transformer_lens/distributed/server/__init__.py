"""What a server does: it holds the blocks of a span, checks and answers calls, and announces itself."""
