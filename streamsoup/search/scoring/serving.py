"""What a worker process does: it loads the task, prepares to score, and scores what it is sent.

It is sent its `Work`, and then one `Candidate` after the other. It answers in pairs of a word and
what goes with it; the other end is in `workers`::

    loaded   the task is loaded: its name, fingerprint and split
    doing    the user's code runs from now on, and what it is; the other end starts its clock
    mixing   the user's code has returned, and our own runs
    done     the outcome of a candidate
    error    the class, the text and the traceback of an error; nothing comes after it

It ends with the process that started it (`task.keeper`).
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from streamsoup.errors import StreamsoupError, option
from streamsoup.search.scoring.connection import Connection
from streamsoup.search.scoring.folders import FolderScorer
from streamsoup.search.scoring.live import LiveScorer
from streamsoup.search.scoring.scorer import Scorer
from streamsoup.search.scoring.work import Work

__all__ = ["serve"]


def serve(descriptor: int, is_live: bool) -> None:
    """Be a worker: load the task, then score what is sent, until the other end closes."""
    connection = Connection(socket.socket(fileno=descriptor))
    mine = os.getpid()
    status = 1

    def say(kind: str, content: Any = None) -> None:
        if os.getpid() != mine:
            os._exit(0)  # a task forked, and its child returned here
        connection.send(pickle.dumps((kind, content)))

    try:
        _serve(connection, say, is_live)
        status = 0
    except BaseException:
        traceback.print_exc()  # the last that it prints
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # the task may have closed it
                stream.flush()
        os._exit(status)


def _serve(connection: Connection, say: Callable[..., None], is_live: bool) -> None:
    try:
        scorer = (_load_live if is_live else _load_command)(connection, say)
        told = {"task": scorer.name, "code": scorer.fingerprint, "split": scorer.split}
        say("loaded", told)
        is_prepared = False
        while True:
            candidate = pickle.loads(_next(connection))
            if not is_prepared:
                scorer.prepare(candidate.recipe)
                is_prepared = True
            say("done", scorer.score(candidate))
    except EOFError:
        pass
    except StreamsoupError as error:
        say("error", (type(error).__name__, error.text, traceback.format_exc()))
    except MemoryError:
        text = f"a worker ran out of memory; lower {option('memory')}, or use fewer jobs"
        say("error", ("BudgetError", text, traceback.format_exc()))


def _next(connection: Connection) -> bytes:
    """Wait for the next message."""
    content = connection.take(wait=True)
    assert content is not None
    return content


def _load_command(connection: Connection, say: Callable[..., None]) -> Scorer:
    work: Work = pickle.loads(_next(connection))
    return FolderScorer(work.task, work)


def _load_live(connection: Connection, say: Callable[..., None]) -> Scorer:
    # Before the clock starts: every live task needs it.
    import streamsoup.live.model  # noqa: F401 - imports torch
    from streamsoup.task import load_task

    pickled = _next(connection)
    say("doing", "loading the task")
    work: Work = pickle.loads(pickled)
    task = load_task(work.task)

    def on_code(what: str) -> None:
        say(*(("doing", f"{task.name}: {what}") if what else ("mixing",)))

    return LiveScorer(task, work, on_code=on_code)
