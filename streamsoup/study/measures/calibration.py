"""How far confidences can be trusted: likelihood, calibration error, and one temperature.

* Negative log-likelihood of the labels, in nats, at an inverse temperature β: −log softmax(β·z)_y.
* Expected calibration error with bins of equal mass: sort by confidence, cut into bins of equal
  counts, Σ_b (n_b/n)·|accuracy_b − confidence_b|. Nguyen and O'Connor 2015,
  https://arxiv.org/abs/1508.05154, for the equal counts.
* Temperature scaling: the β that minimises the likelihood's loss on held-out data, which is
  convex in β. Guo et al. 2017, https://arxiv.org/abs/1706.04599 (T = 1/β).

A logit of −∞ says that a class has no chance. Numpy's settings for errors do not matter here: small
numbers become 0 as they should.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BINS",
    "HELD",
    "NONE",
    "Calibration",
    "answers_of",
    "blocks",
    "calibrate",
    "equal_mass_error",
    "fit_beta",
    "log_softmax",
    "losses",
]

Floats = NDArray[np.float64]
AnyFloats = NDArray[np.float64] | NDArray[np.float32]
Labels = NDArray[np.int64]

BINS = 15
"""Bins of the calibration error, the usual number."""

BETA_RANGE = (1e-3, 1e3)
"""Where an inverse temperature is looked for: where all answers are right, the best is infinite."""


HELD = 4_000_000
"""Logits worked on at once: some 100 MB in float64."""

CACHED = 100_000
"""Logits worked on at once where they are read many times: what fits into a core's cache."""


NONE = -1
"""The answer where logits are NaN, or infinite without saying that a class has no chance."""


class Calibration(msgspec.Struct, frozen=True):
    """How good the answers of one model are on one split, and how honest its confidence."""

    accuracy: float
    """Share of right answers, 0 to 1."""
    nll: float
    """Mean negative log-likelihood of the labels, in nats."""
    ece: float
    """Expected calibration error, 0 to 1."""


def answers_of(logits: AnyFloats) -> Labels:
    """Return the class of the largest of ``(example, class)`` logits, or `NONE`: right nowhere.

    What numpy and torch call the largest of a row with NaN would be right now and then.

    >>> answers_of(np.array([[0.0, 1.0], [np.nan, 0.0], [-np.inf, 0.0], [np.inf, 0.0]]))
    array([ 1, -1,  1, -1])
    """
    answers = logits.argmax(axis=-1)
    return np.where(np.isfinite(logits.max(axis=-1)), answers, NONE)


@np.errstate(all="ignore")
def log_softmax(logits: AnyFloats, beta: float = 1.0) -> Floats:
    """Return log softmax(β·logits) over the last axis, in float64."""
    z = beta * logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    normalised: Floats = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return normalised


def losses(logits: AnyFloats, labels: Labels, beta: float = 1.0) -> Floats:
    """Return the negative log-likelihood of each label ``(example,) float64``, in nats."""
    chosen: Floats = -log_softmax(logits, beta)[np.arange(len(labels)), labels]
    return chosen


def calibrate(
    logits: AnyFloats, labels: Labels, beta: float = 1.0, *, n_bins: int = BINS
) -> Calibration:
    """Measure ``(example, class)`` logits against ``(example,)`` labels, at inverse temperature β.

    Holds some numbers for each example, and blocks of logits; so those may be mapped from a file.

    >>> calibrate(np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 1])).accuracy
    1.0
    """
    n = len(labels)
    right, confidence, loss = np.empty(n), np.empty(n), np.empty(n)
    for part in blocks(logits, HELD):
        logs = log_softmax(logits[part], beta)
        rows = np.arange(len(logs))
        # Of the logits themselves: a small β must not make ties, and with them other answers.
        answers = answers_of(logits[part])
        right[part] = answers == labels[part]
        confidence[part] = np.exp(logs[rows, answers])  # of `NONE` any will do: all are NaN
        loss[part] = -logs[rows, labels[part]]
    ece = equal_mass_error(confidence, right, n_bins=n_bins)
    return Calibration(float(right.mean()), float(loss.mean()), ece)


def equal_mass_error(confidence: Floats, right: Floats, *, n_bins: int = BINS) -> float:
    """Return the expected calibration error with bins of equal counts, 0 to 1.

    `confidence` and `right` ``(example,)`` are between 0 and 1. Examples of equal confidence stay
    in the order given; where the count does not divide, the first bins hold one more.
    """
    # Softmax rounds: what differs in the last digits alone is equal.
    order = np.argsort(np.round(confidence, 12), kind="stable")
    gaps = [
        abs(float(right[part].sum() - confidence[part].sum()))
        for part in np.array_split(order, n_bins)
    ]
    return sum(gaps) / len(order)


def fit_beta(logits: AnyFloats, labels: Labels) -> float:
    """Find the inverse temperature β that minimises the mean loss; within `BETA_RANGE`.

    Newton's method on the convex loss, kept inside a bracket. Costs some ten passes over the
    logits, which may be mapped from a file, and holds a block of them.
    """
    low, high = BETA_RANGE
    beta = 1.0
    for _ in range(100):
        slope, curvature = _slopes(logits, labels, beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else np.inf
        # Outside the bracket, or nowhere: halve it, on a logarithmic scale.
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - beta) <= 1e-12 * beta:
            return following
        beta = following
    return beta


@np.errstate(all="ignore")
def _slopes(logits: AnyFloats, labels: Labels, beta: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean loss by β.

    With p = softmax(β·z) they are E[Σp·z − z_y] and E[Σp·z² − (Σp·z)²]; neither depends on a
    constant added to z. A class without a chance adds nothing to the sums, and a label without one
    costs the same, ∞, at every β, so that its example says nothing of β; nor do logits of NaN.
    """
    first = second = 0.0
    for part in blocks(logits, CACHED):
        z = logits[part].astype(np.float64)
        largest = z.max(axis=1, keepdims=True)
        z -= largest
        rows = np.arange(len(z))
        possible = (z[rows, labels[part]] != -np.inf) & np.isfinite(largest[:, 0])
        p = np.exp(beta * z)
        total = p.sum(axis=1)
        z[z == -np.inf] = 0.0  # p is 0 there, and 0·∞ is none
        p *= z
        mean = p.sum(axis=1) / total
        square = np.einsum("ij,ij->i", p, z) / total
        chosen = z[rows, labels[part]]
        first += float((mean - chosen)[possible].sum())
        second += float((square - mean * mean)[possible].sum())
    return first / len(labels), second / len(labels)


def blocks(logits: AnyFloats, size: int) -> Iterator[slice]:
    """Cut the examples into blocks of about `size` logits."""
    n, at_once = len(logits), max(1, size // max(logits.shape[1], 1))
    for first in range(0, n, at_once):
        yield slice(first, min(first + at_once, n))
