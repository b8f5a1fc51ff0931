"""How a soup is made, as opposed to what it is made of: plain data, with the defaults.

Beside the options stand the events that long work reports to `Options.on_event`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamsoup.errors import RecipeError, printable

if TYPE_CHECKING:
    import torch

__all__ = ["Note", "Options", "Progress", "Step", "check_options", "settle", "take"]


class Progress(msgspec.Struct, frozen=True):
    """How far a pass over the weights has come; sent twenty times a second."""

    nbytes_done: int
    """Bytes of the ingredients read, or found finished by an earlier run."""
    nbytes: int
    """Bytes of the ingredients in all."""
    elapsed_s: float


class Step(msgspec.Struct, frozen=True):
    """How many steps of a search or a study are done; sent before the first and after each."""

    what: str
    """What a step is: ``trial``, ``look``, ``measurement``."""
    n_done: int
    n: int
    """Steps in all; an upper bound if `at_most`."""
    n_paid: int
    """Steps done by this run, rather than known before: what `elapsed_s` was spent on."""
    elapsed_s: float
    at_most: bool = False
    text: str = ""
    """What was done last."""


class Note(msgspec.Struct, frozen=True):
    """A line for a person: what begins now, or what was found."""

    text: str


def take(kind: str, what: str, value: Any) -> Any:
    """Take a number of any library as Python's own, of the `kind` ``int``, ``float`` or ``bool``.

    `what` is its name. Raises `RecipeError` for what is none of that kind.
    """
    read, wanted = _KINDS[kind]
    try:
        if isinstance(value, (str, bytes)):  # which float() would read
            raise TypeError
        number = read(value)
        if kind == "int" and abs(number) >= 2**63:
            raise OverflowError
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RecipeError(f"{what}: {printable(repr(value))} is no {wanted}") from None
    return number


def settle(options: msgspec.Struct) -> None:
    """Take all numbers of some options, in ``__post_init__``, and check what is to be called.

    Goes by the annotations, with ``| None`` or without. Raises `RecipeError`.
    """
    for name, annotation in type(options).__annotations__.items():
        value = getattr(options, name)
        kind = annotation.removesuffix(" | None")
        if value is None and kind != annotation:
            continue
        if kind in _KINDS:
            msgspec.structs.force_setattr(options, name, take(kind, name, value))
        elif kind.startswith("Callable") and not callable(value):
            raise RecipeError(f"{name}: {printable(repr(value))} cannot be called")


def check_options(given: object, kind: type[msgspec.Struct]) -> None:
    """Raise `RecipeError` for options that are of another kind."""
    if not isinstance(given, kind):
        raise RecipeError(f"{printable(repr(given))} is no streamsoup.{kind.__name__}")


def _truth(value: Any) -> bool:
    if value not in (False, True):
        raise ValueError
    return bool(value)


_KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "int": (operator.index, "whole number"),
    "float": (float, "number"),
    "bool": (_truth, "truth value"),
}


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
    """Integers and the like: refuse unless equal, or take those of the first ingredient, as is
    always done with BatchNorm's ``num_batches_tracked``."""
    non_finite: Literal["refuse", "propagate"] = "refuse"
    """NaN and Inf in the soup: refuse, naming where they come from, or let them pass."""
    config: Literal["same", "first"] = "same"
    """Configurations and tokenizers that change what weights mean: refuse where they differ, or
    take those of the first ingredient. Token ids that are in another order are always refused."""
    memory: int | str | None = None
    """Anonymous memory of the whole process, at its peak; None for 150 MB, or what a plan of more
    than some 5,000 tensors takes."""
    threads: int | None = None
    """Threads that read and sum; None for the CPUs this process may use, 8 at most."""
    device: str | torch.device = "auto"
    """Where sums are made: ``cpu``, ``cuda``, ``cuda:1``, …; torch's own will do. For files,
    ``auto`` is ``cpu``."""
    device_memory: int | str | None = None
    """Memory to take on the device, by all workers of a search together, running sums included;
    None for an eighth of what is free."""
    io: Literal["auto", "mmap", "read"] = "auto"
    """Map shards, or read them into buffers; ``auto`` maps unless they lie on a network."""
    overwrite: bool = False
    """Replace an output that exists, in the last step."""
    on_event: Callable[[Any], None] | None = None
    """Called by the calling thread with each event of the work: `Progress` of a pass over the
    weights, `Step` of a search or study, `Note`, and `Trial` of a greedy search. Other
    kinds may be added. An exception it raises stops the work and comes out of the call as it is:
    the output is what it was before, and the same call resumes."""

    def __post_init__(self) -> None:
        """Take numbers and devices as other libraries have them. Raises `RecipeError`."""
        settle(self)
        msgspec.structs.force_setattr(self, "device", str(self.device))

    @property
    def n_threads(self) -> int:
        """The number of threads to use. More than 8 gain nothing: memory is the limit by then."""
        if self.threads is None:
            return min(8, len(os.sched_getaffinity(0)))
        if self.threads < 1:
            raise RecipeError(f"{self.threads} threads cannot work; give one or more")
        return self.threads
