"""What the values of options are: whole numbers, numbers, lists of them, sizes."""

from __future__ import annotations

import os
from typing import Any

import click

from streamsoup.errors import RecipeError, in_options, is_plain, printable
from streamsoup.system.schemes import check_local

__all__ = ["Factors", "Integer", "Number", "Numbers", "Size", "factors", "numbers"]


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


class Factors(Numbers):
    """Numbers separated by commas, as a list; or the path of what holds them, unchanged."""

    name = "factors"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list, or the path; a refusal names the option."""
        if not isinstance(value, str):
            return value
        try:
            return factors(value)
        except click.UsageError as error:
            raise click.BadParameter(error.message, ctx, param) from None


def numbers(text: str) -> list[float]:
    """Return numbers separated by commas. Raises `click.UsageError` for anything else."""
    try:
        if is_plain(text):
            return [float(part) for part in text.split(",")]
    except ValueError:
        pass
    raise click.UsageError(f"{printable(text)!r} is not a list of numbers such as .7,.3")


def factors(text: str) -> list[float] | str:
    """Return a list of numbers; or the path that holds them, unchanged."""
    check_local(text, RecipeError)
    if os.path.exists(text):
        return text
    try:
        return numbers(text)
    except click.UsageError as error:
        raise click.UsageError(f"{error.message}, and no such file") from None
