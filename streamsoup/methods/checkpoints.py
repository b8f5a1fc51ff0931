"""The checkpoints of a run: found in its folder, put in order of age, and thinned.

The step of a checkpoint is ``global_step`` in the ``trainer_state.json`` beside its weights;
without one, the number in its name: the one after a word such as ``step``, else the one it ends
with. A shell sorts names letter by letter, ``checkpoint-10`` before ``checkpoint-6``; so where age
counts, a list in which steps do not rise is refused, and the message says the right order.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from streamsoup.errors import FormatError, RecipeError, check_choice, count, option, printable, some
from streamsoup.formats.index import is_index, n_shards
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, listed
from streamsoup.formats.listings import INDEX, read_listing
from streamsoup.formats.side_files import pieces
from streamsoup.formats.weights import PICKLES
from streamsoup.methods.best import Best, choose_best
from streamsoup.methods.records import LARGEST_STATE, STATE
from streamsoup.options import take

__all__ = ["By", "Checkpoint", "Choice", "Given", "choose", "choose_any", "find_checkpoints"]

By = Literal["step", "name", "time", "given"]
"""What checkpoints are ordered by, oldest first: their step, their name (numbers in it as numbers),
the time their weights were written, or their place in the list."""

Given = Iterable[AnyIngredient] | str | os.PathLike[str]
"""Checkpoints, oldest first; or the folder of a run, which stands for all checkpoints in it."""

_STEP = re.compile(r"(?:step|iter(?:ation)?)s?[-_=]?(\d+)", re.ASCII | re.IGNORECASE)
_EPOCH = re.compile(r"epoch[-_=]?(\d+)", re.ASCII | re.IGNORECASE)
_END = re.compile(r"\d+$", re.ASCII)
_NAMED = re.compile(r"(?:checkpoint|ckpt|global_?step|step|epoch|iter)[-_=]?\d", re.IGNORECASE)
"""How the names of folders begin that hold a checkpoint, or were to hold one."""
_UNFINISHED = ("tmp-", "tmp_")
"""How the names of folders begin that a trainer renames when they are complete."""
_NO_WEIGHTS = (
    "training_args",
    "average_state",
    "optim",
    "sched",
    "scaler",
    "rng_state",
    "random_states",
    "mp_rank",
    "zero_pp",
    "bf16_zero",
)
"""How the names of pickles begin that hold the state of a run."""

log = logging.getLogger("streamsoup")


class Checkpoint(msgspec.Struct, frozen=True):
    """One checkpoint of a run, and what tells its age."""

    given: Any
    """The ingredient: a path, or what else the caller gave."""
    path: str | None
    """Its path; None for what lies in memory."""
    name: str
    """The part of its path that tells it from the others."""
    step: int | None
    """The optimizer step it was saved at, as far as its state or its name says."""


class Choice(msgspec.Struct, frozen=True):
    """The checkpoints that were chosen, oldest first, and how."""

    checkpoints: tuple[Checkpoint, ...]
    by: By
    """What they are ordered by."""
    n_found: int
    """How many there were to choose from."""
    metric: str | None = None
    """The metric by which the best were chosen."""
    direction: str | None = None
    """Which of its values were the best."""
    scores: tuple[float, ...] = ()
    """The values of the metric of those chosen."""
    warnings: tuple[str, ...] = ()
    """What was left out, and whose name and step disagree."""

    @property
    def ingredients(self) -> list[AnyIngredient]:
        """The chosen ingredients, oldest first."""
        return [each.given for each in self.checkpoints]

    @property
    def report(self) -> dict[str, object]:
        """What a provenance says of the choice."""
        found: dict[str, object] = {
            "checkpoints": [each.name for each in self.checkpoints],
            "steps": [each.step for each in self.checkpoints],
            "ordered_by": self.by,
            "n_found": self.n_found,
        }
        if self.metric is not None:
            found |= {"best": self.direction, "metric": self.metric, "scores": list(self.scores)}
        return found


def choose(
    given: Given,
    *,
    by: By | None = None,
    best: Best | None = None,
    every: int = 1,
    last: int | None = None,
) -> Choice:
    """Return the checkpoints to average, oldest first.

    Args:
        given: Checkpoints, or the folder of a run, which stands for all checkpoints in it.
        by: What they are ordered by. None orders a folder by step, and takes a list as it is, but
            refuses one whose steps do not rise.
        best: Keep the best by a metric, in their order of age; None keeps all.
        every: Keep the newest, and every `every`-th counted back from it.
        last: Then keep this many of the newest; None keeps all.

    Raises:
        RecipeError: For an order that cannot be told or is not that of age, and for numbers that
            do not fit the checkpoints.
        FormatError: For a folder that cannot be listed.

    Costs a listing of the folder, and a read of the ``trainer_state.json`` of each checkpoint.
    """
    if by is not None:
        check_choice("by", by, get_args(By))
    every = take("int", "every", every)
    last = None if last is None else take("int", "last", last)
    for name, number in (("every", every), ("last", last)):
        if number is not None and number < 1:
            raise RecipeError(f"{name} must be at least 1, got {number}")
    run = _run_of(given)
    warnings: list[str] = []
    paths = listed(given) if run is None else find_checkpoints(run, warnings)
    found = _described(paths, warnings)
    try:
        ordered = _in_order(found, run, by)
    except RecipeError:
        for warning in warnings:
            log.warning("%s", warning)
        raise
    found_best = None if best is None else choose_best(ordered, best, warnings)
    kept = ordered if found_best is None else list(found_best.checkpoints)
    chosen = kept[::-1][::every]
    if last is not None and last > len(chosen):
        thinned = f", of which every {every} leaves {len(chosen)}" if every > 1 else ""
        raise RecipeError(
            f"the last {last} are asked for, and there are {count(len(found), 'checkpoint')}"
            f"{thinned}"
        )
    chosen = chosen[:last][::-1]
    by = by or ("given" if run is None else "step")
    choice = Choice(tuple(chosen), by, len(found), warnings=tuple(warnings))
    if best is None or found_best is None:
        return choice
    scores = tuple(found_best.scores[id(each)] for each in chosen)
    return msgspec.structs.replace(
        choice, metric=best.metric, direction=found_best.direction, scores=scores
    )


def _in_order(found: Sequence[Checkpoint], run: str | None, by: By | None) -> list[Checkpoint]:
    """Order the checkpoints of a run's folder, or of a list. Raises `RecipeError`."""
    if run is not None and by == "given":
        raise RecipeError(
            f"{printable(run)}: a folder lists its checkpoints in no order; choose "
            f"{option('by', 'step')}, name or time, or give a list of them"
        )
    if by is None and run is None:
        _check_rising(found)
    return _ordered(found, by or ("given" if run is None else "step"))


def choose_any(
    given: Given,
    *,
    by: By | None = None,
    best: Best | None = None,
    every: int = 1,
    last: int | None = None,
) -> Choice | None:
    """Choose where order does not count: None where `given` is a list to take as it is.

    A list need be in order only where it is thinned, and a folder that holds weights of its own
    stands for itself. Otherwise as `choose`.
    """
    asked = (by, best, every, last) != (None, None, 1, None)
    run = _run_of(given)
    if not asked and (run is None or _holds_weights(run)):
        return None
    return choose(given, by=by, best=best, every=every, last=last)


def find_checkpoints(run: str, warnings: list[str]) -> list[str]:
    """Return the paths of the checkpoints in the folder of a run, sorted by name.

    These are the folders that hold weights, and a number in their name or a ``trainer_state.json``;
    else such files. What else looks like a checkpoint is left out, and added to `warnings`. Raises
    `FormatError` for a folder that cannot be listed.
    """
    folders, files = _inside(run)
    whole = [name for name in folders if _holds_weights(os.path.join(run, name))]
    whole = [name for name in whole if not name.startswith(_UNFINISHED)]
    found = [name for name in whole if _is_numbered(os.path.join(run, name))]
    left_out = [name for name in whole if name not in found]
    if not found:
        found = [name for name in files if number_in(name) is not None]
    left_out += [name for name in files if name not in found]
    empty = [name for name in folders if name not in whole and _NAMED.match(name)]
    if left_out:
        warnings.append(
            f"{printable(run)}: {some(left_out)}: left out, as only the numbered checkpoints in "
            "this folder are taken"
        )
    if empty:
        warnings.append(f"{printable(run)}: {some(empty)}: left out, without weights in it")
    return [os.path.join(run, name) for name in found]


def number_in(name: str) -> int | None:
    """Return the step that the name of a checkpoint says, or None.

    >>> [number_in(name) for name in ("checkpoint-10", "step_000500.safetensors", "final")]
    [10, 500, None]
    >>> number_in("epoch=3-step=1200.ckpt"), number_in("step1000-tokens4B")
    (1200, 1000)
    >>> number_in("epoch=3-val_loss=0.12.ckpt")
    3
    """
    stem = name
    for suffix in (".safetensors", *PICKLES):
        stem = stem.removesuffix(suffix)
    found = _STEP.search(stem) or _EPOCH.search(stem)
    if found is not None:
        return int(found[1])
    end = _END.search(stem)
    return None if end is None else int(end[0])


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts names with the numbers in them as numbers.

    >>> sorted(["checkpoint-10", "checkpoint-9"], key=natural)
    ['checkpoint-9', 'checkpoint-10']
    """
    parts = re.split(r"(\d+)", name, flags=re.ASCII)  # text and numbers take turns
    return tuple((int(part), part) if n % 2 else (0, part) for n, part in enumerate(parts))


def _run_of(given: Any) -> str | None:
    """Return the folder of a run, where that alone was given, or is all of a list."""
    if isinstance(given, (list, tuple)) and len(given) == 1:
        (given,) = given
    if not isinstance(given, (str, os.PathLike)) or not os.path.isdir(given):
        return None
    run = os.fsdecode(given)
    folders, files = _inside(run)
    inside = [os.path.join(run, name) for name in folders]
    if any(_is_numbered(path) and _holds_weights(path) for path in inside):
        return run
    if sum(number_in(name) is not None for name in files) > 1:
        return run
    below = os.path.join(run, "checkpoints")  # as Lightning has them
    return _run_of(below) if "checkpoints" in folders and not files else None


def _inside(run: str) -> tuple[list[str], list[str]]:
    """List the folders in a run's, and the files that hold the weights of a checkpoint each."""
    try:
        entries = sorted(os.scandir(run), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    except OSError as error:
        raise FormatError(
            f"{printable(run)}: cannot be listed: {error.strerror}; fix that and run again"
        ) from None
    names = [entry.name for entry in entries if entry.name not in folders]
    listing = read_listing(run)
    if "zero_to_fp32.py" in names or (listing is not None and listing.file == INDEX):
        return [], []  # a checkpoint of DeepSpeed, or a pipeline: the numbers inside are not steps
    if listing is not None:  # what a run of sentence-transformers saved last, beside checkpoints
        folders = [name for name in folders if name not in listing.components]
    weights = [name for name in names if _is_weights(name) and n_shards(name) == 1]
    return folders, [] if any(map(is_index, names)) else weights


def _is_weights(name: str) -> bool:
    kept = name.endswith((".safetensors", *PICKLES)) and name[0] != "."
    return kept and not name.startswith(_NO_WEIGHTS)


def _holds_weights(folder: str) -> bool:
    """Return True if a folder holds weights, or folders with some, as far as can be seen.

    Those are components: of a pipeline, or what the training of one leaves without a listing.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        if any(_is_weights(entry.name) for entry in entries):
            return True
        parts = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        parts = [path for path in parts if number_in(os.path.basename(path)) is None]
        return any(_is_weights(name) for path in parts for name in os.listdir(path))
    except OSError:
        return False


def _is_numbered(path: str) -> bool:
    return number_in(os.path.basename(path)) is not None or os.path.isfile(f"{path}/{STATE}")


def _described(given: Sequence[AnyIngredient], warnings: list[str]) -> list[Checkpoint]:
    """Find the name and the step of each ingredient; add to `warnings` where the two disagree."""
    paths = [_path_of(each) for each in given]
    names = iter(_telling([path for path in paths if path is not None]))
    found = []
    for each, path in zip(given, paths, strict=True):
        name = getattr(each, "name", type(each).__name__) if path is None else next(names)
        found.append(Checkpoint(each, path, str(name), None))
    numbers = _numbers([each.name for each in found if each.path is not None])
    return [
        each
        if each.path is None
        else msgspec.structs.replace(each, step=_step(each, numbers, warnings))
        for each in found
    ]


def _path_of(given: AnyIngredient) -> str | None:
    if isinstance(given, Ingredient):
        return given.source.path
    if not isinstance(given, (str, bytes, os.PathLike)):
        return None
    return str(os.fsdecode(given))


def _telling(paths: Sequence[str]) -> list[str]:
    """Return what tells each path from the others: NAME of ``run/NAME/model.safetensors``."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    while len({*map(tuple, parts)}) > 1 and len({each[-1] for each in parts}) == 1:
        if min(map(len, parts)) == 1:
            break
        parts = [each[:-1] for each in parts]
    return [each[-1] for each in parts]


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """Return the steps in names. A number that ends names which begin differently is none."""
    known = {name: number_in(name) for name in names}
    begins = {re.sub(r"\d+(\.[a-z]+)?$", "", name) for name in names if known[name] is not None}
    if len(begins) > 1 and not all(_STEP.search(name) for name in names):
        return {}
    return {name: number for name, number in known.items() if number is not None}


def _step(checkpoint: Checkpoint, numbers: Mapping[str, int], warnings: list[str]) -> int | None:
    """Return the step in the state of a checkpoint; without one, that of its name in `numbers`."""
    state, number = _step_in_state(checkpoint, warnings), numbers.get(checkpoint.name)
    if state is None:
        return number
    counts_epochs = "epoch" in checkpoint.name.lower() and not _STEP.search(checkpoint.name)
    if number is not None and number != state and not counts_epochs:
        warnings.append(
            f"{printable(checkpoint.name)}: is of step {state} by its {STATE}, which counts, and "
            f"not of step {number}, as its name says"
        )
    return state


class _State(msgspec.Struct):
    """What is read of the state of a run."""

    global_step: int


def _step_in_state(checkpoint: Checkpoint, warnings: list[str]) -> int | None:
    """Read ``global_step``: in the folder that is the checkpoint, or that its file lies in."""
    path = checkpoint.path or ""
    state = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), STATE)
    if not os.path.lexists(state):
        return None
    try:
        if os.path.getsize(state) > LARGEST_STATE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return msgspec.json.decode(b"".join(pieces(state)), type=_State).global_step
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        warnings.append(f"{printable(state)}: says no step: {printable(why)}; the name counts")
        return None


def _check_rising(found: Sequence[Checkpoint]) -> None:
    """Raise `RecipeError` unless steps rise, as far as they are known."""
    known = [each for each in found if each.step is not None]
    rises = all(a.step < b.step for a, b in itertools.pairwise(known))  # type: ignore[operator]
    if rises:
        return
    if len({each.step for each in known}) < len(known):
        twice = [each.name for each in known if _steps(known).count(each.step) > 1]
        raise RecipeError(
            f"{some(twice)}: are of the same step, so none is the older one; leave all but one "
            f"out, or take them as they are with {option('by', 'given')}"
        )
    right = some([each.name for each in sorted(known, key=lambda each: each.step or 0)], 50)
    raise RecipeError(
        f"checkpoints come oldest first, and the steps of these are {some(_steps(known), 50)}; the "
        f"right order is {right}: {option('by', 'step')} puts them in it, and "
        f"{option('by', 'given')} takes them as they are"
    )


def _steps(found: Sequence[Checkpoint]) -> list[int | None]:
    return [each.step for each in found]


def _ordered(found: Sequence[Checkpoint], by: By) -> list[Checkpoint]:
    """Sort by what was asked for. Raises `RecipeError` where that does not tell all apart."""
    if by == "given":
        return list(found)
    keys: dict[str, Callable[[Checkpoint], Any]] = {
        "step": lambda each: each.step,
        "name": lambda each: natural(each.name),
        "time": _written,
    }
    pairs = [(keys[by](each), each) for each in found]
    unknown = [each.name for key, each in pairs if key is None]
    if unknown:
        raise RecipeError(
            f"{some(unknown)}: has no {by} to order by; choose another of {', '.join(keys)}, or "
            f"list them oldest first with {option('by', 'given')}"
        )
    pairs.sort(key=lambda pair: pair[0])
    for (key, one), (following, other) in itertools.pairwise(pairs):
        if key == following:
            raise RecipeError(
                f"{printable(one.name)} and {printable(other.name)} have the same {by}, so none is "
                "the older one; leave one out, or order them by something else"
            )
    return [each for _, each in pairs]


def _written(checkpoint: Checkpoint) -> int | None:
    """Return when the newest file of weights was last written, in nanoseconds; None if unknown."""
    path = checkpoint.path
    if path is None:
        return None
    try:
        inside = [os.path.join(path, name) for name in os.listdir(path) if _is_weights(name)]
    except OSError:
        inside = [path]
    try:
        return max((os.stat(each).st_mtime_ns for each in inside), default=None)
    except OSError:
        return None
