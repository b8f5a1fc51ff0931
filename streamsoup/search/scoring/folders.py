"""Scoring candidates by a shell command, which is given a folder with the candidate in it."""

from __future__ import annotations

import os
import shutil
import time

from streamsoup.engine.plan import FilePlan, Leaf, MixPlan
from streamsoup.errors import OutputError, StreamsoupError, printable
from streamsoup.formats.files import Descriptors
from streamsoup.live.candidates import Candidates
from streamsoup.output.make import write_beside
from streamsoup.output.write import write_at
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.scorer import Candidate, Outcome, naming
from streamsoup.search.scoring.work import Work, candidates_of
from streamsoup.sizes import nbytes_text
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import Folder
from streamsoup.task.command import CommandTask

__all__ = ["FolderScorer"]


class FolderScorer:
    """Writes each candidate into a folder of its own name, for a command to score.

    There is only ever one such folder: it is renamed and rewritten. Single ingredients are
    candidates too, so no command is ever given an ingredient's own files.
    """

    n_at_once = 1

    def __init__(self, task: CommandTask, work: Work) -> None:
        """Check the split; write nothing yet. Candidates are made in the folder of `work`."""
        self.name, self.fingerprint = task.name, task.fingerprint
        self.split = task.check_split(work.split)
        self._task, self._work = task, work
        self._candidates: Candidates | None = None
        self._n_made = 1
        self._current: str | None = None

    def prepare(self, recipe: Recipe) -> None:
        """Prepare to make candidates."""
        self._candidates = candidates_of(self._work, None)

    def score(self, candidate: Candidate) -> Outcome:
        """Write the candidate, and run the command on it."""
        assert self._candidates is not None
        path = os.path.join(self._work.folder, f"candidate-{os.getpid()}-{self._n_made:04}")
        ordered = self._work.ordered
        try:
            self._clear(path)
            sink = _CandidateSink(ordered.plan, ordered.files, path)
            moved = self._candidates.mix(candidate.members, sink, keep=self._work.keeps)
            with Folder.open(path) as folder:
                write_beside(ordered, folder)
        except OSError as error:
            if isinstance(error, StreamsoupError):
                raise
            raise OutputError(
                f"{printable(path)}: a candidate of {nbytes_text(ordered.plan.nbytes_written)} "
                f"cannot be written: {error.strerror or error}; fix that, and the same command "
                "resumes"
            ) from error
        started = time.monotonic()
        with naming(candidate):
            score = self._task.run(path, self.split, candidate.to_beat)
        return Outcome(score, None, moved, time.monotonic() - started)

    def close(self) -> None:
        """Remove the candidate, and forget the running sum."""
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
        if self._candidates is not None:
            self._candidates.forget()

    def _clear(self, path: str) -> None:
        """Make a folder for the next candidate, of the one before it if that is still there."""
        before, self._current = self._current, path
        self._n_made += 1
        if before is None or os.path.islink(before) or not os.path.isdir(before):
            if before is not None:  # a command put something else in its place, or nothing
                with Folder.open(self._work.folder) as folder:
                    folder.remove(os.path.basename(before))
            os.makedirs(path)
            return
        os.rename(before, path)
        expected = {file.name for file in self._work.ordered.files.files}
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in expected or not entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


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
