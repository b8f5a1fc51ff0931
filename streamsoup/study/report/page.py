"""A page of headings, tables and pictures, as Markdown and as one HTML file.

The HTML holds its pictures and style, and loads nothing. The one script in it sorts tables; the
page's content security policy lets no other run, whatever names in the page may hold.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence

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
    hints: Mapping[tuple[int, int], str] = {}
    """What is shown when the pointer rests on a cell, by row and column."""


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
        script = _beside("page.js")
        return _HTML.format(
            title=title,
            policy=_policy(script),
            style=_beside("page.css"),
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
    head = "".join(
        f'<th scope="col"><button type="button">{_in_html(cell)}</button></th>'
        for cell in table.head
    )
    lines: list[str] = []
    for number, row in enumerate(table.rows):
        first, *others = row
        cells = [f'<th scope="row">{_in_html(first)}</th>']
        cells += [_html_cell(table, number, n, cell) for n, cell in enumerate(others, 1)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_cell(table: Table, row: int, column: int, text: str) -> str:
    bold = ' class="bold"' if (row, column) in table.bold else ""
    hint = table.hints.get((row, column))
    title = f' title="{_in_html(hint)}"' if hint else ""
    return f"<td{bold}{title}>{_in_html(text)}</td>"


def _html_picture(picture: Picture, folder: str) -> str:
    with open(os.path.join(folder, picture.file), "rb") as file:
        content = base64.b64encode(file.read()).decode()
    words = _in_html(picture.words)
    return (
        f'<figure><img alt="{words}" src="data:image/png;base64,{content}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _beside(name: str) -> str:
    """Return the content of a file that lies beside this one."""
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        return file.read()


def _policy(script: str) -> str:
    """Return a policy that lets nothing be loaded, and no script run but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


_HTML = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""
