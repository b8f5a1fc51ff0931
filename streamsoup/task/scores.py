"""Scores: what a task returns, a number that is larger where better, and what else it measured.

A number is a score. So is a dictionary of numbers with a main one, which may also hold
``examples`` (a result for each held-out example) or, from a task that stopped early, ``at_most``.
"""

from __future__ import annotations

import base64
import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import TaskError, option, printable, some

__all__ = ["Score", "doubt", "read_score", "training_mode"]

log = logging.getLogger("streamsoup")

MAIN_NAMES = ("score", "main", "accuracy", "acc")
"""Where the main metric is looked for in a dictionary, unless the task names it."""


class Score(msgspec.Struct, frozen=True):
    """One answer of a task."""

    value: float
    """The main metric, larger is better; NaN never wins."""
    metrics: Mapping[str, float] = {}
    """All metrics by name."""
    examples: NDArray[np.float64] | None = None
    """The main metric of each held-out example ``(example,) float64``, in a fixed order."""
    stopped: bool = False
    """True if the task stopped early: `value` is then an upper bound, below the score to beat."""

    def to_record(self) -> dict[str, Any]:
        """Return it as JSON, for a journal. Floats keep every bit; NaN is text."""
        record: dict[str, Any] = {"value": _to_json(self.value)}
        if self.metrics:
            record["metrics"] = {name: _to_json(value) for name, value in self.metrics.items()}
        if self.stopped:
            record["stopped"] = True
        if self.examples is not None:
            packed = zlib.compress(self.examples.astype("<f8").tobytes(), 1)
            record["examples"] = base64.b64encode(packed).decode()
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Score:
        """Read back what `to_record` returned."""
        examples = None
        if "examples" in record:
            packed = zlib.decompress(base64.b64decode(record["examples"]))
            examples = np.frombuffer(packed, "<f8").astype(np.float64)
        metrics = {name: float(value) for name, value in record.get("metrics", {}).items()}
        stopped = bool(record.get("stopped", False))
        return cls(float(record["value"]), metrics, examples, stopped)


def doubt(score: Score, what: str) -> str:
    """Return a warning about the score of `what`, or nothing.

    A NaN is a score, as one diverged model must not end a search of hours: it never wins. But what
    it comes from is more often a mistake.
    """
    if not math.isnan(score.value):
        return ""
    return (
        f"the score of {what} is NaN, and never wins: its weights hold or lead to a NaN, or the "
        "task divides by nothing"
    )


def read_score(answer: object, *, main: str | None, to_beat: float | None, where: str) -> Score:
    """Convert what a task returned to a score.

    `answer` is a number (of Python, numpy or torch, with a single element), or a dictionary with
    a main metric: the one named `main`, or the only one, or the first of `MAIN_NAMES`. `to_beat` is
    what the task was told. NaN and -inf are the scores of a model that is worth nothing. Raises
    `TaskError`, which starts with `where`, for anything else, and for inf: nothing could beat it.
    """
    score = _read(answer, main, to_beat, where)
    if score.value == math.inf:
        raise TaskError(
            f"{where}: answered with inf, which no other score could beat; return a finite number, "
            "or nan for a model that cannot be scored"
        )
    return score


def training_mode(model: Any, where: str) -> str:
    """Return a warning if a module of `model` is in training mode after it was scored, or nothing.

    Before, all of it was in evaluation mode: the task changed that, or the module cannot.
    """
    inside = [name or type(model).__name__ for name, each in model.named_modules() if each.training]
    if not inside:
        return ""
    return (
        f"{where}: the model was in training mode ({some(inside, 3)}), in which dropout is random "
        "and BatchNorm depends on the batch; call model.eval() before scoring"
    )


def _read(answer: object, main: str | None, to_beat: float | None, where: str) -> Score:
    if not isinstance(answer, Mapping):
        return Score(_number(answer, where, ""))
    given = dict(answer)
    if "at_most" in given:
        bound = _number(given["at_most"], where, "'at_most': ")
        if to_beat is None or not bound < to_beat:
            raise TaskError(
                f"{where}: stopped early with at most {bound}, where the score to beat is "
                f"{to_beat}; stop only once that is out of reach"
            )
        return Score(bound, stopped=True)
    examples = given.pop("examples", None)
    metrics = {str(name): _number(v, where, f"{printable(name)!r}: ") for name, v in given.items()}
    results = None if examples is None else _examples(examples, where)
    name = _main_name(metrics, main)
    if name is not None:
        return Score(metrics[name], metrics, results)
    if results is not None and not metrics and len(results):
        return Score(float(results.mean()), {}, results)
    raise TaskError(
        f"{where}: answered with the metrics {some(metrics) or '(none)'}, and which one counts is "
        f"not clear; {_missing(main)}"
    )


def _missing(main: str | None) -> str:
    first = "" if main is None else f"none is {printable(main)!r}: "
    by = option("main", cli="metric")
    return f"{first}name it in the task file, such as main = 'accuracy', or by {by}"


def _main_name(metrics: Mapping[str, float], main: str | None) -> str | None:
    if main is not None:
        return main if main in metrics else None
    if len(metrics) == 1:
        return next(iter(metrics))
    return next((name for name in MAIN_NAMES if name in metrics), None)


def _number(answer: object, where: str, what: str) -> float:
    """Read one number of any library. Raises `TaskError` with what was found instead."""
    if answer is None:
        raise TaskError(f"{where}: {what}answered with None; does the function return its score?")
    shape = getattr(answer, "shape", ())
    single = math.prod(shape) == 1 if isinstance(shape, Sequence) else True
    if getattr(answer, "requires_grad", False) is True:
        log.warning(
            "%s: %sthe answer carries a gradient, and what it takes was held in memory; compute "
            "the score under torch.no_grad()",
            where, what,
        )  # fmt: skip
        answer = answer.detach()  # type: ignore[attr-defined]
    if not isinstance(answer, (str, bytes, bytearray, complex)) and single:
        try:
            return float(answer)  # type: ignore[arg-type]
        except Exception:
            pass
    found = f"{type(answer).__name__} {printable(repr(answer), 120)}"
    raise TaskError(
        f"{where}: {what}answered with {found}; a score is one number, larger is better, "
        "or a dictionary of numbers"
    )


def _examples(answer: object, where: str) -> NDArray[np.float64]:
    try:
        if hasattr(answer, "detach"):
            answer = answer.detach().cpu().double().numpy()
        examples = np.asarray(answer, np.float64)
    except Exception:
        examples = np.empty((0, 0))
    if examples.ndim != 1:
        raise TaskError(
            f"{where}: 'examples' is not a list of numbers, one for each held-out example"
        )
    return examples


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
