"""How ingredients lie to each other: norms, angles and distances, from one pass over all of them.

With a base θ₀ the angles are those between task vectors, cos φᵢⱼ = ⟨θᵢ−θ₀, θⱼ−θ₀⟩ / (‖θᵢ−θ₀‖
‖θⱼ−θ₀‖): Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 4 and its figure of
angles. Without one, all is measured from the mean of the ingredients, and angles say little.
Everything follows from the Gram matrix of the differences, in total and for each tensor.

The running statistics of BatchNorm are measured like any tensor, but not part of the total: they
are not weights, and of a size of their own (a variance of 10⁴ would drown every angle).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.cluster.choice import executing, is_spread
from streamsoup.engine.budget import MemoryPlan, memory_budget
from streamsoup.engine.digest import Digests
from streamsoup.engine.inner import Gram, Sums, measured_part, plan_inner_memory, symmetric
from streamsoup.engine.plan import MixPlan, plan_mix
from streamsoup.engine.read import open_reader, will_map
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, count, printable
from streamsoup.formats.ingredients import AnyIngredient, listed, open_ingredients
from streamsoup.formats.parts import refuse_codes
from streamsoup.options import Options, check_options
from streamsoup.recipe import Coefficients, Recipe

__all__ = ["Geometry", "Place", "geometry"]

Floats = NDArray[np.float64]

FAR = 1.0
"""Distance, in norms of the weights, from which two models hardly share an initialisation: their
weights then have a cosine below a half. Models of different seeds are √2 apart, fine-tunes of one
base some hundredths, and 0.7 where the learning rate was as high as it can be."""

NEAR = 0.05
"""Distance, in norms of the task vectors, below which two ingredients are near-duplicates; seeds
of one recipe are about 1.4 apart, neighbouring checkpoints of one run some tenths."""

ROUNDING = 0.045
"""Mean square of a rounding error, in squares of (value / 2ᶠ) for f stored fraction bits: a
twelfth of a squared spacing, averaged over significands that are log-uniform."""

STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of what BatchNorm has seen, rather than learned."""

BIAS = 0.02
"""Change of a cosine by rounding, from which it is worth a note: a right angle looks like 89°."""


class Place(msgspec.Struct, frozen=True, eq=False):
    """Where the ingredients lie in the space of one tensor, or of all."""

    name: str
    """The tensor's name; empty for all tensors together."""
    n_elements: int
    products: Floats
    """``(pair,)``: of the reference and the differences, each with itself and all that follow."""
    n_changed: NDArray[np.int64]
    """``(ingredient,)``: elements that differ from the base, or else from the first ingredient."""

    @property
    def rows(self) -> Floats:
        """Products of the reference and the differences ``(1 + ingredient, 1 + ingredient)``."""
        return symmetric(self.products)

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
        return float(np.sqrt(self.products[0]))

    @property
    def weight_norms(self) -> Floats:
        """‖θᵢ‖ ``(ingredient,)``."""
        rows = self.rows
        squares = rows[0, 0] + 2 * rows[0, 1:] + np.diag(rows)[1:]
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
        """‖θᵢ−θⱼ‖ ``(ingredient, ingredient)``; exactly 0 for equal ingredients.

        Differences below some 10⁻⁸ of the norms are lost, and may be 0 too.
        """
        gram = self.gram
        squares = np.diag(gram)
        distances: Floats = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0))
        return distances

    @property
    def shares(self) -> Floats:
        """Share of the elements that differ from the base ``(ingredient,)``, 0 to 1."""
        return np.asarray(self.n_changed / max(self.n_elements, 1), np.float64)

    def norm_of_mix(self, coefficients: Sequence[float]) -> float:
        """Return ‖Σᵢ cᵢ·(θᵢ−θ₀)‖: the distance of a soup from the reference, without making it."""
        c = np.asarray(coefficients, np.float64)
        return float(np.sqrt(max(float(c @ self.gram @ c), 0.0)))

    def to_builtins(self) -> dict[str, Any]:
        """Return plain numbers for JSON; what is undefined is None."""
        return {
            "name": self.name,
            "elements": self.n_elements,
            "reference_norm": self.reference_norm,
            "weight_norms": _plain(self.weight_norms),
            "norms": _plain(self.norms),
            "shares_changed": _plain(self.shares),
            "gram": _plain(self.gram),
        }


class Geometry(msgspec.Struct, frozen=True, eq=False):
    """What one pass over all ingredients has shown."""

    names: tuple[str, ...]
    """Paths of the ingredients, in the order given."""
    base: str | None
    """Path of the base; None where all is measured from the mean."""
    total: Place
    """All tensors of floats together, but for running statistics."""
    tensors: tuple[Place, ...]
    """Each of them, in the order of the first checkpoint."""
    notes: tuple[str, ...]
    """What a reader should know: duplicates, strangers, precision."""
    duplicates: tuple[tuple[int, int], ...]
    """Pairs of ingredients whose floats are equal, bit for bit."""
    near_duplicates: tuple[tuple[int, int], ...]
    strangers: tuple[tuple[int, int], ...]
    """Pairs that are as far apart as their weights are large."""
    nbytes_read: int

    def __repr__(self) -> str:
        """Return a one-line summary for the REPL."""
        return f"<Geometry of {len(self.names)}: {count(len(self.tensors), 'tensor')}>"

    def to_builtins(self) -> dict[str, Any]:
        """Return plain data for JSON: the total in full, and the Gram matrix of each tensor."""
        return self.summary() | {"tensors": [tensor.to_builtins() for tensor in self.tensors]}

    def summary(self) -> dict[str, Any]:
        """Return plain data for JSON, all but the single tensors."""
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
            "nbytes_read": self.nbytes_read,
        }


def geometry(
    ingredients: Iterable[AnyIngredient],
    *,
    base: AnyIngredient | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Geometry:
    """Measure norms, angles and distances of `ingredients`, in total and for each tensor.

    With a `base`, of its task vectors; without, of the differences to the mean of all. Dtypes may
    differ between checkpoints; tensors that hold no floats are left out. The numbers depend on
    neither threads nor blocks nor the way of reading.

    Args:
        ingredients: As for `uniform`, one at least.
        base: The checkpoint that all were fine-tuned from; None measures from the mean.
        options: Memory, threads, and the way of reading.

    Returns:
        Gram matrices ``(ingredient, ingredient) float64``, in total and for each tensor, with the
        norms, cosines, angles (degrees) and distances that follow; duplicates, and notes.

    Raises:
        MismatchError: The checkpoints differ in names or shapes; before anything is read.
        RecipeError: There is no checkpoint; before anything is read.
        BudgetError: The blocks do not fit `Options.memory`; before anything is read.
        NonFiniteError: A NaN or Inf leaves nothing to measure.

    Reads each byte of each checkpoint once; holds blocks, and for each tensor about k²/2 float64
    products of k ingredients.
    """
    plan, memory, mapped = plan_geometry(ingredients, base=base, options=options)
    return measure(plan, memory, mapped=mapped, base=base is not None, options=options)


def plan_geometry(
    ingredients: Iterable[AnyIngredient], *, base: AnyIngredient | None, options: Options
) -> tuple[MixPlan, MemoryPlan, bool]:
    """Plan the pass; the base, if any, comes first. Reads headers only."""
    check_options(options, Options)
    ingredients = listed(ingredients)
    if not ingredients:
        raise RecipeError("geometry needs at least one checkpoint; give some")
    given = [*([] if base is None else [base]), *ingredients]
    opened = open_ingredients(given, options.reading)
    recipe = Recipe(
        ingredients=tuple(ingredient.name for ingredient in opened),
        rule=Linear(Coefficients.uniform(len(opened))),
        method="geometry",
        dtype="F64",
        non_float="first",
        reading=options.reading.recorded,
    )
    refuse_codes(opened)
    plan = measured_part(plan_mix(opened, recipe))
    mapped = will_map(opened, options.io)
    memory = plan_inner_memory(
        plan,
        Gram.count_values(plan, base=base is not None),
        mapped=mapped,
        threads=options.n_threads,
        budget=memory_budget(plan, options.memory),
    )
    return plan, memory, mapped


def measure(
    plan: MixPlan, memory: MemoryPlan, *, mapped: bool, base: bool, options: Options
) -> Geometry:
    """Run a planned pass, and return its result with notes. See `geometry`."""
    from streamsoup.engine.stream import DigestLedger, run

    sums = Sums(plan, Gram.count_values(plan, base=base))
    # Rounded sums do not tell whether two ingredients are equal; digests do.
    ledger = DigestLedger(plan)
    if is_spread(options):
        from streamsoup.cluster.products import gram_in_units

        with executing(options) as held:
            gram_in_units(plan, sums, ledger, base=base, mapped=mapped, options=held)
    else:
        gram = Gram(plan, memory, base=base)
        reader = open_reader(plan, memory, mapped=mapped)
        run(plan, memory, reader, gram, sums, ledger=ledger, on_event=options.on_event)
    n = Gram.n_products(len(plan.ingredients) + (not base))
    tensors = [
        Place(planned.name, planned.n_units, values[:n], values[n:].astype(np.int64))
        for planned, values in zip(plan.tensors, sums.of_tensors, strict=True)
    ]
    return _conclude(plan, tensors, ledger.digests, base=base)


def _conclude(plan: MixPlan, tensors: list[Place], digests: Digests, *, base: bool) -> Geometry:
    """Look for duplicates, for strangers, and for what the precision of the files hides."""
    everyone = plan.recipe.ingredients
    names = everyone[1:] if base else everyone
    of_base = everyone[0] if base else None
    weights = [
        (place, len(planned.shape))
        for place, planned in zip(tensors, plan.tensors, strict=True)
        if place.name.rpartition(".")[2] not in STATISTICS
    ]
    total = _together([place for place, _ in weights], 1 + len(names))
    # Gains of norms are near 1 whatever a model started from.
    matrices = [place for place, rank in weights if rank > 1]
    judged = _together(matrices, 1 + len(names)) if matrices else total
    distances = total.distances
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    contents = [digests.of_ingredient(base + i) for i in range(len(names))]
    duplicates = [(i, j) for i, j in pairs if contents[i] == contents[j]]
    others = sorted(set(pairs) - set(duplicates))
    near = _near_duplicates(total, distances, others, base)
    norms, apart = judged.weight_norms, judged.distances
    strangers = [p for p in pairs if apart[p] >= FAR * np.sqrt(norms[p[0]] * norms[p[1]]) > 0]
    notes = [_of_pairs("are equal, value for value", duplicates, names)] if duplicates else []
    if near:
        notes.append(_of_pairs("are near-duplicates", near, names))
    if strangers:
        worst = max(strangers, key=lambda pair: float(apart[pair]))
        angle = f", at an angle of {judged.angles[worst]:.0f}°" if base else ""
        notes.append(
            _of_pairs("can hardly share an initialisation", strangers, names)
            + f": they are {apart[worst]:.3g} apart{angle}, where the weights themselves have "
            f"a norm of {norms[worst[0]]:.3g}. The average of such models is usually worthless"
        )
    if of_base is not None:
        notes += _about_base(plan, names, of_base, total, judged, strangers)
    return Geometry(
        names,
        of_base,
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
    """Find those of `pairs` much closer to each other than to the base, or than most are."""
    norms = total.norms
    usual = float(np.median([distances[pair] for pair in pairs])) if len(pairs) > 1 else 0.0
    near = []
    for i, j in pairs:
        scale = float(min(norms[i], norms[j])) if based else usual
        if distances[i, j] <= NEAR * scale:
            near.append((i, j))
    return near


def _about_base(
    plan: MixPlan,
    names: tuple[str, ...],
    base: str,
    total: Place,
    judged: Place,
    strangers: list[tuple[int, int]],
) -> list[str]:
    """Return notes on a doubtful base: far from all, equal to one, or stored too coarsely."""
    notes = []
    apart, theirs, own = judged.norms, judged.weight_norms, max(judged.reference_norm, 1e-300)
    far = [i for i in range(len(names)) if apart[i] >= FAR * np.sqrt(theirs[i] * own) > 0]
    if far and len(far) == len(names) and not strangers:
        notes.append(
            f"{printable(base)} is as far from every ingredient as its weights are large: it is "
            "not their base, or nothing of it is left in them; the angles mean little"
        )
    elif far and not strangers:
        listed = ", ".join(printable(names[i]) for i in far)
        notes.append(f"{printable(base)} can hardly be the base of {listed}")
    norms = total.norms
    same = [printable(names[i]) for i in range(len(names)) if norms[i] == 0]
    if same:
        notes.append(f"{', '.join(same)}: equal to the base, so it has no angles")
    moved = [i for i in range(len(names)) if norms[i] > 0]
    shortest = min(moved, key=lambda i: float(norms[i]), default=0)
    bits = min((_fraction(plan, 0)), default=52)
    least = min(
        (b for i in range(1, len(plan.ingredients)) for b in _fraction(plan, i)), default=52
    )
    # Rounding that all differences share: of the base, or of weights that training left alone. What
    # was rounded to the base's own value has no difference, and no part in it.
    error = ROUNDING * total.reference_norm**2 * 4.0 ** -min(bits, least)
    error *= float(total.shares[shortest])
    bias = error / float(norms[shortest]) ** 2 if moved else 0.0
    if bias > BIAS and bits <= 10:
        turned = float(np.degrees(np.arccos(min(bias, 1.0))))
        notes.append(
            f"the base is stored with {bits} fraction bits: if the runs started from more precise "
            "weights than these, its rounding is a part of every difference, and two runs at 90° "
            f"can look as close as {turned:.0f}°"
        )
    elif bias > BIAS and least <= 10 < bits:
        notes.append(
            f"the ingredients are stored with {least} fraction bits, the base with {bits}: the "
            "rounding of weights that training hardly moved is a part of every difference, about "
            f"{min(np.sqrt(bias), 1.0):.0%} of the shortest; give a base stored as they are"
        )
    return notes


def _together(places: Sequence[Place], n_rows: int) -> Place:
    """Add places up, in order; `n_rows` are the reference and the ingredients."""
    products, changed = np.zeros(Gram.n_products(n_rows)), np.zeros(n_rows - 1, np.int64)
    for place in places:
        products += place.products
        changed += place.n_changed
    return Place("", sum(place.n_elements for place in places), products, changed)


def _fraction(plan: MixPlan, i: int) -> set[int]:
    """Return the stored fraction bits of the dtypes of ingredient `i`, where there is a weight."""
    layout = plan.layout_of[i]
    dtypes = {tensor.sources[layout].dtype for tensor in plan.tensors if tensor.n_units > 1}
    return {dtype.fraction for dtype in dtypes if dtype.fraction is not None}


def _of_pairs(what: str, pairs: list[tuple[int, int]], names: tuple[str, ...]) -> str:
    shown = [f"{printable(names[i])} and {printable(names[j])}" for i, j in pairs[:3]]
    more = f" ({len(pairs) - 3} more pairs)" if len(pairs) > 3 else ""
    return f"{'; '.join(shown)}{more} {what}"


def _plain(array: Floats) -> Any:
    """Return nested lists, with None for NaN and infinity, which JSON lacks."""
    if array.ndim > 1:
        return [_plain(row) for row in array]
    return [float(x) if np.isfinite(x) else None for x in array]
