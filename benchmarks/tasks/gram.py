"""How long do all angles and distances of many checkpoints take, from one pass?"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.checkpoints import Case, make
from benchmarks.measure import measure, settle, warm_cache
from benchmarks.ours import streamsoup
from benchmarks.rows import Session

__all__ = ["run"]

LIMITS = Path(__file__).parent.parent / "limits.py"
SHOWN = {
    "wall_s": "s:",
    "limit_s": "reading alone, s:",
    "gb_per_s": "GB/s:",
    "cpu_s": "CPU s:",
    "peak_anonymous_nbytes": "peak memory:",
}


def run(session: Session, case: Case, *, rounds: int = 3) -> None:
    """Compute the Gram matrix of a case, the first ingredient as the base."""
    ingredients = make(case)
    settle()
    warm_cache(ingredients)
    files = [str(path) for folder in ingredients for path in folder.glob("*.safetensors")]
    n_cpus = len(os.sched_getaffinity(0))
    for round_ in range(rounds):
        limit = measure([sys.executable, str(LIMITS), "mapped", str(n_cpus), *files])
        base, *others = ingredients
        result = measure(streamsoup("geometry", *others, "--base", base, "--json", "-q"))
        assert result.status == 0, result.stderr
        session.add(
            "gram",
            "streamsoup",
            case.label,
            round=round_,
            gb_per_s=case.n * case.nbytes_each / result.wall_s / 1e9,
            limit_s=json.loads(limit.stdout),
            shown=SHOWN,
            **result.row(),
        )
