"""Numbers for each ingredient that differ from tensor to tensor: by pattern, and along the layers.

What a verb takes for all tensors alike, it takes by the names of tensors too::

    coefficients=[.3, .7]                                   # one for each ingredient
    coefficients=[[0, 1], [1, 0]]                           # from the first layer to the last
    coefficients={"*mlp*": [.3, .7], "*": [[0, 1], .5]}     # the first pattern that fits counts

A gradient ``[a, b, c]`` is interpolated linearly: a in the first layer and in front of the layers
(embeddings), c in the last one and behind them (the last norm, the head).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from streamsoup.errors import RecipeError, count, option, some
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.layers import layer_in, stacks_in, stands_before
from streamsoup.options import take

__all__ = ["ByName", "Each", "each", "each_by_tensor", "most_common", "varies"]

Each = float | Sequence[float | Sequence[float]]
"""One number for all ingredients, or one for each; a gradient in the place of any of the latter."""

ByName = Each | Mapping[str, Each]
"""The same for all tensors, or by patterns of their names."""

Value = TypeVar("Value", bound=Hashable)


def varies(given: ByName) -> bool:
    """Return True if a value may differ from tensor to tensor."""
    if isinstance(given, Mapping):
        return True
    return isinstance(given, Sequence) and any(_is_several(item) for item in given)


def each(what: str, given: Each, n: int) -> tuple[float, ...]:
    """Return one number for each of `n` ingredients. Raises `RecipeError` for another count."""
    many: Sequence[Any] = given if _is_several(given) else [given] * n  # type: ignore[assignment]
    values = tuple(take("float", what, value) for value in many)
    _check_count(what, values, n)
    return values


def each_by_tensor(
    what: str, given: ByName, n: int, ingredient: Ingredient
) -> dict[str, tuple[float, ...]]:
    """Return one number for each of `n` ingredients, for every averaged tensor, by name.

    Args:
        what: The name of the parameter, for messages.
        given: The numbers.
        n: Number of ingredients, a base not counted.
        ingredient: One of them, open: its tensors count.

    Raises:
        RecipeError: Too few numbers, a pattern that fits no tensor, or a tensor that no pattern
            fits.
    """
    places = ingredient.layout.places
    names = [name for name, (_, spec) in places.items() if spec.dtype.averaged]
    if not names:
        raise RecipeError(f"{what}: there is no tensor that is averaged")
    stacks = stacks_in(places)
    patterns = given if isinstance(given, Mapping) else {"*": given}
    used: set[str] = set()
    found: dict[str, tuple[float, ...]] = {}
    strangers: list[str] = []
    for name in names:
        pattern = next((each for each in patterns if fnmatchcase(name, each)), None)
        if pattern is None:
            strangers.append(name)
            continue
        used.add(pattern)
        found[name] = _at(what, patterns[pattern], n, _depth(name, stacks))
    if strangers:
        raise RecipeError(
            f"{what}: no pattern fits {some(strangers)}; add numbers for all others, as '*'"
        )
    unused = [pattern for pattern in patterns if pattern not in used and pattern != "*"]
    if unused:
        raise RecipeError(
            f"{what}: {some(map(repr, unused))} fits no tensor, or none that is left; put what is "
            f"more special first; inspect with {option('tensors', True)} lists the names"
        )
    return found


def most_common(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """Return what most tensors have, and what the others have, by name."""
    ((common, _),) = Counter(values.values()).most_common(1)
    return common, {name: value for name, value in values.items() if value != common}


def _is_several(given: object) -> bool:
    """Return True for a list of any library, False for a number: numpy takes 30 ms to import."""
    return getattr(given, "ndim", isinstance(given, (list, tuple))) > 0


def _depth(name: str, stacks: Mapping[str, int]) -> float:
    """Return how far a tensor stands between the first layer (0) and the last one (1)."""
    layer = layer_in(name)
    if layer is None or layer.prefix not in stacks:
        return 0.0 if stands_before(name) else 1.0
    n = stacks[layer.prefix]
    return layer.number / (n - 1) if n > 1 else 1.0


def _at(what: str, given: Each, n: int, depth: float) -> tuple[float, ...]:
    if not isinstance(given, Sequence):
        return each(what, given, n)
    _check_count(what, given, n)
    return tuple(_gradient(what, item, depth) for item in given)


def _gradient(what: str, given: float | Sequence[float], depth: float) -> float:
    """Interpolate between the two numbers that stand around a depth."""
    if not isinstance(given, Sequence):
        return float(take("float", what, given))
    values = [float(take("float", what, value)) for value in given]
    if not values:
        raise RecipeError(f"{what}: a gradient needs a number at least")
    scaled = depth * (len(values) - 1)
    first = int(scaled)
    part = scaled - first
    return (1 - part) * values[first] + part * values[min(len(values) - 1, first + 1)]


def _check_count(what: str, values: Sequence[Any], n: int) -> None:
    if len(values) != n:
        raise RecipeError(
            f"{what}: {count(len(values), 'value')} for {count(n, 'ingredient')}, a base not "
            "counted; give one, or one for each"
        )
