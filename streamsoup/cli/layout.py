"""How help is laid out: in whole words at any width, and examples that can be pasted."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable

import click

__all__ = ["Context", "Layout"]

WIDEST, NARROWEST = 80, 24
"""Columns of a terminal that are used, and those that are taken to be there."""

TWO_COLUMNS = 60
"""From this width on, options and what they do stand side by side."""


class Layout(click.HelpFormatter):
    """Text in a terminal; click itself supposes 50 columns at least, and breaks words."""

    def __init__(
        self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None
    ) -> None:
        """Use the width of the terminal, unless one is given."""
        if width is None:
            columns = shutil.get_terminal_size().columns
            width = max(min(columns, max_width or WIDEST), NARROWEST)
        super().__init__(indent_increment, width, max_width)

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write names and what they do: side by side, or where that is too narrow, below."""
        if self.width >= TWO_COLUMNS:
            super().write_dl(list(rows), col_max, col_spacing)
            return
        for name, text in rows:
            self.write_text(name.rstrip())
            with self.indentation(), self.indentation():
                self.write_text(text)

    def write_named(self, name: str, text: str, *, command: bool = False) -> None:
        """Write a text after its name; where there is no room, below it.

        A command is continued as a shell would have it.
        """
        head = f"{name}:".ljust(10)
        if len(head) + len(text) <= self.width:
            self.write(f"{head}{text}\n")
            return
        self.write(f"{name}:\n")
        lines = _continued(text, self.width - 2) if command else [text]
        self.write("".join(f"  {line}\n" for line in lines))


def _continued(command: str, width: int) -> list[str]:
    r"""Return a command on lines no longer than `width`, as one can paste it.

    >>> _continued("streamsoup uniform run1 run2 -o soup", 36)
    ['streamsoup uniform run1 run2 \\', '  -o soup']
    """
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        # An option keeps its value beside it.
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and word[0] != "-":
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]} {part}" if lines[-1].strip() else f"{lines[-1]}{part}"
        if lines[-1].strip() and len(longer) + 2 > width:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return lines


class Context(click.Context):
    """A context whose help is laid out so."""

    formatter_class = Layout
