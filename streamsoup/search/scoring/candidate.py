"""Scoring one candidate: in a live model, in place, or as a folder for a command.

A score must depend on the candidate alone, or a search that is resumed would end elsewhere. So
before each one the model is put into evaluation mode, gradients are turned off, and every random
generator starts from the same seed; afterwards all that is put back as it was.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from streamsoup import version
from streamsoup.engine.plan import FilePlan, Leaf, MixPlan
from streamsoup.errors import OutputError, StreamsoupError, TaskError, option, printable
from streamsoup.formats.files import Descriptors
from streamsoup.live.candidates import Candidates, Moved
from streamsoup.output.write import write_at
from streamsoup.sizes import nbytes_text
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import Folder
from streamsoup.task import Score, Task
from streamsoup.task.command import CommandTask
from streamsoup.task.loading import alone
from streamsoup.task.scores import training_mode

if TYPE_CHECKING:
    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import Order

__all__ = ["FolderScorer", "LiveScorer", "Outcome", "Scorer", "contained"]


log = logging.getLogger("streamsoup")

_PACKAGE = os.path.dirname(os.path.abspath(version.__file__)) + os.sep


class Outcome(msgspec.Struct, frozen=True):
    """What one candidate came to."""

    score: Score
    averaged: Score | None
    """The score with averaged BatchNorm statistics, where `score` is with measured ones."""
    moved: Moved
    scoring_s: float


class Scorer(Protocol):
    """Makes candidates and scores them."""

    def score(self, members: Sequence[int], to_beat: float | None, *, keep: bool) -> Outcome:
        """Score the mean of the ingredients `members`, in that order."""

    def close(self) -> None:
        """Give back what the scorer holds."""


class LiveScorer:
    """Scores candidates in one live model; none of them touches the disk."""

    def __init__(
        self, task: Task, sink: ModelSink, candidates: Candidates, *, split: str, recalibrate: bool
    ) -> None:
        """Score in the model of `sink`, into which `candidates` are put.

        `recalibrate` measures BatchNorm statistics anew for candidates of several ingredients; a
        single one is scored as its file is.
        """
        self._task = task
        self._split = split
        self._recalibrate = recalibrate
        self.sink = sink
        sink.check_apart()
        self._candidates = candidates
        self._training = [(module, module.training) for module in sink.model.modules()]
        self._has_warned = False
        """Whether it was said that the task scores in training mode."""
        self._n_members = 0
        """Of the candidate that is in the model."""

    def score(self, members: Sequence[int], to_beat: float | None, *, keep: bool) -> Outcome:
        """Put the candidate into the model, and score it there."""
        return self.judge(self.put(members, keep=keep), to_beat)

    def judge(self, moved: Moved, to_beat: float | None) -> Outcome:
        """Score what `put` has put into the model."""
        started = time.monotonic()
        if not self._recalibrate or self._n_members == 1:
            score = self._score(to_beat)
            return Outcome(score, None, moved, time.monotonic() - started)
        averaged = self._score(None)
        self._measure()
        score = self._score(to_beat)
        return Outcome(score, averaged, moved, time.monotonic() - started)

    def put(self, members: Sequence[int], *, keep: bool = False) -> Moved:
        """Put the mean of `members` into the model. Raises `TaskError` if the task changed it."""
        self.sink.check()
        self._n_members = len(members)
        try:
            return self._candidates.mix(members, self.sink, keep=keep)
        except BaseException as error:
            error.add_note("the live model holds parts of a candidate now")
            raise
        finally:
            self.sink.mark_changed()

    def close(self) -> None:
        """Put modules back into the modes they were in, and forget the running sum."""
        for module, training in self._training:
            module.training = training
        self._candidates.forget()

    def _score(self, to_beat: float | None) -> Score:
        model = self.sink.model
        with contained(self._task, "score"):
            model.eval()
            score = self._task.score(model, self._split, to_beat)
        if not self._has_warned:
            warning = training_mode(model, f"{self._task.name}: score on {self._split!r}")
            self._has_warned = warning != ""
            if warning:
                log.warning("%s", warning)
        return score

    def _measure(self) -> None:
        from streamsoup.live.recalibration import recalibrate

        with contained(self._task, "recalibration"):
            if not recalibrate(self.sink.model, self._task.recalibration()):
                raise TaskError(
                    f"{self._task.name}: the model has no BatchNorm statistics to measure; "
                    f"leave out {option('recalibrate', True)}"
                )


class FolderScorer:
    """Writes each candidate into a folder of its own name, for a command to score.

    There is only ever one such folder: it is renamed and rewritten. Single ingredients are
    candidates too, so no command is ever given an ingredient's own files.
    """

    def __init__(
        self, task: CommandTask, ordered: Order, candidates: Candidates, *, split: str, folder: str
    ) -> None:
        """Take the folder in which candidates are made; it is on the output's file system."""
        self._task = task
        self._ordered = ordered
        self._candidates = candidates
        self._split = split
        self._folder = folder
        self._n_made = 1
        self._current: str | None = None

    def score(self, members: Sequence[int], to_beat: float | None, *, keep: bool) -> Outcome:
        """Write the candidate, and run the command on it."""
        path = os.path.join(self._folder, f"candidate-{os.getpid()}-{self._n_made:04}")
        ordered = self._ordered
        try:
            self._clear(path)
            sink = _CandidateSink(ordered.plan, ordered.files, path)
            moved = self._candidates.mix(members, sink, keep=keep)
            self._write_side_files(path)
        except OSError as error:
            if isinstance(error, StreamsoupError):
                raise
            raise OutputError(
                f"{printable(path)}: a candidate of {nbytes_text(ordered.plan.nbytes_written)} "
                f"cannot be written: {error.strerror or error}; mend that, and the same command "
                "goes on"
            ) from error
        started = time.monotonic()
        score = self._task.run(path, self._split, to_beat)
        return Outcome(score, None, moved, time.monotonic() - started)

    def close(self) -> None:
        """Remove the candidate, and forget the running sum."""
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
        self._candidates.forget()

    def _clear(self, path: str) -> None:
        """Make a folder for the next candidate, of the one before it if that is still there."""
        before, self._current = self._current, path
        self._n_made += 1
        if before is None or os.path.islink(before) or not os.path.isdir(before):
            if before is not None:  # a command put something else in its place, or nothing
                with Folder.open(self._folder) as folder:
                    folder.remove(os.path.basename(before))
            os.makedirs(path)
            return
        os.rename(before, path)
        expected = {file.name for file in self._ordered.files.files}
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in expected or not entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)

    def _write_side_files(self, folder: str) -> None:
        from streamsoup.output.make import write_beside

        with Folder.open(folder) as opened:
            write_beside(self._ordered, opened)


class _CandidateSink:
    """The files of one candidate: at their places, without digests, and not waited for."""

    def __init__(self, plan: MixPlan, files: FilePlan, folder: str) -> None:
        self._plan, self._files, self._folder = plan, files, folder
        for number, file in enumerate(files.files):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            # A file that a command linked elsewhere, or still writes to, is not ours any more.
            path = self.path(number)
            if os.path.lexists(path) and os.stat(path).st_nlink != 1:
                os.unlink(path)
            descriptor = os.open(path, flags, 0o644)
            try:
                os.ftruncate(descriptor, file.nbytes)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)

    def path(self, number: int) -> str:
        return os.path.join(self._folder, self._files.files[number].name)

    def session(self) -> _CandidateSession:
        return _CandidateSession(self, self._plan, self._files)


class _CandidateSession:
    def __init__(self, sink: _CandidateSink, plan: MixPlan, files: FilePlan) -> None:
        self._sink, self._plan, self._places = sink, plan, files.places
        self._descriptors = Descriptors(2)

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        number, offset = self._places[leaf.tensor]
        offset += start * self._plan.tensors[leaf.tensor].unit_nbytes
        write_at(self._descriptors.writing(self._sink.path(number)), block, offset)

    def close(self) -> None:
        self._descriptors.close()


@contextmanager
def contained(task: Task, what: str, *, seed: int = 0) -> Iterator[None]:
    """Run the user's code: same randomness every time, all settings put back, errors named.

    One thread at a time.
    """
    try:
        with alone(task.folder), _same_randomness(seed):
            yield
    except (KeyboardInterrupt, GeneratorExit, StreamsoupError):
        raise
    except BaseException as error:
        raise TaskError(f"{task.name}: {what} failed: {_describe(error)}") from error


@contextmanager
def _same_randomness(seed: int) -> Iterator[None]:
    """Seed all generators, and put back what they were, and torch's settings."""
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


def _describe(error: BaseException) -> str:
    """Say what went wrong, and where in the user's code."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith(_PACKAGE)]
    text = printable(error, 500)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SystemExit):
        what = f"it called sys.exit({error.code!r})"
    if not frames:
        return what
    ours = next((f for f in frames if "site-packages" not in f.filename), frames[-1])
    return f"{what} (line {ours.lineno} of {printable(ours.filename)}, in {ours.name})"
