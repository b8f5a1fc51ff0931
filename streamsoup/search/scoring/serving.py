"""What a worker process does: it loads the task, builds the model, and scores what it is sent.

It is told its `Work`, and then one candidate after the other: members, score to beat, and whether
to keep their sum. It answers in pairs of a word and what goes with it; see `workers` for who asks::

    loaded   the task is there: its name, fingerprint and split
    doing    the user's code runs from now on, and what it is; whoever asked may look at the clock
    mixing   it is over, and our own code runs
    done     the outcome of a candidate
    error    the class and the text of an error; nothing comes after it

It dies with the process that started it.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.errors import BudgetError, StreamsoupError, option
from streamsoup.live.candidates import Candidates
from streamsoup.live.running import SumsPlace, plan_sums
from streamsoup.options import Options
from streamsoup.search.scoring.candidate import FolderScorer, LiveScorer, contained
from streamsoup.search.scoring.connection import Connection
from streamsoup.system.supervise import die_with

if TYPE_CHECKING:
    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import Order

__all__ = ["Work", "candidates_of", "serve"]


class Work(msgspec.Struct, frozen=True):
    """What a worker is told when it starts; it has to survive pickling."""

    task: Any
    split: str | None
    recalibrate: bool
    ordered: Order
    options: Options
    sums: SumsPlace | None
    budget: int
    """Bytes for blocks and the running sum."""
    scratch: str
    n_workers: int
    """Workers that share a device, and the budget there."""


def candidates_of(work: Work, sink: ModelSink | None) -> Candidates:
    """Make the candidates that some work is about, in the live model of `sink` or in files.

    Raises `BudgetError` and `DeviceError`.
    """
    ordered, threads = work.ordered, work.options.n_threads
    where = "cpu, on the way to disk"
    if sink is not None:
        from streamsoup.engine.device import device_budget
        from streamsoup.kernels.accelerator.device import open_device
        from streamsoup.live.mix import DeviceCandidates, device_of, device_text

        name = device_of(sink, work.options)
        if name != "cpu":
            whole = device_budget(open_device(name), work.options)
            options = replace(work.options, device_memory=whole // work.n_workers)
            try:
                return DeviceCandidates(
                    ordered.plan, sink, mapped=ordered.mapped, place=work.sums, options=options
                )
            except BudgetError as error:
                shared = f"; {work.n_workers} jobs share it" if work.n_workers > 1 else ""
                raise BudgetError(f"{error.text}{shared}") from None
        where = device_text(sink, work.options)
    sums = plan_sums(
        ordered.plan,
        mapped=ordered.mapped,
        threads=threads,
        budget=work.budget,
        scratch=work.scratch,
        place=work.sums,
    )
    return Candidates(
        ordered.plan,
        sums,
        mapped=ordered.mapped,
        threads=threads,
        scratch=work.scratch,
        where=where,
    )


def serve(descriptor: int, parent: int, is_live: bool) -> None:
    """Be a worker: load the task, then score what comes, until nothing more does."""
    die_with(parent)
    connection = Connection(socket.socket(fileno=descriptor))
    mine = os.getpid()
    status = 1

    def say(kind: str, content: Any = None) -> None:
        if os.getpid() != mine:
            os._exit(0)  # a task forked, and its child came back here
        connection.send(pickle.dumps((kind, content)))

    try:
        _serve(connection, say, is_live)
        status = 0
    except BaseException:
        traceback.print_exc()  # the last it printed
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # the task may have closed it
                stream.flush()
        os._exit(status)


def _serve(connection: Connection, say: Callable[..., None], is_live: bool) -> None:
    try:
        (_serve_live if is_live else _serve_command)(connection, say)
    except EOFError:
        pass
    except StreamsoupError as error:
        say("error", (type(error).__name__, error.text))
    except MemoryError:
        say(
            "error",
            (
                "BudgetError",
                f"a worker ran out of memory; lower {option('memory')}, or use fewer jobs",
            ),
        )


def _next(connection: Connection) -> bytes:
    """Wait for what is asked next."""
    content = connection.take(wait=True)
    assert content is not None
    return content


def _serve_command(connection: Connection, say: Callable[..., None]) -> None:
    work: Work = pickle.loads(_next(connection))
    task, folder = work.task, os.path.dirname(work.scratch)
    split = task.check_split(work.split)
    say("loaded", {"task": task.name, "code": task.fingerprint, "split": split})
    scorer: FolderScorer | None = None
    while True:
        members, to_beat, keep = pickle.loads(_next(connection))
        scorer = scorer or FolderScorer(
            task, work.ordered, candidates_of(work, None), split=split, folder=folder
        )
        say("done", scorer.score(members, to_beat, keep=keep))


def _serve_live(connection: Connection, say: Callable[..., None]) -> None:
    # Before the clock starts: every live task needs it.
    from streamsoup.live.model import ModelSink  # imports torch
    from streamsoup.task import load_task

    pickled = _next(connection)
    say("doing", "loading the task")
    work: Work = pickle.loads(pickled)
    task = load_task(work.task)
    split = task.check_split(work.split)
    if work.recalibrate:
        task.need("recalibration")
    say("loaded", {"task": task.name, "code": task.fingerprint, "split": split})
    scorer: LiveScorer | None = None
    while True:
        members, to_beat, keep = pickle.loads(_next(connection))
        if scorer is None:
            say("doing", f"{task.name}: build")
            with contained(task, "build"):
                model = task.build()
            say("mixing")
            sink = ModelSink(model, work.ordered.plan)
            scorer = LiveScorer(
                task, sink, candidates_of(work, sink), split=split, recalibrate=work.recalibrate
            )
        moved = scorer.put(members, keep=keep)
        say("doing", f"{task.name}: score")
        say("done", scorer.judge(moved, to_beat))
