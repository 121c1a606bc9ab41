"""What a client does: models with remote blocks, the way through their servers, gradients and texts over them."""
