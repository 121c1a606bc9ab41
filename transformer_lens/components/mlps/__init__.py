"""MLPs under their known import paths."""
