"""Learned soups inside: coefficients, their gradients streamed from disk, and the descent."""
