"""The report of a greedy search: every trial, and what it cost, as plain JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamsoup.errors import printable
from streamsoup.search.scoring.scorer import Outcome
from streamsoup.search.trials import Found, GreedySettings, Run, Trial, best_run
from streamsoup.task import Score

__all__ = ["RULES", "beyond_scoring", "report_of"]

RULES = (
    *("ties", "min_gain", "z", "order", "n_orders", "seed", "direction", "passes"),
    *("recalibrate", "jobs"),
)
"""The settings that decide the outcome of a search, and what it costs."""


def report_of(
    found: Found, settings: GreedySettings, *, paid: Sequence[Outcome], n_resumed: int
) -> dict[str, Any]:
    """Return the result of a search as plain JSON.

    `paid` is every candidate that was scored, including those that several jobs scored ahead and
    that were not needed; `n_resumed` is the number of scores that an earlier run had measured.
    """
    best = best_run(found.runs)
    report: dict[str, Any] = {
        "rules": {name: getattr(settings, name) for name in RULES},
        "ingredients": list(found.names),
        "members": list(best.members),
        "kept": [found.names[i] for i in best.members],
        "score": best.score.to_record()["value"],
        "singles": [_trial_record(trial) for trial in found.singles],
        "runs": [
            {
                "order": list(run.order),
                "members": list(run.members),
                "score": run.score.to_record()["value"],
                "trials": [_trial_record(trial) for trial in run.trials],
            }
            for run in found.runs
        ],
        "n_scored": len(paid),
        "n_resumed": n_resumed,
        "mixed_on": next((each.moved.where for each in paid if each.moved.where), ""),
        "nbytes_read": sum(outcome.moved.nbytes_read for outcome in paid),
        "nbytes_sums": sum(outcome.moved.nbytes_sums for outcome in paid),
        "seconds": {
            "search": found.elapsed_s,
            "scoring": sum(outcome.scoring_s for outcome in paid),
            "mixing": sum(outcome.moved.elapsed_s for outcome in paid),
        },
    }
    scores = [run.score.value for run in found.runs]
    if len(scores) > 1 and all(map(math.isfinite, scores)):
        report["over_orders"] = {"mean": statistics.fmean(scores), "sd": statistics.stdev(scores)}
    if len(best.members) == 1 and len(found.names) > 1:
        report["advice"] = _why_one(found, best, settings)
    return report


def beyond_scoring(seconds: Mapping[str, float]) -> float:
    """Return the share of a search's time, from 0 to 1, that was not spent on scoring.

    `seconds` are those of a report, of a search with one job: several score at the same time.

    >>> beyond_scoring({"search": 4.0, "scoring": 3.0})
    0.25
    """
    whole = seconds["search"]
    return min(max(1 - seconds["scoring"] / whole, 0.0), 1.0) if whole > 0 else 0.0


def _trial_record(trial: Trial) -> dict[str, Any]:
    score = trial.score.to_record()
    score.pop("examples", None)
    record: dict[str, Any] = {
        "ingredient": trial.ingredient,
        "kind": trial.kind,
        "members": list(trial.members),
        "score": score.pop("value"),
        **score,
        "decision": trial.decision,
        "known": trial.known,
        "nbytes_read": trial.moved.nbytes_read,
        "nbytes_sums": trial.moved.nbytes_sums,
        "mixing_s": trial.moved.elapsed_s,
        "scoring_s": trial.scoring_s,
    }
    if trial.to_beat is not None:
        record["to_beat"] = Score(trial.to_beat).to_record()["value"]
    if trial.averaged is not None:
        record["score_with_averaged_statistics"] = trial.averaged.to_record()["value"]
    return record


def _why_one(found: Found, best: Run, settings: GreedySettings) -> str:
    """Explain a soup of one ingredient, and what to look at."""
    strict = settings.min_gain > 0 or settings.z > 0 or settings.ties == "reject"
    demand = "well enough better" if settings.min_gain > 0 or settings.z > 0 else "better"
    tried = [trial for trial in best.trials if trial.decision == "left out"]
    finite = [trial for trial in tried if math.isfinite(trial.score.value)]
    text = (
        f"only {printable(found.names[best.members[0]])} is left: the score did not suffer from "
        "dropping any of the others. "
        if settings.direction == "backward"
        else f"only {printable(found.names[best.members[0]])} was kept: no mean with another "
        f"ingredient scored {demand if strict else 'as well'}. "
    )
    if finite:
        top = max(finite, key=lambda trial: trial.score.value)
        text += (
            f"The closest was with {printable(top.ingredient)}: {top.score.value:.6g} "
            f"against {best.score.value:.6g}. "
        )
    return text + (
        "Ingredients mix when they lie in one valley: look at the angles between them (geometry "
        "with the base; near 90 degrees and far apart is too far), at learning rates (a "
        "high one leaves the valley), at whether all started from the same weights, and at "
        f"another order (such as a random one){' or a milder rule' if strict else ''}"
    )
