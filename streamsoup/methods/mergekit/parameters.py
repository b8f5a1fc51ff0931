"""What the settings of mergekit's recipes are for a tensor: numbers, gradients, filters.

A setting is a value; a list of numbers, interpolated over the layers of its slice; or a list of
values with filters, of which the first counts whose text is part of the tensor's name. Settings
stand beside an input, a slice, or the whole recipe, and the innermost that says anything counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Literal

import msgspec

from streamsoup.errors import RecipeError, is_plain, printable
from streamsoup.formats.documents import Items, Node, Table, Text
from streamsoup.methods.mergekit.configuration import Configuration, Input, Slice

__all__ = ["Parameter", "Place", "number_for", "switch_for", "warn_unused"]

Value = float | bool

_TRUE = ("true", "yes", "on", "1", "1.0", "y", "t")
_FALSE = ("false", "no", "off", "0", "0.0", "n", "f")


class Parameter(msgspec.Struct, frozen=True):
    """A parameter of a method."""

    name: str
    default: Value | None = None
    """None if it has to be given."""
    kind: Literal["number", "switch"] = "number"
    per_input: bool = False
    """True if each input has its own; False for one of the whole tensor."""
    ignored: bool = False
    """True for what changes nothing here."""


class Place(msgspec.Struct, frozen=True):
    """Where a tensor of the soup stands."""

    tensor: str
    """Its name in the soup."""
    slice: Slice
    t: float
    """How far its layer stands between the first of the slice (0) and the last (1)."""


def number_for(
    parameter: Parameter,
    configuration: Configuration,
    place: Place,
    input: Input | None = None,
    tensor: str | None = None,
) -> float | None:
    """Return a number for a tensor, of an input if one is given; None if it has to be given.

    `tensor` is its name in that input. Raises `RecipeError` at the line of what is no number.
    """
    found = _find(parameter, configuration, place, input, tensor)
    return None if found is None else float(found)


def switch_for(parameter: Parameter, configuration: Configuration, place: Place) -> bool:
    """Return a switch for a tensor. Raises `RecipeError` at the line of what is none."""
    return bool(_find(parameter, configuration, place, None, None))


def _find(
    parameter: Parameter,
    configuration: Configuration,
    place: Place,
    input: Input | None,
    tensor: str | None,
) -> Value | None:
    for scope in _scopes(configuration, place.slice, input):
        if parameter.name in scope.entries:
            setting = scope.entries[parameter.name]
            value = _value(parameter, setting, tensor or place.tensor, place.t)
            if value is not None:
                return value
    return parameter.default


def _scopes(configuration: Configuration, slice: Slice, input: Input | None) -> Iterator[Table]:
    """Yield tables of settings, the innermost first."""
    own = None if input is None else input.parameters
    for scope in (own, slice.parameters, configuration.parameters):
        if scope is not None:
            yield scope


def _value(parameter: Parameter, node: Node, tensor: str, t: float) -> Value | None:
    """Return a setting for a tensor; None if no filter fits it."""
    if isinstance(node, Text):
        return None if node.is_nothing else _scalar(parameter, node)
    if isinstance(node, Table):
        return _filtered(parameter, [node], tensor, t)
    assert isinstance(node, Items)
    if not node.items:
        return None
    if all(isinstance(each, Text) for each in node.items):
        values = [_scalar(parameter, each) for each in node.items]
        if parameter.kind == "switch":
            return values[int(t * (len(values) - 1))]
        return _gradient(values, t)
    return _filtered(parameter, node.items, tensor, t)


def _gradient(values: Sequence[float], t: float) -> float:
    """Interpolate between the two values that stand around t."""
    scaled = t * (len(values) - 1)
    first = int(scaled)
    part = scaled - first
    return (1 - part) * values[first] + part * values[min(len(values) - 1, first + 1)]


def _filtered(parameter: Parameter, nodes: Sequence[Node], tensor: str, t: float) -> Value | None:
    """Return the value of the first filter that fits."""
    for node in nodes:
        if not isinstance(node, Table) or "value" not in node.entries:
            raise RecipeError(
                f"{node.where}: {parameter.name}: expected a value with or without a filter, got "
                f"{node.kind}"
            )
        given = node.entries.get("filter")
        if given is not None and not isinstance(given, Text):
            raise RecipeError(f"{node.at('filter')}: expected a part of names, got {given.kind}")
        if given is None or given.is_nothing or given.text == "*" or given.text in tensor:
            return _value(parameter, node.entries["value"], tensor, t)
    return None


def _scalar(parameter: Parameter, node: Node) -> Value:
    text = node.text if isinstance(node, Text) else ""
    if parameter.kind == "switch":
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
    else:
        try:
            number = float(text) if is_plain(text) else math.nan
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise RecipeError(
        f"{node.where}: {parameter.name}: expected a {parameter.kind}, got {node.kind}"
    )


def warn_unused(configuration: Configuration, known: Sequence[Parameter]) -> list[str]:
    """Return a warning for each setting that has no effect, as in mergekit."""
    names = {parameter.name: parameter for parameter in known}
    found = []
    inputs = [input for slice in configuration.slices for input in slice.inputs]
    outer = [configuration.parameters, *(slice.parameters for slice in configuration.slices)]
    scopes = [*((scope, False) for scope in outer), *((each.parameters, True) for each in inputs)]
    for scope, of_input in scopes:
        for name in {} if scope is None else scope.entries:
            assert scope is not None
            if name not in names:
                close = get_close_matches(name, [n for n in names if not names[n].ignored], 1)
                advice = f"; did you mean {close[0]}?" if close else ""
                found.append(
                    f"{scope.at(name)}: {printable(configuration.method)} has no such parameter, "
                    f"and mergekit ignores it{advice}"
                )
            elif of_input and not names[name].per_input and not names[name].ignored:
                found.append(
                    f"{scope.at(name)}: is one for all models, and mergekit ignores it here; move "
                    "it to the outermost parameters"
                )
    return found
