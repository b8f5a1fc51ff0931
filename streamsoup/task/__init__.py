"""What a user says about their task: how to build the model, and how to score it.

A task is one file of plain functions; nothing is registered and no class is needed::

    def build():                     # the model, once; its weights do not matter
        return MyModel()

    def score(model, split):         # a number, larger is better; or a dictionary of numbers
        return accuracy(model, DATA[split])

These are asked for only by what needs them::

    splits = ["val", "test"]         # the first one is searched on; default: ["val"]
    main = "accuracy"                # which number counts, if score gives a dictionary

    def loss(model, split):          # a scalar tensor with a gradient for each held-out batch,
        for x, y in BATCHES[split]:  # or a pair of it and the number of examples in the batch
            yield cross_entropy(model(x), y)

    def predictions(model, split):   # logits (example, class) and labels (example,), by batch
        for x, y in BATCHES[split]:
            yield model(x), y

    def recalibration():             # inputs of the model, to measure BatchNorm statistics on
        for x, _ in BATCHES["train"]:
            yield x

`score` may leave out `split`, or take ``to_beat`` besides: the score that the candidate has to
reach, or None. Once it is out of reach, ``{"at_most": bound}`` may be returned instead of a score;
the decision is the same, only sooner. An ``examples`` entry in the dictionary, a number for each
held-out example, allows paired comparisons.

What a score depends on besides the code, such as data, a task says in an attribute ``version``; of
an object, plain attributes count too, but those whose names begin with an underscore.

Whatever of these runs, the working folder and numpy's error handling are put back after it: a task
names its files by absolute paths, or beside ``__file__``.

Importing this room loads no torch: tasks do.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import msgspec

from streamsoup.errors import TaskError, printable, some
from streamsoup.task.code import digest_code
from streamsoup.task.loading import alone, folder_of, guarded, imported_beside, load
from streamsoup.task.scores import Score, read_score

__all__ = ["EXAMPLES", "AnyTask", "Score", "Task", "load_task", "read_score"]

EXAMPLES = {
    "build": "def build():\n    return MyModel()",
    "score": "def score(model, split):\n    return accuracy(model, DATA[split])",
    "loss": (
        "def loss(model, split):\n"
        "    for x, y in BATCHES[split]:\n"
        "        yield torch.nn.functional.cross_entropy(model(x), y)"
    ),
    "predictions": (
        "def predictions(model, split):\n    for x, y in BATCHES[split]:\n        yield model(x), y"
    ),
    "recalibration": ("def recalibration():\n    for x, _ in BATCHES['train']:\n        yield x"),
}
"""The functions a task may have, each as a user would write it: shown when one is missing."""


class Task(msgspec.Struct, frozen=True):
    """A task whose model is scored where it is in memory."""

    name: str
    """As the user gave it, for messages."""
    fingerprint: str
    """Changes whenever the code that scores may have changed."""
    source: Any
    """The module or object whose attributes are the functions, by name."""
    splits: tuple[str, ...]
    """The splits it can score; the first one is searched on."""
    main: str | None
    """The name of the metric that counts."""
    folder: str = ""
    """Where it may import from besides: the folder of a task file."""

    def has(self, function: str) -> bool:
        """Whether the task has an optional function."""
        return callable(getattr(self.source, function, None))

    def need(self, function: str) -> Callable[..., Any]:
        """Give a function of the task.

        Raises `TaskError`, which shows an example, if the task has none of that name.
        """
        found = getattr(self.source, function, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
        example = "\n".join(f"    {line}" for line in EXAMPLES[function].splitlines())
        what = "is no function" if found is not None else "is missing"
        raise TaskError(f"{self.name}: {function} {what}; add, for example:\n{example}")

    def check_split(self, split: str | None) -> str:
        """Give the split to score: the one asked for, or the first. Raises `TaskError`."""
        if split is None:
            return self.splits[0]
        if split not in self.splits:
            raise TaskError(
                f"{self.name}: has no split {printable(split)!r}, only {some(self.splits)}; "
                "list it in splits = [...]"
            )
        return split

    def build(self) -> Any:
        """Build the model: a `torch.nn.Module`, with whatever weights."""
        with alone(self.folder):
            return self.need("build")()

    def score(self, model: Any, split: str, to_beat: float | None = None) -> Score:
        """Score the model, as it is, on a split. Raises `TaskError` for an answer that is none."""
        function = self.need("score")
        given: dict[str, Any] = {"split": split, "to_beat": to_beat}
        known = _parameters(function)
        if known is not None:
            given = {name: value for name, value in given.items() if name in known}
        with alone(self.folder):
            answer = function(model, **given)
        return read_score(
            answer, main=self.main, to_beat=to_beat, where=f"{self.name}: score on {split!r}"
        )

    def losses(self, model: Any, split: str) -> Iterator[tuple[Any, float]]:
        """Give the loss of each held-out batch, with a gradient, and its number of examples.

        A task that does not say how many examples a batch has weighs all batches alike (1). Raises
        `TaskError` for an answer of another form.
        """
        found = self.need("loss")(model, split)
        if hasattr(found, "backward") or not isinstance(found, Iterable):
            kind = printable(type(found).__name__)
            raise TaskError(f"{self.name}: loss gave one {kind}; yield the loss of each batch")
        for each in found:
            pair = each if isinstance(each, (tuple, list)) else (each, 1.0)
            try:
                loss, n_examples = pair[0], float(pair[1])
            except (TypeError, ValueError, IndexError):
                n_examples = math.nan
            if len(pair) != 2 or not 0 <= n_examples < math.inf:
                raise TaskError(
                    f"{self.name}: loss gave {printable(each, 200)}; yield the loss of a batch, or "
                    "a pair of it and the number of examples in the batch"
                )
            yield loss, n_examples

    def predictions(self, model: Any, split: str) -> Iterator[tuple[Any, Any]]:
        """Give logits ``(example, class)`` and labels ``(example,)``, batch by batch.

        Whether the logits carry a gradient is up to the caller's grad mode.
        """
        found = self.need("predictions")(model, split)
        if isinstance(found, tuple) and len(found) == 2:
            yield found
            return
        yield from found

    def recalibration(self) -> Iterable[Any]:
        """Give inputs of the model, batch by batch, to measure normalisation statistics on."""
        return self.need("recalibration")()  # type: ignore[no-any-return]


AnyTask = str | os.PathLike[str] | Callable[..., Any] | Task | Any
"""A task file, ``module:object``, an object with the functions, or a plain scoring function."""


def load_task(task: AnyTask) -> Task:
    """Find the functions of a task.

    `task` is a file ``task.py``, an importable ``module`` or ``module:object`` (a class is
    called to make the object), an object with the functions as attributes, or a plain function:
    its `score`. Runs the user's code: whatever the file or module does when imported. Raises
    `TaskError` for a task that cannot be loaded or has no `score`.
    """
    if isinstance(task, Task):
        return task
    folder = ""
    if isinstance(task, (str, os.PathLike)):
        name = printable(os.fspath(task))
        folder = folder_of(os.fspath(task))
        source = load(os.fspath(task))
    else:
        source = task
        name = getattr(task, "__name__", None) or type(task).__name__
    if inspect.isclass(source):
        source = guarded(name, folder, source)
    if inspect.isfunction(source) or (callable(source) and not hasattr(source, "score")):
        source = _Lone(source)
    splits = getattr(source, "splits", None)
    if callable(splits):
        splits = guarded(name, folder, splits)
    names = ("val",) if splits is None else tuple(map(str, splits))
    if not names or isinstance(splits, str):
        raise TaskError(f"{name}: splits is empty or no list; write splits = ['val', 'test']")
    main = getattr(source, "main", None)
    main = main if isinstance(main, str) else None
    version = repr((str(getattr(source, "version", "")), main))
    with alone(folder):  # where classes are found by the names of their modules
        fingerprint = digest_code(_parts_of(source), version=version, settings=_settings_of(source))
    loaded = Task(name, fingerprint, source, names, main, folder)
    loaded.need("score")
    return loaded


class _Lone:
    """A plain function, as a task."""

    def __init__(self, score: Callable[..., Any]) -> None:
        self.score = score


def _parameters(function: Callable[..., Any]) -> set[str] | None:
    """Give the names a function takes besides its first argument; None if it takes any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return set()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters if each.kind is not each.VAR_POSITIONAL}


def _parts_of(source: Any) -> list[Any]:
    """List what a task's scores depend on: its functions, and the file or class they are in."""
    functions = [getattr(source, name, None) for name in EXAMPLES]
    if isinstance(source, _Lone):
        return functions
    if isinstance(source, ModuleType):
        return [source, *functions, *imported_beside(source)]
    return [type(source), *functions]


def _settings_of(source: Any) -> Mapping[str, Any]:
    """Give the attributes of an object that is a task, or that is called as one."""
    if isinstance(source, _Lone):
        source = source.score
    if isinstance(source, (ModuleType, FunctionType, functools.partial)):
        return {}  # those are in the code
    return getattr(source, "__dict__", {})
