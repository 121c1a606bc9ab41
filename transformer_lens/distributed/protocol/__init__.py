"""What client and server agree on: models and blocks, edits, and the format of messages."""
