"""Scoring candidates by a shell command, which is given a folder with the candidate in it."""

from __future__ import annotations

import os
import time

from streamsoup.live.candidates import Candidates
from streamsoup.live.rule_candidates import RuleCandidates
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.candidate_folder import CandidateFolder
from streamsoup.search.scoring.scorer import Candidate, Outcome, naming
from streamsoup.search.scoring.work import Work, candidates_of, for_candidate
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
        self._candidates: Candidates | RuleCandidates | None = None
        # On several machines, processes may have the same number; no two have the same scratch.
        number = os.path.basename(work.scratch).removeprefix("sum-")
        prefix = f"candidate-{os.getpid()}-{number}-"
        self._folder = CandidateFolder(work.ordered, work.folder, prefix)

    def prepare(self, recipe: Recipe) -> None:
        """Prepare to make candidates."""
        self._candidates = candidates_of(self._work, None)

    def score(self, candidate: Candidate) -> Outcome:
        """Write the candidate, and run the command on it."""
        assert self._candidates is not None
        ready = for_candidate(self._candidates, candidate)
        moved = self._folder.write(ready, candidate.members, keep=self._work.keeps)
        started = time.monotonic()
        with naming(candidate):
            score = self._task.run(self._folder.path, self.split, candidate.to_beat)
        return Outcome(score, None, moved, time.monotonic() - started)

    def close(self) -> None:
        """Remove the candidate, and forget the running sum."""
        self._folder.remove()
        if self._candidates is not None:
            self._candidates.forget()
