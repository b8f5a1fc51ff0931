"""Tasks of lm-evaluation-harness, scored on one model that stays loaded.

The harness is told to take the model object as it is, so weights that were changed in place are
what it scores; a candidate takes as long as its evaluation, and nothing is loaded again.

* No cache of the harness's own: it returned the scores of the previous weights
  (EleutherAI/lm-evaluation-harness#4063).
* No bootstrap of standard errors, and one index of tasks: they would cost more than the scoring.

Needs the extra ``streamsoup[lm-eval]``, and transformers. Source: Gao et al.,
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamsoup.errors import TaskError, printable, some

__all__ = ["HarnessTask", "pick"]

METRICS = ("acc_norm", "acc", "exact_match", "f1", "mcc", "bleu")
"""Metrics that count, the first that a task has, unless one is named."""


@dataclass(slots=True)
class HarnessTask:
    """Some tasks of the harness; their mean is the score."""

    tasks: tuple[str, ...]
    limit: int | None
    """Examples per task; None for all."""
    metric: str | None
    """The metric that counts; None for the usual one of each task."""
    checkpoint: str
    """Where configuration and tokenizer come from: the first ingredient."""
    splits: tuple[str, ...] = ("val",)
    _loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Say what scores depend on beside the code of streamsoup."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            harness = version("lm-eval")
        except PackageNotFoundError:
            harness = "absent"
        return f"lm-eval {harness}: {self.tasks} limit {self.limit} metric {self.metric}"

    def build(self) -> Any:
        """Load the first ingredient with transformers."""
        try:
            import transformers
        except ModuleNotFoundError:
            raise TaskError("--lm-eval needs transformers: pip install transformers") from None
        self._harness()
        self._loaded["tokenizer"] = transformers.AutoTokenizer.from_pretrained(self.checkpoint)
        return transformers.AutoModelForCausalLM.from_pretrained(self.checkpoint)

    def score(self, model: Any, split: str) -> dict[str, float]:
        """Evaluate all tasks; give the mean, and each."""
        harness = self._harness()
        if "model" not in self._loaded:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            self._loaded["model"] = HFLM(pretrained=model, tokenizer=self._loaded.get("tokenizer"))
            self._loaded["manager"] = TaskManager()
        found = harness.simple_evaluate(
            model=self._loaded["model"],
            tasks=list(self.tasks),
            limit=self.limit,
            bootstrap_iters=0,
            task_manager=self._loaded["manager"],
            use_cache=None,
            log_samples=False,
        )
        scores = {
            name: pick(name, results, found.get("higher_is_better", {}).get(name), self.metric)
            for name, results in found["results"].items()
            if name in self.tasks
        }
        if not scores:
            raise TaskError(f"lm-eval: gave no results for {some(self.tasks)}")
        return {"score": statistics.fmean(scores.values()), **scores}

    def _harness(self) -> Any:
        try:
            import lm_eval
        except ModuleNotFoundError:
            raise TaskError(
                "--lm-eval needs lm-evaluation-harness: pip install 'streamsoup[lm-eval]'"
            ) from None
        return lm_eval


def pick(
    task: str,
    results: Mapping[str, Any],
    higher_is_better: Mapping[str, bool] | None,
    metric: str | None,
) -> float:
    """Choose the metric that counts among a task's results; where less is better, its negative.

    >>> pick("t", {"acc,none": 0.5, "acc_norm,none": 0.75}, {"acc": True}, None)
    0.75
    >>> pick("t", {"word_perplexity,none": 9.0}, {"word_perplexity": False}, "word_perplexity")
    -9.0
    """
    numbers = {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if isinstance(value, (int, float)) and not key.partition(",")[0].endswith("_stderr")
    }
    names = METRICS if metric is None else (metric,)
    name = next((name for name in names if name in numbers), None)
    if name is None:
        raise TaskError(
            f"lm-eval: {printable(task)} has none of the metrics {some(names, 8)}, but "
            f"{some(numbers, 8)}; choose one with --metric"
        )
    better = (higher_is_better or {}).get(name, True)
    return numbers[name] if better else -numbers[name]
