"""A page of headings, tables and pictures, as Markdown and as one HTML file.

The HTML holds its pictures and style, loads nothing, and runs nothing.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence

import msgspec

from streamsoup.errors import OutputError, printable
from streamsoup.system.folders import replacing

__all__ = ["Block", "Code", "Heading", "Page", "Picture", "Table", "Text", "write_text"]


class Heading(msgspec.Struct, frozen=True):
    """A heading within the page."""

    text: str


class Text(msgspec.Struct, frozen=True):
    """A paragraph, as plain text."""

    text: str


class Code(msgspec.Struct, frozen=True):
    """Commands, a line each."""

    lines: Sequence[str]


class Table(msgspec.Struct, frozen=True):
    """A table: the first column is text, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    """Cells that stand out, by row and column."""


class Picture(msgspec.Struct, frozen=True):
    """A picture that lies beside the page."""

    file: str
    """Relative to the page's folder."""
    words: str
    """What it shows."""


Block = Heading | Text | Code | Table | Picture


class Page(msgspec.Struct, frozen=True):
    """A title and what is below it."""

    title: str
    blocks: Sequence[Block]

    def to_markdown(self) -> str:
        """Return the page as Markdown; pictures are linked."""
        parts = [f"# {_shown(self.title)}"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"## {_shown(block.text)}")
            elif isinstance(block, Text):
                parts.append(_escaped(block.text))
            elif isinstance(block, Code):
                fence = "`" * max(3, 1 + _longest_run("`", block.lines))
                parts.append("\n".join([fence, *map(_shown, block.lines), fence]))
            elif isinstance(block, Table):
                parts.append(_markdown_table(block))
            else:
                words = _escaped(block.words)
                parts.append(f"![{words}]({block.file})\n\n{words}")
        return "\n\n".join(parts) + "\n"

    def to_html(self, folder: str) -> str:
        """Return the page as one HTML file; pictures are read from `folder` and put into it."""
        parts = []
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"<h2>{_in_html(block.text)}</h2>")
            elif isinstance(block, Text):
                parts.append(f"<p>{_in_html(block.text)}</p>")
            elif isinstance(block, Code):
                parts.append(f"<pre>{chr(10).join(map(_in_html, block.lines))}</pre>")
            elif isinstance(block, Table):
                parts.append(_html_table(block))
            else:
                parts.append(_html_picture(block, folder))
        title = _in_html(self.title)
        return _HTML.format(title=title, style=_STYLE, body="\n".join(parts))


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all. Raises `OutputError`."""
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None


def _markdown_table(table: Table) -> str:
    head = [_escaped(cell) for cell in table.head]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for number, row in enumerate(table.rows):
        cells = [_escaped(cell) for cell in row]
        lines.append(
            [f"**{c}**" if c and (number, n) in table.bold else c for n, c in enumerate(cells)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(text: str) -> str:
    r"""Return a text with what steers a terminal or turns the line around as visible escapes.

    Names come out of files that anyone may have made.

    >>> _shown("soup\u202etxt.exe\x1b[2J")
    'soup\\u202etxt.exe\\x1b[2J'
    """
    return printable(text, len(text))


def _in_html(text: str) -> str:
    return html.escape(_shown(text))


def _escaped(text: str) -> str:
    text = _shown(text)
    for character in "\\|*_`<[&~$":
        text = text.replace(character, f"\\{character}")
    return text


def _longest_run(character: str, lines: Sequence[str]) -> int:
    runs = re.findall(f"{re.escape(character)}+", "\n".join(lines))
    return max(map(len, runs), default=0)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_in_html(cell)}</th>" for cell in table.head)
    lines = [f"<tr>{head}</tr>"]
    for number, row in enumerate(table.rows):
        cells = "".join(
            f"<td{' class=bold' if (number, n) in table.bold else ''}>{_in_html(cell)}</td>"
            for n, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _html_picture(picture: Picture, folder: str) -> str:
    with open(os.path.join(folder, picture.file), "rb") as file:
        content = base64.b64encode(file.read()).decode()
    words = _in_html(picture.words)
    return (
        f'<figure><img alt="{words}" src="data:image/png;base64,{content}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 84rem; margin: 2rem auto;
  padding: 0 1rem; }
p, figure, pre { max-width: 64rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; }
td.bold { font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { color: #555; font-size: 13px; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""

_HTML = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
