"""What a learned soup learns: raw numbers, the coefficients they stand for, and the chain rule.

Coefficients come in groups of tensors: one group for all, one for each layer, or one for each
tensor. Within a group, of raw numbers z:

* softmax: cᵢ = exp zᵢ / Σⱼ exp zⱼ, positive, sum 1 (the paper's choice);
* affine: cᵢ = zᵢ − mean z + 1/k, sum 1, any sign;
* free: cᵢ = zᵢ.

The paper's code starts every zᵢ at 1/k (https://github.com/mlfoundations/model-soups,
``learned_bylayer.py``), so that a soup begins as the uniform one. A last raw number, if asked for,
is the factor β of the logits. Numpy only; everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.recipe import Coefficients

__all__ = ["Constraint", "Granularity", "Parametrisation", "layer_of", "parametrise"]

Floats = NDArray[np.float64]
Granularity = Literal["global", "layer", "tensor"]
Constraint = Literal["softmax", "affine", "free"]


class Parametrisation(msgspec.Struct, frozen=True):
    """How raw numbers become the coefficients of every tensor."""

    groups: tuple[str, ...]
    """Names of the groups: ``all``, layers, or tensors."""
    group_of: Mapping[str, int]
    """Group number of each averaged tensor, by name."""
    n_ingredients: int
    constraint: Constraint
    temperature: bool
    """True if the last raw number is the factor of the logits."""

    @property
    def n_raw(self) -> int:
        """The number of numbers that are learned."""
        return len(self.groups) * self.n_ingredients + self.temperature

    def start(self) -> Floats:
        """Return the raw numbers of the uniform soup ``(raw,)``."""
        raw = np.full(self.n_raw, 1.0 / self.n_ingredients)
        if self.temperature:
            raw[-1] = 1.0
        return raw

    def rows(self, raw: Floats) -> Floats:
        """Return the coefficients ``(group, ingredient)``."""
        z = self._z(raw)
        if self.constraint == "free":
            return z.copy()
        if self.constraint == "affine":
            return np.asarray(z - z.mean(axis=1, keepdims=True) + 1.0 / self.n_ingredients)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True))

    def beta(self, raw: Floats) -> float:
        """Return the factor of the logits."""
        return float(raw[-1]) if self.temperature else 1.0

    def gradient(self, raw: Floats, slopes: Floats, beta_slope: float) -> Floats:
        """Return ∂L/∂raw ``(raw,)`` from ∂L/∂c ``(group, ingredient)``.

        Where coefficients sum to 1, slopes may all be off by the same number: it cancels.
        """
        if self.constraint == "free":
            z = slopes
        elif self.constraint == "affine":
            z = slopes - slopes.mean(axis=1, keepdims=True)
        else:
            rows = self.rows(raw)
            z = rows * (slopes - (rows * slopes).sum(axis=1, keepdims=True))
        tail = [beta_slope] if self.temperature else []
        return np.concatenate([z.ravel(), tail])

    def coefficients(self, raw: Floats) -> Coefficients:
        """Return the coefficients of a recipe; the uniform soup's, if all are equal."""
        rows = self.rows(raw)
        k = self.n_ingredients
        if self.constraint != "free" and bool((rows == rows[0, 0]).all()):
            return Coefficients.uniform(k)
        if len(rows) == 1:
            return Coefficients(tuple(map(float, rows[0])))
        per_tensor = {name: tuple(map(float, rows[g])) for name, g in self.group_of.items()}
        return Coefficients((1.0,) * k, float(k), per_tensor)

    def _z(self, raw: Floats) -> Floats:
        n = len(self.groups) * self.n_ingredients
        return raw[:n].reshape(len(self.groups), self.n_ingredients)


def parametrise(
    names: Sequence[str],
    tied: Mapping[str, str],
    n_ingredients: int,
    *,
    granularity: Granularity,
    constraint: Constraint,
    temperature: bool,
) -> Parametrisation:
    """Group the averaged tensors `names`; a `tied` one joins the group of the one it is tied to."""
    labels: dict[str, Callable[[str], str]] = {
        "global": lambda name: "all",
        "layer": layer_of,
        "tensor": str,
    }
    label = labels[granularity]
    groups: dict[str, int] = {}
    group_of: dict[str, int] = {}
    for name in names:
        if name not in tied:
            group_of[name] = groups.setdefault(label(name), len(groups))
    for name in names:
        if name in tied:
            group_of[name] = group_of[tied[name]]
    return Parametrisation(tuple(groups), group_of, n_ingredients, constraint, temperature)


def layer_of(name: str) -> str:
    """Return the layer of a tensor: up to the first number in its name, or else its module.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', 'lm_head')
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name
