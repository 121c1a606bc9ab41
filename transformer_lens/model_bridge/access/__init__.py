"""What an unchanged model is read and written through: views, ports, seams, its weights."""
