"""The newest states of a model, in its own dtypes: for averages of the last ones.

Nothing is undone by subtraction: sums of what left the window would stay inexact. The states lie in
memory, on a disk, or on the model's device; the oldest is overwritten by the newest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamsoup.engine.rules.linear import Linear
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import Bytes
from streamsoup.training.arithmetic import Arithmetic, blocks
from streamsoup.training.copies import Arrived
from streamsoup.training.host import bytes_of
from streamsoup.training.live import Spec, dtype_of, torch_dtype
from streamsoup.training.rooms import room, starts

__all__ = ["Window", "state_nbytes"]

State = dict[str, Tensor]


class Window:
    """The newest states, oldest first."""

    def __init__(
        self,
        specs: Mapping[str, Spec],
        arithmetic: Arithmetic,
        size: int | None,
        *,
        folder: str | None,
        on_device: bool,
    ) -> None:
        """Hold `size` states, or all: in memory, in files in `folder`, or where the tensors are."""
        self._specs, self._arithmetic, self._size = dict(specs), arithmetic, size
        self._folder, self._on_device = folder, on_device
        self.states: list[State] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, in the place of the oldest if the window is full."""
        self.add_arrived(self.begin(tensors, tensors), [])

    def begin(self, tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> State:
        """Return a place for the tensors, with those that are `here` copied.

        It is no part of the window until `add_arrived` has brought the others: an interrupt must
        not leave half of a state.
        """
        full = len(self.states) == self._size
        state = self.states.pop(0) if full else self._room(tensors)
        for name, tensor in here.items():
            state[name].copy_(tensor)
        return state

    def add_arrived(self, state: State, arrived: Sequence[Arrived]) -> None:
        """Complete what `begin` returned with what has come from a device, as the newest state."""
        for name, begin, end, values in arrived:
            state[name].view(-1)[begin:end].copy_(values)
        self.states.append(state)

    def _room(self, tensors: Mapping[str, Tensor]) -> State:
        if self._on_device:
            return {name: torch.empty_like(tensors[name]) for name in self._specs}
        sizes = {name: _nbytes(spec) for name, spec in self._specs.items()}
        begins, nbytes = starts(sizes)
        whole = room(nbytes, self._folder)
        found = {}
        for name, spec in self._specs.items():
            part = whole[begins[name] : begins[name] + sizes[name]]
            kind = torch_dtype(spec)
            flat = torch.frombuffer(part, dtype=torch.uint8).view(kind) if part else None
            found[name] = (
                torch.empty(spec.shape, dtype=kind) if flat is None else flat.reshape(spec.shape)
            )
        return found

    def finish(self, name: str, coefficients: Coefficients) -> tuple[Tensor, bool]:
        """Return the average of a tensor over the window, and True if an element is not finite.

        `coefficients` are those of the states, oldest first.
        """
        spec = self._specs[name]
        dtype = dtype_of(spec)
        flats = [state[name].contiguous().reshape(-1) for state in self.states]
        made = torch.empty(spec.shape, dtype=torch_dtype(spec))
        raw = bytes_of(made)
        factors, divisor = coefficients.of(name)

        def finish(block: tuple[int, int]) -> bool:
            begin, end = block
            held = [flat[begin:end].cpu() for flat in flats]
            output = raw[begin * dtype.itemsize : end * dtype.itemsize]
            inputs = [bytes_of(each) for each in held]
            spoiled = self._arithmetic.mix(inputs, factors, divisor, dtype, output)
            if Linear(coefficients).keeps_equal(name, {spec.dtype}):
                _keep_equal(inputs, output)
                spoiled = not np.isfinite(np.frombuffer(output, np.float64)).all()
            return spoiled

        spoiled = any(self._arithmetic.each(finish, blocks(made.numel())))
        return (made.to(flats[0].device) if self._on_device else made), spoiled

    def extend(self, other: Window) -> None:
        """Add the states of another window, as if they had come next."""
        for state in other.states:
            self.add(state)

    def load(self, states: list[State]) -> None:
        """Take copies of states, oldest first."""
        self.states = []
        for state in states:
            self.add(state)


def _keep_equal(inputs: Sequence[Bytes], output: Bytes) -> None:
    """Put back float64 that are the same in all inputs: their sum may be inexact."""
    words = [np.frombuffer(block, np.uint64) for block in inputs]
    equal = np.all([word == words[0] for word in words], axis=0)
    np.frombuffer(output, np.uint64)[equal] = words[0][equal]


def _nbytes(spec: Spec) -> int:
    return torch.Size(spec.shape).numel() * dtype_of(spec).itemsize


def state_nbytes(specs: Mapping[str, Spec]) -> int:
    """Return the bytes that one state takes."""
    return starts({name: _nbytes(spec) for name, spec in specs.items()})[1]
