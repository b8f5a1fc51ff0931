"""Numbers from logits and scores: each against a plain implementation, and with a planted fault."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamsoup.errors import RecipeError
from streamsoup.search.trials import best_first
from streamsoup.study.comparison.selection import grow
from streamsoup.study.comparison.theory import compare_with_ensemble, disagreement
from streamsoup.study.landscape.plane import Plane
from streamsoup.study.measures import calibration
from streamsoup.study.measures.barriers import advantage, barrier, parse_alphas
from streamsoup.study.measures.bootstrap import interval, resampled_means
from streamsoup.study.measures.calibration import (
    NONE,
    answers_of,
    calibrate,
    equal_mass_error,
    fit_beta,
    losses,
)

Floats = NDArray[np.float64]


def answers(
    n: int, n_classes: int, seed: int, beta: float = 1.0
) -> tuple[Floats, NDArray[np.int64]]:
    """Draw logits, and labels from softmax(beta · logits)."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((n, n_classes))
    p = np.exp(beta * logits)
    p /= p.sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(n_classes, p=row) for row in p])
    return logits, labels


def plain_ece(confidence: Floats, right: Floats, n_bins: int, *, equal_mass: bool) -> float:
    """Sum gaps bin by bin, in loops; with equal widths it is another number."""
    n = len(confidence)
    pairs = sorted(zip(confidence.tolist(), right.tolist(), strict=True))
    if equal_mass:
        small, larger = divmod(n, n_bins)
        sizes = [small + (b < larger) for b in range(n_bins)]
        starts = [sum(sizes[:b]) for b in range(n_bins)]
        bins = [pairs[s : s + size] for s, size in zip(starts, sizes, strict=True)]
    else:
        bins = [[p for p in pairs if b / n_bins < p[0] <= (b + 1) / n_bins] for b in range(n_bins)]
    total = 0.0
    for some in bins:
        if some:
            accuracy = sum(r for _, r in some) / len(some)
            confident = sum(c for c, _ in some) / len(some)
            total += len(some) / n * abs(accuracy - confident)
    return total


@pytest.mark.parametrize("n", [100, 101, 7, 1000])
def test_ece_equals_a_plain_loop(n: int) -> None:
    """The calibration error is the one of bins of equal counts, also where n does not divide."""
    rng = np.random.default_rng(n)
    confidence, right = rng.uniform(0.2, 1, n), rng.integers(0, 2, n).astype(float)
    ours = equal_mass_error(confidence, right, n_bins=15)
    assert ours == pytest.approx(plain_ece(confidence, right, 15, equal_mass=True), abs=1e-12)


def test_equal_confidences_stay_in_order() -> None:
    """Classes in another order are no other confidence, though softmax rounds otherwise."""
    rng = np.random.default_rng(0)
    logits = np.array([rng.permutation([3.0, 2.0, 1.0, 0.0, -1.0]) for _ in range(300)])
    labels = np.where(rng.random(300) < 0.6, logits.argmax(1), logits.argmin(1))
    right = (logits.argmax(1) == labels).astype(float)
    confidence = float(np.exp(3.0) / np.exp([3.0, 2.0, 1.0, 0.0, -1.0]).sum())
    gaps = [abs(part.sum() - len(part) * confidence) for part in np.array_split(right, 15)]
    assert calibrate(logits, labels).ece == pytest.approx(sum(gaps) / 300, rel=1e-9)


def test_equal_widths_would_be_seen() -> None:
    """Planted fault: bins of equal width give another error."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500) ** 3
    right = (rng.uniform(0, 1, 500) < confidence).astype(float)
    ours = equal_mass_error(confidence, right)
    assert abs(ours - plain_ece(confidence, right, 15, equal_mass=False)) > 1e-4


def test_likelihood_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are torch's cross-entropies in float64; blocks do not change the summary."""
    logits, labels = answers(97, 5, 1)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(1.7 * logits), torch.tensor(labels), reduction="none"
    )
    np.testing.assert_allclose(losses(logits, labels, 1.7), expected.numpy(), rtol=1e-12)
    whole = calibrate(logits, labels, 1.7)
    monkeypatch.setattr(calibration, "HELD", 50)
    cut = calibrate(logits, labels, 1.7)
    assert cut.accuracy == whole.accuracy == (logits.argmax(1) == labels).mean()
    assert cut.nll == pytest.approx(whole.nll, rel=1e-14)
    assert cut.ece == pytest.approx(whole.ece, rel=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_fitted_temperature_is_the_minimum(beta: float) -> None:
    """No β on a fine grid has a lower loss; the one that labels were drawn with is close."""
    logits, labels = answers(3000, 4, 2, beta)
    found = fit_beta(logits, labels)
    grid = found * np.linspace(0.9, 1.1, 201)
    lowest = min(float(losses(logits, labels, b).mean()) for b in grid)
    assert float(losses(logits, labels, found).mean()) <= lowest + 1e-12
    assert found == pytest.approx(beta, rel=0.1)


def test_large_logits_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature and theory hold blocks, and blocks do not change them: logits may be mapped."""
    logits, labels = answers(2000, 300, 9)
    others = [logits * (1 + 0.1 * k) for k in range(4)]

    def both() -> list[float]:
        found = compare_with_ensemble(
            (logits, *others),
            labels,
            alpha=0.5,
            step=0.1,
            beta=1.2,  # type: ignore[arg-type]
        )
        return [fit_beta(logits, labels), found.approximation, found.measured]

    whole = both()
    monkeypatch.setattr(calibration, "CACHED", 7000)
    monkeypatch.setattr("streamsoup.study.comparison.theory.HELD", 7000)
    tracemalloc.start()
    try:
        cut = both()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cut == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert peak < logits.nbytes / 4


def test_temperature_of_perfect_and_of_worthless_answers() -> None:
    """Where every answer is right β grows to its bound, where all are wrong it falls to it."""
    logits = np.eye(4)[np.arange(40) % 4] * 3
    right = np.arange(40) % 4
    low, high = calibration.BETA_RANGE
    assert high / 10 < fit_beta(logits, right) <= high or fit_beta(logits, right) > 10
    assert low <= fit_beta(logits, (right + 1) % 4) < 0.01


def test_classes_without_a_chance_change_nothing() -> None:
    """Logits of −∞ give what very low ones do: the same temperature, calibration and theory."""
    first, labels = answers(500, 4, 3, 0.6)
    second = first + 0.3 * answers(500, 4, 4)[0]
    found = []
    for floor in (-math.inf, -1e6):
        a, b = (np.hstack([z, np.full((500, 2), floor)]) for z in (first, second))
        c = np.hstack([(first + second) / 2 + 0.01 * first**2, np.full((500, 2), floor)])
        beta = fit_beta(a, labels)
        theory = compare_with_ensemble((a, c, c, c, b), labels, alpha=0.5, step=0.1, beta=beta)
        at = calibrate(a, labels, beta)
        found.append([beta, at.accuracy, at.nll, at.ece, theory.approximation, theory.measured])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    assert found[0][0] == pytest.approx(fit_beta(first, labels), rel=1e-9)
    # Of a label that has no chance the loss is ∞ at every β: the others decide.
    labels[:10] = 5
    a = np.hstack([first, np.full((500, 2), -math.inf)])
    assert fit_beta(a, labels) == pytest.approx(fit_beta(first[10:], labels[10:]), rel=1e-9)
    assert calibrate(a, labels).nll == math.inf


def test_logits_that_are_none_are_never_right() -> None:
    """NaN and +∞ answer nothing, whatever numpy calls the largest, and say nothing of β."""
    logits, labels = answers(500, 4, 3, 0.6)
    spoiled = np.vstack([logits, np.full((3, 4), math.nan), np.full((2, 4), math.inf)])
    more = np.concatenate([labels, np.zeros(5, np.int64)])
    assert list(answers_of(spoiled)[500:]) == [NONE] * 5
    at = calibrate(spoiled, more)
    assert at.accuracy == pytest.approx(calibrate(logits, labels).accuracy * 500 / 505)
    assert math.isnan(at.nll)
    assert fit_beta(spoiled, more) == pytest.approx(fit_beta(logits, labels), rel=1e-9)


def test_strict_numpy_changes_nothing() -> None:
    """Where a task lets numpy raise, small numbers still become 0, and −∞ is still a number."""
    logits, labels = answers(200, 5, 6)
    logits *= 300
    hidden = np.where(np.arange(5) == (labels[:, None] + 1) % 5, -math.inf, logits)

    def all_of_it() -> list[float]:
        found = []
        for z in (logits, hidden, logits.astype(np.float32)):
            beta = fit_beta(z, labels)
            at = calibrate(z, labels, beta)
            theory = compare_with_ensemble(
                (z, z, z, z, 2 * z), labels, alpha=0.5, step=0.1, beta=1.0
            )
            found += [beta, at.nll, at.ece, theory.measured, theory.disagreement]
            found.append(disagreement(z, z, 1.0))
        return [*found, float(losses(logits, labels).mean())]

    expected = all_of_it()
    with np.errstate(all="raise"):
        assert all_of_it() == expected
        with pytest.raises(FloatingPointError):
            np.exp(np.array([-1e4]))


def test_bootstrap_agrees_with_the_binomial() -> None:
    """The spread of resampled shares is √(p(1−p)/n), and the interval covers it twice over."""
    right = (np.arange(400) < 300).astype(float)[None]
    means = resampled_means(right, n=4000)[0]
    sigma = math.sqrt(0.75 * 0.25 / 400)
    assert means.mean() == pytest.approx(0.75, abs=4 * sigma / math.sqrt(4000))
    assert means.std() == pytest.approx(sigma, rel=0.05)
    found = interval(means)
    assert found.high - found.low == pytest.approx(2 * 1.96 * sigma, rel=0.06)


def test_rows_are_resampled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows given one by one, or in smaller blocks, are resampled as they are together: paired."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 50))
    together = resampled_means(values, n=100, seed=5)
    apart = [resampled_means(row[None], n=100, seed=5)[0] for row in values]
    np.testing.assert_allclose(together, apart, rtol=1e-12)
    monkeypatch.setattr("streamsoup.study.measures.bootstrap.HELD", 120)
    np.testing.assert_allclose(resampled_means(values, n=100, seed=5), together, rtol=1e-12)
    assert not np.allclose(resampled_means(values, n=100, seed=6), together)


def test_both_barriers_by_hand() -> None:
    """The two definitions differ where the ends do; without a hump only one is zero."""
    humped = barrier([0, 0.25, 0.5, 1], [0.1, 0.5, 0.2, 0.3])
    assert humped.over_mean == pytest.approx(0.3)
    assert humped.over_chord == pytest.approx(0.5 - 0.15)
    assert humped.alpha == 0.25
    slope = barrier([0, 0.5, 1], [0.4, 0.2, 0.0])
    assert (slope.over_mean, slope.over_chord) == (pytest.approx(0.2), pytest.approx(0.0))
    unknown = barrier([0, 0.5, 1], [0.1, math.nan, 0.3])
    assert math.isnan(unknown.over_mean)
    assert math.isnan(unknown.over_chord)
    beyond = barrier([-0.5, 0, 1, 1.5], [9.0, 0.1, 0.1, 9.0])
    assert (beyond.over_mean, beyond.over_chord) == (0.0, 0.0)
    assert advantage(0.7, 0.9, 0.8) == pytest.approx(0.15)
    with pytest.raises(RecipeError, match="both ends"):
        barrier([0, 0.5], [0.1, 0.2])


def test_alphas_are_read_with_both_ends() -> None:
    """A range holds both ends and round numbers; what is none is refused."""
    assert parse_alphas("0:1:0.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert parse_alphas("-0.5:1.5:0.5") == [-0.5, 0, 0.5, 1, 1.5]
    assert parse_alphas("1,0,.5") == [0, 0.5, 1]
    for text in (
        "",
        "0:1",
        "0:1:0",
        "0:1:0.3",
        "nan",
        "a,b",
        "0:1:-1",
        "0:1e9:1",
        "0:inf:1",
        "0:1_0:1",
        "٣",
    ):
        with pytest.raises(RecipeError, match="range"):
            parse_alphas(text)


def test_plane_agrees_with_gram_schmidt() -> None:
    """Coordinates from the Gram matrix are those on an explicit orthonormal basis, both ways."""
    rng = np.random.default_rng(4)
    base, first, second = rng.standard_normal((3, 60)) + 5
    d1, d2 = first - base, second - base
    plane = Plane.from_gram(np.array([[d1 @ d1, d1 @ d2], [d1 @ d2, d2 @ d2]]))
    u1 = d1 / np.linalg.norm(d1)
    v = d2 - (d2 @ u1) * u1
    u2 = v / np.linalg.norm(v)
    for c in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [0.2, 0.3, 0.5], [2.0, -1.5, 0.5]):
        point = c[0] * base + c[1] * first + c[2] * second - base
        x, y = plane.place(c)
        assert (x, y) == (pytest.approx(point @ u1), pytest.approx(point @ u2))
        assert plane.coefficients(x, y) == pytest.approx(c)
    for place, c in zip(plane.corners, np.eye(3).tolist(), strict=True):
        assert plane.place(c) == pytest.approx(place)
    xs, ys = plane.grid(11, 0.25)
    assert max(len(xs), len(ys)) == 11
    assert np.diff(xs) == pytest.approx(np.diff(ys)[0])
    for x, y in plane.corners:
        assert xs[0] < x < xs[-1]
        assert ys[0] < y < ys[-1]


@pytest.mark.parametrize("gram", [[[1, 2], [2, 4]], [[0, 0], [0, 1]], [[1, 0], [0, 0]]])
def test_three_on_a_line_are_refused(gram: list[list[float]]) -> None:
    """A plane needs three checkpoints that are not on one line."""
    with pytest.raises(RecipeError, match=r"one line|two are equal"):
        Plane.from_gram(np.array(gram, float))


def theory_of(
    bend: float, *, seed: int = 8, beta: float = 1.3, step: float = 0.01
) -> tuple[float, float]:
    """Set theory beside measurement where logits are linear along the path, but for a bend."""
    first, labels = answers(400, 6, 7)
    rng = np.random.default_rng(seed)
    second = first + 0.5 * rng.standard_normal(first.shape)
    curve = bend * rng.standard_normal(first.shape)

    def at(alpha: float) -> Floats:
        return (1 - alpha) * first + alpha * second + alpha * (1 - alpha) * curve

    a = 0.5
    found = compare_with_ensemble(
        (first, at(a - step), at(a), at(a + step), second), labels, alpha=a, step=step, beta=beta
    )
    return found.approximation, found.measured


def test_linear_models_have_one_soup_and_ensemble() -> None:
    """For a linear head both losses are equal, and the two terms of the theory cancel."""
    approximation, measured = theory_of(0.0)
    assert measured == pytest.approx(0, abs=1e-14)
    assert approximation == pytest.approx(0, abs=1e-6)


def test_theory_follows_a_mild_bend() -> None:
    """With slight bends, approximation and measurement nearly agree, and so do their signs."""
    pairs = np.array([theory_of(0.2, seed=seed) for seed in range(12)])
    assert np.abs(pairs[:, 1]).max() > 1e-3
    assert np.corrcoef(pairs.T)[0, 1] > 0.95
    clear = np.abs(pairs[:, 1]) > 1e-3
    assert (np.sign(pairs[clear, 0]) == np.sign(pairs[clear, 1])).all()


def test_a_theory_without_temperature_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: with the variance not scaled by β², a linear head has a difference."""
    from streamsoup.study.comparison import theory

    plain = theory.disagreement
    monkeypatch.setattr(theory, "disagreement", lambda soup, d, beta: plain(soup, d, 1.0))
    assert abs(theory_of(0.0)[0]) > 1e-4


def test_order_and_greedy_rule_by_hand() -> None:
    """Best first with ties as given and NaN last; ties are accepted, NaN never is."""
    assert best_first([0.1, 0.5, math.nan, 0.5]) == [1, 3, 0, 2]
    scores = {(1,): 0.5, (1, 3): 0.5, (1, 3, 0): 0.4, (1, 3, 2): math.nan}
    assert grow([1, 3, 0, 2], scores.__getitem__) == (1, 3)
    assert grow([2, 1], {(2,): math.nan, (2, 1): 0.5}.__getitem__) == (2, 1)
