"""Were the coefficients good: comparisons, landscapes, angles drawn, and reports of them.

May import `search` and what lies below it. What must not change: each mixture is measured at most
once, and what is shown is what was measured.
"""
