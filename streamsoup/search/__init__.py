"""Searches by score: which ingredients belong in the soup, and with which coefficients.

May import `task`, `methods` and what lies below them. What must not change: a search that was
killed resumes to the outcome of an uninterrupted one, and the soup is the one that its recipe
makes, whatever the history of the search.
"""
