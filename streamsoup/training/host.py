"""Sums in float64, in memory or on a disk: 8 bytes for each element.

Where a mean of float64 tensors is taken, their first values and what has stayed equal are kept as
well (9 bytes more): equal values stay as they are, as the sum of equal float64 may be inexact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamsoup.system.buffers import Bytes
from streamsoup.training.arithmetic import Arithmetic, blocks
from streamsoup.training.copies import Arrived
from streamsoup.training.live import Spec, dtype_of, torch_dtype
from streamsoup.training.rooms import room, starts
from streamsoup.training.running import Step

__all__ = ["HostSums", "bytes_of", "sums_nbytes"]


class Piece(NamedTuple):
    """A block of one tensor."""

    name: str
    begin: int
    end: int


class HostSums:
    """Running sums of named tensors."""

    def __init__(
        self,
        specs: Mapping[str, Spec],
        arithmetic: Arithmetic,
        folder: str | None,
        *,
        keeps_equal: bool,
    ) -> None:
        """Reserve the sums: in memory, or in a file in `folder`."""
        self._arithmetic = arithmetic
        self._specs = dict(specs)
        sizes, self._watched = parts(specs, keeps_equal=keeps_equal)
        begins, nbytes = starts(sizes)
        self._room = room(nbytes, folder)
        self._parts = {
            name: self._room[begin : begin + sizes[name]] for name, begin in begins.items()
        }

    def add(self, tensors: Mapping[str, Tensor], step: Step) -> None:
        """Add the tensors; those of other devices are brought here one by one."""
        here: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                here[name] = tensor
            else:
                self._add([_whole(name, tensor.cpu().contiguous())], step)
        self._add([_whole(name, tensor) for name, tensor in here.items()], step)

    def add_arrived(self, arrived: Sequence[Arrived], step: Step) -> None:
        """Add elements of tensors that have come from a device."""
        self._add(arrived, step)

    def _add(self, arrived: Sequence[Arrived], step: Step) -> None:
        pieces = []
        for name, first, _, values in arrived:
            raw, size = bytes_of(values), dtype_of(self._specs[name]).itemsize
            pieces += [
                (Piece(name, first + begin, first + end), raw[begin * size : end * size])
                for begin, end in blocks(values.numel())
            ]

        def add(one: tuple[Piece, Bytes]) -> None:
            piece, block = one
            name, begin, end = piece
            dtype = dtype_of(self._specs[name])
            sums = self._parts[name][8 * begin : 8 * end]
            if step.shift:
                floats = np.frombuffer(sums, np.float64)
                np.ldexp(floats, -step.shift, out=floats)
            self._arithmetic.add(sums, block, dtype, step.factor, fresh=step.fresh)
            if name in self._watched:
                self._watch(piece, block, fresh=step.fresh)

        self._arithmetic.each(add, pieces)

    def _watch(self, piece: Piece, block: Bytes, *, fresh: bool) -> None:
        """Note which float64 have had the same bits in all updates."""
        name, begin, end = piece
        first = np.frombuffer(self._parts[f"{name}\0first"], np.uint64)[begin:end]
        equal = np.frombuffer(self._parts[f"{name}\0equal"], np.bool_)[begin:end]
        words = np.frombuffer(block, np.uint64)
        if fresh:
            first[:] = words
            equal[:] = True
        else:
            equal &= words == first

    def finish(self, name: str, divisor: float) -> tuple[Tensor, bool]:
        """Return the average of a tensor, and True if an element is not finite."""
        spec = self._specs[name]
        dtype = dtype_of(spec)
        made = torch.empty(spec.shape, dtype=torch_dtype(spec))
        raw = bytes_of(made)

        def finish(block: tuple[int, int]) -> bool:
            begin, end = block
            output = raw[begin * dtype.itemsize : end * dtype.itemsize]
            sums = self._parts[name][8 * begin : 8 * end]
            spoiled = self._arithmetic.finish(sums, divisor, dtype, output)
            if name in self._watched:
                first = np.frombuffer(self._parts[f"{name}\0first"], np.uint64)[begin:end]
                equal = np.frombuffer(self._parts[f"{name}\0equal"], np.bool_)[begin:end]
                floats = np.frombuffer(output, np.uint64)
                floats[equal] = first[equal]
                spoiled = not np.isfinite(floats.view(np.float64)).all()
            return spoiled

        return made, any(self._arithmetic.each(finish, blocks(made.numel())))

    def merge(self, other: HostSums) -> None:
        """Add the sums of another average of the same tensors."""
        for name in self._specs:
            mine, theirs = (np.frombuffer(each._parts[name], np.float64) for each in (self, other))
            np.add(mine, theirs, out=mine)
            if name in self._watched:
                firsts, equals = (
                    [each._parts[f"{name}\0{what}"] for each in (self, other)]
                    for what in ("first", "equal")
                )
                same = np.frombuffer(firsts[0], np.uint64) == np.frombuffer(firsts[1], np.uint64)
                equal = np.frombuffer(equals[0], np.bool_)
                equal &= np.frombuffer(equals[1], np.bool_) & same

    def state(self) -> dict[str, Tensor]:
        """Return the sums as float64 tensors, and what is kept of float64; none is copied."""
        found = {}
        for name, part in self._parts.items():
            kind = torch.uint8 if name.endswith("\0equal") else torch.float64
            found[name] = _tensor(part, kind)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy sums that `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _whole(name: str, tensor: Tensor) -> Arrived:
    return Arrived(name, 0, tensor.numel(), tensor)


def parts(specs: Mapping[str, Spec], *, keeps_equal: bool) -> tuple[dict[str, int], set[str]]:
    """Return the bytes of each part of the sums, and which tensors' equal values are kept."""
    sizes: dict[str, int] = {}
    watched = {name for name, spec in specs.items() if keeps_equal and spec.dtype == "F64"}
    for name, spec in specs.items():
        n = torch.Size(spec.shape).numel()
        sizes[name] = 8 * n
        if name in watched:
            sizes[f"{name}\0first"] = 8 * n
            sizes[f"{name}\0equal"] = n
    return sizes, watched


def sums_nbytes(specs: Mapping[str, Spec], *, keeps_equal: bool) -> int:
    """Return the bytes that the sums of these tensors take."""
    return starts(parts(specs, keeps_equal=keeps_equal)[0])[1]


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single element may have any stride
    raw: Bytes = flat.view(torch.uint8).numpy().data
    return raw


def _tensor(part: Bytes, kind: torch.dtype) -> Tensor:
    return torch.frombuffer(part, dtype=kind) if len(part) else torch.empty(0, dtype=kind)
