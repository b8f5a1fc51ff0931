"""What was compared, as pages and pictures one can hand on.

* `figures`: an empty figure, and how it is saved: whole or not at all
* `charts`: scatter, curves, intervals, pairs, paths and planes
* `page`: headings, tables and pictures, as Markdown and as one HTML file
* `comparison`: the report of a comparison

Matplotlib draws, and is loaded when it is asked for (``streamsoup[plot]``); without it the pages
have tables alone.
"""
