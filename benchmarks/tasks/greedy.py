"""What does a greedy search cost beyond scoring, and how many bytes does each trial move?

The peer's way is what anyone does with a merge tool: write each candidate, load it, score it. It
is given here as its parts that can be measured: a soup written for each trial, and loaded.
Pure scoring is a process of its own that builds the model and scores it as often.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup
from benchmarks.rows import Session

__all__ = ["run"]

TASK = Path(__file__).parent.parent / "live_task.py"

SHOWN = {
    "wall_s": "whole search, s:",
    "share_of_scoring": "of pure scoring:",
    "extra_s_per_score": "beyond each score, s:",
    "extra_written_nbytes": "bytes written beside the soup:",
    "peak_anonymous_nbytes": "peak memory:",
}


def run(session: Session, case: Case, *, score_s: float = 2.0, rounds: int = 2) -> None:
    """Search over the case with a scorer of known time; every other candidate is rejected."""
    ingredients = make(case)
    settle()
    warm_cache(ingredients)
    output = cache_folder() / "soups" / "greedy"
    env = {
        "STREAMSOUP_BENCH_LIKE": str(ingredients[0]),
        "STREAMSOUP_BENCH_SCORE_S": str(score_s),
        "STREAMSOUP_BENCH_N": str(case.n),
    }
    n_scores = 2 * case.n - 1
    case_label = f"{case.label}, {score_s:g} s a score"
    for round_ in range(rounds):
        alone = measure([sys.executable, str(TASK), str(n_scores)], env=env)
        assert alone.status == 0, alone.stderr
        shown = {"wall_s": "the same scores, s:", "peak_anonymous_nbytes": "peak memory:"}
        row = alone.row()
        session.add("greedy", "scoring alone", case_label, round=round_, shown=shown, **row)
        line = streamsoup("greedy", *ingredients, "--task", TASK, "-o", output, "--json", "-q")
        result = measure(line, output=output, env=env)
        assert result.status == 0, result.stderr
        soup = json.loads(result.stdout)
        extra = result.wall_s - alone.wall_s
        session.add(
            "greedy",
            "streamsoup",
            case_label,
            round=round_,
            n_scores=n_scores,
            n_accepted=len(soup["recipe"]["ingredients"]),
            share_of_scoring=result.wall_s / alone.wall_s,
            extra_s_per_score=extra / n_scores,
            extra_written_nbytes=result.written_nbytes - soup["nbytes_written"],
            shown=SHOWN,
            **result.row(),
        )
    remove(output)
