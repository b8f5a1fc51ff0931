"""What to make, and what was made: plain frozen data with a JSON round trip, and no I/O.

A `Recipe` is everything that decides a soup's bytes. However a soup was found (given
coefficients, a greedy search, a learned one), it ends as a recipe, and the same pass writes it.
A `Provenance` is a recipe with the digests of what went in and of what came out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import RecipeError, check_choice, count, printable
from streamsoup.reading import Reading
from streamsoup.rule import Reduction, Rule, RuleMemory
from streamsoup.tensors import TensorSpec
from streamsoup.version import __version__

__all__ = [
    "ARITHMETIC",
    "DIGEST",
    "PROVENANCE_LIMIT",
    "PROVENANCE_NAME",
    "Coefficients",
    "FileRecord",
    "IngredientRecord",
    "Provenance",
    "Recipe",
    "UnknownRule",
    "is_tagged",
    "rule_name",
]

ARITHMETIC = "float64, recipe order, product rounded then added, one division, one rounding"
"""What every kernel computes; written into each provenance. A change to it changes bytes."""

DIGEST = "xxh3-128 of leaves of 4194304 elements"
"""How a tensor is digested: leaves first (`streamsoup.engine.plan.LEAF`), then their digests."""


PROVENANCE_NAME = "streamsoup.json"
"""Name of the file in an output that holds its provenance."""

PROVENANCE_LIMIT = 500_000_000
"""Bytes of a provenance that are read: 64 coefficients for each of 100,000 tensors take 150 MB."""


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
        """Return equal coefficients: factors 1, divided once by the number of ingredients."""
        return cls((1.0,) * n_ingredients, float(n_ingredients))

    @classmethod
    def given(cls, values: Sequence[float], *, normalize: bool = False) -> Coefficients:
        """Return coefficients with given factors.

        Args:
            values: One finite number for each ingredient, in order.
            normalize: Divide by the sum of the factors.

        Raises:
            RecipeError: Not a sequence of finite numbers, or a sum of zero to divide by.
        """
        try:
            if isinstance(values, (str, bytes, set, frozenset, Mapping)):
                raise TypeError
            # float() of a torch tensor with a gradient warns.
            factors = tuple(float(v.detach() if hasattr(v, "detach") else v) for v in values)
        except (TypeError, ValueError, OverflowError):
            raise RecipeError(
                f"{printable(repr(values))}: is not a list of numbers; give one for each ingredient"
            ) from None
        for value in factors:
            if not math.isfinite(value):
                raise RecipeError(f"coefficient {value} is not finite; give finite numbers")
        if not normalize:
            return cls(factors)
        try:
            total = math.fsum(factors)
        except OverflowError:  # a partial sum, even if the whole sum is finite
            total = math.inf
        if total == 0 or not math.isfinite(total):
            raise RecipeError(
                f"coefficients that sum to {total} cannot be normalized; give others, or leave "
                "out normalize"
            )
        return cls(factors, total)

    @property
    def is_copy(self) -> bool:
        """True if the soup is a copy of a single ingredient."""
        return (self.values, self.divisor, self.per_tensor) == ((1.0,), 1.0, {})

    def of(self, tensor: str) -> tuple[tuple[float, ...], float]:
        """Return the factors and the divisor of one tensor."""
        own = self.per_tensor.get(tensor)
        return (self.values, self.divisor) if own is None else (own, 1.0)

    def is_affine(self, tensor: str) -> bool:
        """Return True if the factors of a tensor sum to its divisor, up to rounding.

        The soup of equal tensors is then that same tensor, so a copy can replace it.
        """
        factors, divisor = self.of(tensor)
        return abs(math.fsum(factors) / divisor - 1) <= 1e-9

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` unless every tensor has one finite factor for each ingredient."""
        rows: list[tuple[str, tuple[float, ...]]] = [("", self.values), *self.per_tensor.items()]
        for tensor, values in rows:
            where = f" for tensor {printable(tensor)!r}" if tensor else ""
            if len(values) != n_ingredients:
                raise RecipeError(
                    f"{count(len(values), 'coefficient')}{where} for "
                    f"{count(n_ingredients, 'ingredient')}; "
                    "give one for each, in the same order"
                )
            for value in values:
                if not math.isfinite(value):
                    raise RecipeError(
                        f"coefficient {value}{where} is not finite; give finite numbers"
                    )
        if not math.isfinite(self.divisor) or self.divisor == 0:
            raise RecipeError(f"divisor must be finite and not 0, got {self.divisor}")


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Everything that decides the bytes of a soup."""

    ingredients: tuple[str, ...]
    """Paths, in the order of the sum."""
    rule: Rule
    """How the averaged tensors are made, with all parameters."""
    method: str = "mix"
    """How the rule was chosen: ``uniform``, ``mix``, ``interpolate``, ``greedy``, …; a label."""
    dtype: str = "same"
    """Dtype of the averaged tensors in the soup, or ``same`` as in the ingredients."""
    non_float: str = "same"
    """``same``: integers and the like must be equal; ``first``: take them from the first."""
    non_finite: str = "refuse"
    """``refuse`` a NaN or Inf in the soup, or ``propagate`` it."""
    shard_size: int | None = None
    """Largest shard in bytes; None mirrors the shards of the first ingredient."""
    reading: Reading = Reading()
    """How the ingredients were read."""

    def check(self, names: Collection[str]) -> None:
        """Raise `RecipeError` unless the recipe fits ingredients with tensors of these names."""
        if not self.ingredients:
            raise RecipeError("a soup needs at least one ingredient; give some")
        given: object = self.rule
        known = isinstance(given, Rule) and is_tagged(type(given))
        if not known and not isinstance(given, UnknownRule):
            raise RecipeError(
                f"{printable(repr(self.rule))}: is not a rule; see streamsoup.Rule, and derive it "
                "from msgspec.Struct with frozen=True and a tag"
            )
        self.rule.check(len(self.ingredients), names)
        check_choice("non_float", self.non_float, ("same", "first"))
        check_choice("non_finite", self.non_finite, ("refuse", "propagate"))
        if self.shard_size is not None and self.shard_size < 1:
            raise RecipeError(f"shard_size must be at least 1 byte, got {self.shard_size}")


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
    """What a soup was made of and by what: its file ``streamsoup.json``."""

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
    """How a search found the coefficients; empty without one."""
    checksum: str
    """Over all other fields; set by `sealed`. Detects accidents such as an edit, not forgeries."""

    def __repr__(self) -> str:
        """Return a one-line summary for the REPL."""
        n = len(self.ingredients)
        made = f"{count(len(self.tensors), 'tensor')} of {count(n, 'ingredient')}"
        return f"<Provenance: {made}, {self.created}>"

    def sealed(self) -> Provenance:
        """Return a copy whose checksum matches its present content."""
        return msgspec.structs.replace(self, checksum=self._digest())

    def to_json(self) -> bytes:
        """Return it as indented JSON; floats keep every bit."""
        text = msgspec.json.encode(self, enc_hook=_plain)
        return msgspec.json.format(text, indent=1) + b"\n"

    @property
    def intact(self) -> bool:
        """True if the content still matches its checksum."""
        return self.checksum == self._digest()

    def _digest(self) -> str:
        text = msgspec.json.encode(msgspec.structs.replace(self, checksum=""), enc_hook=_plain)
        # Encode, decode and encode again: an int where a float belongs reads back as 1.0.
        back = _decode(text, (type(self.recipe.rule),))
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(back, enc_hook=_plain))

    @classmethod
    def from_json(cls, text: bytes, rules: Sequence[type[Rule]]) -> Provenance:
        """Return the provenance in JSON that this version or an earlier one wrote.

        Args:
            text: The JSON.
            rules: Types of rules that may stand in the recipe; any other becomes an `UnknownRule`.
                No code that the text names is ever looked for.

        Raises:
            RecipeError: The text is not a provenance.
        """
        try:
            plain = msgspec.json.decode(text)
            recipe = plain["recipe"]
            if "rule" in recipe:
                return _decode(text, rules)
            # Version 0.1 before its release: the linear rule, with its coefficients in the recipe.
            was_intact = _digest_plain(plain) == plain["checksum"]
            recipe["rule"] = {"type": "linear", "coefficients": recipe.pop("coefficients")}
            found = _decode(msgspec.json.encode(plain), rules)
            return found.sealed() if was_intact else found
        except (
            msgspec.MsgspecError,
            UnicodeDecodeError,
            RecursionError,
            TypeError,
            KeyError,
        ) as error:
            raise RecipeError(f"is not a streamsoup provenance: {printable(error)}") from None


class UnknownRule:
    """A rule whose type was not given: it keeps its parameters, and refuses to make a soup."""

    n_passes = 1
    spans_model = False

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        """Keep the parameters as plain JSON data."""
        self.parameters = parameters

    def __repr__(self) -> str:
        """Return a one-line summary for the REPL."""
        return f"<UnknownRule {self.parameters.get('type')!r}>"

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` that names the rule and says how to give its class."""
        name = printable(str(self.parameters.get("type")))
        raise RecipeError(
            f"made by the rule {name!r}, which does not come with streamsoup "
            f"{__version__}; give its class, as in verify(soup, rules=[...])"
        )

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Return zero bytes: nothing is ever made."""
        return RuleMemory()

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Reduction:
        """Raise `RecipeError`: an unknown rule cannot be applied."""
        raise RecipeError(f"{self!r}: an unknown rule cannot make a soup")


def rule_name(rule: object) -> str:
    """Return the tag of a rule, or the name of its type if it has none."""
    tag = getattr(getattr(type(rule), "__struct_config__", None), "tag", None)
    return tag if isinstance(tag, str) else type(rule).__name__


def is_tagged(kind: type) -> bool:
    """Return True for a frozen struct with a tag, which tells its JSON from other rules'."""
    config = getattr(kind, "__struct_config__", None)
    return config is not None and config.frozen and config.tag is not None


def _decode(text: bytes, rules: Sequence[type[Any]]) -> Provenance:
    """Decode a provenance, with its rule as one of `rules`."""

    def find_rule(kind: type, plain: Any) -> Any:
        if kind is not Rule:
            return plain  # a report holds any plain data
        if not isinstance(plain, dict):
            raise TypeError("a rule is an object")
        for each in rules:
            config = getattr(each, "__struct_config__", None)
            if config is not None and plain.get(config.tag_field) == config.tag:
                return msgspec.convert(plain, each)
        return UnknownRule(plain)

    return msgspec.json.decode(text, type=Provenance, dec_hook=find_rule)


def _digest_plain(plain: Mapping[str, Any]) -> str:
    """Return the checksum of a provenance as plain data."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode({**plain, "checksum": ""}))


def _plain(value: Any) -> Any:
    """Convert a number of numpy or torch, or an unknown rule, to plain JSON data."""
    if isinstance(value, UnknownRule):
        return value.parameters
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written into a provenance")
