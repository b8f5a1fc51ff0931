"""The pipeline waits where it must: in the worst orders allowed, and no wait can be left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from simulated import KINDS, MOVES, SimulatedDevice, Stream, TimedDevice
from torch.utils._python_dispatch import TorchDispatchMode

from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape
from streamsoup.selftest.lanes import WORDS, random_ingredients, specified, through_lane
from streamsoup.tensors import DTYPES

BLOCK = 16
N = 4 * BLOCK + 5


def orders() -> Iterator[dict[str, object]]:
    """Every preference among the streams, lazy and eager; and a few orders at random."""
    for preference in itertools.permutations(range(3)):
        yield {"order": "lazy", "preference": preference}
        yield {"order": "eager", "preference": preference}
    for seed in range(6):
        yield {"order": "random", "seed": seed}


def n_wrong(n_slots: int, weighted: bool, **fault: object) -> int:
    """Count the orders in which the pipeline, with a `fault`, gives wrong bytes.

    The very last element is infinite, which has to be noticed.
    """
    source = DTYPES["BF16" if weighted else "F64"]
    factors = (0.5, 0.2, 0.1, 0.1, 0.1) if weighted else (1.0,) * 5
    divisor = 1.0 if weighted else 5.0
    ingredients = random_ingredients(source, 5, N, ties=True)
    infinity = source.largest + 1
    ingredients[0].view(WORDS[source.itemsize])[-1] = infinity
    expected = specified(ingredients, source, source, factors, divisor).tobytes()
    wrong = 0
    for order in orders():
        device = SimulatedDevice(**order, **fault)  # type: ignore[arg-type]
        soup, spoiled = through_lane(
            device, ingredients, source, source, factors, divisor, block=BLOCK, n_slots=n_slots
        )
        assert device.is_idle()
        wrong += soup.tobytes() != expected or not spoiled
        if not fault:
            assert sorted(device.waits) == sorted(KINDS)
    return wrong


@pytest.mark.parametrize("n_slots", [1, 2, 3, 7])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "uniform float64"])
def test_right_in_every_order(n_slots: int, weighted: bool) -> None:
    """No order that streams and events allow changes a byte; five kinds of wait are met."""
    assert n_wrong(n_slots, weighted) == 0


@pytest.mark.parametrize("n_slots", [1, 2, 3])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "uniform float64"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_wait_is_needed(kind: int, n_slots: int, weighted: bool) -> None:
    """The planted faults: with any one of the waits left out, some order gives wrong bytes."""
    assert n_wrong(n_slots, weighted, forget=kind) > 0


@pytest.mark.parametrize("kind", range(len(MOVES)))
def test_every_record_is_in_its_place(kind: int) -> None:
    """More planted faults: an event recorded before the work it stands for, not after."""
    assert n_wrong(2, True, hasten=kind) > 0


class SecondHandDevice(SimulatedDevice):
    """Hands out memory that somebody else's work, queued before, still uses: torch's cache does."""

    def __init__(self, **order: object) -> None:
        super().__init__(**order)  # type: ignore[arg-type]
        self._earlier: Stream | None = None

    def stream(self) -> Stream:
        if self._earlier is None:  # the lane's own streams come after it
            self._earlier = super().stream()
        return super().stream()

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        memory = super().device(n, dtype)
        assert self._earlier is not None
        self.launch(self._earlier, lambda: memory.view(torch.uint8).fill_(0x77))
        return memory


def test_memory_is_waited_for() -> None:
    """Work that was queued before a lane was made, on memory that it is given, spoils nothing."""
    dtype = DTYPES["F64"]
    ingredients = random_ingredients(dtype, 3, N, ties=True)
    expected = specified(ingredients, dtype, dtype, (1.0,) * 3, 3.0).tobytes()
    for preference in itertools.permutations(range(4)):
        device = SecondHandDevice(order="lazy", preference=preference)
        soup, _ = through_lane(device, ingredients, dtype, dtype, (1.0,) * 3, 3.0, block=BLOCK)
        assert soup.tobytes() == expected


def test_a_closed_lane_leaves_nothing_under_way() -> None:
    """Once a lane is closed its memory may go, and a result on the device may be looked at."""
    dtype = DTYPES["BF16"]
    (data,) = random_ingredients(dtype, 1, BLOCK, ties=True)
    device = SimulatedDevice("lazy")
    lane = Lane(device, LaneShape(BLOCK, 2, 2, 0, False))
    target = device.device(BLOCK, torch.bfloat16)
    lane.start(BLOCK, dtype, 1.0, compares=False, canonical=False, target=target)
    lane.add(data, dtype, 1.0)
    lane.finish()
    assert not device.is_idle()
    lane.close()
    assert device.is_idle()
    assert target.view(torch.uint8).numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("k", [1, 2, 8])
def test_copies_in_sums_and_ends_go_side_by_side(k: int) -> None:
    """Where all that is launched takes as long, a ring of slots takes 0.7 of one slot's time."""
    dtype = DTYPES["BF16"]
    ingredients = random_ingredients(dtype, k, 32 * BLOCK, ties=True)
    factors, divisor = (1.0,) * k, float(k)
    expected = specified(ingredients, dtype, dtype, factors, divisor).tobytes()
    ticks = {}
    for n_slots in (1, 2, 3):
        device = TimedDevice()
        soup, _ = through_lane(
            device, ingredients, dtype, dtype, factors, divisor, block=BLOCK, n_slots=n_slots
        )
        assert soup.tobytes() == expected
        ticks[n_slots] = device.ticks()
    assert ticks[2] <= 0.7 * ticks[1]
    assert ticks[3] <= 0.7 * ticks[1]


def test_nothing_is_queued_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a sum for each ingredient, an end for each block; constants where they change."""
    dtype = DTYPES["BF16"]
    n_blocks, k = 6, 3
    ingredients = random_ingredients(dtype, k, n_blocks * BLOCK, ties=True)
    launched = []
    launch = TimedDevice.launch
    monkeypatch.setattr(TimedDevice, "launch", lambda *call: (launched.append(call), launch(*call)))
    device = TimedDevice()
    through_lane(device, ingredients, dtype, dtype, (1.0,) * k, float(k), block=BLOCK)
    assert len(launched) == n_blocks * (2 * k + 1) + 1 + 1  # the constants; the workspace


class NotedDevice(TimedDevice):
    """Remembers which memory is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned_storages: set[int] = set()

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        made = super().pinned(n, dtype)
        self.pinned_storages.add(made.untyped_storage().data_ptr())
        return made


class Copies(TorchDispatchMode):
    """Notes each copy: from where, to where, and whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int, bool]] = []

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            places = [each.untyped_storage().data_ptr() for each in args[:2]]
            waits = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
            self.found.append((places[1], places[0], waits))
        return func(*args, **kwargs)


def test_the_host_waits_for_no_copy() -> None:
    """Copies between pinned memory and the device's are asked for, and not waited for."""
    dtype = DTYPES["BF16"]
    ingredients = random_ingredients(dtype, 3, N, ties=True)
    device = NotedDevice()
    with Copies() as copies:
        through_lane(device, ingredients, dtype, dtype, (1.0,) * 3, 3.0, block=BLOCK)
    pinned = device.pinned_storages
    over_the_bus = [copy for copy in copies.found if (copy[0] in pinned) != (copy[1] in pinned)]
    n_blocks = -(-N // BLOCK)
    assert len(over_the_bus) == n_blocks * (3 + 2)  # each ingredient; the soup, and its largest
    assert not any(waits for _, _, waits in over_the_bus)


def test_nothing_is_allocated_under_way() -> None:
    """A lane takes all it needs when it is made."""
    dtype = DTYPES["F32"]
    counts = []
    for n_blocks in (3, 30):
        device = SimulatedDevice("eager")
        ingredients = random_ingredients(dtype, 4, BLOCK * n_blocks, ties=True)
        through_lane(device, ingredients, dtype, dtype, (1.0,) * 4, 4.0, block=BLOCK)
        counts.append(len(device.sizes))
    shape = LaneShape(BLOCK, 2, 8, 8, False)
    assert counts == [len(shape.device_sizes() + shape.pinned_sizes())] * 2


def test_allocations_are_the_predicted_ones() -> None:
    """The sizes that `LaneShape` tells are those that a lane asks for."""
    for shape in (LaneShape(64, 3, 2, 2, False), LaneShape(128, 2, 8, 4, True)):
        device = SimulatedDevice("eager")
        Lane(device, shape)
        assert sorted(device.sizes) == sorted(shape.device_sizes() + shape.pinned_sizes())


def test_a_result_on_the_device_and_a_running_sum() -> None:
    """Sums continued from a tensor, kept in one, and a result put into a third: the same bits."""
    dtype = DTYPES["BF16"]
    ingredients = random_ingredients(dtype, 3, BLOCK, ties=True)
    expected = specified(ingredients, dtype, dtype, (1.0,) * 3, 3.0)
    for order in orders():
        device = SimulatedDevice(**order)  # type: ignore[arg-type]
        lane = Lane(device, LaneShape(BLOCK, 2, 2, 0, False))
        kept = device.device(BLOCK, torch.float64)
        target = device.device(BLOCK, torch.bfloat16)
        lane.start(BLOCK, dtype, 2.0, compares=False, canonical=False, target=target)
        for data in ingredients[:2]:
            lane.add(data, dtype, 1.0)
        lane.keep(kept)
        lane.finish()
        lane.start(BLOCK, dtype, 3.0, compares=False, canonical=False, target=target, initial=kept)
        lane.add(ingredients[2], dtype, 1.0)
        lane.finish()
        lane.take()
        landed, spoiled = lane.take()
        assert len(landed) == 0
        assert not spoiled
        assert target.view(torch.uint8).numpy().tobytes() == expected.tobytes()
        assert np.isfinite(kept.numpy()).all()
