"""A task: the functions of a user's file or object, found, checked and called."""

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
from streamsoup.task.loading import Loaded, load
from streamsoup.task.running import alone, loaded
from streamsoup.task.scores import Score, read_score

__all__ = ["EXAMPLES", "AnyTask", "Task", "load_task"]

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
"""The functions that a task may have, each as a user would write it: shown when one is missing."""

_SCORING = ("score", "loss", "predictions")
"""A task has one of them at least."""


class Task(msgspec.Struct, frozen=True):
    """A task whose model is scored in this process's memory."""

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
    lists_splits: bool = True
    """False if the task names no splits, and ``val`` stands for the only one."""
    hold: object = None
    """See `loading.Loaded`."""

    def has(self, function: str) -> bool:
        """Return True if the task has a function of this name."""
        return callable(getattr(self.source, function, None))

    def need(self, function: str) -> Callable[..., Any]:
        """Return a function of the task.

        Raises:
            TaskError: If the task has no function of this name; the message shows an example.
        """
        found = getattr(self.source, function, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
        what = "is not a function" if found is not None else "is missing"
        raise TaskError(f"{self.name}: {function} {what}; add, for example:\n{_example(function)}")

    def check_split(self, split: str | None) -> str:
        """Return the split to score: the one asked for, or the first. Raises `TaskError`."""
        if split is None:
            return self.splits[0]
        if split in self.splits:
            return split
        if not self.lists_splits:
            raise TaskError(
                f"{self.name}: splits is missing, so {some(self.splits)} is the only split, and "
                f"not {printable(split)!r}; add, for example:\n    splits = ['val', 'test']"
            )
        listed = ", ".join(repr(printable(each)) for each in (*self.splits, split))
        raise TaskError(
            f"{self.name}: has no split {printable(split)!r}, only {some(self.splits)}; list it, "
            f"for example:\n    splits = [{listed}]"
        )

    def build(self) -> Any:
        """Build the model, a `torch.nn.Module` with any weights."""
        with alone():
            return self.need("build")()

    def score(self, model: Any, split: str, to_beat: float | None = None) -> Score:
        """Score the model, as it is, on a split.

        Raises:
            TaskError: For an answer that is not a score.
        """
        with alone():
            return self.score_beside_others(model, split, to_beat)

    def score_beside_others(self, model: Any, split: str, to_beat: float | None = None) -> Score:
        """Score as `score` does, in several threads at once: for models that live in servers.

        Args:
            model: What the task's ``score`` is given first; of a server, its address.
            split: The split to score on.
            to_beat: The score that is to be reached, if there is one.

        Raises:
            TaskError: For an answer that is not a score.
        """
        function = self.need("score")
        given: dict[str, Any] = {"split": split, "to_beat": to_beat}
        known = _parameters(function)
        if known is not None:
            given = {name: value for name, value in given.items() if name in known}
        answer = function(model, **given)
        where = f"{self.name}: score on {split!r}"
        return read_score(answer, main=self.main, to_beat=to_beat, where=where)

    def losses(self, model: Any, split: str) -> Iterator[tuple[Any, float]]:
        """Yield the loss of each held-out batch, with a gradient, and its number of examples.

        Where the task gives no number of examples, every batch weighs 1.

        Raises:
            TaskError: For an answer of another form.
        """
        found = self.need("loss")(model, split)
        if hasattr(found, "backward") or not isinstance(found, Iterable):
            kind = printable(type(found).__name__)
            raise TaskError(
                f"{self.name}: loss returned one {kind}; yield the loss of each batch, for "
                f"example:\n{_example('loss')}"
            )
        for each in found:
            pair = each if isinstance(each, (tuple, list)) else (each, 1.0)
            try:
                loss, n_examples = pair[0], float(pair[1])
            except (TypeError, ValueError, IndexError):
                n_examples = math.nan
            if len(pair) != 2 or not 0 <= n_examples < math.inf:
                raise TaskError(
                    f"{self.name}: loss yielded {printable(each, 200)}; yield the loss of a batch, "
                    "or a pair of it and the number of examples in the batch"
                )
            yield loss, n_examples

    def predictions(self, model: Any, split: str) -> Iterator[tuple[Any, Any]]:
        """Yield logits ``(example, class)`` and labels ``(example,)``, batch by batch.

        They carry a gradient if the caller's grad mode is on and the task does not turn it off.
        """
        found = self.need("predictions")(model, split)
        if isinstance(found, tuple) and len(found) == 2:
            yield found
            return
        yield from found

    def recalibration(self) -> Iterable[Any]:
        """Return inputs of the model, batch by batch, to measure normalisation statistics on."""
        return self.need("recalibration")()  # type: ignore[no-any-return]


AnyTask = str | os.PathLike[str] | Callable[..., Any] | Task | Any
"""A task file, ``module:object``, an object with the functions, or a plain scoring function."""


def load_task(task: AnyTask) -> Task:
    """Find the functions of a task. Runs the user's code: whatever the file does when imported.

    Args:
        task: A file ``task.py``, an importable ``module`` or ``module:object`` (a class is called
            to make the object), an object with the functions as attributes, or a plain function,
            its `score`.

    Raises:
        TaskError: For a task that cannot be loaded, or that has no function to score with.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, (str, os.PathLike)):
        name = printable(os.fspath(task))
        code = load(os.fspath(task))
    else:
        name = getattr(task, "__name__", None) or type(task).__name__
        code = Loaded(task)
    source = code.source
    if inspect.isclass(source):
        source = loaded(name, source)
    if inspect.isfunction(source) or (callable(source) and not _scores(source)):
        source = _Lone(source)
    splits = getattr(source, "splits", None)
    if callable(splits):
        splits = loaded(name, splits)
    names = ("val",) if splits is None else tuple(map(str, splits))
    if not names or isinstance(splits, str):
        raise TaskError(
            f"{name}: splits is empty or not a list; write, for example:\n"
            "    splits = ['val', 'test']"
        )
    main = getattr(source, "main", None)
    main = main if isinstance(main, str) else None
    version = repr((str(getattr(source, "version", "")), main))
    fingerprint = digest_code(
        _parts_of(source), version=version, settings=_settings_of(source), files=code.files
    )
    found = Task(name, fingerprint, source, names, main, splits is not None, code.hold)
    if not any(map(found.has, _SCORING)):
        found.need("score")
    return found


class _Lone:
    """A plain function, as a task."""

    def __init__(self, score: Callable[..., Any]) -> None:
        self.score = score


def _scores(source: Any) -> bool:
    return any(hasattr(source, name) for name in _SCORING)


def _example(function: str) -> str:
    return "\n".join(f"    {line}" for line in EXAMPLES[function].splitlines())


def _parameters(function: Callable[..., Any]) -> set[str] | None:
    """Return the names a function takes besides its first argument; None if it takes any."""
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
    return [source if isinstance(source, ModuleType) else type(source), *functions]


def _settings_of(source: Any) -> Mapping[str, Any]:
    """Return the attributes of an object that is a task, or that is called as one."""
    if isinstance(source, _Lone):
        source = source.score
    if isinstance(source, (ModuleType, FunctionType, functools.partial)):
        return {}  # those are in the code
    return getattr(source, "__dict__", {})
