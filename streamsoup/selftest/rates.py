"""What cannot fail: how fast this machine copies, reads and sums, and what becomes of it.

Limits first: what the machine can do. Then what is made of them: sums of files in the page cache
whose results are thrown away, and whole soups on disk. Rates are of bytes of ingredients a second,
but for writing, the best of a few runs, all in the same minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.engine.device import OnDevice
from streamsoup.engine.read import open_reader
from streamsoup.engine.reduce import Engine, Mix
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import Nowhere, run
from streamsoup.kernels.accelerator.device import Accelerator, HostDevice
from streamsoup.options import Options
from streamsoup.output.make import Order, make, order
from streamsoup.recipe import Coefficients
from streamsoup.selftest.checks import make_checkpoints, order_on

if TYPE_CHECKING:
    import torch

    from streamsoup.selftest.findings import Report
from streamsoup.system.libc import forget_cached, sync

__all__ = ["measure"]

K = 4
RUNS = 3
LOW = 0.6
"""Below this share of the smallest limit, the report warns."""


def measure(device: Accelerator | HostDevice, room: str, nbytes: int, report: Report) -> None:
    """Fill in limits, rates, ratios and warnings of a report."""
    paths = make_checkpoints(os.path.join(room, "large"), K, max(1000, int(nbytes / K / 3.3)))
    size = sum(os.path.getsize(path) for path in paths)
    limits, rates = report.limits, report.rates
    limits["storage, uncached"] = size / _read(paths, cold=True)
    limits["storage, cached"] = size / min(_read(paths, cold=False) for _ in range(RUNS))
    source = np.ones(min(size, 1 << 26), np.uint8)
    target = np.empty_like(source)
    limits["host copy"] = len(source) / _best(partial(np.copyto, target, source))
    written = partial(_write, os.path.join(room, "written"), source[: size // K])
    limits["writing and syncing"] = min(len(source), size // K) / _best(written)
    if isinstance(device, Accelerator):
        limits |= _buses(device, min(size, 1 << 26))
    _rate("cpu", ["storage, cached"], _order(None, paths, 0), size, room, report)
    if isinstance(device, Accelerator):
        used = ["storage, cached", "host copy", "host to device, pinned"]
        by_device, one_slot = (_order(device, paths, n_slots) for n_slots in (3, 1))
        _rate("pipeline", used, by_device, size, room, report)
        slow = size / _best(partial(_sum, one_slot))
        report.ratios["time of three slots to that of one"] = slow / rates["sums by the pipeline"]
        report.ratios["streams at work at once, by events"] = _overlap(device, by_device)


def _rate(
    name: str, used: Sequence[str], ordered: Order, size: int, room: str, report: Report
) -> None:
    """Time sums, and a soup on disk; say what share of the smallest of the limits is reached."""
    options = Options(overwrite=True, device="cpu")
    soup = partial(make, ordered, output=os.path.join(room, "soup"), options=options)
    report.rates[f"sums by the {name}"] = rate = size / _best(partial(_sum, ordered))
    report.rates[f"soup on disk by the {name}"] = size / _best(soup)
    smallest = min(used, key=report.limits.__getitem__)
    share = rate / report.limits[smallest]
    report.ratios[f"sums by the {name} to the smallest limit ({smallest})"] = share
    if share < LOW:
        report.warnings.append(
            f"sums by the {name} reach {share:.0%} of the smallest limit ({smallest}); so few "
            f"bytes ({size / 1e6:.0f} MB) may be bound by their start: try a larger "
            "size"
        )


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _read(paths: Sequence[str], *, cold: bool) -> float:
    """Time plain reads of whole files, after asking for them to be dropped from memory if cold."""
    buffer = bytearray(1 << 22)
    if cold:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            sync(descriptor)
            forget_cached(descriptor)
            os.close(descriptor)
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _write(path: str, data: NDArray[np.uint8]) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(data.data)
        sync(file.fileno())


def _buses(device: Accelerator, nbytes: int) -> dict[str, float]:
    """Time copies between host and device."""
    import torch

    pinned, there = device.pinned(nbytes, torch.uint8), device.device(nbytes, torch.uint8)
    pageable = torch.ones(nbytes, dtype=torch.uint8)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        device.settle()

    pinned.zero_()
    copy(there, pinned)
    return {
        "host to device, pinned": nbytes / _best(partial(copy, there, pinned)),
        "device to host, pinned": nbytes / _best(partial(copy, pinned, there)),
        "host to device, pageable": nbytes / _best(partial(copy, there, pageable)),
    }


def _order(device: Accelerator | None, paths: Sequence[str], n_slots: int) -> Order:
    """Plan a uniform soup by the pipeline, or by the kernels of the CPU without a device."""
    options = Options(device="cpu")
    if device is not None:
        return order_on(device, paths, options, n_slots)
    equal = Coefficients.uniform(len(paths))
    return order(list(paths), Linear(equal), method="uniform", options=options)


class _Timed(Accelerator):
    """A device that has the beginning and the end of all its work noted on its streams."""

    def __init__(self, device: Accelerator) -> None:
        super().__init__(device.torch_device)
        self.spans: list[tuple[torch.Event, torch.Event]] = []

    def launch(self, stream: torch.Stream, work: Callable[[], object]) -> None:
        import torch

        begun, done = (torch.Event(device=self.torch_device, enable_timing=True) for _ in range(2))
        self.record(begun, stream)
        super().launch(stream, work)
        self.record(done, stream)
        self.spans.append((begun, done))


def _overlap(device: Accelerator, ordered: Order) -> float:
    """Return the mean number of busy streams, from the first piece of work to the last."""
    timed = _Timed(device)
    assert ordered.on_device is not None
    _sum(replace(ordered, on_device=OnDevice(timed, ordered.on_device.plan)))
    device.settle()
    first = timed.spans[0][0]
    busy = sum(begun.elapsed_time(done) for begun, done in timed.spans)
    return busy / max(first.elapsed_time(done) for _, done in timed.spans)


def _sum(ordered: Order) -> None:
    """Make a soup and forget it, without digests."""
    plan, memory, on_device = ordered.plan, ordered.memory, ordered.on_device
    mix = Mix(plan, memory, Engine(plan)) if on_device is None else on_device.mix(plan)
    reader = open_reader(plan, memory, mapped=ordered.mapped)
    run(plan, memory, reader, mix, Nowhere())
