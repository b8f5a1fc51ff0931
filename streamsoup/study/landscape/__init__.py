"""What lies between checkpoints: the line through two, and the plane through three."""
