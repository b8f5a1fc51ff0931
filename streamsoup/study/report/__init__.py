"""What was found, as a page that one can hand on.

* `write`: where a report goes, and what may be replaced there
* `comparison`, `searches`, `coefficients`, `sweeps`, `paths`, `angles`: a page for each kind of
  result
* `blocks`: what a page consists of, as data
* `page`, `markdown`, `svg`: the same blocks as one HTML file, as Markdown, as pictures
* `figures`: pictures by matplotlib (``streamsoup[plot]``), for the contours of a landscape

The page builder knows no result, and a result knows neither HTML nor Markdown. Nothing is loaded
from anywhere, and names are escaped in one place, `svg.in_html`.
"""
