"""Searches by score: which ingredients belong in the soup, and with which coefficients.

::

    greedy    `greedy`: the public verb           learned     `learned`: the public verb
    trials    its settings, and the search        learning/   settings, search, slopes, journal
    scoring/  who scores: the Scorer joint        run         what both do around their question
    folder    OUT.search: lock and journal        report      a greedy search as plain JSON

May import `task`, `methods` and what lies below them. What must not change: a search that was
killed resumes to the outcome of an uninterrupted one, whatever scores and however many at once; and
the soup is the one that its recipe makes, whatever the history of the search.
"""
