"""A device that does its queued work in the worst orders that streams and events allow.

Nothing is done when it is asked for. Work waits in its stream's queue until the host has to see a
result; then the streams are run in an order of preference, each as far as its waits let it, so
that whoever can be early is, and whoever can be late is. Which order is worst depends on the
wait that somebody forgot, so a test tries all. Memory is handed out full of poison.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

POISON = 0xCB


@dataclass
class Event:
    """The number of its last record, and of the last one that came to pass."""

    recorded: int = 0
    passed: int = 0
    stream: int = -1


@dataclass
class Stream:
    """Work in order: closures, records and waits."""

    number: int
    queue: deque[tuple[str, object, int]] = field(default_factory=deque)


class SimulatedDevice:
    """A `streamsoup.kernels.accelerator.device.Device` over plain tensors."""

    name = "simulated"

    def __init__(
        self,
        order: Literal["eager", "lazy", "random"],
        preference: tuple[int, ...] = (0, 1, 2),
        seed: int = 0,
        forget: int | None = None,
        hasten: int | None = None,
    ) -> None:
        """Run ``eager``: as soon as allowed; ``lazy``: only for the host; or ``random``.

        Streams are run by `preference`, in the order in which they were made. Faults: `forget`
        leaves out the waits of one of `KINDS`; `hasten` records the events of one of `MOVES`
        before the work that they should come after.
        """
        self._order = order
        self._preference = preference
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self._forget = None if forget is None else KINDS[forget]
        self._hasten = None if hasten is None else MOVES[hasten]
        self.waits: set[tuple[str, int, int]] = set()
        """The kinds of wait met so far: who waits, which stream, for an event of which stream."""
        self.sizes: list[int] = []
        """Bytes of each allocation."""

    def is_idle(self) -> bool:
        return not any(stream.queue for stream in self._streams)

    # ---- what the pipeline calls

    def stream(self) -> Stream:
        self._streams.append(Stream(len(self._streams)))
        return self._streams[-1]

    def event(self) -> Event:
        return Event()

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        return self.device(n, dtype)

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = n * dtype.itemsize
        self.sizes.append(nbytes)
        return torch.full((nbytes,), POISON, dtype=torch.uint8).view(dtype)

    def launch(self, stream: Stream, work: Callable[[], object]) -> None:
        stream.queue.append(("work", work, 0))
        self._maybe()

    def record(self, event: Event, stream: Stream) -> None:
        event.recorded += 1
        event.stream = stream.number
        entry = ("record", event, event.recorded)
        if self._hasten == stream.number and stream.queue:
            stream.queue.insert(len(stream.queue) - 1, entry)
        else:
            stream.queue.append(entry)
        self._maybe()

    def wait(self, stream: Stream, event: Event) -> None:
        if not self._forgets("stream", stream.number, event):
            stream.queue.append(("wait", event, event.recorded))
        self._maybe()

    def host_wait(self, event: Event) -> None:
        wanted = event.recorded
        if not self._forgets("host", -1, event):
            while event.passed < wanted:
                assert self._step(), "a deadlock"

    def settle(self) -> None:
        while self._step():
            pass
        assert self.is_idle(), "a deadlock"

    def free_nbytes(self) -> int:
        return 1 << 30

    # ---- how it goes about it

    def _forgets(self, who: str, number: int, event: Event) -> bool:
        kind = (who, number, event.stream)
        if event.stream >= 0:  # an event never recorded holds nobody back
            self.waits.add(kind)
        return kind == self._forget

    def _maybe(self) -> None:
        if self._order == "eager":
            while self._step():
                pass
        elif self._order == "random":
            for _ in range(self._random.randrange(4)):
                self._step()

    def _step(self) -> bool:
        """Do one thing, if there is one that may be done."""
        order = [self._streams[i] for i in self._preference if i < len(self._streams)]
        if self._order == "random":
            self._random.shuffle(order)
        for stream in order:
            if stream.queue:
                what, thing, number = stream.queue[0]
                if what == "wait" and thing.passed < number:  # type: ignore[attr-defined]
                    continue
                stream.queue.popleft()
                if what == "work":
                    thing()  # type: ignore[operator]
                elif what == "record":
                    thing.passed = number  # type: ignore[attr-defined]
                return True
        return False


class TimedDevice:
    """A device over plain tensors that does all at the call, and keeps what time it would take.

    Everything that is launched takes a tick; streams go on side by side; the host's own work takes
    none.
    """

    name = "timed"

    def __init__(self) -> None:
        self._host = 0
        self._streams: list[int] = []

    def ticks(self) -> int:
        """Return the time at which all that was launched is done."""
        return max(self._streams, default=0)

    def stream(self) -> int:
        self._streams.append(0)
        return len(self._streams) - 1

    def event(self) -> list[int]:
        return [0]

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(n, dtype=dtype)

    device = pinned

    def launch(self, stream: int, work: Callable[[], object]) -> None:
        self._streams[stream] = max(self._streams[stream], self._host) + 1
        work()

    def record(self, event: list[int], stream: int) -> None:
        event[0] = self._streams[stream]

    def wait(self, stream: int, event: list[int]) -> None:
        self._streams[stream] = max(self._streams[stream], event[0])

    def host_wait(self, event: list[int]) -> None:
        self._host = max(self._host, event[0])

    def settle(self) -> None:
        self._host = max(self._host, self.ticks())

    def free_nbytes(self) -> int:
        return 1 << 30


COPYING, SUMMING, ENDING = range(3)
KINDS = [
    ("host", -1, COPYING),
    ("stream", COPYING, SUMMING),
    ("stream", SUMMING, COPYING),
    ("stream", ENDING, SUMMING),
    ("host", -1, ENDING),
]
"""The five waits of the pipeline, in the order in which its page lists them."""

MOVES = [COPYING, SUMMING, ENDING]
"""The streams whose records can be hastened."""
