"""A soup made by several processes, each its part, on any machines that share a file system.

All parts work in ``OUT.parts``, a folder beside the output::

    OUT.parts/plan                    what is made, of what, and in how many parts
    OUT.parts/soup/                   the shards: each part writes its own leaves into them
    OUT.parts/part-0003/lock          held by the one process that makes part 3
    OUT.parts/part-0003/journal-…     the leaves that one run of part 3 has finished
    OUT.parts/commit-…                the provenance, by its digest, that is about to be in place

Every part plans the whole soup, by the headers alone, and makes its *share* of the leaves: a static
cut, so no process ever waits for another or sends it anything. `commit` hands shards and notes over
to an ordinary run, as if it were an earlier one that was killed before its last step: that run
reads every leaf, compares it with its noted digest, writes the files beside the weights, and
renames. Until then there is no output.

Why no two processes spoil each other's work:

1. The plan is written once, by a rename that fails if it exists. Who finds another one stops.
2. A byte is only ever written with the value that the plan gives it, so it does not matter who
   writes it, how often, or how late. Shards are set to their full size, and never cut.
3. A journal has one writer: each run of a part has its own, and reads those of its part's earlier
   runs. A leaf is noted after its bytes were synced, and believed if they match its digest.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec
import xxhash

from streamsoup.engine.plan import FilePlan, Leaf, MixPlan
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.errors import (
    OutputBusyError,
    OutputError,
    RecipeError,
    count,
    option,
    printable,
    some,
)
from streamsoup.formats.identity import IngredientIdentity, how_files_differ
from streamsoup.output.journal import Journal, records_of
from streamsoup.output.staging import provenance_digest
from streamsoup.recipe import ARITHMETIC, DIGEST, PROVENANCE_LIMIT, Provenance
from streamsoup.rule import Rule
from streamsoup.system.closing import Closing
from streamsoup.system.folders import Folder, other_writer
from streamsoup.system.libc import NO_REPLACE, rename, sync
from streamsoup.system.locks import HeldError, Lock
from streamsoup.system.regular import read_file

__all__ = ["Parts", "SharedPlan", "part_folder", "share"]

_PLAN = "plan"
_COMMIT = "commit-"


class SharedPlan(msgspec.Struct, frozen=True):
    """What all parts have to agree on."""

    n_parts: int
    provenance: Provenance
    """Of the soup to be made, without digests."""
    ingredients: tuple[IngredientIdentity, ...]
    shards: tuple[tuple[str, int, str], ...]
    """Of each shard: its name, size, and the digest of its header."""
    side_files: dict[str, str | bool]
    """The options that decide the files beside the weights."""
    arithmetic: str = ARITHMETIC
    digest: str = DIGEST

    @property
    def fingerprint(self) -> str:
        """A digest of all of it, but for the time and for how paths were written."""
        recipe = msgspec.structs.replace(self.provenance.recipe, ingredients=())
        same = msgspec.structs.replace(
            self.provenance, recipe=recipe, created="", versions={}, checksum=""
        )
        text = msgspec.json.encode(msgspec.structs.replace(self, provenance=same))
        return xxhash.xxh3_128_hexdigest(text)

    def differences(self, other: SharedPlan) -> list[str]:
        """Return in what `other` differs, in words."""
        found: list[str] = []
        if other.n_parts != self.n_parts:
            found.append(f"there are {self.n_parts} parts, not {other.n_parts}")
        here, there = self.provenance, other.provenance
        if (self.arithmetic, self.digest) != (other.arithmetic, other.digest):
            found.append("streamsoup is of another version")
        if len(self.ingredients) != len(other.ingredients):
            n = len(self.ingredients)
            found.append(f"there are {count(n, 'ingredient')}, not {len(other.ingredients)}")
        for one, two in zip(self.ingredients, other.ingredients, strict=False):
            if one.path != two.path:
                found.append(f"{printable(two.path)} is in the place of {printable(one.path)}")
            elif one.files != two.files:
                found.append(f"{printable(one.path)} {how_files_differ(one, two)}")
        if msgspec.structs.replace(here.recipe, ingredients=()) != msgspec.structs.replace(
            there.recipe, ingredients=()
        ):
            found.append("the recipe differs")
        if not found and self.shards != other.shards:
            found.append("the shards differ")
        if not found and self.side_files != other.side_files:
            found.append("options for the files beside the weights differ")
        return found


def share(plan: MixPlan, files: FilePlan, number: int, n: int) -> list[Leaf]:
    """Return the leaves of part `number` of `n`, about as many bytes as those of any other.

    Each part is a run of leaves that lie side by side in the output; where a rule takes statistics
    of a tensor, its leaves stay together. Raises `RecipeError` for statistics of the whole model.
    """
    rule = plan.recipe.rule
    whole = rule.n_passes > 1
    if whole and rule.spans_model:
        raise RecipeError(
            f"{plan.recipe.method}: takes statistics of the whole model, which cannot be shared "
            f"out; leave out {option('part')}, or take those of each tensor"
        )
    leaves = sorted(plan.leaves(), key=lambda leaf: (files.places[leaf.tensor], leaf.start))
    sizes = [leaf.n_units * plan.tensors[leaf.tensor].unit_nbytes for leaf in leaves]
    total = sum(sizes)
    of_tensor: dict[int, int] = {}
    done = 0
    chosen: set[int] = set()
    for leaf, nbytes in zip(leaves, sizes, strict=True):
        mine = min((2 * done + nbytes) * n // max(2 * total, 1), n - 1)
        if whole:
            mine = of_tensor.setdefault(leaf.tensor, mine)
        if mine == number - 1:
            chosen.add(leaf.number)
        done += nbytes
    return [leaf for leaf in plan.leaves() if leaf.number in chosen]


def part_folder(output: str) -> str:
    """Return the folder in which the parts of an output are made."""
    return os.path.realpath(output) + ".parts"


class Parts(Closing):
    """The folder of all parts of one output, open."""

    def __init__(self, target: str, above: Folder, root: Folder) -> None:
        """Hold the open folder; see `begin` and `find`."""
        self.target = target
        self.root = root
        self._above = above

    @classmethod
    def begin(cls, target: str, plan: SharedPlan) -> Parts:
        """Open the folder of an output, made if it does not exist, and agree on the plan.

        Raises:
            OutputError: Something else has the folder's name, or its parts belong to another soup.
        """
        path = part_folder(target)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        above = Folder.open(os.path.dirname(path))
        try:
            with suppress(FileExistsError):
                os.mkdir(os.path.basename(path), 0o700, dir_fd=above.descriptor)
                above.sync()
            parts = cls(target, above, above.folder(os.path.basename(path)))
        except NotADirectoryError:
            above.close()
            raise _in_the_way(path) from None
        except BaseException:
            above.close()
            raise
        try:
            parts._check_ours()
            parts._agree(plan)
        except BaseException:
            parts.close()
            raise
        return parts

    @classmethod
    def find(cls, target: str) -> Parts | None:
        """Open the folder of an output's parts; None if there is none."""
        path = part_folder(target)
        try:
            above = Folder.open(os.path.dirname(path))
        except FileNotFoundError:
            return None
        try:
            parts = cls(target, above, above.folder(os.path.basename(path)))
        except FileNotFoundError:
            above.close()
            return None
        except NotADirectoryError:
            above.close()
            raise _in_the_way(path) from None
        try:
            parts._check_ours()
        except BaseException:
            parts.close()
            raise
        return parts

    def close(self) -> None:
        """Close the folder, whose content stays; a second time does nothing."""
        self.root.close()
        self._above.close()

    def plan(self, rules: Sequence[type[Rule]] = BUILT_IN) -> SharedPlan:
        """Read the plan. Raises `OutputError` if it is damaged, or was never finished."""
        try:
            return _decode(read_file(self.root, _PLAN, PROVENANCE_LIMIT), rules)
        except FileNotFoundError:
            raise OutputError(
                f"{printable(self.root.path)}: has no plan; run the parts, and then commit"
            ) from None
        except (RecipeError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise OutputError(
                f"{printable(self.root.path)}/{_PLAN}: is damaged ({printable(error)}); remove "
                "that folder and run the parts again"
            ) from None

    def has_plan(self) -> bool:
        """Return True unless no part has begun, or a commit has tidied up."""
        return self.root.status(_PLAN) is not None

    def announce(self, digest: str) -> None:
        """Note the digest of the provenance that is about to be put in place, on disk."""
        with suppress(FileExistsError):
            os.close(self.root.file(_COMMIT + digest, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        self.root.sync()

    def in_place(self) -> bool:
        """Return True if the output is what a commit of these parts put there.

        An output of the same recipe may be an older one, of ingredients that were other ones then.
        """
        digest = provenance_digest(self._above, os.path.basename(self.target))
        return digest is not None and self.root.status(_COMMIT + digest) is not None

    def missing(self, n_parts: int) -> list[int]:
        """Return the numbers of the parts that are not finished, from 1 on."""
        return [number for number in range(1, n_parts + 1) if not self._is_done(number)]

    def notes(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield what all runs of a part have noted."""
        try:
            folder = self.root.folder(_name(number))
        except FileNotFoundError:
            return
        with folder:
            for name in folder.names():
                if name.startswith("journal-"):
                    yield from records_of(folder, name)

    def soup(self) -> Folder:
        """Open the folder of the shards, made if it does not exist."""
        with suppress(FileExistsError):
            os.mkdir("soup", dir_fd=self.root.descriptor)
        return self.root.folder("soup")

    def remove(self) -> None:
        """Remove the folder with all that is in it: the plan last but for what tells of a commit.

        So whenever this is killed, what is left tells the next commit that all is done.
        """
        for name in sorted(self.root.names(), key=lambda name: (_is_mark(name), name == _PLAN)):
            self.root.remove(name)
        with suppress(OSError):  # a part that was started late has begun anew
            os.rmdir(os.path.basename(self.root.path), dir_fd=self._above.descriptor)
        self._above.sync()

    def _is_done(self, number: int) -> bool:
        return any("done" in record for record in self.notes(number))

    def _agree(self, plan: SharedPlan) -> None:
        """Write the plan unless there is one; then compare. Raises `OutputError`."""
        if not self.has_plan():
            for name in filter(_is_mark, self.root.names()):  # of a commit that is done
                self.root.remove(name)
            temporary = f"{_PLAN}.{os.urandom(8).hex()}"
            descriptor = self.root.file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with open(descriptor, "wb") as file:
                file.write(_encode(plan))
                file.flush()
                sync(file.fileno())
            here = {"source_folder": self.root.descriptor, "target_folder": self.root.descriptor}
            try:
                if not rename(temporary, _PLAN, NO_REPLACE, **here):
                    os.link(
                        temporary,
                        _PLAN,
                        src_dir_fd=self.root.descriptor,
                        dst_dir_fd=self.root.descriptor,
                    )
                self.root.sync()
            except FileExistsError:
                pass  # another part was quicker
            finally:
                self.root.remove(temporary)
        rules = (*BUILT_IN, type(plan.provenance.recipe.rule))
        plan = _decode(_encode(plan), rules)  # numbers as they are read back
        there = self.plan(rules)
        differences = there.differences(plan)
        if not differences and there.fingerprint != plan.fingerprint:
            differences = ["its plan differs"]
        if differences:
            raise OutputError(
                f"{printable(self.root.path)}: holds parts of another soup than this one: "
                f"{some(differences, 3)}; give every part the same command, or remove that folder"
            )

    def _check_ours(self) -> None:
        who = other_writer(self.root, self._above)
        if who:
            raise OutputError(
                f"{printable(self.root.path)}: {who}, so its content is not trusted; choose "
                "another output, or remove that folder"
            )
        for name in self.root.names():
            status = self.root.status(name)
            known = name == "soup" or name.startswith((_PLAN, "part-", _COMMIT))
            if status is not None and not known:
                raise _in_the_way(self.root.path)


class Part:
    """One part, held by this process."""

    def __init__(self, parts: Parts, number: int, n: int) -> None:
        """Lock a part, and begin a journal. Raises `OutputBusyError` if another process has it."""
        self._parts, self._number = parts, number
        with suppress(FileExistsError):
            os.mkdir(_name(number), 0o700, dir_fd=parts.root.descriptor)
        self._folder = parts.root.folder(_name(number))
        try:
            self._lock = Lock(self._folder, patience_s=30.0)
        except HeldError as error:
            self._folder.close()
            raise OutputBusyError(
                f"{printable(parts.target)}: part {number} of {n} is being made by {error}; wait "
                "for it, or stop it"
            ) from None
        except BaseException:
            self._folder.close()
            raise
        name = f"journal-{os.urandom(8).hex()}"
        self.journal = _PartJournal(self, os.path.join(self._folder.path, name), self._folder)

    def earlier_notes(self) -> Iterator[dict[str, Any]]:
        """Yield what earlier runs of this part have noted, and this one."""
        return self._parts.notes(self._number)

    def __enter__(self) -> Part:
        """Return the part itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the part; what it has finished stays."""
        self.journal.close()
        self._lock.close()
        self._folder.close()


class _PartJournal(Journal):
    """The journal of one run of a part, which is read as that of all its runs."""

    def __init__(self, part: Part, path: str, folder: Folder) -> None:
        super().__init__(path, folder)
        self._part = part

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the records of all runs of the part."""
        return self._part.earlier_notes()


def is_lone(status: os.stat_result) -> bool:
    """Return True for a regular file with one name: writing to it changes no other."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _is_mark(name: str) -> bool:
    return name.startswith(_COMMIT)


def _name(number: int) -> str:
    return f"part-{number:04}"


def _in_the_way(path: str) -> OutputError:
    return OutputError(
        f"{printable(path)}: is in the way and was not made by streamsoup; move it elsewhere"
    )


def _encode(plan: SharedPlan) -> bytes:
    return msgspec.json.encode(plan)


def _decode(text: bytes, rules: Sequence[type[Rule]]) -> SharedPlan:
    plain = json.loads(text)
    provenance = Provenance.from_json(json.dumps(plain.pop("provenance")).encode(), rules)
    rest: dict[str, Any] = {
        name: msgspec.convert(plain[name], kind)
        for name, kind in (
            ("n_parts", int),
            ("ingredients", tuple[IngredientIdentity, ...]),
            ("shards", tuple[tuple[str, int, str], ...]),
            ("side_files", dict[str, str | bool]),
            ("arithmetic", str),
            ("digest", str),
        )
    }
    return SharedPlan(provenance=provenance, **rest)
