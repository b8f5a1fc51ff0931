"""How fast are the kernels alone, beside memory: data in memory, and data in a core's cache?

``memory``: all cores, inputs far larger than any cache, beside the bandwidth of reading memory.
``cache``: one core, inputs that fit its second cache, in processor time: what the arithmetic costs.
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

from benchmarks.limits import memory
from benchmarks.rows import Session

__all__ = ["run"]

K = 8
BLOCK = 1 << 18
"""Elements of a call, as in a large run."""


def run(session: Session, *, nbytes: int = 1 << 30, rounds: int = 5) -> None:
    """Measure every dtype that is averaged, with as many ingredients as `K`."""
    from streamsoup.kernels.cpu import mixer
    from streamsoup.tensors import DTYPES

    n_cpus = len(os.sched_getaffinity(0))
    dtypes = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
    mixers = {name: mixer(DTYPES[name], DTYPES[name]) for name in dtypes}
    rates: dict[tuple[str, str], list[float]] = {}
    for round_ in range(rounds):
        limit = memory(n_cpus)
        session.add("kernels", "memory", "read by all cores", round=round_, gb_per_s=limit / 1e9)
        for name in dtypes:
            size = DTYPES[name].itemsize
            inputs = _inputs(name, size, nbytes)
            for where, n_threads in (("memory", n_cpus), ("cache", 1)):
                rate = _rate(mixers[name], inputs, size, where, n_threads)
                rates.setdefault((name, where), []).append(rate)
                session.add(
                    "kernels",
                    "streamsoup",
                    f"{name.lower()}, in {where}",
                    round=round_,
                    n=K,
                    n_threads=n_threads,
                    gb_per_s=rate / 1e9,
                    limit_gb_per_s=limit / 1e9,
                )
    for (name, where), each in rates.items():
        print(f"{name:8} {where:6} {statistics.median(each) / 1e9:6.1f} GB/s", file=sys.stderr)


def _inputs(name: str, size: int, nbytes: int) -> list[NDArray[np.uint8]]:
    """Make inputs of ordinary values: none is a NaN, few are subnormal."""
    n = nbytes // K // size
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    if name == "F64":
        words = values.astype(np.float64).view(np.uint8)
    elif name == "F32":
        words = values.view(np.uint8)
    elif name == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    elif name == "F16":
        words = values.astype(np.float16).view(np.uint8)
    else:
        words = rng.integers(0, 0x70, 1 << 20).astype(np.uint8)
    return [np.resize(np.roll(words, i * size), n * size) for i in range(K)]


def _rate(
    mix: Callable[..., bool], inputs: list[NDArray[np.uint8]], size: int, where: str, n_threads: int
) -> float:
    """Give bytes of input per second."""
    block = BLOCK if where == "memory" else (1 << 19) // (K + 1) // size
    n = len(inputs[0]) // size
    starts = list(range(0, n - block + 1, block))
    if where == "cache":
        starts = [0] * len(starts)
    todo, lock = iter(starts), threading.Lock()
    nothing, ones = np.empty(0), np.ones(K)
    bases = np.array([each.ctypes.data for each in inputs], np.int64)

    spent: list[float] = []

    def work() -> None:
        began = time.thread_time()
        output = np.empty(block * size, np.uint8)
        at = output.ctypes.data
        while True:
            with lock:
                start = next(todo, None)
            if start is None:
                spent.append(time.thread_time() - began)
                return
            mix(nothing, bases + start * size, ones, True, float(K), at, block)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started if where == "memory" else sum(spent)
    return len(starts) * block * size * K / elapsed
