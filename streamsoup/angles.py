"""How ingredients lie to each other: norms, angles and distances, from one pass over all of them.

With a base θ₀ the angles are those between task vectors, cos φᵢⱼ = ⟨θᵢ−θ₀, θⱼ−θ₀⟩ / (‖θᵢ−θ₀‖
‖θⱼ−θ₀‖): Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 4 and its figure of
angles. Without one, all is measured from the mean of the ingredients, and angles say little.
Everything follows from the Gram matrix of the differences, in total and for each tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import RecipeError, printable
from streamsoup.formats.shards import Ingredient, open_ingredients
from streamsoup.inner import Gram, Sums, floats_of, plan_inner_memory
from streamsoup.options import Options
from streamsoup.plan import MemoryPlan, MixPlan, parse_nbytes, plan_mix
from streamsoup.read import open_reader, will_map
from streamsoup.recipe import Coefficients, Recipe

__all__ = ["Geometry", "Place", "geometry"]

Floats = NDArray[np.float64]
AnyIngredient = str | os.PathLike[str] | Ingredient | Any

FAR = 0.7
"""Distance, in norms of the weights, from which two models hardly share an initialisation: models
of different seeds are √2 apart, fine-tunes of one base some hundredths."""

NEAR = 0.05
"""Distance, in norms of the task vectors, below which two ingredients are near-duplicates; seeds
of one recipe are about 1.4 apart, neighbouring checkpoints of one run some tenths."""

ROUNDING = 0.045
"""Mean square of a rounding error, in squares of (value / 2ᶠ) for f stored fraction bits: a
twelfth of a squared spacing, averaged over significands that are log-uniform."""

BIAS = 0.005
"""Change of a cosine by rounding, from which it is worth a note."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the ingredients lie in the space of one tensor, or of all."""

    name: str
    """The tensor's name; empty for all tensors together."""
    n_elements: int
    rows: Floats
    """``(1 + ingredient, 1 + ingredient)``: products of the reference and of the differences."""
    n_changed: NDArray[np.int64]
    """``(ingredient,)``: elements that differ from the base, or else from the first ingredient."""

    @property
    def gram(self) -> Floats:
        """⟨θᵢ−θ₀, θⱼ−θ₀⟩ ``(ingredient, ingredient)``; θ₀ is the base, or the mean."""
        return self.rows[1:, 1:]

    @property
    def norms(self) -> Floats:
        """‖θᵢ−θ₀‖ ``(ingredient,)``."""
        norms: Floats = np.sqrt(np.diag(self.gram))
        return norms

    @property
    def reference_norm(self) -> float:
        """‖θ₀‖."""
        return float(np.sqrt(self.rows[0, 0]))

    @property
    def weight_norms(self) -> Floats:
        """‖θᵢ‖ ``(ingredient,)``."""
        squares = self.rows[0, 0] + 2 * self.rows[0, 1:] + np.diag(self.gram)
        norms: Floats = np.sqrt(np.maximum(squares, 0.0))
        return norms

    @property
    def cosines(self) -> Floats:
        """Cosines of φᵢⱼ ``(ingredient, ingredient)``; NaN where an ingredient is the reference."""
        norms = self.norms
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines: Floats = np.clip(self.gram / np.outer(norms, norms), -1.0, 1.0)
        defined = norms > 0
        cosines[defined, defined] = 1.0
        return cosines

    @property
    def angles(self) -> Floats:
        """φᵢⱼ in degrees ``(ingredient, ingredient)``; NaN where there is none."""
        angles: Floats = np.degrees(np.arccos(self.cosines))
        return angles

    @property
    def distances(self) -> Floats:
        """‖θᵢ−θⱼ‖ ``(ingredient, ingredient)``; exactly 0 for equal ingredients."""
        squares = np.diag(self.gram)
        distances: Floats = np.sqrt(
            np.maximum(squares[:, None] + squares[None, :] - 2 * self.gram, 0.0)
        )
        return distances

    @property
    def shares(self) -> Floats:
        """Share of the elements that differ from the base ``(ingredient,)``, 0 to 1."""
        return np.asarray(self.n_changed / max(self.n_elements, 1), np.float64)

    def norm_of_mix(self, coefficients: Sequence[float]) -> float:
        """Give ‖Σᵢ cᵢ·(θᵢ−θ₀)‖: how far from the reference a soup lies, unmade."""
        c = np.asarray(coefficients, np.float64)
        return float(np.sqrt(max(float(c @ self.gram @ c), 0.0)))

    def to_builtins(self) -> dict[str, Any]:
        """Give plain numbers for JSON; what is undefined is None."""
        return {
            "name": self.name,
            "elements": self.n_elements,
            "reference_norm": self.reference_norm,
            "weight_norms": _plain(self.weight_norms),
            "norms": _plain(self.norms),
            "shares_changed": _plain(self.shares),
            "gram": _plain(self.gram),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """What one pass over all ingredients has shown."""

    names: tuple[str, ...]
    """Paths of the ingredients, in the order given."""
    base: str | None
    """Path of the base; None where all is measured from the mean."""
    total: Place
    """All tensors of floats together."""
    tensors: tuple[Place, ...]
    """Each of them, in the order of the first checkpoint."""
    notes: tuple[str, ...]
    """What a reader should know: duplicates, strangers, precision."""
    duplicates: tuple[tuple[int, int], ...]
    """Pairs of ingredients whose values are all equal."""
    near_duplicates: tuple[tuple[int, int], ...]
    strangers: tuple[tuple[int, int], ...]
    """Pairs that are as far apart as their weights are large."""
    nbytes_read: int

    def to_builtins(self) -> dict[str, Any]:
        """Give plain data for JSON: the total in full, and the Gram matrix of each tensor."""
        total = self.total.to_builtins() | {
            "cosines": _plain(self.total.cosines),
            "angles_deg": _plain(self.total.angles),
            "distances": _plain(self.total.distances),
        }
        return {
            "ingredients": list(self.names),
            "base": self.base,
            "reference": "mean" if self.base is None else "base",
            "total": total,
            "duplicates": [list(pair) for pair in self.duplicates],
            "near_duplicates": [list(pair) for pair in self.near_duplicates],
            "strangers": [list(pair) for pair in self.strangers],
            "notes": list(self.notes),
            "tensors": [tensor.to_builtins() for tensor in self.tensors],
            "nbytes_read": self.nbytes_read,
        }


def geometry(
    ingredients: Sequence[AnyIngredient],
    *,
    base: AnyIngredient | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Geometry:
    """Measure norms, angles and distances of `ingredients`, in total and for each tensor.

    With a `base`, of its task vectors; without, of the differences to the mean of all. Dtypes may
    differ between checkpoints; tensors that hold no floats are left out. Reads each byte of each
    checkpoint once; holds blocks, and some k²/2 numbers for each tensor. The numbers depend on
    neither threads nor blocks nor the way of reading. Raises `MismatchError`, `RecipeError`,
    `BudgetError` before it reads, and `NonFiniteError` where a NaN or Inf leaves nothing to
    measure.
    """
    plan, memory, mapped = plan_geometry(ingredients, base=base, options=options)
    return measure(plan, memory, mapped=mapped, base=base is not None, options=options)


def plan_geometry(
    ingredients: Sequence[AnyIngredient], *, base: AnyIngredient | None, options: Options
) -> tuple[MixPlan, MemoryPlan, bool]:
    """Plan the pass; the base, if any, comes first. Reads headers only."""
    if not ingredients:
        raise RecipeError("geometry needs at least one checkpoint")
    opened = open_ingredients([*([] if base is None else [base]), *ingredients])
    recipe = Recipe(
        ingredients=tuple(ingredient.name for ingredient in opened),
        coefficients=Coefficients.uniform(len(opened)),
        method="geometry",
        dtype="F64",
        non_float="first",
    )
    plan = floats_of(plan_mix(opened, recipe))
    mapped = will_map(opened, options.io)
    budget = options.memory
    n_rows = len(opened) + (base is None)
    memory = plan_inner_memory(
        plan,
        Gram.n_products(n_rows) + n_rows - 1,
        mapped=mapped,
        threads=options.n_threads,
        budget=parse_nbytes(budget) if isinstance(budget, str) else budget,
    )
    return plan, memory, mapped


def measure(
    plan: MixPlan, memory: MemoryPlan, *, mapped: bool, base: bool, options: Options
) -> Geometry:
    """Run a planned pass, and say what it shows. See `geometry`."""
    from streamsoup.stream import run

    gram = Gram(plan, memory, base=base)
    sums = Sums(plan, gram.n_values)
    reader = open_reader(plan, memory, mapped=mapped)
    run(plan, memory, reader, gram, sums, digest=False, on_progress=options.on_progress)
    tensors, total = [], np.zeros(gram.n_values)
    for planned, values in zip(plan.tensors, sums.of_tensors, strict=True):
        matrix, changed = gram.unpack(values)
        tensors.append(Place(planned.name, planned.n_units, matrix, changed.astype(np.int64)))
        total += values
    matrix, changed = gram.unpack(total)
    n_elements = sum(tensor.n_elements for tensor in tensors)
    whole = Place("", n_elements, matrix, changed.astype(np.int64))
    names = plan.recipe.ingredients
    return _conclude(plan, names[1:] if base else names, names[0] if base else None, whole, tensors)


def _conclude(
    plan: MixPlan, names: tuple[str, ...], base: str | None, total: Place, tensors: list[Place]
) -> Geometry:
    """Look for duplicates, for strangers, and for what the precision of the files hides."""
    distances = total.distances
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    duplicates = [pair for pair in pairs if distances[pair] == 0]
    near = _near_duplicates(total, distances, pairs, base is not None)
    norms = total.weight_norms
    strangers = [p for p in pairs if distances[p] >= FAR * np.sqrt(norms[p[0]] * norms[p[1]]) > 0]
    notes = [_of_pairs("are equal, value for value", duplicates, names)] if duplicates else []
    if near:
        notes.append(_of_pairs("are near-duplicates", near, names))
    if strangers:
        worst = max(strangers, key=lambda pair: float(distances[pair]))
        angle = "" if base is None else f", at an angle of {total.angles[worst]:.0f}°"
        notes.append(
            _of_pairs("can hardly share an initialisation", strangers, names)
            + f": they are {distances[worst]:.3g} apart{angle}, where the weights themselves have "
            f"a norm of {norms[worst[0]]:.3g}. The average of such models is usually worthless"
        )
    if base is not None:
        notes += _about_base(plan, names, base, total, strangers)
    return Geometry(
        names,
        base,
        total,
        tuple(tensors),
        tuple(notes),
        tuple(duplicates),
        tuple(near),
        tuple(strangers),
        plan.nbytes_read,
    )


def _near_duplicates(
    total: Place, distances: Floats, pairs: list[tuple[int, int]], based: bool
) -> list[tuple[int, int]]:
    """Find pairs much closer to each other than to the base, or else than most pairs are."""
    norms = total.norms
    usual = float(np.median([distances[pair] for pair in pairs])) if len(pairs) > 1 else 0.0
    near = []
    for i, j in pairs:
        scale = float(min(norms[i], norms[j])) if based else usual
        if 0 < distances[i, j] <= NEAR * scale:
            near.append((i, j))
    return near


def _about_base(
    plan: MixPlan,
    names: tuple[str, ...],
    base: str,
    total: Place,
    strangers: list[tuple[int, int]],
) -> list[str]:
    """Say where the base is in doubt: far from all, equal to one, or stored too coarsely."""
    notes = []
    norms, weights = total.norms, total.weight_norms
    far = [i for i in range(len(names)) if norms[i] >= FAR * np.sqrt(weights[i] * _one(total)) > 0]
    if far and len(far) == len(names) and not strangers:
        notes.append(
            f"{printable(base)} is as far from every ingredient as its weights are large: it is "
            "not their base, and the angles mean nothing"
        )
    elif far and not strangers:
        listed = ", ".join(printable(names[i]) for i in far)
        notes.append(f"{printable(base)} can hardly be the base of {listed}")
    same = [printable(names[i]) for i in range(len(names)) if norms[i] == 0]
    if same:
        notes.append(f"{', '.join(same)}: equal to the base, so it has no angles")
    moved = norms[norms > 0]
    bits = min((_fraction(plan, 0)), default=52)
    theirs = min(
        (b for i in range(1, len(plan.ingredients)) for b in _fraction(plan, i)), default=52
    )
    # Rounding that all differences share: of the base, or of weights that training left alone.
    error = ROUNDING * total.reference_norm**2 * 4.0 ** -min(bits, theirs)
    bias = error / float(moved.min()) ** 2 if len(moved) else 0.0
    if bias > BIAS and bits <= 10:
        turned = float(np.degrees(np.arccos(min(bias, 1.0))))
        notes.append(
            f"the base is stored with {bits} fraction bits: if the runs started from more precise "
            "weights than these, its rounding is a part of every difference, and two runs at 90° "
            f"can look as close as {turned:.0f}°"
        )
    elif bias > BIAS and theirs <= 10 < bits:
        notes.append(
            f"the ingredients are stored with {theirs} fraction bits, the base with {bits}: the "
            "rounding of weights that training hardly moved is a part of every difference, about "
            f"{min(np.sqrt(bias), 1.0):.0%} of the shortest; give a base stored as they are"
        )
    return notes


def _one(total: Place) -> float:
    return max(total.reference_norm, 1e-300)


def _fraction(plan: MixPlan, i: int) -> set[int]:
    """Give the stored fraction bits of the dtypes of ingredient `i`, where there is a weight."""
    layout = plan.layout_of[i]
    dtypes = {tensor.sources[layout].dtype for tensor in plan.tensors if tensor.n_units > 1}
    return {dtype.fraction for dtype in dtypes if dtype.fraction is not None}


def _of_pairs(what: str, pairs: list[tuple[int, int]], names: tuple[str, ...]) -> str:
    shown = [f"{printable(names[i])} and {printable(names[j])}" for i, j in pairs[:3]]
    more = f" ({len(pairs) - 3} more pairs)" if len(pairs) > 3 else ""
    return f"{'; '.join(shown)}{more} {what}"


def _plain(array: Floats) -> Any:
    """Give nested lists, with None for what JSON cannot say."""
    if array.ndim > 1:
        return [_plain(row) for row in array]
    return [float(x) if np.isfinite(x) else None for x in array]
