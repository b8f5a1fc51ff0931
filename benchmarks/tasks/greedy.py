"""What does a greedy search cost beyond scoring, and how many bytes does each trial move?

Beside it two ways without it: the paper's, which loads each candidate again, and that of a merge
tool, which writes each trial as a checkpoint to be loaded. Pure scoring is a process of its own
that builds the model and scores it as often.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup
from benchmarks.peers import PEERS, install, python_of
from benchmarks.rows import Session

__all__ = ["run"]

HERE = Path(__file__).parent.parent
TASK = HERE / "live_task.py"

PEER_WAYS = {"loaded": "paper's way", "files": "a file for each trial"}
"""What `peers/greedy_from_disk.py` takes, and the rows' names for it."""

SHOWN = {
    "wall_s": "whole search, s:",
    "share_of_scoring": "of pure scoring:",
    "extra_s_per_score": "beyond each score, s:",
    "read_per_score_nbytes": "weights read for each score:",
    "extra_written_nbytes": "bytes written beside the soup:",
    "peak_anonymous_nbytes": "peak memory:",
}


def run(session: Session, case: Case, *, score_s: float = 2.0, rounds: int = 2) -> None:
    """Search over the case with a scorer of known time; every other candidate is rejected."""
    install(PEERS[:1])
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
    script = HERE / "peers" / "greedy_from_disk.py"
    searches = {"streamsoup": streamsoup("greedy", "--task", TASK, "--json", "-q", "-o", output)}
    for way, name in PEER_WAYS.items():
        searches[name] = [str(python_of(PEERS[0])), str(script), way, str(output)]
    kept: set[int] = set()
    for round_ in range(rounds):
        alone = measure([sys.executable, str(TASK), str(n_scores)], env=env)
        assert alone.status == 0, alone.stderr
        shown = {"wall_s": "the same scores, s:", "peak_anonymous_nbytes": "peak memory:"}
        row = alone.row()
        session.add("greedy", "scoring alone", case_label, round=round_, shown=shown, **row)
        for tool, command in searches.items():
            result = measure([*command, *map(str, ingredients)], output=output, env=env)
            assert result.status == 0, result.stderr
            n_kept, nbytes = _told(json.loads(result.stdout))
            kept.add(n_kept)
            assert len(kept) == 1, "searches that keep others do not compare"
            extra = result.wall_s - alone.wall_s
            session.add(
                "greedy",
                tool,
                case_label,
                round=round_,
                n_scores=n_scores,
                n_accepted=n_kept,
                share_of_scoring=result.wall_s / alone.wall_s,
                extra_s_per_score=extra / n_scores,
                read_per_score_nbytes=nbytes / n_scores,
                extra_written_nbytes=result.written_nbytes - case.nbytes_each,
                shown=SHOWN,
                **result.row(),
            )
            remove(output.with_name(output.name + "-trial"))
    remove(output)


def _told(answer: dict[str, Any]) -> tuple[int, int]:
    """Return the number of ingredients that were kept, and the bytes of weights read for trials."""
    if "report" in answer:  # ours
        return len(answer["report"]["members"]), answer["report"]["nbytes_read"]
    return answer["n_kept"], answer["loaded_nbytes"]
