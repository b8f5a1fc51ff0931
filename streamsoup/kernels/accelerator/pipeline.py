"""The one pipeline: blocks of ingredients in, sums on the device, blocks of the soup out.

A *lane* belongs to one thread and has three streams: copies in, sums, and the end of a block (its
division, its rounding, its copy out). Between host and sums lies a ring of slots, each a pinned
buffer and one on the device; two sets of sums let the end of a block go beside the next one's
sums. Nothing is allocated once a lane stands. Five waits keep the order:

1. the host fills a pinned slot only when its last copy in is done;
2. a copy in overwrites a slot on the device only when its last sum is done;
3. a sum reads a slot only when its copy in is done;
4. a block is ended only when its sums are complete;
5. the host looks at a result only when its copy out is done. By that wait, too, a set of sums is
   free again before it is started anew: `take` the block before last first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels import blocks
from streamsoup.kernels.accelerator.device import Device
from streamsoup.kernels.accelerator.torch_blocks import (
    Constants,
    Room,
    add_,
    carried,
    compare_,
    finish_,
    spoils,
    torch_dtype,
)
from streamsoup.tensors import DType

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]

__all__ = ["Lane", "LaneShape", "held_nbytes", "taken_nbytes"]

Array = NDArray[np.uint8]
S = TypeVar("S")
E = TypeVar("E")


class LaneShape(msgspec.Struct, frozen=True):
    """What a lane allocates: nothing in it depends on how many ingredients there are."""

    block: int
    """Elements of the largest block."""
    n_slots: int
    """Slots in the ring: with one, all take turns; two already overlap, three are smoother."""
    staged: int
    """Bytes of the widest element copied in."""
    made: int
    """Bytes of the widest element copied out; 0 when all results stay on the device."""
    compares: bool
    """True if float64 ingredients are compared, for the rule on equal ones."""

    @property
    def in_flight(self) -> int:
        """Blocks a lane works on at once: one is ended while the next is summed."""
        return min(2, self.n_slots)

    def device_sizes(self) -> list[int]:
        """Return the bytes of each allocation on the device, in order."""
        sums = [8 * self.block] * (3 if self.compares else 1)
        return [
            *[self.staged * self.block] * self.n_slots,
            *sums * self.in_flight,
            *[8 * self.block] * 3,
            self.block,
            self.made * self.block,
            8,
            32,
        ]

    def pinned_sizes(self) -> list[int]:
        """Return the bytes of each pinned allocation."""
        landings = [self.made * self.block, 8] * self.in_flight
        return [*[self.staged * self.block] * self.n_slots, *landings]


def held_nbytes(shape: LaneShape, n_lanes: int) -> tuple[int, int]:
    """Return the device and the pinned bytes that torch takes from the driver for some lanes.

    At most: torch serves what it can from memory it already holds. Its allocator of pinned memory
    rounds to powers of two. A reduction takes a few bytes from memory of its stream's own: 2 MiB.
    """
    pinned = sum(1 << (size - 1).bit_length() for size in shape.pinned_sizes() if size)
    return taken_nbytes(shape.device_sizes() * n_lanes) + 2 * MIB * n_lanes, pinned * n_lanes


def taken_nbytes(sizes: Sequence[int]) -> int:
    """Return the bytes that torch takes from the driver, at most, for allocations on the device.

    It rounds to 512 bytes, and takes 2 MiB for requests up to 1 MiB, 20 MiB for those below
    10 MiB, and for larger ones their size rounded to 2 MiB; what is left of these is used for
    later requests (c10/core/AllocatorConfig.h, 2.13).
    """
    small = large = total = 0
    for size in sizes:
        size = -(-size // 512) * 512
        if size <= MIB:
            if small < size:
                total, small = total + 2 * MIB, 2 * MIB
            small -= size
        elif size < 10 * MIB:
            if large < size:
                total, large = total + 20 * MIB, 20 * MIB
            large -= size
        else:
            total += -(-size // (2 * MIB)) * 2 * MIB
    return total


MIB = 1 << 20


class _Slot(Generic[E]):
    """A place in the ring, and what last happened to it."""

    def __init__(self, device: Device[S, E], nbytes: int) -> None:
        import torch

        self.pinned = device.pinned(nbytes, torch.uint8)
        self.host: Array = self.pinned.numpy()
        self.device = device.device(nbytes, torch.uint8)
        self.copied = device.event()
        self.summed = device.event()


class _Sums(Generic[E]):
    """The sums of one block, and where its result lands."""

    def __init__(self, device: Device[S, E], shape: LaneShape) -> None:
        import torch

        n = shape.block
        self.total = device.device(n, torch.float64)
        self.alike = (
            (device.device(n, torch.int64), device.device(n, torch.int64))
            if shape.compares
            else None
        )
        self.landing = device.pinned(n * shape.made, torch.uint8)
        self.worst = device.pinned(1, torch.float64)
        self.complete = device.event()
        self.landed = device.event()


class _Block(msgspec.Struct):
    """A block under way."""

    n: int
    output: DType
    divisor: float
    compares: bool
    canonical: bool
    target: torch.Tensor | None
    fresh: bool


class Lane(Generic[S, E]):
    """One thread's way over the device. See the top of this page for the order of things."""

    def __init__(self, device: Device[S, E], shape: LaneShape) -> None:
        """Allocate everything. Raises what torch raises when there is not enough."""
        import torch

        self._device = device
        n = shape.block
        self._copying, self._summing, self._ending = (device.stream() for _ in range(3))
        self._slots = [_Slot(device, n * shape.staged) for _ in range(shape.n_slots)]
        self._sums = [_Sums(device, shape) for _ in range(shape.in_flight)]
        self._product = device.device(n, torch.float64)
        self._room = Room(
            device.device(n, torch.float64),
            device.device(n, torch.float64),
            device.device(n, torch.bool),
        )
        self._made = device.device(n * shape.made, torch.uint8)
        self._worst = device.device(1, torch.float64)[0]
        self._numbers = device.device(4, torch.float64)
        self._current: tuple[float, DType] | None = None
        self._n_added = self._n_started = 0
        self._ended: deque[tuple[_Block, _Sums[E]]] = deque()
        # Memory handed out again may still be in use by earlier work.
        device.settle()
        # Let the reduction take its workspace now.
        device.launch(self._ending, partial(torch.amax, self._room.spare, 0, out=self._worst))

    def start(
        self,
        n: int,
        output: DType,
        divisor: float,
        *,
        compares: bool,
        canonical: bool,
        target: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
    ) -> None:
        """Begin a block of `n` elements whose result is of dtype `output`.

        With `target` ``(n,)`` the result goes there, on the device, and nothing is copied out;
        with `initial` ``(n,) float64``, also there, sums start from it. `compares`: keep what is
        equal in all ingredients; `canonical`: mind the bits of NaNs; see `finish_`.
        """
        assert len(self._ended) < len(self._sums), "take a block before one more is started"
        self._into = self._sums[self._n_started % len(self._sums)]
        self._n_started += 1
        self._block = _Block(n, output, divisor, compares, canonical, target, initial is None)
        if initial is not None:
            self._launch(self._summing, self._into.total[:n].copy_, initial)

    def add(self, data: Array, dtype: DType, factor: float) -> None:
        """Add `factor` times the raw elements `data`, which are copied before this returns."""
        device, block = self._device, self._block
        slot = self._slots[self._n_added % len(self._slots)]
        self._n_added += 1
        staged = carried(dtype, output=False)
        nbytes = block.n * staged.itemsize
        device.host_wait(slot.copied)
        if staged is dtype:
            np.copyto(slot.host[:nbytes], data)
        else:
            np.copyto(slot.host[:nbytes].view(np.float32), blocks.widen(data, dtype))
        device.wait(self._copying, slot.summed)
        self._launch(self._copying, slot.device[:nbytes].copy_, slot.pinned[:nbytes], True)
        device.record(slot.copied, self._copying)
        device.wait(self._summing, slot.copied)
        values = slot.device[:nbytes].view(torch_dtype(staged))
        alike = self._into.alike if block.compares else None
        self._launch(
            self._summing, _sum, values, factor, self._into.total, alike, self._product, block.fresh
        )
        device.record(slot.summed, self._summing)
        block.fresh = False

    def keep(self, sums: torch.Tensor) -> None:
        """Copy what is added so far to ``(n,) float64`` on the device."""
        self._launch(self._summing, sums.copy_, self._into.total[: self._block.n])

    def finish(self) -> None:
        """Queue the end of the block, once all its ingredients are added."""
        device, block, sums = self._device, self._block, self._into
        device.record(sums.complete, self._summing)
        device.wait(self._ending, sums.complete)
        constants = self._constants_of(block)
        self._launch(self._ending, self._end, block, sums, constants)
        device.record(sums.landed, self._ending)
        self._ended.append((block, sums))

    def take(self) -> tuple[Array, bool]:
        """Return the oldest finished block, and whether a result in it is not finite.

        Its raw bytes ``(n · itemsize,)`` are valid until the next block is started; there are none
        if it went to a target.
        """
        block, sums = self._ended.popleft()
        self._device.host_wait(sums.landed)
        spoiled = spoils(float(sums.worst.item()), block.output)
        if block.target is not None:
            return np.empty(0, np.uint8), spoiled
        out = carried(block.output, output=True)
        landed: Array = sums.landing.numpy()[: block.n * out.itemsize]
        if out is block.output:
            return landed, spoiled
        narrow = np.empty(block.n, np.uint8)
        blocks.narrow(blocks.widen(landed, out).astype(np.float64), block.output, narrow)
        return narrow, spoiled

    def close(self) -> None:
        """Wait for the device, so that what the lane holds can be given back."""
        self._device.settle()

    def _launch(self, stream: S, work: Callable[..., object], *arguments: object) -> None:
        self._device.launch(stream, partial(work, *arguments))

    def _constants_of(self, block: _Block) -> Constants:
        """Return the constants of a block; if the last block had others, they are queued first."""
        constants = Constants.within(self._numbers, block.output)
        if self._current != (block.divisor, block.output):
            self._launch(self._ending, constants.fill_, block.divisor, block.output)
            self._current = block.divisor, block.output
        return constants

    def _end(self, block: _Block, sums: _Sums[E], constants: Constants) -> None:
        n, output = block.n, block.output
        out = carried(output, output=True)
        target = block.target
        if target is None:
            target = self._made[: n * out.itemsize].view(torch_dtype(out))
        alike = None
        if block.compares and sums.alike is not None:
            alike = sums.alike[0][:n], sums.alike[1][:n]
        finish_(
            sums.total[:n],
            output,
            constants,
            Room(*(each[:n] for each in self._room)),
            target,
            self._worst,
            divide=block.divisor != 1.0,
            alike=alike,
            canonical=block.canonical,
        )
        if block.target is None:
            nbytes = n * out.itemsize
            sums.landing[:nbytes].copy_(self._made[:nbytes], non_blocking=True)
        sums.worst.copy_(self._worst, non_blocking=True)


def _sum(
    values: torch.Tensor,
    factor: float,
    total: torch.Tensor,
    alike: Pair | None,
    product: torch.Tensor,
    fresh: bool,
) -> None:
    n = len(values)
    add_(total[:n], values, factor, product[:n], fresh)
    if alike is not None:
        first, differ = alike
        compare_(values, first[:n], differ[:n], product[:n], fresh)
