"""Layers of several checkpoints, one upon the other: ``A[0:8],B[4:12]``.

Such an ingredient has the layers 0 to 7 of A and then the layers 4 to 11 of B, numbered from 0 to
15. What stands before the layers (embeddings) comes from the first, and what stands behind them
(the last norm, the head) from the last. Its side files are those of the first, with the number of
layers in ``config.json`` made what it is now, and lists of something for each layer rearranged.

Nothing is read but from the checkpoints themselves, so it costs what reading them costs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from streamsoup.errors import FormatError, MismatchError, RecipeError, printable
from streamsoup.formats.configs import read_config
from streamsoup.formats.files import Access
from streamsoup.formats.layers import layer_in, renumbered, stacks_in, stands_before
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor, Suspects
from streamsoup.system.buffers import Bytes
from streamsoup.tensors import DTYPES

__all__ = ["Piece", "open_stacked", "pieces_of", "stack_text"]

SHARD = 5_000_000_000
"""Bytes of a shard of a soup that mirrors a stack, at most, unless a tensor is larger."""

_PIECE = re.compile(r"(.+?)\[([0-9]{1,6}):([0-9]{1,6})\](?:,|$)")

_N_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
"""Where configurations say how many layers there are."""


class Piece(msgspec.Struct, frozen=True):
    """Layers of one checkpoint."""

    path: str
    first: int
    end: int
    """The number after the last one."""

    def __str__(self) -> str:
        """Return the piece as paths have it."""
        return f"{self.path}[{self.first}:{self.end}]"


def pieces_of(path: str) -> list[Piece] | None:
    """Return the pieces that a path names; None for the path of one checkpoint.

    >>> [str(piece) for piece in pieces_of("A[0:8],B[4:12]") or ()]
    ['A[0:8]', 'B[4:12]']
    """
    if not path.endswith("]") or os.path.lexists(path):
        return None
    pieces: list[Piece] = []
    at = 0
    while at < len(path):
        found = _PIECE.match(path, at)
        if found is None:
            return None
        pieces.append(Piece(found[1], int(found[2]), int(found[3])))
        at = found.end()
    return pieces


def stack_text(pieces: Sequence[Piece]) -> str:
    """Return the path of a stack of pieces."""
    return ",".join(map(str, pieces))


def open_stacked(pieces: Sequence[Piece], open_one: Callable[[str], Source]) -> Stacked:
    """Open a stack of layers.

    Args:
        pieces: Which layers of which checkpoint, from the first layer to the last.
        open_one: Opens the checkpoint at a path.

    Raises:
        RecipeError: A piece is empty, or has layers that its checkpoint has not.
        MismatchError: A checkpoint has no layers, or two stacks of them.
        StreamsoupError: Whatever opening a checkpoint raises.

    Opens each checkpoint once, whatever the number of its pieces.
    """
    opened: dict[str, Source] = {}
    for piece in pieces:
        if piece.path not in opened:
            opened[piece.path] = open_one(piece.path)
    return Stacked(pieces, [opened[piece.path] for piece in pieces])


class Stacked(Source):
    """A source whose layers are those of others."""

    def __init__(self, pieces: Sequence[Piece], sources: Sequence[Source]) -> None:
        """Name the tensors of all layers anew; there is a source for each piece."""
        self.pieces, self.sources = tuple(pieces), tuple(sources)
        self.origins: dict[str, tuple[int, str]] = {}
        """Of each tensor, the number of its source, and its name there."""
        n_layers = 0
        last = len(pieces) - 1
        n_in = [_check(piece, source) for piece, source in zip(pieces, sources, strict=True)]
        for number, (piece, source) in enumerate(zip(pieces, sources, strict=True)):
            (prefix,) = stacks_in(source.tensors)
            layers: list[list[str]] = [[] for _ in range(piece.first, piece.end)]
            outside = []
            for name in source.tensors:
                layer = layer_in(name)
                if layer is None or layer.prefix != prefix:
                    outside.append(name)
                elif piece.first <= layer.number < piece.end:
                    layers[layer.number - piece.first].append(name)
            if number == 0:
                self.origins |= {name: (0, name) for name in outside if stands_before(name)}
            for i, names in enumerate(layers):
                self.origins |= {renumbered(n, n_layers + i): (number, n) for n in names}
            n_layers += len(layers)
            if number == last:
                behind = [name for name in outside if not stands_before(name)]
                self.origins |= {name: (last, name) for name in behind}
        self.n_layers = n_layers
        self._n_before = n_in[0]
        self._tensors = _in_shards(
            {name: sources[i].tensors[inner] for name, (i, inner) in self.origins.items()}
        )

    @property
    def name(self) -> str:
        """Its pieces, with the names of their checkpoints."""
        return self._text([source.name for source in self.sources])

    @property
    def path(self) -> str | None:
        """Its pieces, with absolute paths; None if one has no path."""
        paths = [source.path for source in self.sources]
        return None if None in paths else self._text([str(path) for path in paths])

    def _text(self, names: Sequence[str]) -> str:
        named = zip(self.pieces, names, strict=True)
        return stack_text([Piece(name, each.first, each.end) for each, name in named])

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors from the first layer to the last."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """The pieces, and what tells their checkpoints from others."""
        return [
            "stacked",
            *(
                [p.first, p.end, s.fingerprint]
                for p, s in zip(self.pieces, self.sources, strict=True)
            ),
        ]

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor over all of the checkpoints."""
        return _Cursor(self, access)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Look at the checkpoint of a tensor, or at all of them."""
        if tensor is not None:
            number, inner = self.origins[tensor]
            self.sources[number].check_unchanged(inner)
            return
        for source in dict.fromkeys(self.sources):
            source.check_unchanged()

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Return what the dearest checkpoint costs; cursors are open in all of them."""
        costs = [source.cost(mapped=mapped) for source in dict.fromkeys(self.sources)]
        return ReadingCost(
            views=all(cost.views for cost in costs),
            unit_nbytes=max(cost.unit_nbytes for cost in costs),
            cursor_nbytes=sum(cost.cursor_nbytes for cost in costs),
            opening_nbytes=max(cost.opening_nbytes for cost in costs),
        )

    @property
    def file_names(self) -> Sequence[str]:
        """One file, or as many as its size takes."""
        n = 1 + max((tensor.file for tensor in self._tensors.values()), default=0)
        if n == 1:
            return ("model.safetensors",)
        return tuple(f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n))

    @property
    def index_name(self) -> str | None:
        """The index of several files."""
        return None if len(self.file_names) == 1 else "model.safetensors.index.json"

    @property
    def files(self) -> Sequence[str]:
        """The files of all checkpoints."""
        return tuple(dict.fromkeys(file for source in self.sources for file in source.files))

    @property
    def memory(self) -> Mapping[str, Any]:
        """The live tensors of all checkpoints."""
        found: dict[str, Any] = {}
        for source in self.sources:
            found |= source.memory
        return found

    @property
    def folder(self) -> str | None:
        """The folder of the first checkpoint."""
        return self.sources[0].folder

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The configuration of the first checkpoint, with the layers that there are now."""
        folder = self.folder
        config = None if folder is None else read_config(os.path.join(folder, "config.json"))
        if config is None:
            return {}
        text = json.dumps(self._rearranged(config), indent=2)
        return {"config.json": text.encode() + b"\n"}

    def _rearranged(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration, or a part of one, with another number of layers."""
        n = self._n_before
        numbers = [i for piece in self.pieces for i in range(piece.first, piece.end)]
        found: dict[str, Any] = {}
        for key, value in config.items():
            if key in _N_LAYERS and value == n:
                found[key] = self.n_layers
            elif isinstance(value, list) and len(value) == n and "layer" in key:
                found[key] = [value[i] if i < n else value[-1] for i in numbers]
            elif isinstance(value, dict) and key.endswith("_config"):
                found[key] = self._rearranged(value)
            else:
                found[key] = value
        return found

    @property
    def notes(self) -> Sequence[str]:
        """What is worth knowing about the checkpoints."""
        return tuple(dict.fromkeys(note for source in self.sources for note in source.notes))

    def check_read(self, tensors: Collection[str]) -> None:
        """Let each checkpoint check what was read of it."""
        for source in dict.fromkeys(self.sources):
            origins = (self.origins[tensor] for tensor in tensors)
            source.check_read([name for i, name in origins if self.sources[i] is source])

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return the tensors that come from suspected ones."""
        state = []
        names: list[str] = []
        for source in dict.fromkeys(self.sources):
            below = source.suspects(strict=strict)
            if below is None:
                continue
            state.append((source, below))
            inner = frozenset(below.tensors)
            names += [
                name
                for name, (number, there) in self.origins.items()
                if self.sources[number] is source and there in inner
            ]
        return Suspects(names, state) if state else None

    def settle(self, suspects: Suspects) -> None:
        """Settle the checkpoints."""
        for source, below in suspects.state:
            source.settle(below)

    def where(self, tensor: str) -> str:
        """Return where the tensor is in its own checkpoint."""
        number, inner = self.origins[tensor]
        return self.sources[number].where(inner)


class _Cursor(Cursor):
    """One thread's way through the checkpoints, each opened when it is first read."""

    def __init__(self, stacked: Stacked, access: Access) -> None:
        self._stacked, self._access = stacked, access
        self._open: dict[int, Cursor] = {}

    def _at(self, tensor: str) -> tuple[Cursor, str]:
        number, inner = self._stacked.origins[tensor]
        source = self._stacked.sources[number]
        if id(source) not in self._open:
            self._open[id(source)] = source.cursor(self._access)
        return self._open[id(source)], inner

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        cursor, inner = self._at(tensor)
        return cursor.view(inner, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        cursor, inner = self._at(tensor)
        cursor.read(inner, begin, block)

    def close(self) -> None:
        for cursor in self._open.values():
            cursor.close()
        self._open.clear()


def _check(piece: Piece, source: Source) -> int:
    """Return the number of layers of a checkpoint. Raises unless it has those of the piece."""
    stacks = stacks_in(source.tensors)
    if len(stacks) != 1:
        what = "no layers" if not stacks else f"layers under {' and '.join(map(printable, stacks))}"
        raise MismatchError(
            f"{printable(source.name)}: has {what}; only a model with one stack of layers, "
            "numbered from 0, can be cut"
        )
    ((_, n),) = stacks.items()
    if not piece.first < piece.end <= n:
        raise RecipeError(
            f"{printable(str(piece))}: there are {n} layers, 0 to {n - 1}; give a first one, and "
            "the number after the last"
        )
    return n


def _in_shards(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Put tensors into files one after the other, each filled up to `SHARD`."""
    found: dict[str, SourceTensor] = {}
    file = filled = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise FormatError(f"{printable(name)}: has the unknown dtype {printable(tensor.dtype)}")
        n = 1
        for size in tensor.shape:
            n *= size
        nbytes = -(-n * DTYPES[tensor.dtype].nbits // 8)
        if filled and filled + nbytes > SHARD:
            file, filled = file + 1, 0
        filled += nbytes
        found[name] = SourceTensor(tensor.dtype, tensor.shape, tensor.delivered, file)
    return found
