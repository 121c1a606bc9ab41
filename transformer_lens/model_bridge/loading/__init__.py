"""A model from a hub, a directory or a config, and back into a directory."""
