"""What cannot fail: how fast this machine copies, reads and sums, and what becomes of it.

Every rate is of bytes of ingredients a second, the best of a few runs, beside the limits of the
same machine measured in the same minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from streamsoup.kernels.device import Accelerator, HostDevice
from streamsoup.options import Options
from streamsoup.recipe import Coefficients
from streamsoup.selftest.checks import make_checkpoints, order_on
from streamsoup.soups.make import make, order

if TYPE_CHECKING:
    from streamsoup.selftest import Report

__all__ = ["measure"]

RUNS = 3
LOW = 0.6
"""Below this share of the smallest limit, the report warns."""


def measure(device: Accelerator | HostDevice, room: str, nbytes: int, report: Report) -> None:
    """Fill in the rates of a report."""
    k = 4
    paths = make_checkpoints(os.path.join(room, "large"), k, max(1000, int(nbytes / k / 3.3)))
    size = sum(os.path.getsize(path) for path in paths)
    rates = report.rates
    rates["storage, uncached"] = size / _read(paths, cold=True)
    rates["storage, cached"] = size / min(_read(paths, cold=False) for _ in range(RUNS))
    source = np.ones(min(size, 1 << 26), np.uint8)
    target = np.empty_like(source)
    rates["host copy"] = len(source) / _best(partial(np.copyto, target, source))
    limits = [rates["storage, cached"], rates["host copy"]]
    if isinstance(device, Accelerator):
        for name, rate in _buses(device, min(size, 1 << 26)).items():
            rates[name] = rate
        limits.append(rates["host to device, pinned"])
    rates["soup to disk, cpu"] = size / _soup(device, paths, room, None)
    rates["soup to disk, pipeline"] = size / _soup(device, paths, room, 3)
    one_slot = _soup(device, paths, room, 1)
    report.ratios["three slots to one, time"] = size / rates["soup to disk, pipeline"] / one_slot
    efficiency = rates["soup to disk, pipeline"] / min(limits)
    report.ratios["pipeline to the smallest limit"] = efficiency
    if isinstance(device, Accelerator) and efficiency < LOW:
        report.warnings.append(
            f"the pipeline reaches {efficiency:.0%} of the smallest limit; a soup this small "
            "({:.0f} MB) may be bound by its start: try a larger --size".format(size / 1e6)
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
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


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


def _soup(
    device: Accelerator | HostDevice, paths: Sequence[str], room: str, n_slots: int | None
) -> float:
    """Time a uniform soup by the pipeline, or by the kernels of the CPU without slots."""
    options = Options(overwrite=True, device="cpu")
    if n_slots is None:
        ordered = order(
            list(paths), Coefficients.uniform(len(paths)), method="uniform", options=options
        )
    else:
        ordered = order_on(device, paths, options, n_slots)
    return _best(partial(make, ordered, output=os.path.join(room, "soup"), options=options))
