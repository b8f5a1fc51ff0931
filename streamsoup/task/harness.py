"""Tasks of lm-evaluation-harness, scored on one model that stays loaded.

The harness loads the first ingredient as it would load any model, and keeps the object. Weights
that are changed in place are what it scores then: a candidate takes as long as its evaluation.

* No cache of the harness's own: it returned the scores of the previous weights
  (EleutherAI/lm-evaluation-harness#4063).
* Its index of built-in tasks is made only where one is asked for: that takes 15 s or more. Task
  files of the user's own are loaded by their paths. A file with a group names others, so it is
  loaded by name, with all files in and below its folder known, and the built-in ones.
* Not its `simple_evaluate`: that lists all installed packages for each score, which takes 3 s. What
  it does besides is done here: each score starts from the same few-shot seed.

Needs the extra ``streamsoup[lm-eval]``. Source: Gao et al.,
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import hashlib
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from streamsoup.errors import TaskError, option, printable, some

__all__ = ["HarnessTask", "pick"]

METRICS = ("acc_norm", "acc", "exact_match", "f1", "mcc", "bleu")
"""Metrics that count, the first that a task has, unless one is named."""

_GROUP_ADVICE = (
    "the tasks of a group are looked up by name among files ending in .yaml in its folder and "
    "below, and built-in tasks"
)

FEWSHOT_SEED = 1234
"""The harness's own default, so that scores are those of its command line."""


class HarnessTask(msgspec.Struct):
    """Some tasks of the harness; their mean is the score."""

    tasks: tuple[str, ...]
    """Names of tasks, groups and tags, and paths of task files (YAML)."""
    limit: int | None
    """Examples per task; None for all."""
    metric: str | None
    """The metric that counts, such as ``acc`` or ``exact_match,strict-match``; None for the usual
    one of each task."""
    batch_size: str
    """Examples at once: a number; or ``auto``, as many as fit, found out for each candidate."""
    checkpoint: str
    """Where configuration and tokenizer come from: the first ingredient."""
    splits: tuple[str, ...] = ("val",)
    _loaded: dict[str, Any] = {}

    @property
    def __name__(self) -> str:
        """The name in messages."""
        return "lm-eval"

    @property
    def version(self) -> str:
        """What scores depend on besides the code of streamsoup."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            harness = version("lm-eval")
        except PackageNotFoundError:
            harness = "absent"
        digest = hashlib.sha256()
        for path in _code_of(self.tasks):
            digest.update(path.read_bytes())
        files = digest.hexdigest()
        # In few bits, padding changes a score.
        how = f"limit {self.limit} metric {self.metric} batch {self.batch_size}"
        return f"lm-eval {harness}: {self.tasks} {files} {how}"

    def build(self) -> Any:
        """Load the tasks, and the first ingredient on CUDA where there is one."""
        import torch

        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise TaskError(
                "lm-eval tasks need lm-evaluation-harness with transformers "
                f"(there is no module {error.name}): pip install 'streamsoup[lm-eval]'"
            ) from None
        groups = [os.path.dirname(os.path.abspath(t)) for t in self.tasks if _is_group(t)]
        own = not groups and all(map(_is_file, self.tasks))
        manager = TaskManager(include_path=sorted(set(groups)), include_defaults=not own)
        known = {
            os.path.realpath(entry.yaml_path): name
            for name, entry in manager.task_index.items()
            if entry.yaml_path is not None
        }
        names = [known.get(os.path.realpath(t), t) if _is_group(t) else t for t in self.tasks]
        try:
            self._loaded["tasks"] = manager.load(names)
        except KeyError as error:
            raise TaskError(
                f"lm-eval: {printable(error.args[0], 500)}; give names that `lm-eval ls tasks` "
                "shows, or the path of a task file"
            ) from None
        except Exception as error:
            what = f"{type(error).__name__}: {printable(error, 500)}"
            raise TaskError(
                f"lm-eval: {some(self.tasks)}: cannot be loaded: {what}; "
                + (_GROUP_ADVICE if groups else "try it with lm-eval's own command line")
            ) from error
        path = self.checkpoint
        folder = os.path.dirname(path) if os.path.isfile(path) else path
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._loaded["model"] = HFLM(pretrained=folder, device=device, batch_size=self.batch_size)
        return self._loaded["model"].model

    def score(self, model: Any, split: str) -> dict[str, float]:
        """Evaluate all tasks; return their mean as ``score``, and each."""
        from lm_eval.evaluator import evaluate

        loaded = self._loaded["tasks"]
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(
            self._loaded["model"],
            loaded,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        children: Mapping[str, list[str]] = loaded["group_map"]
        inner = {child for names in children.values() for child in names}
        scores: dict[str, float] = {}
        for name in (*loaded["groups"], *loaded["tasks"]):
            if name not in inner:
                metric, value = _score_of(name, found, children, self.metric)
                scores[f"{name} {metric}"] = value
        return {"score": statistics.fmean(scores.values()), **scores}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _is_group(task: str) -> bool:
    """Return True if a task file is a group of others."""
    if not _is_file(task) or not os.path.isfile(task):
        return False
    text = Path(task).read_text("utf-8", "replace")
    return re.search(r"^group\s*:", text, re.MULTILINE) is not None


def _code_of(tasks: tuple[str, ...]) -> list[Path]:
    """List task files, and what they may include or call: files of their kind beside them.

    Those of a group may lie in folders below it.
    """
    folders = {(os.path.dirname(os.path.abspath(t)), _is_group(t)) for t in tasks if _is_file(t)}
    return [
        path
        for folder, deep in sorted(folders)
        for path in sorted(Path(folder).glob("**/*" if deep else "*"))
        if path.suffix in (".yaml", ".yml", ".py") and path.is_file()
    ]


def _score_of(
    name: str, found: Mapping[str, Any], children: Mapping[str, list[str]], metric: str | None
) -> tuple[str, float]:
    """Score a task or a group. A group without an aggregate is the mean of its parts."""
    results = found["results"].get(name, {})
    if name in children and not _numbers(results):
        parts = [_score_of(child, found, children, metric)[1] for child in children[name]]
        return "mean", statistics.fmean(parts)
    return pick(name, results, found.get("higher_is_better", {}).get(name), metric)


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among results, named as ``metric,filter``."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key
        and isinstance(value, (int, float))
        and not key.partition(",")[0].endswith("_stderr")
    }


def pick(
    task: str,
    results: Mapping[str, Any],
    higher_is_better: Mapping[str, bool] | None,
    metric: str | None,
) -> tuple[str, float]:
    """Return the metric that counts among a task's results, negated where less is better.

    Where answers are filtered in several ways, the first counts, unless `metric` names another.

    >>> pick("t", {"acc,none": 0.5, "acc_norm,none": 0.75}, {"acc": True}, None)
    ('acc_norm', 0.75)
    >>> pick("t", {"word_perplexity,none": 9.0}, {"word_perplexity": False}, "word_perplexity")
    ('word_perplexity', -9.0)
    >>> pick("t", {"exact_match,strict": 0.5, "exact_match,lax": 0.75}, None, "exact_match,lax")
    ('exact_match,lax', 0.75)
    """
    numbers = _numbers(results)
    names = METRICS if metric is None else (metric,)
    keys = [key for name in names for key in numbers if name in (key, key.partition(",")[0])]
    if not keys:
        raise TaskError(
            f"lm-eval: {printable(task)} has none of the metrics {some(names, 8)}, but "
            f"{some(numbers, 8) or '(none)'}; choose one with {option('metric')}"
        )
    better = (higher_is_better or {}).get(keys[0].partition(",")[0], True)
    return keys[0].removesuffix(",none"), numbers[keys[0]] if better else -numbers[keys[0]]
