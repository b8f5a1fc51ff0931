"""Copies of a model's tensors on their way from its device to the host, while training goes on.

`Copies.begin` queues them on the stream that the device computes on, behind the step that made the
values and before the one that changes them, and returns at once. A thread of its own waits for the
last of them and then adds them up, while the device is at the next step. `Copies.settle` waits for
that thread: before the next update, since there is one place for a model in transit, and before any
result.

The place is page-locked memory, as only into that a device copies on its own. Torch rounds each
request for it up to a power of two, so it is asked for in `CHUNK` bytes, and tensors are cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Arrived", "Copies", "Span", "is_away", "spans", "staged_nbytes"]

CHUNK = 1 << 26
"""Bytes of most requests for page-locked memory."""

ALIGNMENT = 64
"""Bytes that each part begins at a multiple of: a cache line, and any dtype's size."""


class Span(NamedTuple):
    """Elements of one tensor that lie together in transit."""

    name: str
    begin: int
    end: int
    chunk: int
    offset: int
    """In bytes, within the chunk."""


class Arrived(NamedTuple):
    """Elements of one tensor that are on the host."""

    name: str
    begin: int
    end: int
    values: Tensor
    """``(end - begin,)``, valid until the next update."""


def is_away(tensor: Tensor) -> bool:
    """Return True for a tensor on a device whose copies can go on by themselves."""
    return tensor.device.type not in ("cpu", "meta")


def spans(tensors: Mapping[str, Tensor]) -> tuple[list[Span], list[int]]:
    """Return where the elements of each tensor lie in transit, and the bytes of each chunk."""
    found: list[Span] = []
    chunk, at = 0, 0
    for name, tensor in tensors.items():
        begin, n = 0, tensor.numel()
        while begin < n:
            room = (CHUNK - at) // tensor.itemsize
            if not room:
                chunk, at = chunk + 1, 0
                continue
            end = min(begin + room, n)
            found.append(Span(name, begin, end, chunk, at))
            at += -(-(end - begin) * tensor.itemsize // ALIGNMENT) * ALIGNMENT
            begin = end
    return found, [CHUNK] * chunk + ([1 << max(at - 1, 1).bit_length()] if at else [])


def staged_nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of page-locked memory that these tensors take in transit."""
    return sum(spans(tensors)[1])


class Copies:
    """The tensors of one update in transit."""

    def __init__(self) -> None:
        """Reserve nothing yet."""
        self._chunks: list[Tensor] | None = []
        # Made when it is needed: an average that had no update can be copied and pickled.
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def reserve(self, tensors: Mapping[str, Tensor]) -> bool:
        """Get page-locked memory for tensors on devices; return False if there is none here."""
        self.settle()
        if self._chunks is None:
            return False
        sizes = spans(tensors)[1]
        if [len(chunk) for chunk in self._chunks] == sizes:
            return True
        self._chunks = None  # given back before new ones are asked for, and no second try
        if not (hasattr(torch, "Event") and hasattr(torch, "accelerator")):
            return False
        try:
            for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
                _record(device)
            self._chunks = [_pinned(size) for size in sizes]
        except (RuntimeError, NotImplementedError):
            return False
        return True

    def begin(
        self, tensors: Mapping[str, Tensor], work: Callable[[Sequence[Arrived]], None]
    ) -> None:
        """Queue copies of the tensors, and `work` with them once they have arrived.

        Args:
            tensors: Those reserved for. They may be changed by what is queued there later.
            work: Called in another thread. What it raises is raised by `settle`.
        """
        self.settle()
        placed, _ = spans(tensors)
        assert self._chunks is not None
        arrived: list[Arrived] = []
        flats: dict[str, Tensor] = {}
        for span in placed:
            if span.name not in flats:
                flats = {span.name: tensors[span.name].detach().contiguous().reshape(-1)}
            flat = flats[span.name]
            end = span.offset + (span.end - span.begin) * flat.itemsize
            values = self._chunks[span.chunk][span.offset : end].view(flat.dtype)
            values.copy_(flat[span.begin : span.end], non_blocking=True)
            arrived.append(Arrived(span.name, span.begin, span.end, values))
        events = [_record(device) for device in dict.fromkeys(t.device for t in tensors.values())]
        self._pool = self._pool or ThreadPoolExecutor(1, "streamsoup-average")
        self._pending = self._pool.submit(_wait, events, work, arrived)

    def settle(self) -> None:
        """Wait until all that was begun has arrived and is added up.

        Raises what that raised, again and again: the average holds a part of an update.
        """
        if self._pending is not None:
            self._pending.result()  # an interrupt of the wait leaves it as it is
            self._pending = None

    def abandon(self) -> None:
        """Wait, and forget what was begun, whether it went well or not."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None


def _wait(
    events: Sequence[Any], work: Callable[[Sequence[Arrived]], None], arrived: Sequence[Arrived]
) -> None:
    for event in events:
        event.synchronize()
    work(arrived)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _record(device: torch.device) -> Any:
    """Return an event that is done once all that is now queued on a device is."""
    event = torch.Event(device=device)
    event.record(torch.accelerator.current_stream(device))
    return event
