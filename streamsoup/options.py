"""How a soup is made, as opposed to what it is made of: plain data, with the defaults."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamsoup.errors import RecipeError, printable

if TYPE_CHECKING:
    import torch

__all__ = ["Options"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What every verb accepts. Nothing here but `dtype`, `shard_size` and the rules changes bytes.

    Sizes are bytes, or text such as ``"5GB"``.
    """

    dtype: str | torch.dtype = "same"
    """Dtype of the averaged tensors in the soup: ``same``, ``f32``, ``bf16``, ``f16``, …; torch's
    own will do."""
    shard_size: int | str | None = None
    """Largest shard of the soup; None mirrors the shards of the first ingredient."""
    non_float: Literal["same", "first"] = "same"
    """Integers and the like: refuse unless equal, or take those of the first ingredient."""
    non_finite: Literal["refuse", "propagate"] = "refuse"
    """NaN and Inf in the soup: refuse, naming where they come from, or let them pass."""
    memory: int | str | None = None
    """Anonymous memory of the whole process, at its peak; None for 150 MB, or what the plan of tens
    of thousands of tensors takes."""
    threads: int | None = None
    """Threads that read and sum; None for the CPUs this process may use, 8 at most."""
    device: str = "auto"
    """Where sums are made: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` is ``cpu`` for files."""
    device_memory: int | str | None = None
    """Memory to take on the device, by all workers of a search together, running sums included;
    None for an eighth of what is free."""
    io: Literal["auto", "mmap", "read"] = "auto"
    """Map shards, or read them into buffers; ``auto`` maps unless they lie on a network."""
    overwrite: bool = False
    """Replace an output that exists, in the last step."""
    on_progress: Callable[[Any], None] | None = None
    """Called with a `streamsoup.stream.Progress` twenty times a second, by the calling thread."""

    @property
    def n_threads(self) -> int:
        """The number of threads to use. More than 8 gain nothing: memory is the limit by then."""
        if self.threads is None:
            return min(8, len(os.sched_getaffinity(0)))
        try:
            threads = operator.index(self.threads)
        except TypeError:
            given = printable(self.threads)
            raise RecipeError(f"{given!r} is no number of threads; give a whole one") from None
        if threads < 1:
            raise RecipeError(f"{threads} threads cannot work; give one or more")
        return threads
