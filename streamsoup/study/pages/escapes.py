"""Names as text: what they hold is shown, and never obeyed.

Names come out of files that anyone may have made. All of HTML, SVG and Markdown is escaped here
or with what is here.
"""

from __future__ import annotations

import html

from streamsoup.errors import printable

__all__ = ["hint_in_html", "in_html", "shown"]


def shown(text: str) -> str:
    r"""Return a text with what steers a terminal or turns the line around as visible escapes.

    Names come out of files that anyone may have made.

    >>> shown("soup\u202etxt.exe\x1b[2J")
    'soup\\u202etxt.exe\\x1b[2J'
    """
    return printable(text, len(text))


def in_html(text: str) -> str:
    """Return a text as it may stand in HTML and SVG, in attributes too."""
    return html.escape(shown(text))


def hint_in_html(text: str) -> str:
    r"""Return a hint as it may stand in HTML and SVG, its lines apart.

    >>> hint_in_html("a<b\n0.5")
    'a&lt;b&#10;0.5'
    """
    return "&#10;".join(map(in_html, text.split("\n")))
