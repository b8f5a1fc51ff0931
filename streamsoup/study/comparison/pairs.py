"""What lies half-way between two ingredients: what the middle gains, and what theory says of it.

The paper finds that pairs at larger angles gain more, unless a high learning rate put a barrier
between them: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import xxhash
from msgspec.structs import replace

from streamsoup.study.comparison.theory import compare_with_ensemble
from streamsoup.study.measures.barriers import advantage
from streamsoup.study.measures.bench import Bench
from streamsoup.study.measures.calibration import fit_beta
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.rows import Pair, Splits

__all__ = ["choose_pairs", "look_between"]

STEP = 0.1
"""Between the points of a path whose second derivative is taken: the paper's sweeps use tenths."""


def choose_pairs(n: int, most: int, seed: int) -> list[tuple[int, int]]:
    """Return all pairs of `n`, or `most` of them drawn at random, in order.

    Each pair draws a number of its own, and the smallest are taken: of one ingredient more, few
    pairs come in, and the others stay.
    """

    def drawn(pair: tuple[int, int]) -> int:
        return xxhash.xxh3_64_intdigest(f"{seed} {pair}".encode())

    return sorted(sorted(itertools.combinations(range(n), 2), key=drawn)[:most])


def look_between(
    bench: Bench,
    splits: Splits,
    pairs: Sequence[tuple[int, int]],
    values: Sequence[float],
    base: int,
    *,
    theory: bool,
) -> list[Pair]:
    """Measure the middle of each pair, on the split of the same distribution.

    `values` are those of the ingredients there. Costs a point for each pair and, with `theory`,
    three more, and one pass over all ingredients for the angles.
    """
    angles = _angles(bench, len(values), base)
    split = splits.judged
    found = []
    for i, j in pairs:
        pair = Pair(i, j, angles[i][j], 0.0)
        if theory and bench.predicts:
            pair = _in_theory(bench, pair, splits)
        middle = bench.value(Mixture.uniform((i, j)), split)
        found.append(replace(pair, advantage=advantage(values[i], middle, values[j])))
    return found


def _in_theory(bench: Bench, pair: Pair, splits: Splits) -> Pair:
    """Add the theory of soup against ensemble to a pair, at α = ½; β is fitted on validation."""
    i, j = pair.first, pair.second
    split = splits.judged
    middle = Mixture.uniform((i, j))
    key = f"{bench.key(middle, split)}:theory:{STEP}"
    known = bench.cache.value(key)
    if known is None:
        beta = fit_beta(*bench.answers(middle, splits.val))
        soup, labels = bench.answers(middle, split)
        before, _ = bench.answers(Mixture.of((i, j), (0.5 + STEP, 0.5 - STEP)), split)
        after, _ = bench.answers(Mixture.of((i, j), (0.5 - STEP, 0.5 + STEP)), split)
        first, second = (bench.logits(Mixture.uniform([n]), split)[0] for n in (i, j))
        theory = compare_with_ensemble(
            (first, before, soup, after, second), labels, alpha=0.5, step=STEP, beta=beta
        )
        known = [theory.approximation, theory.measured, theory.error_difference]
        bench.cache.put_value(key, known)
    return replace(pair, approximation=known[0], measured=known[1], error_difference=known[2])


def _angles(bench: Bench, n: int, base: int) -> list[list[float]]:
    """Return the angles between task vectors in degrees, from one pass over all, which is kept."""
    from streamsoup.methods.angles import geometry

    key = "angles:" + ",".join(bench.digest(i) for i in (*range(n), base))
    known: list[list[float]] | None = bench.cache.value(key)
    if known is None:
        opened = bench.plan.ingredients
        found = geometry(opened[:n], base=opened[base], options=bench.options)
        known = found.total.angles.tolist()
        bench.cache.put_value(key, known)
    return known
