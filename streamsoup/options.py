"""Options of how a soup is made (not of what it is made of), with their defaults: plain data.

The events that long work reports to `Options.on_event` stand here, too.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamsoup.errors import RecipeError, printable
from streamsoup.reading import Reading

if TYPE_CHECKING:
    import torch

__all__ = ["Note", "Options", "Progress", "Step", "check_options", "n_cpus", "settle", "take"]


class Planned(msgspec.Struct, frozen=True):
    """A soup that is planned; sent before its first weight is read.

    An exception that the callback raises ends the call there, and nothing is written.
    """

    order: Any
    """The plan: `streamsoup.output.make.Order`."""
    n_before: int = 0
    """Passes over the ingredients before those of the rule: for angles, one."""


class Progress(msgspec.Struct, frozen=True):
    """Progress of the passes over the weights; sent twenty times a second."""

    nbytes_done: int
    """Bytes of the ingredients read in all passes so far, or found finished by an earlier run."""
    nbytes: int
    """Bytes of the ingredients in all passes: an estimate, where a rule tells only as it goes how
    many it needs."""
    elapsed_s: float
    nodes: Mapping[str, int] = {}
    """Bytes read by each node of a cluster in what is finished, by its name."""


class Step(msgspec.Struct, frozen=True):
    """Progress of a search or a study in steps; sent before the first step and after each."""

    what: str
    """Kind of step: ``trial``, ``look``, ``measurement``."""
    n_done: int
    n: int
    """Steps in all; an upper bound if `at_most`."""
    n_paid: int
    """Steps that this run itself did, in `elapsed_s`; others were known from an earlier run."""
    elapsed_s: float
    at_most: bool = False
    text: str = ""
    """The last step in words."""


class Note(msgspec.Struct, frozen=True):
    """A line of text for the user: what begins now, or what was found."""

    text: str


def n_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def take(kind: str, what: str, value: Any) -> Any:
    """Return a number of any library as a Python one.

    Args:
        kind: ``int``, ``float`` or ``bool``.
        what: The name of the option, for the message.
        value: The number, of Python, numpy or torch; text is refused.

    Raises:
        RecipeError: Not a number of that kind.
    """
    read, wanted = _KINDS[kind]
    try:
        if isinstance(value, (str, bytes)):  # which float() would read
            raise TypeError
        number = read(value)
        if kind == "int" and abs(number) >= 2**63:
            raise OverflowError
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RecipeError(f"{what}: {printable(repr(value))} is not a {wanted}") from None
    return number


def settle(options: msgspec.Struct, kind_of: type[msgspec.Struct] | None = None) -> None:
    """Convert all numbers of some options in ``__post_init__``, and check the callbacks.

    Only the fields that `kind_of` itself has, where it is given: a class between others. Reads the
    annotations ``int``, ``float``, ``bool`` and ``Callable…``, with ``| None`` or without. Raises
    `RecipeError`.
    """
    for name, annotation in (kind_of or type(options)).__annotations__.items():
        value = getattr(options, name)
        kind = annotation.removesuffix(" | None")
        if value is None and kind != annotation:
            continue
        if kind in _KINDS:
            msgspec.structs.force_setattr(options, name, take(kind, name, value))
        elif kind.startswith("Callable") and not callable(value):
            raise RecipeError(f"{name}: {printable(repr(value))} is not callable")


def _names(what: str, value: Any) -> tuple[str, ...]:
    """Return a list of names as a tuple. Raise `RecipeError` for text, and for anything else."""
    listed = value if isinstance(value, (list, tuple)) else None
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise RecipeError(f"{what}: {printable(repr(value))} is not a list of names")
    return tuple(listed)


def check_options(given: object, kind: type[msgspec.Struct]) -> None:
    """Raise `RecipeError` unless `given` are options of a `kind`."""
    if not isinstance(given, kind):
        raise RecipeError(f"{printable(repr(given))} is not a streamsoup.{kind.__name__}")


def _truth(value: Any) -> bool:
    if value not in (False, True):
        raise ValueError
    return bool(value)


_KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "int": (operator.index, "whole number"),
    "float": (float, "number"),
    "bool": (_truth, "truth value"),
}


class Options(Reading, frozen=True, kw_only=True):
    """Options that every verb accepts.

    Only `dtype`, `shard_size`, `non_float`, `non_finite`, `config`, `card` and the fields of
    `streamsoup.reading.Reading` can change what is written.
    Sizes are bytes, or text such as ``"5GB"``.
    """

    dtype: str | torch.dtype = "same"
    """Dtype of the averaged tensors in the soup: ``same``, ``f32``, ``bf16``, ``f16``, …; or a
    dtype of torch."""
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
    card: bool = True
    """Write a model card, ``README.md``, beside the soup."""
    memory: int | str | None = None
    """Anonymous memory of the whole process, at its peak; None for 150 MB, or what a plan of more
    than some 5,000 tensors takes."""
    threads: int | None = None
    """Threads that read and sum; None for the CPUs this process may use, 8 at most."""
    device: str | torch.device = "auto"
    """Where sums are made: ``cpu``, ``cuda``, ``cuda:1``, …; or a device of torch. For
    files, ``auto`` is ``cpu``."""
    device_memory: int | str | None = None
    """Most memory on the device, for all workers of a search together, running sums included;
    None for an eighth of the free memory."""
    io: Literal["auto", "mmap", "read"] = "auto"
    """Map shards, or read them into buffers; ``auto`` maps unless they lie on a network."""
    part: str | None = None
    """Make one part of the soup: ``3/8``, or ``auto`` for what the launcher of an array job says
    (``auto/8`` where it does not say how many there are). For soups made by a formula."""
    commit: bool = False
    """If all parts are made after this one, put the soup in place."""
    ray: str | None = None
    """Spread the work over the nodes of Ray, which see the same files: ``local`` for processes that
    are started on this machine, ``auto`` or ``HOST:PORT`` for a cluster. `threads` and `memory` are
    then those of each process, of which a node has as many as fit."""
    executor: Any = None
    """What does the work instead: a `streamsoup.Executor`; None for the threads of this process."""
    overwrite: bool = False
    """Replace an output that exists, in the last step."""
    on_event: Callable[[Any], None] | None = None
    """Called by the calling thread with each event of the work: `Progress` of a pass over the
    weights, `Step` of a search or study, `Note`, and `Trial` of a greedy search. Other
    kinds may be added. An exception it raises stops the work and comes out of the call as it is:
    the output is what it was before, and the same call resumes."""

    def __post_init__(self) -> None:
        """Convert numbers and devices of other libraries to plain ones. Raises `RecipeError`."""
        settle(self)
        Reading.__post_init__(self)
        msgspec.structs.force_setattr(self, "device", str(self.device))
        msgspec.structs.force_setattr(self, "components", _names("components", self.components))

    @property
    def reading(self) -> Reading:
        """How ingredients are read: the part of these options that a recipe records."""
        return Reading(**{name: getattr(self, name) for name in Reading.__struct_fields__})

    @property
    def n_threads(self) -> int:
        """Number of threads to use; at most 8 by default, as memory is the limit from there on.

        Raises `RecipeError` for a number below 1.
        """
        if self.threads is None:
            return min(8, n_cpus())
        if self.threads < 1:
            raise RecipeError(f"threads must be at least 1, got {self.threads}")
        return self.threads
