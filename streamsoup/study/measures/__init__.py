"""One mixture on one split, measured once and kept: scores, losses, logits and their statistics."""
