"""What the values of options are: whole numbers, numbers, lists of them, sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from streamsoup.errors import RecipeError, in_options, is_plain, printable
from streamsoup.system.schemes import check_local

__all__ = [
    "ByName",
    "Factors",
    "Integer",
    "Number",
    "Numbers",
    "Size",
    "by_name",
    "for_each",
    "numbers",
]


class _Plain:
    """Mixin for click's number ranges: plain digits, and no range in the help if none is set.

    Python also parses 1_0 as ten, and the digits of all scripts.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number as click reads it, if its digits are plain."""
        if isinstance(value, str) and not is_plain(value):
            raise click.BadParameter(
                f"{printable(value)!r} is not a number in plain digits", ctx, param
            )
        return super().convert(value, param, ctx)  # type: ignore[misc]

    def _describe_range(self) -> Any:
        # Click would say "x<=None" of any number.
        limits = (self.min, self.max)  # type: ignore[attr-defined]
        return "" if limits == (None, None) else super()._describe_range()  # type: ignore[misc]


class Integer(_Plain, click.IntRange):
    """A whole number, in a range if one is given."""

    name = "integer"


class Number(_Plain, click.FloatRange):
    """A number, in a range if one is given."""

    name = "number"


class Size(click.ParamType):  # type: ignore[type-arg]  # older clicks have none
    """A size in bytes, in any common spelling."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the size in bytes; a refusal names the option."""
        from streamsoup.sizes import parse_nbytes

        try:
            return parse_nbytes(value)
        except RecipeError as error:
            raise click.BadParameter(in_options(error.text), ctx, param) from None


class Numbers(click.ParamType):  # type: ignore[type-arg]  # older clicks have none
    """Numbers separated by commas, as a list; each in a range if one is given."""

    name = "numbers"

    def __init__(self, least: float | None = None, most: float | None = None) -> None:
        """Set the range of each number."""
        self.each = Number(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list; a refusal names the option."""
        if not isinstance(value, str):
            return value
        try:
            return [self.each.convert(number, param, ctx) for number in numbers(value)]
        except click.UsageError as error:
            raise click.BadParameter(error.message, ctx, param) from None


class ByName(Numbers):
    """Numbers for all tensors, or behind a pattern of their names: ``.3,.7`` or ``*mlp*=.3,.7``.

    Any of them may be a gradient over the layers: ``0~1``. For an option that may be given several
    times, with the callback `by_name`.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the pattern, or None, and the numbers; a refusal names the option."""
        if not isinstance(value, str):
            return value
        pattern, _, text = value.rpartition("=")
        given = [
            super(ByName, self).convert(part.replace("~", ","), param, ctx)
            for part in text.split(",")
        ]
        return pattern or None, [each[0] if len(each) == 1 else each for each in given]


class Factors(ByName):
    """Numbers, as in `ByName`; or the path of what holds them, unchanged."""

    name = "factors"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the pattern and the numbers; or the text, if it is neither: see `check`."""
        if not isinstance(value, str) or os.path.exists(value):
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            return value

    @staticmethod
    def check(value: Any) -> None:
        """Raise `click.UsageError` for a text that is no path; `RecipeError` for a remote one."""
        if isinstance(value, str):
            check_local(value, RecipeError)
            if not os.path.exists(value):
                raise click.UsageError(
                    f"{printable(value)!r} is not a list of numbers such as .7,.3, and no such file"
                )


def by_name(ctx: click.Context, param: click.Parameter, values: Sequence[Any]) -> Any:
    """Return what was given: None, a path, a list, or a dictionary of lists by pattern.

    What has no pattern is that of all tensors that no pattern fits.
    """
    if not values:
        return None
    paths = [value for value in values if isinstance(value, str)]
    if paths and len(values) > 1:
        raise click.BadParameter("a file holds all of them; give nothing else", ctx, param)
    if paths:
        return paths[0]
    found: dict[str, list[Any]] = {}
    for pattern, given in sorted(values, key=lambda value: value[0] is None):
        if (pattern or "*") in found:
            what = "numbers for all" if pattern is None else printable(repr(pattern))
            raise click.BadParameter(f"{what} are given twice; keep one of them", ctx, param)
        found[pattern or "*"] = given
    return found["*"] if list(found) == ["*"] else found


def for_each(given: Any, n: int) -> Any:
    """Return numbers with a lone one, or a lone gradient, repeated for each of `n` ingredients."""
    if isinstance(given, dict):
        return {pattern: for_each(values, n) for pattern, values in given.items()}
    return given * n if len(given) == 1 else given


def numbers(text: str) -> list[float]:
    """Return numbers separated by commas. Raises `click.UsageError` for anything else."""
    try:
        if is_plain(text):
            return [float(part) for part in text.split(",")]
    except ValueError:
        pass
    raise click.UsageError(f"{printable(text)!r} is not a list of numbers such as .7,.3")
