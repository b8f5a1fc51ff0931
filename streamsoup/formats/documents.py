"""YAML files that people write, as texts, lists and tables that know the line they stand on.

PyYAML reads the events, with its safe loader alone; nothing is constructed from a tag. A scalar
stays the text that was written: who asks for a number, a switch or a path says so, so that ``1e-5``
is a number and a folder called ``on`` a path, which YAML 1.1 would both get wrong.

Nothing that a file holds is trusted. Its size, its depth, the number of its nodes and what its
aliases unfold to are bounded, and a key that stands twice is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from streamsoup.errors import RecipeError, printable
from streamsoup.system.regular import read_whole

__all__ = ["Items", "Node", "Table", "Text", "read_document"]

LARGEST = 1 << 20
"""Bytes of a file that is read; recipes have some hundreds."""

DEEPEST = 20
"""Lists and tables within each other."""

MOST_NODES = 50_000
"""Texts, lists and tables in all, those that aliases repeat counted again."""

_NOTHING = ("", "~", "null", "Null", "NULL")


class Node(msgspec.Struct, frozen=True):
    """Something in a document."""

    file: str
    line: int
    """Counted from 1."""

    @property
    def where(self) -> str:
        """Where it stands, for a message: ``recipe.yaml:4``."""
        return f"{printable(self.file)}:{self.line}"

    @property
    def is_nothing(self) -> bool:
        """True for an empty value, or ``null``."""
        return False

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        return "text"


class Text(Node, frozen=True):
    """A scalar, as it was written."""

    text: str
    quoted: bool
    """True if it stood in quotes, or in a block of its own."""

    @property
    def is_nothing(self) -> bool:
        """True for an empty value, or ``null``."""
        return not self.quoted and self.text in _NOTHING

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        return "nothing" if self.is_nothing else repr(printable(self.text, 60))


class Items(Node, frozen=True):
    """A list."""

    items: tuple[Node, ...]

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        return "a list"


class Table(Node, frozen=True):
    """Keys with their values, in the order of the file."""

    entries: Mapping[str, Node]
    lines: Mapping[str, int]
    """The line of each key."""

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        return "a table"

    def at(self, key: str) -> str:
        """Return where a key stands, for a message: ``recipe.yaml:4: density``."""
        return f"{printable(self.file)}:{self.lines.get(key, self.line)}: {printable(key)}"


def read_document(path: str) -> Table:
    """Read a file of YAML, or of JSON, that holds one table.

    Args:
        path: The file.

    Returns:
        Its table, with every value as it was written.

    Raises:
        RecipeError: It cannot be read, is no YAML, holds anything but one table, or goes beyond the
            bounds of this module; the message names the file and the line.
    """
    try:
        text = read_whole(path, LARGEST)
    except OSError as error:
        raise RecipeError(
            f"{printable(path)}: cannot be read: {error.strerror}; give a recipe of 1 MB at most"
        ) from None
    node = _Reader(path).read(text)
    if not isinstance(node, Table):
        raise RecipeError(f"{node.where}: expected keys with values, such as method: uniform")
    return node


class _Reader:
    """Turns the events of one file into nodes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._anchors: dict[str, tuple[Node, int]] = {}
        """What each anchor names, and how many nodes that is."""
        self._n_nodes = 0

    def read(self, text: bytes) -> Node:
        import yaml

        try:
            events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
            node = self._document(events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._refused(0 if mark is None else mark.line, error.problem) from None
        except RecipeError:
            raise
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "reason", None) or "it has a character that there is not"
            raise self._refused(0, reason) from None
        return node

    def _refused(self, line: int, why: object) -> RecipeError:
        where = f"{printable(self._path)}:{line + 1}"
        return RecipeError(f"{where}: cannot be read as YAML: {printable(why)}")

    def _document(self, events: Iterator[Any]) -> Node:
        import yaml

        node: Node | None = None
        for event in events:
            line: int = event.start_mark.line
            if isinstance(event, yaml.DocumentStartEvent) and node is not None:
                raise self._refused(line, "a recipe is one document")
            if isinstance(event, yaml.NodeEvent):
                node = self._node(event, events, 0)
        return Text(self._path, 1, "", False) if node is None else node

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        import yaml

        line: int = event.start_mark.line
        self._count(line, 1)
        if depth > DEEPEST:
            raise self._refused(line, f"more than {DEEPEST} lists and tables within each other")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._refused(line, f"*{event.anchor} names nothing before it")
            node, n_nodes = self._anchors[event.anchor]
            self._count(line, n_nodes)
            return node
        if event.tag is not None:
            raise self._refused(line, f"the tag {event.tag} has no meaning here; leave it out")
        before = self._n_nodes
        node = self._made(event, events, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._n_nodes - before + 1)
        return node

    def _made(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        import yaml

        line = event.start_mark.line
        if isinstance(event, yaml.ScalarEvent):
            return Text(self._path, line + 1, event.value, event.style is not None)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(inner := next(events), yaml.SequenceEndEvent):
                items.append(self._node(inner, events, depth + 1))
            return Items(self._path, line + 1, tuple(items))
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(inner := next(events), yaml.MappingEndEvent):
            key = self._node(inner, events, depth + 1)
            at = inner.start_mark.line
            if not isinstance(key, Text):
                raise self._refused(at, "a key is a word")
            if key.text == "<<":
                raise self._refused(at, "keys are not merged with <<; write them out")
            if key.text in entries:
                raise self._refused(
                    at, f"{key.text} stands here and in line {lines[key.text]}; keep one of them"
                )
            entries[key.text] = self._node(next(events), events, depth + 1)
            lines[key.text] = at + 1
        return Table(self._path, line + 1, entries, lines)

    def _count(self, line: int, n_nodes: int) -> None:
        self._n_nodes += n_nodes
        if self._n_nodes > MOST_NODES:
            raise self._refused(line, f"more than {MOST_NODES} values")
