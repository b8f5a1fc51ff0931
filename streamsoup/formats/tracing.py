"""Where the elements of some tensors end up when code slices, stacks, turns and joins them.

The code runs on tensors of the meta device, which have shapes and strides, and no elements: so it
costs no memory, whatever it copies. A slice of one is told by its storage. A copy that keeps the
shape (``clone``, ``contiguous``) stands for what it was made of, and what ``cat`` and ``stack``
make is known by its inputs. What any other operation makes is unknown, and so is what it changes
in place: `Trace.pieces` then gives None, rather than a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Piece", "Trace"]


class Piece(NamedTuple):
    """A box of a result, and the elements of one source that fill it, in C order."""

    box: tuple[slice, ...]
    """One slice of each of the result's dimensions."""
    source: str
    shape: tuple[int, ...]
    """Dimensions in which the source is stepped through; their product is the size of the box."""
    stride: tuple[int, ...]
    offset: int
    """In elements from the source's first, as if it were contiguous."""


class Trace(TorchDispatchMode):
    """Code under this context is followed: where its results come from can be told afterwards."""

    def __init__(self, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        """Make the sources, by name, of some shapes and dtypes: see `sources`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: dict[str, Tensor] = {
            name: torch.empty(tuple(shape), dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }
        """Stand-ins, on the meta device, for the tensors that the code is to be given."""
        self._names = {_storage(tensor): name for name, tensor in self.sources.items()}
        self._made: dict[int, tuple[Tensor, list[Piece]]] = {}
        """What was put together, by its storage."""
        self._changed: set[int] = set()
        """Storages that an operation wrote into."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; note what it puts together."""
        aten = torch.ops.aten
        if func._schema.is_mutable:
            for told, given in zip(func._schema.arguments, args, strict=False):
                if told.alias_info is not None and told.alias_info.is_write:
                    self._changed.add(_storage(given))
        if func is aten.clone.default:
            return aten.alias.default(args[0])
        if func in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            return self._reshaped(args[0], args[1])
        made = func(*args, **(kwargs or {}))
        if func in (aten.cat.default, aten.stack.default):
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            self._joined(made, args[0], dim % made.dim(), stacks=func is aten.stack.default)
        return made

    def pieces(self, result: Tensor) -> list[Piece] | None:
        """Return what a result is put together from; None where that is not known."""
        storage = _storage(result)
        if storage in self._changed or result.is_conj() or result.is_neg():
            return None
        whole = tuple(slice(0, n) for n in result.shape)
        if (name := self._names.get(storage)) is not None:
            if result.dtype != self.sources[name].dtype:
                return None
            shape, stride = tuple(result.shape), tuple(result.stride())
            return [Piece(whole, name, shape, stride, int(result.storage_offset()))]
        made, pieces = self._made.get(storage, (None, []))
        if made is None or (result.shape, result.stride()) != (made.shape, made.stride()):
            return None
        return pieces if result.storage_offset() == 0 else None

    def _reshaped(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """View a tensor in another shape; where only a copy has it, note what it is made of."""
        try:
            viewed: Tensor = torch.ops.aten.view.default(tensor, shape)
            return viewed
        except RuntimeError:
            copied = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            made = copied.view(shape)
            found = self.pieces(tensor)
            if found is not None and len(found) == 1:
                whole = tuple(slice(0, n) for n in made.shape)
                self._made[_storage(made)] = made, [found[0]._replace(box=whole)]
            return made

    def _joined(self, made: Tensor, inputs: Sequence[Tensor], dim: int, *, stacks: bool) -> None:
        """Note what each box of `made` comes from, if that of all inputs is known."""
        pieces: list[Piece] = []
        begin = 0
        for tensor in inputs:
            found = self.pieces(tensor)
            if found is None:
                return
            for piece in found:
                box = list(piece.box)
                if stacks:
                    box.insert(dim, slice(begin, begin + 1))
                elif tensor.dim() == made.dim():
                    box[dim] = slice(begin + box[dim].start, begin + box[dim].stop)
                pieces.append(piece._replace(box=tuple(box)))
            begin += 1 if stacks else tensor.shape[dim] if tensor.dim() == made.dim() else 0
        self._made[_storage(made)] = made, pieces


def _storage(tensor: Tensor) -> int:
    """Return what two tensors have in common if one is a view of the other."""
    return int(tensor.untyped_storage()._cdata)
