"""The page builder: headings, tables and plots as data, and as HTML, Markdown and pictures.

* `blocks`: what a page consists of, as data
* `page`: a page, as one HTML file and as Markdown with pictures beside it
* `svg`, `heat`, `axes`: plots, heat maps, and their scales
* `escapes`: names as text, in one place

It knows no result of streamsoup. A page loads nothing, and its policy lets no script run but its
own.
"""
