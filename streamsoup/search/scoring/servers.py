"""Scoring in inference servers: each candidate is written once, loaded by a server, and scored.

What a score is of is never taken on trust:

1. Each candidate has a version of its own, a digest of its recipe and its ingredients. The server
   is told it with the weights, and asked for it before the score and after.
2. A load that fails is tried again, and so is a score during which the server went away or came to
   have another version: loading and scoring may be repeated without harm.
3. A score that is that of the candidate before, to the bit, may be of stale weights: the candidate
   is loaded once more, and scored again. If the score stays, it counts (accuracies may be equal).
4. What does not get better ends the search with an error that names the server. All scores until
   then are kept, and the same command goes on.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import xxhash
from msgspec.structs import replace

from streamsoup.errors import OutputError, StreamsoupError, TaskError, count, option, printable
from streamsoup.live.candidates import Candidates
from streamsoup.live.rule_candidates import RuleCandidates
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.candidate_folder import CandidateFolder
from streamsoup.search.scoring.protocols import NoAnswerError, Refused, Server
from streamsoup.search.scoring.scorer import Candidate, Outcome, naming
from streamsoup.search.scoring.work import Work, candidates_of, for_candidate
from streamsoup.system.folders import Folder, other_writer
from streamsoup.task import Score, Task
from streamsoup.task.command import CommandTask
from streamsoup.task.running import described

__all__ = ["ServerScorer"]

log = logging.getLogger("streamsoup")

TRIES = 3
"""How often a candidate is loaded, or scored, before its server is given up."""

PAUSE_S = 1.0
"""How long to wait before the second try; each further wait is twice as long."""

LONGEST_PAUSE_S = 20.0

BEGINNING_S = 10.0
"""How long to wait for a server that does not answer before the search begins."""


class ServerScorer:
    """Scores candidates in servers, one at a time in each."""

    def __init__(
        self,
        task: CommandTask | Task,
        works: Sequence[Work],
        servers: Sequence[Server],
        *,
        scratch: str | None,
        reload_timeout: float,
    ) -> None:
        """Check the split; ask no server yet.

        Args:
            task: A command, which finds the address of its server as ``{server}`` and in
                ``STREAMSOUP_SERVER``; or a task whose ``score`` is given the address in the place
                of a model.
            works: What to score, one for each server.
            servers: Where.
            scratch: The folder to write candidates in, which the servers see under the same path;
                None for the folder of the search.
            reload_timeout: Seconds that a server may take to load a candidate, or to come back.
        """
        self.name, self.fingerprint = task.name, task.fingerprint
        self.split = task.check_split(works[0].split)
        self.n_at_once = len(servers)
        if isinstance(task, Task):
            task.need("score")
        self._task, self._works, self._timeout = task, works, reload_timeout
        self._scratch = scratch
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._servers = servers
        self._idle: list[_Held] = []
        self._held: list[_Held] = []
        self._room: Folder | None = None
        self.report = {"reloads": 0, "rescored": 0, "equal": 0}
        """How often a load was repeated, a score was, and a repeated score stayed the same."""

    def prepare(self, recipe: Recipe) -> None:
        """Make room for the candidates, and see that all servers answer."""
        for work, server in zip(self._works, self._servers, strict=True):
            where = self._open_room(work)
            number = len(self._held)
            self._held.append(
                _Held(
                    server,
                    candidates_of(work, None),
                    CandidateFolder(work.ordered, where, f"candidate-{number}-"),
                    work,
                )
            )
        self._check_room()
        for held in self._held:
            # One that is not there at all is a slip of the address, most likely.
            timeout = min(self._timeout, BEGINNING_S)
            self._patiently(held.server, "answer", held.server.version, timeout)
        self._idle = list(reversed(self._held))

    def score(self, candidate: Candidate) -> Outcome:
        """Score a candidate in a server that is idle."""
        with self._lock:
            held = self._idle.pop()
        try:
            with naming(candidate):
                return self._score(held, candidate)
        finally:
            with self._lock:
                self._idle.append(held)

    def close(self) -> None:
        """Remove the candidates; calls of `score` that wait for a server fail soon."""
        self._stop.set()
        for server in self._servers:
            server.close()
        for held in self._held:
            held.folder.remove()
            held.candidates.forget()
        if self._room is not None:
            room, self._room = self._room, None
            above, name = os.path.split(room.path)
            room.close()
            with Folder.open(above) as folder:
                folder.remove(name)

    def _score(self, held: _Held, candidate: Candidate) -> Outcome:
        started = time.monotonic()
        ready = for_candidate(held.candidates, candidate)
        moved = held.folder.write(ready, candidate.members, keep=held.work.keeps)
        made = time.monotonic()
        version = self._version(candidate)
        score = self._loaded_and_scored(held, candidate, version)
        if held.last is not None and held.last == _bits(score):
            self._count("rescored")
            again = self._loaded_and_scored(held, candidate, version)
            if _bits(again) == held.last:
                self._count("equal")
            else:
                where = printable(held.server.url)
                log.warning(
                    "%s: a score that was the same as the one before changed after another load: "
                    "the server had kept old weights",
                    where,
                )
            score = again
        held.last = _bits(score)
        return Outcome(
            score, None, replace(moved, elapsed_s=made - started), time.monotonic() - made
        )

    def _loaded_and_scored(self, held: _Held, candidate: Candidate, version: str) -> Score:
        """Load a candidate and score it, until it was the same weights before and after."""
        where = printable(held.server.url)
        for last in (False,) * (TRIES - 1) + (True,):
            self._load(held, version)
            try:
                score = self._ask(held, candidate.to_beat)
            except TaskError as error:
                # A server that is as it was has nothing to do with it: the task failed.
                why = self._changed(held.server, version)
                if why is None or last:
                    raise
                log.warning("%s: %s while it was scored (%s); again", where, why, error.text)
                continue
            why = self._changed(held.server, version)
            if why is None:
                return score
            if last:
                break
            log.warning("%s: %s while it was scored; its score is thrown away", where, why)
        raise TaskError(
            f"{where}: {why} while a candidate was scored, {count(TRIES, 'time')} in a row; let "
            "nothing else load weights there, and run the same command again"
        )

    def _load(self, held: _Held, version: str) -> None:
        """Load the candidate into its server, and see that it has it."""
        server, path = held.server, held.folder.path

        def load() -> None:
            server.load(path, version, self._timeout)
            found = server.version()
            if found != version:
                named = "no version" if found is None else f"version {printable(found, 60)}"
                raise Refused(
                    f"{printable(server.url)}: says it has {named} after loading {version}"
                )

        self._patiently(server, "load the candidate", load, self._timeout)

    def _patiently(
        self, server: Server, what: str, call: Callable[[], Any], timeout_s: float
    ) -> None:
        """Call until it succeeds: a server that refuses a few times, one that is away longer."""
        until = time.monotonic() + timeout_s
        pause_s, n_refused, n_away = PAUSE_S, 0, 0
        while True:
            try:
                call()
                return
            except Refused as error:
                n_refused += 1
                failed: TaskError = error
                is_over = n_refused == TRIES
            except NoAnswerError as error:
                n_away += 1
                failed = error
                is_over = n_away > 1 and time.monotonic() > until  # a hang is tried once more
            if is_over or self._stop.is_set():
                raise TaskError(
                    f"{failed.text}; it did not {what} ({option('reload_timeout')} is "
                    f"{self._timeout:g} s); see its log, and run the same command again"
                ) from None
            self._count("reloads")
            log.warning("%s; trying again", failed.text)
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _changed(self, server: Server, version: str) -> str | None:
        """Return how a server is not as it was when it loaded a version; None if it is."""
        try:
            found = server.version()
        except NoAnswerError:
            return "the server went away"
        except Refused as error:
            return f"the server failed ({error.text})"
        return None if found == version else f"the weights became version {printable(found, 60)}"

    def _ask(self, held: _Held, to_beat: float | None) -> Score:
        """Score what a server has loaded."""
        url = held.server.url
        if isinstance(self._task, CommandTask):
            return self._task.run(
                held.folder.path, self.split, to_beat, server=url, stop=self._stop
            )
        try:
            return self._task.score_beside_others(url, self.split, to_beat)
        except StreamsoupError:
            raise
        except Exception as error:
            raise TaskError(f"{self._task.name}: score failed: {described(error)}") from error

    def _version(self, candidate: Candidate) -> str:
        """Return what tells a candidate from every other: a digest of all it is made of."""
        ingredients = self._works[0].ordered.plan.ingredients
        made_of = [ingredients[i].fingerprint for i in candidate.members]
        text = msgspec.json.encode([candidate.recipe, made_of], enc_hook=str)
        return xxhash.xxh3_128_hexdigest(text)

    def _open_room(self, work: Work) -> str:
        """Return the folder that candidates are written in: a new one in the scratch folder."""
        if self._scratch is None:
            return work.folder
        if self._room is None:
            # Its name is that of the search, which no other run has at the same time: what an
            # earlier run that was killed has left there is removed.
            mine = xxhash.xxh3_64_hexdigest(os.path.realpath(work.folder).encode())
            name = f"streamsoup-{mine}"
            try:
                with Folder.open(self._scratch) as above:
                    there = above.status(name)
                    if there is not None:
                        with above.folder(name) as old:
                            if who := other_writer(old, above):
                                raise OutputError(
                                    f"{printable(old.path)}: {who}; remove it, or choose another "
                                    f"{option('scratch')}"
                                )
                        above.remove(name)
                    self._room = above.make(name, 0o755)
            except OSError as error:
                if isinstance(error, OutputError):
                    raise
                raise OutputError(
                    f"{printable(self._scratch)}: candidates cannot be written there: "
                    f"{error.strerror}; make that folder, or choose another {option('scratch')}"
                ) from None
        return self._room.path

    def _check_room(self) -> None:
        """Raise `OutputError` if the candidates of all servers do not fit on the disk."""
        where = self._room.path if self._room is not None else self._works[0].folder
        needed = sum(work.ordered.plan.nbytes_written for work in self._works)
        free = os.statvfs(where)
        if needed > free.f_bavail * free.f_frsize:
            from streamsoup.sizes import nbytes_text

            raise OutputError(
                f"{printable(where)}: has {nbytes_text(free.f_bavail * free.f_frsize)} free, and "
                f"{count(len(self._works), 'candidate')} at once take "
                f"{nbytes_text(needed, up=True)}; choose another {option('scratch')}"
            )

    def _count(self, what: str) -> None:
        with self._lock:
            self.report[what] += 1


class _Held:
    """One server, and the candidate on disk for it."""

    def __init__(
        self,
        server: Server,
        candidates: Candidates | RuleCandidates,
        folder: CandidateFolder,
        work: Work,
    ) -> None:
        self.server, self.candidates, self.folder, self.work = server, candidates, folder, work
        self.last: str | None = None
        """The score of the candidate before, with its results by example."""


def _bits(score: Score) -> str:
    """Return a score as text, to the bit."""
    return json.dumps(score.to_record(), sort_keys=True)
