"""What was found, as a page that one can hand on; `streamsoup.study.pages` builds it.

* `write`: where a report goes, and what may be replaced there
* `comparison`, `searches`, `coefficients`, `sweeps`, `paths`, `angles`: a page for each kind of
  result
* `figures`: pictures by matplotlib (``streamsoup[plot]``), for the contours of a landscape
"""
