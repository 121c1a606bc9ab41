"""What a run leaves: activations by name, and what is made of them."""
