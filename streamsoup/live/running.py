"""The running sum of the accepted ingredients: where it is kept, and what that costs.

It is a float64 partial sum in recipe order, so it may be continued, and the bits are those of a
pass over all. It is kept in whichever way moves the fewest bytes of files within the budget:

* not at all, the accepted ingredients are read again: while they are smaller than their sum;
* in memory, if it fits: nothing but the new ingredient is read;
* in a scratch file beside the output, 8 bytes an element.
"""

from __future__ import annotations

import os
import shutil
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.budget import plan_memory
from streamsoup.engine.plan import MixPlan
from streamsoup.errors import BudgetError, option
from streamsoup.output.write import write_at
from streamsoup.sizes import nbytes_text

__all__ = [
    "FileSums",
    "MemorySums",
    "Sums",
    "SumsPlace",
    "SumsPlan",
    "can_carry",
    "open_sums",
    "plan_sums",
]

Floats = NDArray[np.float64]

SumsPlace = Literal["reread", "memory", "file"]


class SumsPlan(msgspec.Struct, frozen=True):
    """Where the running sum is kept, and what that costs; decided before anything is read."""

    place: SumsPlace
    nbytes: int
    """Bytes of the whole sum: 8 for each averaged element."""
    memory: int
    """Budget left for blocks."""


def plan_sums(
    plan: MixPlan,
    *,
    mapped: bool,
    threads: int,
    budget: int,
    scratch: str | None,
    place: SumsPlace | None = None,
) -> SumsPlan:
    """Choose where the running sum of `plan`'s ingredients is kept.

    `scratch` is the path its file would have; `place` overrides the choice. Raises `BudgetError`
    if not even blocks fit into `budget`, or the sum does not fit where it has to be.
    """
    nbytes = plan.nbytes_summed
    plan_memory(plan, mapped=mapped, threads=threads, budget=budget)
    if not can_carry(plan):
        return SumsPlan("reread", nbytes, budget)
    if place in (None, "memory"):
        try:
            plan_memory(plan, mapped=mapped, threads=threads, budget=budget - nbytes)
            return SumsPlan("memory", nbytes, budget - nbytes)
        except BudgetError:
            if place == "memory":
                raise BudgetError(
                    f"a running sum of {nbytes_text(nbytes, up=True)} does not fit into a memory "
                    f"budget of {nbytes_text(budget)}; raise {option('memory')}, or leave out "
                    f"{option('sums', 'memory')}"
                ) from None
    if place in (None, "file") and scratch is not None:
        free = shutil.disk_usage(os.path.dirname(scratch)).free
        if place == "file" or free > 2 * nbytes:
            return SumsPlan("file", nbytes, budget)
    return SumsPlan("reread", nbytes, budget)


def can_carry(plan: MixPlan) -> bool:
    """Return True if a running sum of these ingredients gives the bits of a pass over all.

    The one rule it cannot carry: float64 values that are the same in all (`kernels.reference`).
    """
    return all(source.dtype.name != "F64" for tensor in plan.tensors for source in tensor.sources)


class Sums(Protocol):
    """The running sum: one float64 for each averaged element, by tensor, wherever it is kept."""

    def close(self) -> None:
        """Free the memory or the file."""


def open_sums(plan: MixPlan, place: SumsPlace, scratch: str | None) -> Sums:
    """Make room for the running sum of a plan; `scratch` is the path of a file, if it is one."""
    places: dict[str, int] = {}
    n = 0
    for tensor in plan.tensors:
        if tensor.is_reduced:
            places[tensor.name] = n
            n += tensor.n_units
    if place == "memory":
        return MemorySums(places, n)
    assert scratch is not None
    return FileSums(places, n, scratch)


class MemorySums:
    """Sums in this process."""

    def __init__(self, places: dict[str, int], n: int) -> None:
        """Hold `n` sums; `places` says where those of each tensor begin."""
        self._places = places
        self._sums = np.empty(n)

    def read(self, tensor: str, start: int, into: Floats) -> None:
        """Copy the sums of a tensor, from element `start` on."""
        begin = self._places[tensor] + start
        into[:] = self._sums[begin : begin + len(into)]

    def write(self, tensor: str, start: int, sums: Floats) -> None:
        """Set the sums of a tensor, from element `start` on."""
        begin = self._places[tensor] + start
        self._sums[begin : begin + len(sums)] = sums

    def close(self) -> None:
        """Free the memory."""
        self._sums = np.empty(0)


class FileSums:
    """Sums in a file that has no name: a killed run leaves nothing behind."""

    def __init__(self, places: dict[str, int], n: int, path: str) -> None:
        """Make room for `n` sums at once; `places` says where those of each tensor begin."""
        self._places = places
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)
        os.unlink(path)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, max(1, 8 * n))
            else:
                os.ftruncate(self._descriptor, 8 * n)
        except OSError as error:
            os.close(self._descriptor)
            raise BudgetError(
                f"no room for a running sum of {8 * n} bytes beside the output "
                f"({error.strerror}); {option('sums', 'reread')} does without"
            ) from None

    def read(self, tensor: str, start: int, into: Floats) -> None:
        """Copy the sums of a tensor, from element `start` on."""
        offset = 8 * (self._places[tensor] + start)
        view = into.view(np.uint8).data
        while view:
            n = os.preadv(self._descriptor, [view], offset)
            if n == 0:
                raise OSError("the running sum's file ended early")
            view = view[n:]
            offset += n

    def write(self, tensor: str, start: int, sums: Floats) -> None:
        """Set the sums of a tensor, from element `start` on."""
        write_at(self._descriptor, sums.view(np.uint8).data, 8 * (self._places[tensor] + start))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
