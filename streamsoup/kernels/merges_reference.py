"""Merges of task vectors, element by element: the specification of the rules in `engine.rules`.

Everything is float64. θ₀ is the base, dᵢ = θᵢ − θ₀ the task vector of ingredient i, 0 where both
are the same; products are rounded, and then added in recipe order. Where nothing moves an element,
because no ingredient has a part in it or the parts add up to zero, θ₀ stays bit for bit. The result
is rounded once (`kernels.reference.narrow`). Tensors are flat lists in C order.

Of equal magnitudes the one with the lowest index counts as the larger. Random numbers are those of
`kernels.philox`. Sums over a tensor follow `total`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamsoup.kernels.philox import Key, philox

__all__ = [
    "della_mask",
    "factor_by_density",
    "factor_by_l1",
    "largest",
    "middle",
    "near_swap",
    "ram",
    "random_mask",
    "row_slerp",
    "sce",
    "sum_of_task_vectors",
    "task_vector",
    "total",
]

Values = Sequence[float]
Mask = Sequence[bool]

GRAIN, LANES = 4096, 64


def task_vector(values: Values, base: Values) -> list[float]:
    """Return dᵢ."""
    return [0.0 if a == b else a - b for a, b in zip(values, base, strict=True)]


def total(values: Values) -> float:
    """Add up values: lanes of grains of 4096 in order, then lanes in order, then grains in order.

    Element e of a grain belongs to lane e mod 64.
    """
    result = 0.0
    for begin in range(0, len(values), GRAIN):
        lanes = [0.0] * LANES
        for place, value in enumerate(values[begin : begin + GRAIN]):
            lanes[place % LANES] += value
        grain = 0.0
        for lane in lanes:
            grain += lane
        result += grain
    return result


def by_magnitude(values: Values) -> list[int]:
    """Return the indices of `values`, the largest magnitude first."""
    return sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))


def largest(values: Values, k: int) -> list[bool]:
    """Return the mask of the k largest magnitudes; for TIES k is ``max(1, int(density·n))``."""
    chosen = set(by_magnitude(values)[:k])
    return [index in chosen for index in range(len(values))]


def middle(values: Values, density: float, gamma: float) -> list[bool]:
    """Return the mask of Breadcrumbs.

    Of n magnitudes in ascending order it keeps ``int(density·n)`` from rank
    ``max(0, n − int(density·n) − int(gamma·n))`` on.
    """
    n = len(values)
    kept = int(density * n)
    first = max(0, n - kept - int(gamma * n))
    chosen = set(by_magnitude(values)[::-1][first : first + kept])
    return [index in chosen for index in range(n)]


def fraction(key: Key, index: int) -> float:
    """Return the random number of an element as a fraction of its range, below 1."""
    counter = index // 4
    return philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key)[index % 4] / 2**32


def random_mask(n: int, density: float, key: Key) -> list[bool]:
    """Return the mask of DARE."""
    return [fraction(key, index) < density for index in range(n)]


def della_mask(
    values: Values, shape: Sequence[int], density: float, epsilon: float, key: Key
) -> list[bool]:
    """Return the mask of DELLA: ranks within rows, 0 for the smallest magnitude."""
    length = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    mask = [False] * len(values)
    for begin in range(0, len(values), max(1, length)):
        row = values[begin : begin + length]
        for rank, place in enumerate(reversed(by_magnitude(row))):
            chance = density
            if length > 1:
                chance = (density - epsilon) + (2 * epsilon) * (rank / (length - 1))
            mask[begin + place] = fraction(key, begin + place) < chance
    return mask


def factor_by_l1(values: Values, mask: Mask) -> float:
    """Return Σ|d| / Σ|S(d)|; 1 where nothing is kept but zeros."""
    kept = total([abs(value) if keep else 0.0 for value, keep in zip(values, mask, strict=True)])
    return total([abs(value) for value in values]) / kept if kept > 0 else 1.0


def factor_by_density(density: float) -> float:
    """Return 1 / density; 1 where nothing is kept."""
    return 1.0 / density if density > 0 else 1.0


def sum_of_task_vectors(
    base: Values,
    tasks: Sequence[Values],
    masks: Sequence[Mask],
    factors: Values,
    coefficients: Values,
    *,
    scale: float = 1.0,
    consensus: bool = False,
    normalize: bool = False,
) -> list[float]:
    """Return θ₀ + λ · Σᵢ wᵢ·S(dᵢ)·[agrees] / divisor.

    Args:
        base: θ₀ ``(element,)``.
        tasks: dᵢ ``(ingredient, element)``.
        masks: What is kept of them ``(ingredient, element)``.
        factors: What `rescale` multiplies each by ``(ingredient,)``; 1 where there is none.
        coefficients: wᵢ ``(ingredient,)``.
        scale: λ.
        consensus: Whether each element elects the sign of its sum, plus where that is zero, and
            only what has that sign has a part in it; zeros have none.
        normalize: Whether to divide by Σᵢ wᵢ, if that is 1e-8 in magnitude at least; with a
            consensus, by that of those that agree, if it is not 0.
    """
    result = []
    for element, start in enumerate(base):
        products = []
        for task, mask, factor, w in zip(tasks, masks, factors, coefficients, strict=True):
            products.append((task[element] if mask[element] else 0.0) * factor * w)
        moved = 0.0
        for product in products:
            moved += product
        divisor = 0.0
        for w in coefficients:
            divisor += w
        divisor = divisor if abs(divisor) >= 1e-8 else 1.0
        if consensus:
            sign = 1.0 if moved >= 0 else -1.0
            moved = divisor = 0.0
            for product, w in zip(products, coefficients, strict=True):
                if product * sign > 0:
                    moved += product
                    divisor += w
            divisor = divisor or 1.0
        if normalize:
            moved /= divisor
        if scale != 1.0:
            moved *= scale
        result.append(start if moved == 0 else start + moved)
    return result


def sce(base: Values, tasks: Sequence[Values], select_topk: float) -> list[float]:
    """Return SCE: select by variance, calculate coefficients by energy, erase minorities."""
    n = len(tasks)
    masked = [list(task) for task in tasks]
    if select_topk < 1:
        variances = []
        for values in zip(*tasks, strict=True):
            mean = 0.0
            for value in values:
                mean += value
            mean /= n
            spread = 0.0
            for value in values:
                spread += (value - mean) * (value - mean)
            variances.append(spread / n)
        n_nonzero = sum(variance != 0 for variance in variances)
        mask = largest(variances, int(n_nonzero * select_topk))
        masked = [[v if keep else 0.0 for v, keep in zip(t, mask, strict=True)] for t in tasks]
    energies = [total([value * value for value in task]) / max(1, len(base)) for task in masked]
    whole = 0.0
    for energy in energies:
        whole += energy
    weights = [energy / whole if whole >= 1e-6 else 1 / n for energy in energies]
    result = []
    for start, values in zip(base, zip(*masked, strict=True), strict=True):
        elected = 0.0
        for value in values:
            elected += value
        sign = 1.0 if elected >= 0 else -1.0
        moved = divisor = 0.0
        for value, weight in zip(values, weights, strict=True):
            if value * sign > 0:
                moved += weight * value
                divisor += weight
        moved /= max(divisor, 1e-6)
        result.append(start if moved == 0 else start + moved)
    return result


def ram(base: Values, tasks: Sequence[Values], epsilon: float) -> list[float]:
    """Return RAM: the whole change of what one ingredient changes, the mean of what several do."""
    result = []
    for start, values in zip(base, zip(*tasks, strict=True), strict=True):
        moved, n = 0.0, 0
        for value in values:
            if abs(value) > epsilon:
                moved += value
                n += 1
        moved /= max(n, 1)
        result.append(start if moved == 0 else start + moved)
    return result


def row_slerp(x: Values, y: Values, length: int, t: float) -> list[float]:
    """Return (sin((1−t)Ω)·x + sin(tΩ)·y) / sin Ω for each row of `length` elements.

    Factors are divided first. Rows on one line, by 1 − cos²Ω up to 1e-16, and zeros, are averaged
    straight. Inner products are summed in 64 lanes: element e of a row belongs to lane e mod 64.
    """

    def product(a: Values, b: Values) -> float:
        lanes = [0.0] * LANES
        for e, (left, right) in enumerate(zip(a, b, strict=True)):
            lanes[e % LANES] += left * right
        result = 0.0
        for lane in lanes:
            result += lane
        return result

    made: list[float] = []
    for begin in range(0, len(x), max(1, length)):
        a, b = x[begin : begin + length], y[begin : begin + length]
        f, g = 1.0 - t, t
        lengths = math.sqrt(product(a, a)) * math.sqrt(product(b, b))
        if lengths > 0:
            cosine = min(1.0, max(-1.0, product(a, b) / lengths))
            if 1 - cosine * cosine > 1e-16:
                angle = math.acos(cosine)
                f, g = math.sin((1 - t) * angle), math.sin(t * angle)
                f, g = f / math.sin(angle), g / math.sin(angle)
        made += [f * one + g * other for one, other in zip(a, b, strict=True)]
    return made


def near_swap(base: Values, other: Values, t: float) -> list[float]:
    """Return NearSwap: w·b + (1 − w)·a with w = min(1, t / max(|a − b|, 1e-6))."""
    result = []
    for a, b in zip(base, other, strict=True):
        w = min(1.0, t / max(abs(a - b), 1e-6))
        result.append(a if a == b else w * b + (1.0 - w) * a)
    return result
