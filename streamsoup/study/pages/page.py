"""A page of headings, tables and plots, as Markdown and as one HTML file.

The HTML holds its plots and style, and loads nothing. The one script in it sorts tables and shows
hints; the page's content security policy lets no other run, whatever names in the page may hold.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from itertools import groupby

import msgspec

from streamsoup.errors import OutputError, printable
from streamsoup.study.pages.blocks import Block, Code, Heading, Plot, Table, Text
from streamsoup.study.pages.escapes import hint_in_html, in_html
from streamsoup.study.pages.heat import heat_map
from streamsoup.study.pages.markdown import markdown
from streamsoup.study.pages.svg import beside, draw, standing_alone
from streamsoup.system.folders import replacing

__all__ = ["GENERATOR", "Page", "write_text"]

GENERATOR = '<meta name="generator" content="streamsoup">'
"""Only a file with this line is replaced by another report."""

TEXT = ' class="text"'
UNNAMED = ' aria-label="name of the row"'
NUMBER = re.compile(r"\s*[+-]?\d")


class Page(msgspec.Struct, frozen=True):
    """A title and what is below it."""

    title: str
    blocks: Sequence[Block]

    def to_markdown(self, pictures: str) -> str:
        """Return the page as Markdown, with links to pictures in a folder beside it."""
        return markdown(self.title, self.blocks, pictures)

    def to_pictures(self) -> dict[str, str]:
        """Return the pictures that the Markdown links to, by their file names."""
        found = {}
        for block in self.blocks:
            if isinstance(block, Plot):
                found[f"{block.name}.svg"] = standing_alone(draw(block))
            elif isinstance(block, Table) and block.name:
                found[f"{block.name}.svg"] = standing_alone(heat_map(block))
        return found

    def to_html(self) -> str:
        """Return the page as one HTML file."""
        parts = []
        for are_plots, blocks in groupby(self.blocks, lambda block: isinstance(block, Plot)):
            texts = "\n".join(map(_in_html, blocks))
            parts.append(f'<div class="plots">{texts}</div>' if are_plots else texts)
        script = beside("page.js")
        return _HTML.format(
            generator=GENERATOR,
            title=in_html(self.title),
            policy=_policy(script),
            style="".join(map(beside, ("colours.css", "page.css", "plot.css"))),
            body="\n".join(parts),
            script=script,
        )


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all. Raises `OutputError`."""
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None


def _in_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{in_html(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{in_html(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{chr(10).join(map(in_html, block.lines))}</pre>"
    if isinstance(block, Table):
        return _table(block)
    return f"<figure>{draw(block)}<figcaption>{in_html(block.words)}</figcaption></figure>"


def _table(table: Table) -> str:
    are_text = [_is_text([row[n] for row in table.rows]) for n in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{TEXT * is_text}><button type="button"{UNNAMED * (not cell)}>'
        f"{in_html(cell)}</button></th>"
        for cell, is_text in zip(table.head, are_text, strict=True)
    )
    lines: list[str] = []
    for number, row in enumerate(table.rows):
        first, *others = row
        cells = [f'<th scope="row">{in_html(first)}</th>']
        cells += [_cell(table, number, n, cell, are_text[n]) for n, cell in enumerate(others, 1)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    words = f"<p>{in_html(table.words)}</p>\n" if table.words else ""
    return (
        f'{words}<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _is_text(cells: Sequence[str]) -> bool:
    """Return True for a column without a number, which reads better from the left."""
    return not any(NUMBER.match(cell) for cell in cells)


def _cell(table: Table, row: int, column: int, text: str, is_text: bool) -> str:
    place = (row, column)
    shade = table.shades.get(place)
    known = {"heat": shade is not None, "bold": place in table.bold, "text": is_text}
    kinds = " ".join(kind for kind, holds in known.items() if holds)
    attributes = f' class="{kinds}"' if kinds else ""
    attributes += f' style="--s:{shade:.3f}"' if shade is not None else ""
    hint = table.hints.get(place)
    attributes += f' title="{hint_in_html(hint)}"' if hint else ""
    return f"<td{attributes}>{in_html(text)}</td>"


def _policy(script: str) -> str:
    """Return a policy that lets nothing be loaded, and no script run but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


_HTML = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{generator}
<title>{title}</title><style>{style}</style></head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
