"""Which coefficients: each way to choose them ends in one recipe, made by the same pass."""
