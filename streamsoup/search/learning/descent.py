"""Two ways downhill on a few numbers: AdamW as in the paper, and L-BFGS. Numpy only, float64.

Both ask for one loss and gradient at a time, and are fixed functions of the answers: a search is
resumed by answering the same questions again.

* AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; here without weight decay.
* L-BFGS: Nocedal 1980, two-loop recursion; with a line search by bisection for the weak Wolfe
  conditions (Lewis and Overton 2013, https://doi.org/10.1007/s10107-012-0514-2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["AdamW", "lbfgs"]

Floats = NDArray[np.float64]
Answer = tuple[float, Floats]
"""Loss and gradient ``(raw,)``."""

MEMORY = 10
"""Pairs of steps and gradient changes that L-BFGS keeps."""

ARMIJO, CURVATURE = 1e-4, 0.9
"""The usual constants of the Wolfe conditions for quasi-Newton steps."""

LINE_TRIALS = 8
"""Points tried on one line; what does not descend by then is at the bottom, up to rounding."""


class AdamW(msgspec.Struct):
    """The state of AdamW, a step at a time; the same arithmetic as `torch.optim.AdamW`."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    n_steps: int = 0
    mean: Floats = msgspec.field(default_factory=lambda: np.zeros(0))
    square: Floats = msgspec.field(default_factory=lambda: np.zeros(0))

    def step(self, raw: Floats, gradient: Floats) -> Floats:
        """Return the raw numbers after one more gradient."""
        if not self.n_steps:
            self.mean, self.square = np.zeros_like(raw), np.zeros_like(raw)
        self.n_steps += 1
        self.mean = self.mean + (1 - self.beta1) * (gradient - self.mean)
        self.square = self.beta2 * self.square + (1 - self.beta2) * gradient * gradient
        rate = self.lr / (1 - self.beta1**self.n_steps)
        root = np.sqrt(self.square) / np.sqrt(1 - self.beta2**self.n_steps) + self.eps
        return np.asarray(raw - rate * self.mean / root)


def lbfgs(
    start: Floats, first_step: float, largest_step: float, tolerance: float
) -> Generator[Floats, Answer, str]:
    """Minimise: yields points, is sent their loss and gradient, returns why it stopped.

    `first_step` is the largest change of any number in the first step, `largest_step` in all
    others. Ends when two steps in a row lower the loss by less than `tolerance` of it, or when no
    step does any more.
    """
    x = start.copy()
    loss, gradient = yield x
    pairs: deque[tuple[Floats, Floats]] = deque(maxlen=MEMORY)
    n_slow = 0
    while True:
        if float(np.abs(gradient).max(initial=0.0)) == 0.0:
            return "the gradient is zero"
        direction = -_two_loop(gradient, pairs)
        slope = float(direction @ gradient)
        if not slope < 0:
            pairs.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        reach = float(np.abs(direction).max())
        limit = largest_step if pairs else first_step
        step = min(1.0, limit / reach) if pairs else limit / reach
        found = yield from _line_search(x, loss, direction, slope, step)
        if found is None:
            return "no step lowers the loss any more"
        point, answer = found
        if float((point - x) @ (answer[1] - gradient)) > 0:
            pairs.append((point - x, answer[1] - gradient))
        gain = loss - answer[0]
        n_slow = n_slow + 1 if gain <= tolerance * max(abs(loss), 1e-12) else 0
        x, loss, gradient = point, answer[0], answer[1]
        if n_slow == 2:
            return "steps hardly lower the loss any more"


def _line_search(
    x: Floats, loss: float, direction: Floats, slope: float, step: float
) -> Generator[Floats, Answer, tuple[Floats, Answer] | None]:
    """Find a point that is lower, and where the slope has flattened; else the lowest seen."""
    low, high = 0.0, np.inf
    best: tuple[Floats, Answer] | None = None
    for _ in range(LINE_TRIALS):
        point = x + step * direction
        answer = yield point
        if not answer[0] <= loss + ARMIJO * step * slope:  # NaN, too
            high = step
        else:
            if best is None or answer[0] < best[1][0]:
                best = point, answer
            if float(direction @ answer[1]) >= CURVATURE * slope:
                return best
            low = step
            if np.isinf(high) and step > 1e6:
                break
        step = (low + high) / 2 if np.isfinite(high) else 2 * low
    return best


def _two_loop(gradient: Floats, pairs: deque[tuple[Floats, Floats]]) -> Floats:
    """Multiply by the inverse Hessian that the pairs stand for."""
    q = gradient.copy()
    kept: list[float] = []
    for s, y in reversed(pairs):
        a = float(s @ q) / float(s @ y)
        kept.append(a)
        q = q - a * y
    if pairs:
        s, y = pairs[-1]
        q = q * (float(s @ y) / float(y @ y))
    for (s, y), a in zip(pairs, reversed(kept), strict=True):
        q = q + (a - float(y @ q) / float(s @ y)) * s
    return q
