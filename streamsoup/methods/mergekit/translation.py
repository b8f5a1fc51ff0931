"""From a recipe of mergekit to what makes it here: a rule, or a mean on a sphere.

Every parameter is settled for every tensor, and what most tensors have becomes the rule's own; the
others have theirs by name. METHODS: `engine.rules.task_vectors` for the sums of task vectors,
`methods.spheres` for slerp and its kin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.rules.by_tensor import ByTensor
from streamsoup.engine.rules.elementwise import NearSwap, Ram
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.rules.sce import Sce
from streamsoup.engine.rules.sparsifiers import Largest, Middle, Random, Ranked, Sparsifier
from streamsoup.engine.rules.task_vectors import TaskVectors
from streamsoup.engine.rules.terms import Consensus, Terms
from streamsoup.errors import RecipeError, count, printable
from streamsoup.methods.by_name import most_common
from streamsoup.methods.mergekit.configuration import Configuration, Input, refused
from streamsoup.methods.mergekit.parameters import Parameter, Place, number_for, switch_for
from streamsoup.methods.spheres import (
    FactorsOf,
    karcher_factors,
    multislerp_factors,
    nuslerp_factors,
)
from streamsoup.recipe import Coefficients
from streamsoup.rule import Rule

__all__ = ["METHODS", "Inputs", "Method", "Sphere", "Stock", "Tensors", "find_method"]

Floats = NDArray[np.float64]

NEARLY_ZERO = 1e-8
"""Sum of weights in magnitude, below which task vectors are divided by nothing."""

NO_SHARE = 1e-6
"""Sum of the weights of NuSLERP in magnitude, below which it goes half the way."""


class Sphere(msgspec.Struct, frozen=True):
    """A mean on a sphere, tensor by tensor."""

    factors_of: FactorsOf
    shares: Floats
    """``(ingredient,)``, with sum 1."""
    per_tensor: Mapping[str, Floats]


class Stock(msgspec.Struct, frozen=True):
    """Model Stock, which has no parameters."""


class Method(msgspec.Struct, frozen=True):
    """A method of mergekit."""

    translate: Callable[[Tensors], Rule | Sphere | Stock]
    parameters: tuple[Parameter, ...]
    base: Literal["needed", "possible", "input"]
    """``input``: a base is one of the inputs, as any other."""
    least: int = 1
    """Inputs, besides the base."""
    most: int | None = None


class Inputs(msgspec.Struct, frozen=True):
    """The inputs of each slice, in the order of the soup's ingredients."""

    bases: tuple[Input, ...] | None
    """``(slice,)``; None if there is no base."""
    others: tuple[tuple[Input, ...], ...]
    """``(slice, ingredient)``, the base left out."""


class Tensors:
    """The tensors of the soup, and what the recipe says for each."""

    def __init__(
        self,
        configuration: Configuration,
        inputs: Inputs,
        places: Mapping[str, tuple[int, Place]],
        names_in: Callable[[str, Input], str],
    ) -> None:
        """Hold the number of the slice and the place of each averaged tensor, by name.

        `names_in` returns the name that a tensor has in an input.
        """
        self.configuration, self.inputs, self.names = configuration, inputs, list(places)
        self._places, self._names_in = places, names_in

    def each(self, name: str, parameter: Parameter) -> tuple[float, ...]:
        """Return a parameter of every input but the base ``(ingredient,)``."""
        number, place = self._places[name]
        return tuple(
            self._needed(parameter, name, place, input) for input in self.inputs.others[number]
        )

    def one(self, name: str, parameter: Parameter) -> float:
        """Return a parameter of the whole tensor."""
        return self._needed(parameter, name, self._places[name][1], None)

    def switch(self, name: str, parameter: Parameter) -> bool:
        """Return a switch of the whole tensor."""
        return switch_for(parameter, self.configuration, self._places[name][1])

    def _needed(self, parameter: Parameter, name: str, place: Place, input: Input | None) -> float:
        inner = None if input is None else self._names_in(name, input)
        found = number_for(parameter, self.configuration, place, input, inner)
        if found is None:
            where = self.configuration.where if input is None else input.where
            of = "" if input is None else f" of {printable(input.model)}"
            raise RecipeError(
                f"{where}: {self.configuration.method} needs a {parameter.name}{of}, and has none "
                f"for {printable(name)}"
            )
        return found


def find_method(configuration: Configuration) -> Method:
    """Return the method that a recipe names. Raises `RecipeError` at its line."""
    name = configuration.method
    if name in METHODS:
        return METHODS[name]
    if name in NOT_HERE:
        raise refused(configuration.where, NOT_HERE[name])
    close = get_close_matches(name, METHODS, 1)
    advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(METHODS)}"
    raise RecipeError(f"{configuration.where}: {printable(name)!r} is no method; {advice}")


NOT_HERE = {
    "arcee_fusion": "arcee_fusion is not made here; it chooses elements by thresholds of its own",
    "ramplus_tl": "ramplus_tl is not made here; ram is",
}

WEIGHT = Parameter("weight", per_input=True)
INT8_MASK = Parameter("int8_mask", False, "switch", ignored=True)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", default, "switch")


def _coefficients(rows: Mapping[str, tuple[float, ...]]) -> Coefficients:
    """Return coefficients of given rows, by tensor."""
    common, rest = most_common(rows)
    return Coefficients(common, per_tensor=rest)


def _linear(tensors: Tensors) -> Rule:
    normalize = _normalize(True)
    rows = {name: tensors.each(name, WEIGHT) for name in tensors.names}
    divided = {name: tensors.switch(name, normalize) for name in tensors.names}
    if len({*rows.values()}) == 1 and len({*divided.values()}) == 1:
        name = tensors.names[0]
        if divided[name]:
            _check_sum(tensors, name, rows[name])
        return Linear(Coefficients.given(rows[name], normalize=divided[name]))
    for name in tensors.names:
        if divided[name]:
            total = _check_sum(tensors, name, rows[name])
            rows[name] = tuple(weight / total for weight in rows[name])
    return Linear(_coefficients(rows))


def _check_sum(tensors: Tensors, name: str, weights: Sequence[float]) -> float:
    """Return the sum of weights. Raises `RecipeError` if nothing can be divided by it."""
    total = math.fsum(weights)
    if total == 0:
        raise RecipeError(
            f"{tensors.configuration.where}: the weights of {printable(name)} sum to 0, and are to "
            "be divided by it; give others, or normalize: false"
        )
    return total


def _passthrough(tensors: Tensors) -> Rule:
    scale = Parameter("scale", 1.0, per_input=True)
    return Linear(_coefficients({name: tensors.each(name, scale) for name in tensors.names}))


def _arithmetic(tensors: Tensors) -> Rule:
    """θ₀ + λ · Σ wᵢ·dᵢ as coefficients of θ₀ and θᵢ."""
    normalize, scale = _normalize(False), Parameter("lambda", 1.0)
    rows = {}
    for name in tensors.names:
        weights, factor = tensors.each(name, WEIGHT), tensors.one(name, scale)
        if tensors.switch(name, normalize) and abs(math.fsum(weights)) >= NEARLY_ZERO:
            factor /= math.fsum(weights)
        scaled = [factor * weight for weight in weights]
        rows[name] = (1.0 - math.fsum(scaled), *scaled)
    return Linear(_coefficients(rows))


def _task_vectors(
    sparsify: Callable[[Tensors, str, tuple[float, ...]], Sparsifier],
    consensus: Consensus,
    normalizes: bool,
    rescales: bool,
) -> Callable[[Tensors], Rule]:
    """Return the translation of a method, with its defaults."""
    normalize, scale = _normalize(normalizes), Parameter("lambda", 1.0)
    rescale = Parameter("rescale", rescales, "switch")
    density = Parameter("density", 1.0, per_input=True)

    def translate(tensors: Tensors) -> Rule:
        terms = {}
        for name in tensors.names:
            shares = tuple(min(1.0, max(0.0, each)) for each in tensors.each(name, density))
            whole = all(share == 1.0 for share in shares)
            terms[name] = Terms(
                coefficients=tensors.each(name, WEIGHT),
                sparsifier=None if whole else sparsify(tensors, name, shares),
                scale=tensors.one(name, scale),
                consensus=consensus,
                normalize=tensors.switch(name, normalize),
                rescale="l1" if tensors.switch(name, rescale) and not whole else "none",
            )
        common, rest = most_common(terms)
        return TaskVectors(common, rest)

    return translate


GAMMA = Parameter("gamma", 0.01, per_input=True)
EPSILON = Parameter("epsilon", 0.15, per_input=True)


def _largest(tensors: Tensors, name: str, density: tuple[float, ...]) -> Sparsifier:
    return Largest(density)


def _random(tensors: Tensors, name: str, density: tuple[float, ...]) -> Sparsifier:
    return Random(density)


def _middle(tensors: Tensors, name: str, density: tuple[float, ...]) -> Sparsifier:
    return Middle(density, tensors.each(name, GAMMA))


def _ranked(tensors: Tensors, name: str, density: tuple[float, ...]) -> Sparsifier:
    return Ranked(density, tensors.each(name, EPSILON))


def _shares(rows: Mapping[str, tuple[float, ...]], factors_of: FactorsOf) -> Sphere:
    common, rest = most_common(rows)
    per_tensor = {name: np.array(row) for name, row in rest.items()}
    return Sphere(factors_of, np.array(common), per_tensor)


def _slerp(tensors: Tensors) -> Sphere:
    """From the base, which is the first of two ingredients, to the other."""
    t = Parameter("t")
    ways = {name: tensors.one(name, t) for name in tensors.names}
    return _shares({name: (1.0 - way, way) for name, way in ways.items()}, nuslerp_factors)


def _nuslerp(tensors: Tensors) -> Sphere:
    by_row = Parameter("nuslerp_row_wise", False, "switch")
    flat = Parameter("nuslerp_flatten", True, "switch")
    rows = {}
    for name in tensors.names:
        if tensors.switch(name, by_row) or not tensors.switch(name, flat):
            raise refused(
                tensors.configuration.where,
                "nuslerp turns whole tensors here, not their rows or columns; leave out "
                "nuslerp_row_wise and nuslerp_flatten",
            )
        weights = tensors.each(name, WEIGHT)
        total = weights[0] + weights[1]
        way = 0.5 if abs(total) < NO_SHARE else weights[1] / total
        rows[name] = (1.0 - way, way)
    return _shares(rows, nuslerp_factors)


def _multislerp(tensors: Tensors) -> Sphere:
    normalize = Parameter("normalize_weights", True, "switch")
    rows = {}
    for name in tensors.names:
        weights = tensors.each(name, WEIGHT)
        total = _check_sum(tensors, name, weights)
        if not tensors.switch(name, normalize) and abs(total - 1) > 1e-9:
            raise refused(
                tensors.configuration.where,
                f"the weights of multislerp sum to {total:g}; give weights with sum 1, or leave "
                "out normalize_weights",
            )
        if min(weights) < 0:
            raise refused(tensors.configuration.where, "weights of multislerp are not negative")
        rows[name] = tuple(weight / total for weight in weights)
    return _shares(rows, multislerp_factors)


def _karcher(tensors: Tensors) -> Sphere:
    n = len(tensors.inputs.others[0])
    return Sphere(karcher_factors, np.full(n, 1.0 / n), {})


def _stock(tensors: Tensors) -> Stock:
    by_filter = Parameter("filter_wise", False, "switch")
    if any(tensors.switch(name, by_filter) for name in tensors.names):
        raise refused(
            tensors.configuration.where,
            "model_stock has one ratio for a tensor here, not for its rows; leave out filter_wise",
        )
    return Stock()


def _by_tensor(
    name: str, default: float | None, rule_of: Callable[[float], Sce | Ram | NearSwap]
) -> Callable[[Tensors], Rule]:
    """Return the translation of a method with one number for each tensor."""

    def translate(tensors: Tensors) -> Rule:
        values = {each: tensors.one(each, Parameter(name, default)) for each in tensors.names}
        common, rest = most_common(values)
        if not rest:
            return rule_of(common)
        numbers = [common, *dict.fromkeys(rest.values())]
        of = {each: numbers.index(value) for each, value in rest.items()}
        return ByTensor(tuple(map(rule_of, numbers)), of)

    return translate


def _of_task_vectors(*more: Parameter) -> tuple[Parameter, ...]:
    """Return the parameters of a sum of task vectors; their defaults are those of the method."""
    density = Parameter("density", 1.0, per_input=True)
    shared = (_normalize(False), Parameter("rescale", False, "switch"), Parameter("lambda", 1.0))
    return (WEIGHT, density, *shared, INT8_MASK, *more)


METHODS: dict[str, Method] = {
    "linear": Method(_linear, (WEIGHT, _normalize(True)), "input"),
    "slerp": Method(_slerp, (Parameter("t"),), "needed", 1, 1),
    "nuslerp": Method(
        _nuslerp,
        (
            WEIGHT,
            Parameter("nuslerp_row_wise", False, "switch"),
            Parameter("nuslerp_flatten", True, "switch"),
        ),
        "possible",
        2,
        2,
    ),
    "multislerp": Method(
        _multislerp,
        (
            WEIGHT,
            Parameter("normalize_weights", True, "switch"),
            Parameter("eps", 1e-8, ignored=True),
        ),
        "possible",
        2,
    ),
    "karcher": Method(
        _karcher,
        (Parameter("max_iter", 10, ignored=True), Parameter("tol", 1e-5, ignored=True)),
        "input",
        2,
    ),
    "task_arithmetic": Method(_arithmetic, _of_task_vectors(), "needed"),
    "ties": Method(_task_vectors(_largest, "sum", True, False), _of_task_vectors(), "needed"),
    "dare_ties": Method(_task_vectors(_random, "sum", False, True), _of_task_vectors(), "needed"),
    "dare_linear": Method(
        _task_vectors(_random, "none", False, True), _of_task_vectors(), "needed"
    ),
    "breadcrumbs": Method(
        _task_vectors(_middle, "none", False, False), _of_task_vectors(GAMMA), "needed"
    ),
    "breadcrumbs_ties": Method(
        _task_vectors(_middle, "sum", False, False), _of_task_vectors(GAMMA), "needed"
    ),
    "della": Method(_task_vectors(_ranked, "sum", True, True), _of_task_vectors(EPSILON), "needed"),
    "della_linear": Method(
        _task_vectors(_ranked, "none", False, True), _of_task_vectors(EPSILON), "needed"
    ),
    "model_stock": Method(_stock, (Parameter("filter_wise", False, "switch"),), "needed", 2),
    "sce": Method(
        _by_tensor("select_topk", 1.0, Sce),
        (Parameter("select_topk", 1.0), INT8_MASK),
        "needed",
    ),
    "ram": Method(_by_tensor("epsilon", 1e-5, Ram), (Parameter("epsilon", 1e-5),), "needed"),
    "nearswap": Method(_by_tensor("t", None, NearSwap), (Parameter("t"),), "needed", 1, 1),
    "passthrough": Method(_passthrough, (Parameter("scale", 1.0, per_input=True),), "input", 1, 1),
}


def check_count(configuration: Configuration, method: Method, inputs: Inputs) -> None:
    """Raise `RecipeError` unless each slice has as many inputs as the method takes."""
    for slice, others in zip(configuration.slices, inputs.others, strict=True):
        n = len(others)
        besides = "" if inputs.bases is None else " besides the base"
        if n < method.least or (method.most is not None and n > method.most):
            most = f" to {method.most}" if method.most not in (None, method.least) else ""
            wanted = f"{method.least}{most}" if method.most else f"{method.least} or more"
            raise RecipeError(
                f"{slice.where}: {configuration.method} takes {wanted}{besides}, got "
                f"{count(n, 'model')}"
            )
        if n != len(inputs.others[0]):
            raise RecipeError(
                f"{slice.where}: {count(n, 'source')}, and the first slice has "
                f"{len(inputs.others[0])}; all slices need as many"
            )
