"""What does each tier of kernels buy? Whole soups with fast ones, plain ones and numpy, in turn.

The uniform soup, and one with coefficients, of which no mean is taken in float32. The same answer
first: the bytes of all tiers are compared.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup, uniform
from benchmarks.rows import Session
from streamsoup.kernels.tiers import TIERS, VARIABLE

__all__ = ["run"]


def run(session: Session, cases: Sequence[Case], *, rounds: int = 7) -> None:
    """Measure `rounds` of each tier for each case, in turn, after one that is not counted."""
    output = cache_folder() / "soups" / "tiers"
    for case in cases:
        ingredients = make(case)
        warm_cache(ingredients)
        coefficients = ",".join(f"{0.9 / case.n + 0.01 * i:.3f}" for i in range(case.n))
        weighted = streamsoup("mix", *ingredients, "-c", coefficients, "-o", output, "--quiet")
        for name, line in (("uniform", uniform(output, ingredients)), ("mix", weighted)):
            _compare(session, f"{name}, {case.label}", line, output, rounds)
    remove(output)


def _compare(session: Session, name: str, line: list[str], output: Path, rounds: int) -> None:
    """Run one command with each tier in turn."""
    made: set[bytes] = set()
    times: dict[str, list[float]] = {tier: [] for tier in TIERS}
    for round_ in range(-1, rounds):
        for tier in TIERS:
            settle(10)
            result = measure(line, output=output, env={VARIABLE: tier})
            assert result.status == 0, result.stderr
            if round_ < 0:  # kernels are compiled, and the answers compared
                made.add((output / "model.safetensors").read_bytes())
                continue
            row = session.add("tiers", tier, name, round=round_, **result.row())
            times[tier].append(row["wall_s"])
    assert len(made) == 1, f"{name}: tiers differ"
    for tier, each in times.items():
        print(f"{name}: {tier:6} {statistics.median(each):.3f} s", file=sys.stderr)
