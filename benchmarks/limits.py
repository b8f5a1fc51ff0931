"""What the machine can do at best, measured beside everything else: ``limits.py WHAT ...``.

A process of its own for each answer, which it prints as JSON: seconds inside the process, so a
limit never pays for starting Python. ``mapped N FILE...`` and ``plain N FILE...`` read all bytes
with N threads, ``write WAY NBYTES FILE`` writes and syncs in one of `WAYS`, ``both N WAY NBYTES
OUTPUT FILE...`` does that while N threads read plainly, ``memory N`` reads what is in memory.
Infinite is what cannot be done here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PART = 1 << 24
"""Bytes a thread takes at once."""

BUFFER = 1 << 20
"""Bytes of a plain read: larger ones fall out of the second cache before they are looked at."""

REPEATS = 5
"""Times that memory is read, of which the best counts."""

LIBC = ctypes.CDLL(None)
LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
SYNC_FILE_RANGE_WRITE = 2


def glance(words: NDArray[np.uint64]) -> None:
    """Look at every byte, in the cheapest way numpy has (measured: sums 52 GB/s, `max` 32)."""
    np.bitwise_or.reduce(words)


def in_threads(n_threads: int, jobs: Sequence[Callable[[], None]]) -> float:
    """Do the jobs, in order, by several threads, and say how long that took."""
    todo, lock = iter(jobs), threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not failures:
                with lock:
                    job = next(todo, None)
                if job is None:
                    return
                job()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
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


@dataclass(frozen=True, slots=True)
class Way:
    """A way to write a file."""

    how: str
    """What the tables say of it, after *write and sync*."""
    n_threads: int = 1
    piece: int = 1 << 22
    """Bytes that a thread writes at once."""
    reserved: bool = True
    """True if the disk makes room for all of it first."""
    begun: bool = False
    """True if the disk is told to begin with each piece as soon as it is written."""
    direct: bool = False
    """True if it goes past the page cache, to the disk alone."""


WAYS = {
    "plain": Way("", reserved=False),
    "reserved": Way(", reserved first"),
    "begun": Way(", reserved first, begun at once, 2 threads", 2, 1 << 20, begun=True),
    "direct": Way(", reserved first, past the page cache, 2 threads", 2, 1 << 20, direct=True),
}
"""More threads, four and eight, were no faster."""


def write(way: Way, nbytes: int, path: str) -> float:
    """Write a file, and wait until it is on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if way.direct else 0)
    piece = memoryview(mmap.mmap(-1, way.piece))  # begins with a page, as direct writes must
    piece[:] = os.urandom(way.piece)
    if way.direct:
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        started = time.perf_counter()
        descriptor = os.open(path, flags)
        if way.reserved:
            os.posix_fallocate(descriptor, 0, nbytes)

        def write_piece(at: int) -> None:
            n = min(way.piece, nbytes - at)
            assert os.pwrite(descriptor, piece[:n], at) == n, "the disk is full"
            if way.begun:
                LIBC.sync_file_range(descriptor, at, n, SYNC_FILE_RANGE_WRITE)

        starts = range(0, nbytes, way.piece)
        in_threads(way.n_threads, [functools.partial(write_piece, at) for at in starts])
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - started
    except OSError as error:
        if way.direct and error.errno == errno.EINVAL:
            return math.inf  # this file system has no direct writes
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def both(n_threads: int, way: Way, nbytes: int, output: str, paths: Sequence[str]) -> float:
    """Write and sync a file while others are read: what a disk that does both has to do."""
    written: list[float] = []
    started = time.perf_counter()
    writer = threading.Thread(target=lambda: written.append(write(way, nbytes, output)))
    writer.start()
    plain(n_threads, paths)
    writer.join()
    return time.perf_counter() - started if math.isfinite(written[0]) else math.inf


def memory(n_threads: int) -> float:
    """Return bytes per second read from memory, outside all caches: the best of `REPEATS`."""
    words = np.ones(1 << 27, np.uint64)
    parts = np.array_split(words, 64)
    jobs = [lambda part=part: glance(part) for part in parts]  # type: ignore[misc]
    return words.nbytes / min(in_threads(n_threads, jobs) for _ in range(REPEATS))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "write":
        print(json.dumps(write(WAYS[rest[0]], int(rest[1]), rest[2])))
    elif what == "both":
        print(json.dumps(both(int(rest[0]), WAYS[rest[1]], int(rest[2]), rest[3], rest[4:])))
    elif what == "memory":
        print(json.dumps(memory(int(rest[0]))))
    else:
        read_all = {"mapped": mapped, "plain": plain}[what]
        print(json.dumps(read_all(int(rest[0]), rest[1:])))
