"""What to make, and what was made: plain frozen data with a JSON round trip, and no I/O.

A `Recipe` is everything that decides a soup's bytes. However a soup was found (given
coefficients, a greedy search, a learned one), it ends as a recipe, and the same pass writes it.
A `Provenance` is a recipe with the digests of what went in and of what came out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import RecipeError, check_choice, printable

__all__ = [
    "ARITHMETIC",
    "DIGEST",
    "PROVENANCE_NAME",
    "Coefficients",
    "FileRecord",
    "IngredientRecord",
    "Provenance",
    "Recipe",
]

ARITHMETIC = "float64, recipe order, product rounded then added, one division, one rounding"
"""The law every kernel keeps; written into each provenance. A change to it changes bytes."""

DIGEST = "xxh3-128 of leaves of 4194304 elements"
"""How a tensor is digested: leaves first (`streamsoup.engine.plan.LEAF`), then their digests."""


PROVENANCE_NAME = "streamsoup.json"
"""The file of an output that says what it is made of."""


class Coefficients(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The factors of the ingredients, for all tensors or for each.

    A tensor's soup is ``(Σᵢ values[i]·θᵢ) / divisor``; the division is a true one, so that a
    uniform soup (values 1, divisor k) rounds exact ties as ties.
    """

    values: tuple[float, ...]
    """One finite factor for each ingredient."""
    divisor: float = 1.0
    """Divides the sum once, at the end; 1 divides nothing."""
    per_tensor: dict[str, tuple[float, ...]] = {}
    """Factors of single tensors, by name; these are not divided."""

    @classmethod
    def uniform(cls, n_ingredients: int) -> Coefficients:
        """Weigh all alike: plain adds, and one division by their number."""
        return cls((1.0,) * n_ingredients, float(n_ingredients))

    @classmethod
    def given(cls, values: Sequence[float], *, normalize: bool = False) -> Coefficients:
        """Take factors as they are, or divided by their sum if `normalize`.

        Raises `RecipeError` for what is no list of finite numbers, and for a sum of zero to divide
        by.
        """
        try:
            if isinstance(values, (str, bytes, set, frozenset, Mapping)):
                raise TypeError
            # Of torch without its gradient, of which it would warn.
            factors = tuple(float(v.detach() if hasattr(v, "detach") else v) for v in values)
        except (TypeError, ValueError, OverflowError):
            raise RecipeError(
                f"{printable(repr(values))}: a list of coefficients is wanted"
            ) from None
        for value in factors:
            if not math.isfinite(value):
                raise RecipeError(f"coefficient {value} is not finite; give plain numbers")
        if not normalize:
            return cls(factors)
        try:
            total = math.fsum(factors)
        except OverflowError:  # on the way, whatever the others would have made of it
            total = math.inf
        if total == 0 or not math.isfinite(total):
            raise RecipeError(
                f"coefficients that sum to {total} cannot be normalized; give others, or take them "
                "as they are"
            )
        return cls(factors, total)

    @property
    def is_copy(self) -> bool:
        """Whether the soup is the one ingredient there is."""
        return (self.values, self.divisor, self.per_tensor) == ((1.0,), 1.0, {})

    def of(self, tensor: str) -> tuple[tuple[float, ...], float]:
        """Give the factors and the divisor of one tensor."""
        own = self.per_tensor.get(tensor)
        return (self.values, self.divisor) if own is None else (own, 1.0)

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` unless every tensor has one finite factor for each ingredient."""
        rows: list[tuple[str, tuple[float, ...]]] = [("", self.values), *self.per_tensor.items()]
        for tensor, values in rows:
            where = f" for tensor {printable(tensor)!r}" if tensor else ""
            if len(values) != n_ingredients:
                what = "coefficient" if len(values) == 1 else "coefficients"
                raise RecipeError(
                    f"{len(values)} {what}{where} for {n_ingredients} ingredients; "
                    "give one for each, in the same order"
                )
            for value in values:
                if not math.isfinite(value):
                    raise RecipeError(
                        f"coefficient {value}{where} is not finite; give plain numbers"
                    )
        if not math.isfinite(self.divisor) or self.divisor == 0:
            raise RecipeError(f"divisor {self.divisor} divides nothing; give one that is not 0")


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Everything that decides the bytes of a soup."""

    ingredients: tuple[str, ...]
    """Paths, in the order of the sum."""
    coefficients: Coefficients
    method: str = "mix"
    """How the coefficients were found: ``uniform``, ``mix``, ``interpolate``, ``greedy``, …"""
    dtype: str = "same"
    """Dtype of the averaged tensors in the soup, or ``same`` as in the ingredients."""
    non_float: str = "same"
    """``same``: integers and the like must be equal; ``first``: take them from the first."""
    non_finite: str = "refuse"
    """``refuse`` a NaN or Inf in the soup, or ``propagate`` it."""
    shard_size: int | None = None
    """Largest shard in bytes; None mirrors the shards of the first ingredient."""

    @property
    def only_measures(self) -> bool:
        """Whether it makes no checkpoint, and so has no rule for NaN and Inf."""
        return self.method in ("geometry", "compare")

    def check(self) -> None:
        """Raise `RecipeError` for a recipe that cannot be cooked whatever the files hold."""
        if not self.ingredients:
            raise RecipeError("a soup needs at least one ingredient; give some")
        self.coefficients.check(len(self.ingredients))
        check_choice("non_float", self.non_float, ("same", "first"))
        check_choice("non_finite", self.non_finite, ("refuse", "propagate"))
        if self.shard_size is not None and self.shard_size < 1:
            raise RecipeError(f"shard size {self.shard_size} is below one byte; give 5GB, say")


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file as it was: name, size in bytes, and digest."""

    name: str
    nbytes: int
    digest: str
    """Of the header for a shard, of the whole content for a side file; hex xxh3-128."""


class IngredientRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ingredient as it was read."""

    path: str
    """Absolute, at the time; of a state dict, its name."""
    nbytes: int
    digest: str
    """Over its tensors' names, dtypes, shapes and digests; not over file layout or metadata."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was made, out of what, by what: the file ``streamsoup.json`` of a soup."""

    recipe: Recipe
    ingredients: tuple[IngredientRecord, ...]
    shards: tuple[FileRecord, ...]
    side_files: tuple[FileRecord, ...]
    tensors: dict[str, str]
    """Digest of each tensor of the soup, by name."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    arithmetic: str
    digest: str
    report: Mapping[str, object]
    """What a search adds about how it found the coefficients."""
    checksum: str
    """Of all the rest; set by `sealed`. It finds accidents, such as an edit, not forgeries."""

    def __repr__(self) -> str:
        """Say it in a line."""
        made = f"{len(self.tensors)} tensors of {len(self.ingredients)} ingredients"
        return f"<Provenance: {made}, {self.created}>"

    def sealed(self) -> Provenance:
        """Give it with its checksum, as it is now."""
        return msgspec.structs.replace(self, checksum=self._digest())

    def to_json(self) -> bytes:
        """Write it as indented JSON; floats keep every bit."""
        text = msgspec.json.encode(self, enc_hook=_number)
        return msgspec.json.format(text, indent=1) + b"\n"

    @property
    def intact(self) -> bool:
        """Whether it still says what it did when it was sealed."""
        return self.checksum == self._digest()

    def _digest(self) -> str:
        text = msgspec.json.encode(msgspec.structs.replace(self, checksum=""), enc_hook=_number)
        # There and back, as what was made with an int where a float belongs reads back as 1.0.
        back = msgspec.json.decode(text, type=type(self))
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(back))

    @classmethod
    def from_json(cls, text: bytes) -> Provenance:
        """Read it back. Raises `RecipeError` when it is not what `to_json` wrote."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(f"is not a streamsoup provenance: {printable(error)}") from None


def _number(value: Any) -> Any:
    """Write down a number of numpy or torch as what it is."""
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be noted in a provenance")
