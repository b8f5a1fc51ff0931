"""How fast are the kernels alone, beside the bandwidth of reading memory?

All cores, inputs far larger than any cache: fine-tunes of one base, as in `checkpoints`; and, for
bfloat16, strangers to each other, whose sums are less often exact in float32, and many of them.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.limits import REPEATS, memory
from benchmarks.measure import settle
from benchmarks.rows import Session

__all__ = ["run"]

MANY = 32
"""Ingredients whose streams outnumber the ways of a first cache, and what processors foresee."""

BLOCK = 1 << 18
"""Elements of a call, as in a large run."""


def run(session: Session, *, nbytes: int = 1 << 30, rounds: int = 5) -> None:
    """Measure every dtype that is averaged, with 8 ingredients, and bfloat16 with `MANY`."""
    from streamsoup.kernels.cpu import mixer
    from streamsoup.tensors import DTYPES

    n_cpus = len(os.sched_getaffinity(0))
    dtypes = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
    mixers = {name: mixer(DTYPES[name], DTYPES[name]) for name in dtypes}
    rates: dict[str, list[float]] = {}
    for round_ in range(rounds):
        cases = [(name, 8, False) for name in dtypes] + [("BF16", 8, True), ("BF16", MANY, False)]
        for name, k, strangers in cases:
            case = name.lower() + (", strangers" if strangers else "")
            case += f", {k} ingredients" if k != 8 else ""
            size = DTYPES[name].itemsize
            inputs = _inputs(name, size, nbytes, k=k, strangers=strangers)
            settle()
            limit = memory(n_cpus)
            # The best of as many as the limit is the best of: both are what the machine can do.
            rate = max(_rate(mixers[name], inputs, size, n_cpus) for _ in range(REPEATS))
            rates.setdefault(case, []).append(rate / limit)
            session.add(
                "kernels",
                "streamsoup",
                case,
                round=round_,
                n=k,
                n_threads=n_cpus,
                gb_per_s=rate / 1e9,
                limit_gb_per_s=limit / 1e9,
            )
    for case, each in rates.items():
        print(f"{case:16} {statistics.median(each):6.2f} of memory bandwidth", file=sys.stderr)


def _inputs(
    name: str, size: int, nbytes: int, *, k: int = 8, strangers: bool = False
) -> list[NDArray[np.uint8]]:
    """Make ingredients of ordinary values: none is a NaN, few are subnormal."""
    n = nbytes // k // size
    rng = np.random.default_rng(0)
    base = rng.standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    inputs = []
    for i in range(k):
        own = rng.standard_normal(len(base), dtype=np.float32) * np.float32(0.002)
        values = np.roll(base, i) if strangers else base + own
        inputs.append(np.resize(_words(name, values), n * size))
    return inputs


def _words(name: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of values in a dtype; where it is coarser, cut off rather than rounded."""
    if name == "F64":
        return values.astype(np.float64).view(np.uint8)
    if name == "F32":
        return values.view(np.uint8)
    if name == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    halves = values.astype(np.float16)
    if name == "F16":
        return halves.view(np.uint8)
    if name == "F8_E5M2":
        return (halves.view(np.uint16) >> 8).astype(np.uint8)
    # E4M3, whose exponents reach from 2^-6: scaled up, as callers that cast to it do.
    bits = (values * np.float32(2.0**-112)).view(np.uint32)
    return (((bits >> 24) & 0x80) | ((bits & 0x7FFFFFFF) >> 20)).astype(np.uint8)


def _rate(
    mix: Callable[..., bool], inputs: list[NDArray[np.uint8]], size: int, n_threads: int
) -> float:
    """Return bytes of input per second."""
    k, n = len(inputs), len(inputs[0]) // size
    todo, lock = iter(range(0, n - BLOCK + 1, BLOCK)), threading.Lock()
    ones = [1.0] * k
    bases = [each.ctypes.data for each in inputs]

    def work() -> None:
        output = np.empty(BLOCK * size, np.uint8)
        at = output.ctypes.data
        while True:
            with lock:
                start = next(todo, None)
            if start is None:
                return
            mix(0, [base + start * size for base in bases], ones, True, float(k), at, BLOCK)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return n // BLOCK * BLOCK * size * k / (time.perf_counter() - started)
