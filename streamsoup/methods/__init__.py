"""The formulas: how each method chooses its coefficients, and the angles that some of them need.

May import `live`, `output` and what lies below them. Every method ends in one recipe, written by
the one pass of `output.make`.
"""
