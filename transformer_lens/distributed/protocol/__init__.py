"""What a client and a server agree on: which model and blocks, which edits, and what a message says."""
