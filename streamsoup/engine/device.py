"""Mixes on an accelerator: the reduction of `reduce.Mix`, by way of `kernels.accelerator`.

Tensors that are averaged go through a lane, each thread its own; those that are only copied stay
on the host. Results come back to the host for a sink that wants bytes, or go straight into tensors
on the device, where a live model keeps its parameters.

When it pays: averaging to disk moves every byte of every ingredient over the bus to save one pass
over memory, so ``auto`` means the CPU there. A model that is on the device already is mixed in
place, and with a running sum kept there, a trial moves one ingredient only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from streamsoup.engine.budget import (
    SMALLEST_BLOCK,
    MemoryPlan,
    fixed_nbytes,
    memory_budget,
    opening_nbytes,
    plan_reading,
)
from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.engine.reduce import Engine, Mix, MixWorker, OnePass
from streamsoup.errors import BudgetError, StreamsoupError, option, printable
from streamsoup.kernels import blocks
from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape, held_nbytes
from streamsoup.kernels.accelerator.torch_blocks import carried
from streamsoup.options import Options
from streamsoup.sizes import nbytes_text, parse_nbytes
from streamsoup.system.buffers import Bytes

if TYPE_CHECKING:
    import torch

    from streamsoup.kernels.accelerator.device import Device

__all__ = [
    "DeviceMix",
    "DevicePlan",
    "OnDevice",
    "RunningSum",
    "device_budget",
    "find_device",
    "plan_device",
]

LARGEST_DEVICE_BLOCK = 1 << 20
"""Elements copied at once: a few MB, so that calls from Python (some 50 µs) are small beside it."""

USUAL_SLOTS = 3
"""Slots of a lane: two overlap; a third takes up what reading is late."""

MOST_LANES = 4
"""Threads that feed a device: four fill pinned memory faster than a bus takes it."""

FREE_SHARE = 8
"""The default budget is this fraction of the device's free memory; the model needs the rest."""


class DevicePlan(msgspec.Struct, frozen=True):
    """The memory of a run on a device and on the host, decided before anything is allocated."""

    device: str
    shape: LaneShape
    memory: MemoryPlan
    """Threads, each with a lane, and blocks; its peak is that of the host, pinned memory included,
    but without what torch and the driver hold for themselves."""
    device_nbytes: int
    """Upper bound of the memory taken on the device."""
    pinned_nbytes: int
    """Upper bound of the host memory pinned."""


def plan_device(
    plan: MixPlan,
    *,
    device: str,
    budget: int,
    mapped: bool,
    threads: int,
    memory: int,
    lands: bool = True,
    beside: int = 0,
    n_slots: int = USUAL_SLOTS,
) -> DevicePlan:
    """Choose the largest blocks that stay within `budget` on the device and `memory` beside it.

    Depends neither on how many ingredients there are nor on how large their tensors are, unless
    all are small. Without `lands`, results stay on the device. `beside` is what a running sum takes
    of the budget. Raises `BudgetError`, with how much would do.
    """
    mixed = plan.reduced
    sources = [source.dtype for tensor in mixed for source in tensor.sources]
    largest = max((tensor.n_units for tensor in plan.tensors), default=1)
    block = min(LARGEST_DEVICE_BLOCK, 1 << max(largest - 1, SMALLEST_BLOCK - 1).bit_length())
    lanes = max(1, min(threads, MOST_LANES))
    reading = plan_reading(plan, mapped=mapped)
    widest_out = max((t.unit_nbytes for t in plan.tensors), default=1)

    def of(block: int, lanes: int) -> DevicePlan:
        shape = LaneShape(
            block=block,
            n_slots=n_slots,
            staged=max((carried(d, output=False).itemsize for d in sources), default=1),
            made=max((carried(t.dtype, output=True).itemsize for t in mixed), default=1)
            if lands
            else 0,
            compares=any(dtype.name == "F64" for dtype in sources),
        )
        on_device, pinned = held_nbytes(shape, lanes)
        # A thread copies tensors that are not averaged, widens and narrows float8, reads a group.
        each = block * (widest_out + (32 if any(d.nbits == 8 for d in sources) else 0))
        each += reading.unit_nbytes * block + reading.session_nbytes
        peak = max(fixed_nbytes(plan) + pinned + lanes * each, opening_nbytes(plan))
        return DevicePlan(
            device, shape, MemoryPlan(lanes, block, reading.group, peak), on_device, pinned
        )

    def fits(chosen: DevicePlan) -> bool:
        return chosen.device_nbytes + beside <= budget and chosen.memory.peak_nbytes <= memory

    # Blocks of a megabyte or so first, then lanes, then the smallest blocks.
    while block > LARGEST_DEVICE_BLOCK // 8 and not fits(of(block, lanes)):
        block //= 2
    while lanes > 1 and not fits(of(block, lanes)):
        lanes -= 1
    while block > SMALLEST_BLOCK and not fits(of(block, lanes)):
        block //= 2
    chosen = of(block, lanes)
    if chosen.device_nbytes + beside > budget:
        more = "; raise it above that"
        without = (
            f", {nbytes_text(beside)} of it for the running sum; {option('sums', 'reread')} does "
            "without"
        )
        raise BudgetError(
            f"a {option('device_memory')} of {nbytes_text(budget)} is too small: {device} needs "
            f"{nbytes_text(chosen.device_nbytes + beside, up=True)} at least"
            f"{without if beside else more}"
        )
    if chosen.memory.peak_nbytes > memory:
        raise BudgetError(
            f"a memory budget of {nbytes_text(memory)} is too small: feeding {device} takes "
            f"{nbytes_text(chosen.memory.peak_nbytes, up=True)} at least; raise {option('memory')} "
            "above that"
        )
    return chosen


class OnDevice(msgspec.Struct, frozen=True):
    """An open accelerator, and the memory plan of a run on it."""

    device: Device[Any, Any]
    plan: DevicePlan

    def mix(self, plan: MixPlan, **more: Any) -> DeviceMix:
        """Return the reducer; `more` are further arguments of `DeviceMix`."""
        return DeviceMix(plan, self.plan, self.device, **more)


def find_device(
    plan: MixPlan, options: Options, *, mapped: bool, lands: bool = True, beside: int = 0
) -> OnDevice:
    """Open the device that `options` name, and plan what a mix will hold there. Imports torch.

    See `plan_device` for the other arguments. Raises `DeviceError` if the device is missing,
    `RecipeError` if the name is unknown, and `BudgetError` if it has too little memory.
    """
    from streamsoup.kernels.accelerator.device import open_device

    device = open_device(str(options.device))
    chosen = plan_device(
        plan,
        device=device.name,
        budget=device_budget(device, options),
        mapped=mapped,
        threads=options.n_threads,
        memory=memory_budget(plan, options.memory),
        lands=lands,
        beside=beside,
    )
    return OnDevice(device, chosen)


def device_budget(device: Device[Any, Any], options: Options) -> int:
    """Return the bytes that may be used on `device`: as asked, or a share of its free memory."""
    from streamsoup.kernels.accelerator.device import our_errors

    budget = options.device_memory
    if budget is None:
        with our_errors(device.name):
            return device.free_nbytes() // FREE_SHARE
    return parse_nbytes(budget)


class RunningSum(msgspec.Struct, frozen=True):
    """Sums that stay on the device from one mix to the next.

    Not for float64: sums do not show which values were equal in all ingredients so far.
    """

    of: Callable[[str], torch.Tensor]
    """The sums of a tensor, by name: flat, float64, on the device."""
    starts: bool
    """True if this mix starts from them."""
    n_tail: int
    """After how many of this mix's ingredients they are to be set to its sums; 0 for not at all."""


class DeviceMix(OnePass):
    """Σᵢ cᵢ·θᵢ on a device: the bytes are those of `reduce.Mix`."""

    def __init__(
        self,
        plan: MixPlan,
        chosen: DevicePlan,
        device: Device[Any, Any],
        *,
        target: Callable[[PlannedTensor], torch.Tensor | None] = lambda tensor: None,
        running: RunningSum | None = None,
        lanes: list[Lane[Any, Any]] | None = None,
    ) -> None:
        """Hold what the workers share; allocate nothing yet.

        `target` returns the flat tensor on the device, of the planned dtype, that receives a
        tensor of the plan, or None to hand its bytes to the sink. Work queued earlier on it is
        waited for; after the run, all targets are complete.

        `lanes` are idle lanes of earlier runs of the same plan on the device, to be reused: a new
        lane has new streams, each with a workspace of its own.
        """
        self.lanes = lanes
        self.plan, self.chosen, self.device = plan, chosen, device
        self.target, self.running = target, running
        self.asked = (
            f"{nbytes_text(chosen.device_nbytes)} on {device.name} and "
            f"{nbytes_text(chosen.pinned_nbytes)} of pinned memory"
        )
        """For errors."""
        self.copies = Mix(plan, chosen.memory, Engine(plan.only(set())))
        self._lock = threading.Lock()

    def worker(self) -> DeviceWorker:
        """Return a thread's own worker, with a lane. Raises `BudgetError` if memory is short."""
        from streamsoup.kernels.accelerator.device import our_errors

        # One after the other: what torch takes from the driver depends on the order.
        with self._lock, our_errors(self.asked):
            if self.lanes:
                self.device.settle()  # a target may still be in use
                lane = self.lanes.pop()
            else:
                lane = Lane(self.device, self.chosen.shape)
            return DeviceWorker(self, lane, self.copies.worker())

    def leave(self, lane: Lane[Any, Any]) -> None:
        """Keep an idle lane for the next run."""
        if self.lanes is not None:
            self.lanes.append(lane)


class DeviceWorker:
    """One thread's lane, and the host's part of the work."""

    def __init__(self, mix: DeviceMix, lane: Lane[Any, Any], copies: MixWorker) -> None:
        """Hold a lane for averaged tensors, and a worker on the CPU for copied ones."""
        self._mix = mix
        self._lane = lane
        self._copies = copies
        self._waiting: deque[bool] = deque()
        """Blocks whose result was not taken yet: whether each is in the lane."""
        self._averages = False
        self._whole = True
        """True if nothing failed, and the last block that was started is complete."""
        self.spoiled = False

    @property
    def n_ahead(self) -> int:
        """Blocks to start before the first result is asked for."""
        return self._mix.chosen.shape.in_flight - 1 if self._averages else 0

    def digests(self, tensor: PlannedTensor, n_units: int) -> None:
        """Return None: the stream makes the digests."""

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block of `n_units` of `tensor`."""
        from streamsoup.kernels.accelerator.device import our_errors

        mix = self._mix
        self._tensor, self._start, self._n = tensor, start, n_units
        self._averages = tensor.is_reduced
        if not self._averages:
            self._copies.start(tensor, start, n_units)
            return
        self._factors, divisor = mix.copies.rule.coefficients.of(tensor.name)
        running = mix.running
        target = mix.target(tensor)
        self._whole = False
        with our_errors(self._what()):
            self._lane.start(
                n_units,
                tensor.dtype,
                divisor,
                compares=mix.copies.keeps_equal(tensor),
                canonical=mix.plan.recipe.non_finite == "propagate",
                target=None if target is None else target[start : start + n_units],
                initial=self._sums() if running is not None and running.starts else None,
            )

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Add the blocks of ingredients `first` and following, in order."""
        from streamsoup.kernels.accelerator.device import our_errors

        if not self._averages:
            self._copies.add(first, inputs)
            if first == 0:
                self._waiting.append(False)
            return
        mix, tensor = self._mix, self._tensor
        with our_errors(self._what()):
            for i, block in enumerate(inputs, first):
                dtype = tensor.sources[mix.plan.layout_of[i]].dtype
                self._lane.add(blocks.array_of(block), dtype, self._factors[i])
                if mix.running is not None and i + 1 == mix.running.n_tail:
                    self._lane.keep(self._sums())
            if first + len(inputs) == len(self._factors):
                self._lane.finish()
                self._waiting.append(True)

    def result(self) -> Bytes:
        """Return the raw bytes of the oldest block; empty if they went to a device target."""
        from streamsoup.kernels.accelerator.device import our_errors

        if not self._waiting.popleft():
            self.spoiled = False
            return self._copies.result()
        self._whole = False
        with our_errors(self._what()):
            result, self.spoiled = self._lane.take()
        self._whole = True
        return result.data

    def close(self) -> None:
        """Wait for the device, even after an error, so that its memory can be released."""
        from streamsoup.kernels.accelerator.device import our_errors

        sound = self._whole and not any(self._waiting)
        try:
            with our_errors(self._mix.asked):
                self._lane.close()
            if sound:
                self._mix.leave(self._lane)
        except StreamsoupError:
            if sound:  # else something failed before, and that error is the one to show
                raise
        finally:
            del self._lane  # an error that is kept keeps this frame alive, and with it the lane

    def _sums(self) -> torch.Tensor:
        assert self._mix.running is not None
        return self._mix.running.of(self._tensor.name)[self._start : self._start + self._n]

    def _what(self) -> str:
        return f"{self._mix.asked}, at {printable(self._tensor.name, 100)}"
