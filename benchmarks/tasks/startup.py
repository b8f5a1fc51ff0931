"""How long does it take to begin: a soup of two 1 MB checkpoints, the first run ever, ``--help``?

The first run ever has an empty kernel cache (``$XDG_CACHE_HOME``) and is large enough to be worth
compiling for; what it takes longer than a second run is what compiling costs.
"""

from __future__ import annotations

import tempfile

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup, uniform
from benchmarks.rows import Session

__all__ = ["run"]


def run(session: Session, *, first: Case, rounds: int = 10, first_rounds: int = 3) -> None:
    """Measure starts. `first` is the soup whose kernels are compiled anew."""
    output = cache_folder() / "soups" / "startup"
    small = make(Case("0.5M", 2))
    large = make(first)
    warm_cache([*small, *large])
    measure(uniform(output, small), output=output)
    for round_ in range(rounds):
        for name, line in (
            ("two of 1 MB", uniform(output, small)),
            ("--help", streamsoup("--help")),
            ("plan, two of 1 MB", streamsoup("plan", *small)),
        ):
            made = output if "-o" in line else None
            settle(10)
            result = measure(line, output=made)
            assert result.status == 0, result.stderr
            session.add("startup", "streamsoup", name, round=round_, **result.row())
    for round_ in range(first_rounds):
        with tempfile.TemporaryDirectory() as empty:
            for when in ("first run ever", "second run"):
                settle(10)
                env = {"XDG_CACHE_HOME": empty}
                result = measure(uniform(output, large), output=output, env=env)
                assert result.status == 0, result.stderr
                name = f"{when}, {first.label}"
                session.add("startup", "streamsoup", name, round=round_, **result.row())
    remove(output)
