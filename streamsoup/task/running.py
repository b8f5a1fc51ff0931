"""Running a user's code: the same randomness every time, all settings put back, failures named.

One thread at a time: the working folder, random generators and torch's settings belong to the
whole process.
"""

from __future__ import annotations

import os
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from streamsoup import version
from streamsoup.errors import StreamsoupError, TaskError, printable
from streamsoup.task.code import is_installed

__all__ = ["alone", "contained", "described", "loaded"]

_PACKAGE = os.path.dirname(os.path.abspath(version.__file__)) + os.sep

_LOCKS: dict[int, threading.RLock] = {}
"""The lock of each process, by its id. A forked child makes its own: the thread that holds its
parent's lock does not exist there."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


@contextmanager
def alone() -> Iterator[None]:
    """Run the user's code, one thread at a time; restore the working folder and numpy's errors."""
    with _LOCKS.setdefault(os.getpid(), threading.RLock()), np.errstate():
        path_only = getattr(os, "O_PATH", os.O_RDONLY)  # which needs no right to list it
        folder = os.open(".", path_only | os.O_CLOEXEC)  # valid even if it was removed
        try:
            yield
        finally:
            os.fchdir(folder)
            os.close(folder)


@contextmanager
def contained(task: _Named, what: str, *, seed: int = 0) -> Iterator[None]:
    """Run a function of a task without side effects on this process.

    Args:
        task: Named in messages.
        what: The function, for messages.
        seed: Of every random generator; they are put back afterwards, as are torch's settings.

    Raises:
        TaskError: For whatever the function raises, with the line where it failed.
    """
    try:
        with alone(), _same_randomness(seed):
            yield
    except (KeyboardInterrupt, GeneratorExit, StreamsoupError):
        raise
    except BaseException as error:
        raise TaskError(f"{task.name}: {what} failed: {described(error)}") from error


def loaded(where: str, run: Callable[[], Any]) -> Any:
    """Run code that makes a task, and return what it returns.

    Raises `TaskError`, which starts with `where` and names the line, for whatever it raises.
    """
    try:
        with alone():
            return run()
    except (Exception, SystemExit) as error:
        raise TaskError(f"{where}: cannot be loaded: {described(error)}") from error


@contextmanager
def _same_randomness(seed: int) -> Iterator[None]:
    """Seed all generators; restore them, and torch's settings."""
    import torch

    state = random.getstate(), np.random.get_state()  # noqa: NPY002 - tasks may use it
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            # Not `torch.manual_seed`: it takes longer than a small model's score, and a lock that
            # a forked child may wait for in vain.
            torch.default_generator.manual_seed(seed)
            for kind in (torch.cuda, torch.xpu):
                if kind.is_initialized():
                    kind.manual_seed_all(seed)
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def described(error: BaseException) -> str:
    """Return an error in words, with the last line of the user's own code that led to it."""
    text = printable(error, 500)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SystemExit):
        what = f"it called sys.exit({error.code!r})"
    if isinstance(error, SyntaxError):  # its text has the line
        return what
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith((_PACKAGE, "<frozen "))]
    own = [frame for frame in frames if not is_installed(frame.filename)] or frames
    if not own:
        return what
    last = own[-1]
    return f"{what} (line {last.lineno} of {printable(last.filename)}, in {last.name})"
