"""Soup against logit ensemble, in theory: when does averaging weights lose to averaging answers?

For a pair with θ(α) = (1−α)·θ₀ + α·θ₁, the cross-entropies at an inverse temperature β differ by

    L_soup − L_ens ≈ α(1−α)/2 · ( −d²/dα² L_soup(α) + β²·E_x Var_{Y∼p}[Δf_Y(x)] ),

with p = softmax(β·f(x; θ(α))) and Δf(x) = f(x; θ₁) − f(x; θ₀): Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482, section 4, equation 1. A valley along the path favours the soup,
disagreement between the ends where the soup is unsure favours the ensemble. It assumes logits that
are nearly linear along the path; for linear models soup and ensemble are the same. β is the one
that calibrates the soup.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.study.measures.calibration import (
    HELD,
    AnyFloats,
    Labels,
    answers_of,
    blocks,
    log_softmax,
    losses,
)

__all__ = ["Theory", "compare_with_ensemble", "disagreement"]

Floats = NDArray[np.float64]


class Theory(msgspec.Struct, frozen=True):
    """One pair: what the approximation says, and what was measured. In nats."""

    approximation: float
    """Of L_soup − L_ens; negative where the soup is expected to be better."""
    measured: float
    """L_soup − L_ens."""
    error_difference: float
    """Error of the soup less error of the ensemble, 0 to 1."""
    curvature: float
    """d²/dα² L_soup, by central differences."""
    disagreement: float
    """E_x Var[Δf_Y(x)], before β²."""
    beta: float


@np.errstate(all="ignore")
def disagreement(soup: AnyFloats, difference: AnyFloats, beta: float) -> float:
    """Return E_x Var_{Y∼softmax(β·soup)}[difference_Y], both ``(example, class)``."""
    p = np.exp(log_softmax(soup, beta))
    # Where p is 0 nothing is added, even if both logits are −∞ and their difference is NaN.
    d = np.where(p > 0, difference.astype(np.float64), 0.0)
    # A constant added to all classes changes no variance, and centring loses no digits.
    d -= (p * d).sum(axis=1, keepdims=True)
    return float((p * d * d).sum(axis=1).mean())


@np.errstate(all="ignore")
def compare_with_ensemble(
    logits: tuple[AnyFloats, AnyFloats, AnyFloats, AnyFloats, AnyFloats],
    labels: Labels,
    *,
    alpha: float,
    step: float,
    beta: float,
) -> Theory:
    """Set the approximation beside the measured difference, for one pair.

    `logits` ``(example, class)`` are those of θ₀, of the soups at α−h, α and α+h, and of θ₁, with
    h = `step`; `beta` is the soup's. They may be mapped from files: blocks are held.
    """
    sums = np.zeros(7)
    for part in blocks(logits[0], HELD):
        some, right = [z[part].astype(np.float64) for z in logits], labels[part]
        first, _, soup, _, second = some
        ensemble = (1 - alpha) * first + alpha * second
        sums += [
            *(losses(z, right, beta).sum() for z in (*some[1:4], ensemble)),
            *((answers_of(z) != right).sum() for z in (soup, ensemble)),
            disagreement(soup, second - first, beta) * len(right),
        ]
    before, at, after, of_ensemble, wrong, wrong_ensemble, spread = sums / len(labels)
    curvature = (before - 2 * at + after) / step**2
    return Theory(
        approximation=float(alpha * (1 - alpha) / 2 * (beta**2 * spread - curvature)),
        measured=float(at - of_ensemble),
        error_difference=float(wrong - wrong_ensemble),
        curvature=float(curvature),
        disagreement=float(spread),
        beta=beta,
    )
