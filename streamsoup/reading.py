"""How ingredients are read, where there is more than one way: plain data, part of each recipe."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

from streamsoup.errors import RecipeError, check_choice, option, printable

__all__ = ["Reading"]


class Reading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the files of ingredients become tensors; the same for all ingredients of a soup.

    `streamsoup.Options` has the same fields, and a `Recipe` records them, so that `verify` reads
    the ingredients as they were read when the soup was made.
    """

    key: str | None = None
    """Where in pickled checkpoints the weights are: a key such as ``state_dict_ema``, keys with
    dots between them, ``.`` for the top; None to find them."""
    dequantize: bool = False
    """Read quantised weights as codes times scales, exact, and write them in bfloat16 unless
    `Options.dtype` says otherwise; else they are copied where they are equal, or refused."""
    rename: tuple[str, ...] = ()
    """``old=>new``: replaces a prefix of the names of tensors, in all ingredients; of several, the
    first that fits."""
    include: tuple[str, ...] = ()
    """Shell patterns of the tensors to average; none for all. The others are those of the first
    ingredient, copied."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of tensors not to average, even if they are included."""
    drop: bool = False
    """Leave out of the soup what is not averaged by `include` and `exclude`."""
    embeddings: Literal["same", "common"] = "same"
    """Embeddings and heads of vocabularies of several lengths: refuse, or average the rows that all
    have, and give the ingredients that lack a row the mean of that row in those that have it. Then
    the longest vocabulary is the soup's."""
    components: tuple[str, ...] = ()
    """Components of pipelines to make a soup of, by the paths of their folders, ``.`` for the
    pipeline's own; the others are taken from the first ingredient. All if empty."""

    rank: int | None = None
    """Of adapters alone, the most ranks that a module of the adapter they make may have: where
    there are more, the best approximation of the sum, in the Frobenius norm; None to keep all."""
    rank_of: tuple[float, ...] = ()
    """The coefficients of the adapters in that sum. The verbs set it."""

    download: bool = False
    """Download models of the Hugging Face Hub that its cache lacks into that cache, with
    huggingface_hub; searches always do."""
    network_timeout: float = 120.0
    """Seconds without a byte from the network after which a soup of remote files ends in an
    error."""

    def __post_init__(self) -> None:
        """Make tuples of lists, and check all. Raises `RecipeError`."""
        if self.dequantize not in (False, True) or self.drop not in (False, True):
            raise RecipeError(
                f"{option('dequantize')} and {option('drop')} are truth values, got "
                f"{printable(repr((self.dequantize, self.drop)), 80)}"
            )
        number: Any = self.network_timeout
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1e6:
            raise RecipeError(
                f"{option('network_timeout')} is a number of seconds above 0, got "
                f"{printable(repr(number), 80)}"
            )
        if self.download not in (False, True):
            raise RecipeError(
                f"{option('download')} is a truth value, got {printable(repr(self.download), 80)}"
            )
        rank: Any = self.rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise RecipeError(
                f"{option('rank')} is a whole number from 1 on, got {printable(repr(rank), 80)}"
            )
        for name in ("rename", "include", "exclude"):
            msgspec.structs.force_setattr(self, name, _texts(name, getattr(self, name)))
        check_choice("embeddings", self.embeddings, ("same", "common"))
        for pair in self.rename:
            if pair.count("=>") != 1 or pair.startswith("=>"):
                raise RecipeError(
                    f"{option('rename')} {printable(repr(pair))} is not a prefix and its "
                    "replacement, such as 'module.=>'"
                )
        if self.drop and not (self.include or self.exclude):
            raise RecipeError(
                f"{option('drop', True)} leaves out what {option('include')} or "
                f"{option('exclude')} choose; give one of them"
            )

    @property
    def told(self) -> dict[str, Any]:
        """What differs from the defaults, as plain JSON: scores depend on it.

        How ingredients reach this machine is left out, as it changes no byte of them.
        """
        found: dict[str, Any] = msgspec.to_builtins(self.recorded)
        return found

    @property
    def changes_tensors(self) -> bool:
        """True if tensors are renamed, chosen by name, or may get further rows."""
        return bool(self.rename or self.include or self.exclude) or self.embeddings != "same"

    @property
    def recorded(self) -> Reading:
        """What a recipe records: all but how ingredients reach this machine."""
        return self.reaching_as(Reading())

    def reaching_as(self, other: Reading) -> Reading:
        """Return the same reading of ingredients that reach this machine as in another."""
        return msgspec.structs.replace(
            self, download=other.download, network_timeout=other.network_timeout
        )

    @property
    def downloading(self) -> Reading:
        """The same with `download`: for searches, which read ingredients many times."""
        return msgspec.structs.replace(self, download=True)

    def takes(self, tensor: str) -> bool:
        """Return True for a tensor that is averaged, if its dtype is: chosen by its name."""
        wanted = not self.include or any(fnmatchcase(tensor, each) for each in self.include)
        return wanted and not any(fnmatchcase(tensor, each) for each in self.exclude)

    def renamed(self, tensor: str) -> str:
        """Return the name of a tensor with its prefix replaced.

        >>> Reading(rename=("module.=>",)).renamed("module.head.weight")
        'head.weight'
        """
        for pair in self.rename:
            old, _, new = pair.partition("=>")
            if tensor.startswith(old):
                return new + tensor.removeprefix(old)
        return tensor


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """Return one text, or several, as a tuple."""
    texts = (given,) if isinstance(given, str) else tuple(given) if _is_list(given) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise RecipeError(f"{option(name)}: {printable(repr(given), 100)} is not a list of texts")
    return texts


def _is_list(given: Any) -> bool:
    return isinstance(given, (list, tuple))
