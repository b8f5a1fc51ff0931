"""Blocks as Markdown; plots and heat maps are links to pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from streamsoup.study.pages.blocks import Block, Code, Heading, Plot, Table, Text
from streamsoup.study.pages.escapes import shown

__all__ = ["END", "markdown"]

END = "<!-- a report of streamsoup -->"
"""The last line of each report: only such a file is replaced by another report."""


def markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """Return a page as Markdown; `pictures` is the folder of the pictures, relative to the page."""
    parts = [f"# {shown(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {shown(block.text)}")
        elif isinstance(block, Text):
            parts.append(_escaped(block.text))
        elif isinstance(block, Code):
            fence = "`" * max(3, 1 + _longest_run("`", block.lines))
            parts.append("\n".join([fence, *map(shown, block.lines), fence]))
        else:
            if block.name:
                words = _escaped(block.words)
                parts.append(f"![{words}]({quote(pictures)}/{block.name}.svg)\n\n{words}")
            if not isinstance(block, Plot):
                parts.append(_table(block))
    return "\n\n".join([*parts, END]) + "\n"


def _table(table: Table) -> str:
    head = [_escaped(cell) for cell in table.head]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for number, row in enumerate(table.rows):
        cells = [_escaped(cell) for cell in row]
        lines.append(
            [f"**{c}**" if c and (number, n) in table.bold else c for n, c in enumerate(cells)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    text = shown(text)
    for character in "\\|*_`<[&~$":
        text = text.replace(character, f"\\{character}")
    return text


def _longest_run(character: str, lines: Sequence[str]) -> int:
    runs = re.findall(f"{re.escape(character)}+", "\n".join(lines))
    return max(map(len, runs), default=0)
