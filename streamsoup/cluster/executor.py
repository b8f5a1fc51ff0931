"""The Executor joint: who does units of work, in other processes that see the same files."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from streamsoup import errors
from streamsoup.cluster.units import Unit
from streamsoup.errors import ClusterError, StreamsoupError, option, printable

__all__ = ["Answer", "Executor", "Work", "attempt", "result_of"]

Work = Callable[[bytes, Any], Any]
"""Does one unit: called with what all units share, and with what is its own. It can be pickled.

It may be called several times for one unit, at the same time, too: then it does the same twice.
"""


class Answer(msgspec.Struct, frozen=True):
    """What became of a unit in another process; plain data."""

    result: Any = None
    kind: str = ""
    """Name of the class of its error, which is ours or `OSError`; empty without one."""
    text: str = ""
    errno: int | None = None
    trace: str = ""


@runtime_checkable
class Executor(Protocol):
    """Does units of work in processes of its own, which it may lose and start anew."""

    def open(self) -> None:
        """Connect to what does the work; a second time does nothing.

        Raises `ClusterError` if that cannot be reached.
        """

    def n_cpus(self) -> int:
        """Return the CPUs of its smallest node: no unit may ask for more."""

    def n_slots(self, n_cpus: int, nbytes: int) -> int:
        """Return how many units that take so many CPUs and bytes run at the same time."""

    def run(
        self,
        work: Work,
        shared: bytes,
        units: Sequence[Unit],
        *,
        n_cpus: int,
        nbytes: int,
        on_done: Callable[[Unit, Any, str], None],
        on_wait: Callable[[], None],
    ) -> None:
        """Do all units, in any order, and return when they are done.

        Args:
            work: Called in other processes with `shared` and `Unit.own`. It raises nothing: errors
                are a part of what it returns.
            shared: What all units share.
            units: What is to be done.
            n_cpus: Threads of a unit.
            nbytes: Memory that a unit takes.
            on_done: Called in this thread with each unit, with what `work` returned, and with the
                name of the node. It may raise, and then no unit is to be done any more.
            on_wait: Called in this thread some times a second; the same.

        Raises:
            ClusterError: A unit is lost too often, or cannot be done anywhere.
        """

    def close(self) -> None:
        """End what it has started; a second time does nothing."""


def attempt(work: Work, shared: bytes, own: Any) -> Answer:
    """Do a unit, in the process that is to do it; errors become part of the answer."""
    try:
        return Answer(work(shared, own))
    except StreamsoupError as error:
        number = error.errno if isinstance(error, OSError) else None
        return Answer(
            None, type(error).__name__, error.text, number, traceback.format_exc(limit=-20)
        )
    except OSError as error:
        where = "" if error.filename is None else f"{printable(str(error.filename))}: "
        return Answer(None, "OSError", f"{where}{error.strerror or error}", error.errno)
    except MemoryError:
        text = f"out of memory; lower {option('memory')} or {option('threads')}"
        return Answer(None, "BudgetError", text)
    except Exception as error:
        text = f"{type(error).__name__}: {printable(error, 500)}"
        return Answer(None, "ClusterError", text, None, traceback.format_exc(limit=-20))


def result_of(answer: Answer, node: str) -> Any:
    """Return the result of a unit, or raise its error, with the name of the node at its end."""
    if not answer.kind:
        return answer.result
    text = f"{answer.text}; this was on {node}"
    if answer.kind == "OSError":
        raise OSError(answer.errno, text)
    error: StreamsoupError = getattr(errors, answer.kind, ClusterError)(text)
    if isinstance(error, OSError):
        error.errno = answer.errno
    raise error from (_ThereError(answer.trace) if answer.trace else None)


class _ThereError(Exception):
    """The cause of an error in another process: its traceback there."""

    def __str__(self) -> str:
        return f"in another process\n{self.args[0]}"
