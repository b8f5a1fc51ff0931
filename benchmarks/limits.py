"""What the machine can do at best, measured beside everything else: ``limits.py WHAT ...``.

A process of its own for each answer, which it prints as JSON: seconds inside the process, so a
limit never pays for starting Python. ``mapped N FILE...`` and ``plain N FILE...`` read all bytes
with N threads, ``write NBYTES FILE`` writes and syncs, ``reserved NBYTES FILE`` has the disk make
room first, ``both N NBYTES OUTPUT FILE...`` does that while N threads read plainly, ``memory N``
reads what is in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

PART = 1 << 24
"""Bytes a thread takes at once."""

BUFFER = 1 << 20
"""Bytes of a plain read: larger ones fall out of the second cache before they are looked at."""

REPEATS = 5
"""Times that memory is read, of which the best counts."""


def glance(words: NDArray[np.uint64]) -> None:
    """Look at every byte, in the cheapest way numpy has (measured: sums 52 GB/s, `max` 32)."""
    np.bitwise_or.reduce(words)


def in_threads(n_threads: int, jobs: Sequence[Callable[[], None]]) -> float:
    """Do the jobs, in order, by several threads, and say how long that took."""
    todo, lock = iter(jobs), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return
            job()

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def mapped(n_threads: int, paths: Sequence[str]) -> float:
    """Map files, and look at every page."""
    jobs: list[Callable[[], None]] = []
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb") as file:
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        content = content[: len(content) // 8 * 8]
        for at in range(0, len(content), PART):
            part = content[at : at + PART].view(np.uint64)
            jobs.append(lambda part=part: glance(part))  # type: ignore[misc]
    return time.perf_counter() - started + in_threads(n_threads, jobs)


def plain(n_threads: int, paths: Sequence[str]) -> float:
    """Read files into a small buffer, and look at it."""
    own = threading.local()
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]

    def read(descriptor: int, start: int, end: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(BUFFER, np.uint8)
        for at in range(start, end, BUFFER):
            n = os.preadv(descriptor, [own.buffer[: min(BUFFER, end - at)]], at)
            glance(own.buffer[: n // 8 * 8].view(np.uint64))

    jobs: list[Callable[[], None]] = []
    for descriptor, path in zip(descriptors, paths, strict=True):
        size = os.path.getsize(path)
        for at in range(0, size, PART):
            end = min(at + PART, size)
            jobs.append(lambda d=descriptor, a=at, e=end: read(d, a, e))  # type: ignore[misc]
    return in_threads(n_threads, jobs)


def write(nbytes: int, path: str, *, reserved: bool = False) -> float:
    """Write a file, after making room for all of it if `reserved`, and wait until it is on disk."""
    block = os.urandom(1 << 22)
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if reserved:
        os.posix_fallocate(descriptor, 0, nbytes)
    for at in range(0, nbytes, len(block)):
        os.pwrite(descriptor, block[: min(len(block), nbytes - at)], at)
    os.fsync(descriptor)
    os.close(descriptor)
    elapsed = time.perf_counter() - started
    os.unlink(path)
    return elapsed


def both(n_threads: int, nbytes: int, output: str, paths: Sequence[str]) -> float:
    """Write and sync a file while others are read: what a disk that does both has to do."""
    started = time.perf_counter()
    writer = threading.Thread(target=write, args=(nbytes, output), kwargs={"reserved": True})
    writer.start()
    plain(n_threads, paths)
    writer.join()
    return time.perf_counter() - started


def memory(n_threads: int) -> float:
    """Give bytes per second read from memory, well outside of all caches: the best of `REPEATS`."""
    words = np.ones(1 << 27, np.uint64)
    parts = np.array_split(words, 64)
    jobs = [lambda part=part: glance(part) for part in parts]  # type: ignore[misc]
    return words.nbytes / min(in_threads(n_threads, jobs) for _ in range(REPEATS))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what in ("write", "reserved"):
        print(json.dumps(write(int(rest[0]), rest[1], reserved=what == "reserved")))
    elif what == "both":
        print(json.dumps(both(int(rest[0]), int(rest[1]), rest[2], rest[3:])))
    elif what == "memory":
        print(json.dumps(memory(int(rest[0]))))
    else:
        read_all = {"mapped": mapped, "plain": plain}[what]
        print(json.dumps(read_all(int(rest[0]), rest[1:])))
