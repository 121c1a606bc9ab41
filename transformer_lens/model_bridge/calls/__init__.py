"""What a call of the model is made of: tokens, padding, KV caches, outputs."""
