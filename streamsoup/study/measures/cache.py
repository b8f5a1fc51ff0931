"""Scores and logits, kept by content: what was measured once is never measured again.

A key is made of what an answer depends on: the digests of the ingredients that went into the
mixture, its coefficients, the task's code and the split. So one more ingredient costs only what is
new, a changed checkpoint or task finds nothing, and a run that was killed is taken up by the same
command. What the task reads, but for its own file and the modules beside it, is not in the key.

::

    CACHE/lock         held by the one run that measures here
    CACHE/journal      a record for each digest, score and file of logits
    CACHE/….npy        logits (example, class) of one mixture on one split; labels of a split

Records survive a kill at once, and a power failure after `SYNC_S`. Files are known by their digest:
one that was cut short or damaged counts as absent.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamsoup.errors import OutputError
from streamsoup.formats.ingredients import Ingredient
from streamsoup.output.journal import Journal, named
from streamsoup.search.folder import lock_folder
from streamsoup.study.measures.calibration import AnyFloats, Labels
from streamsoup.system.folders import replacing
from streamsoup.system.regular import reading
from streamsoup.system.schemes import check_local
from streamsoup.task import Score

__all__ = ["Cache"]

SYNC_S = 2.0
"""Time after which answers are brought to disk for sure: what a power failure can cost."""


class Cache:
    """A folder of answers, held by this run."""

    def __init__(self, folder: str) -> None:
        """Make the folder if need be, take it, and read what is known.

        Raises `OutputBusyError` if another run holds it, `OutputError` if it is not ours, and
        `ResumeError` if its journal is damaged.
        """
        check_local(folder, OutputError)
        self.folder = folder
        self._held, self._lock = lock_folder(os.path.realpath(folder))
        try:
            self._journal = Journal(os.path.join(folder, "journal"), self._held)
        except BaseException:
            self._unlock()
            raise
        self._synced = time.monotonic()
        self._intact: set[str] = set()
        self._scores: dict[str, Score] = {}
        self._logits: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        for record in self._journal:
            self._index(record)

    def __enter__(self) -> Cache:
        """Return the cache itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock on the folder; the answers stay."""
        with nullcontext() if error is None else suppress(OutputError):
            self.close()

    def close(self) -> None:
        """Release the lock on the folder. Raises `OutputError` if answers cannot be written."""
        if self._held.descriptor < 0:
            return
        try:
            with named(self._journal.path):
                self._journal.sync()
        finally:
            self._journal.close()
            self._unlock()

    def _unlock(self) -> None:
        self._lock.close()
        self._held.close()

    def digest_of(self, ingredient: Ingredient) -> str | None:
        """Return the digest of an ingredient whose files are those that were digested."""
        return self._digests.get(_identity(ingredient))

    def put_digest(self, ingredient: Ingredient, digest: str) -> None:
        """Remember the digest of an ingredient."""
        self._add({"digest": digest, "of": _identity(ingredient)})

    def score(self, key: str) -> Score | None:
        """Return a score that is known."""
        return self._scores.get(key)

    def put_score(self, key: str, score: Score) -> None:
        """Remember a score."""
        self._add({"key": key, "score": score.to_record()})

    def value(self, key: str) -> Any:
        """Return whatever plain data was kept under a key, or None."""
        return self._values.get(key)

    def put_value(self, key: str, value: Any) -> None:
        """Remember plain data (JSON)."""
        self._add({"key": key, "value": value})

    def has_logits(self, key: str) -> bool:
        """Return True if logits are known, and their files are as they were written.

        Costs a read of the files, the first time.
        """
        record = self._logits.get(key)
        if record is None:
            return False
        for name, digest in (record["logits"], record["labels"]):
            if name not in self._intact:
                if _digest(os.path.join(self.folder, name)) != digest:
                    return False
                self._intact.add(name)
        return True

    def logits(self, key: str) -> tuple[AnyFloats, Labels]:
        """Map logits ``(example, class)``, and read labels ``(example,)``, that are known."""
        record = self._logits[key]
        logits = np.load(os.path.join(self.folder, record["logits"][0]), mmap_mode="r")
        labels = np.load(os.path.join(self.folder, record["labels"][0]))
        return logits, labels

    def put_logits(self, key: str, logits: AnyFloats, labels: Labels) -> None:
        """Keep logits and labels."""
        name = f"labels-{xxhash.xxh3_64_hexdigest(labels.tobytes())}.npy"
        record = {
            "key": key,
            "logits": self._save(f"{key}.npy", logits),
            "labels": self._save(name, labels),
        }
        self._add(record)

    def _save(self, name: str, array: NDArray[Any]) -> tuple[str, str]:
        """Write an array, whole or not at all; give its file's name and digest."""
        path = os.path.join(self.folder, name)
        with named(path), replacing(path) as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            file.seek(0)
            digest = _digest_of(file)
        self._intact.add(name)
        return name, digest

    def _add(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        wait = now - self._synced > SYNC_S
        with named(self._journal.path):
            self._journal.append(record, wait=wait)
        if wait:
            self._synced = now
        self._index(record)

    def _index(self, record: dict[str, Any]) -> None:
        if "digest" in record:
            self._digests[record["of"]] = record["digest"]
        elif "score" in record:
            self._scores[record["key"]] = Score.from_record(record["score"])
        elif "logits" in record:
            self._logits[record["key"]] = record
        elif "value" in record:
            self._values[record["key"]] = record["value"]


def _identity(ingredient: Ingredient) -> str:
    return xxhash.xxh3_128_hexdigest(repr(ingredient.fingerprint).encode())


def _digest(path: str) -> str:
    """Digest a file; nothing for one that is not there."""
    try:
        with reading(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
            return _digest_of(file)
    except OSError:
        return ""


def _digest_of(file: BinaryIO) -> str:
    whole = xxhash.xxh3_128()
    while piece := file.read(1 << 22):
        whole.update(piece)
    return whole.hexdigest()
