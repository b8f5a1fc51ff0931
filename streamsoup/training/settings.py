"""The settings of an `Average`: which make sense, and which decide its values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from streamsoup.errors import RecipeError, check_choice
from streamsoup.options import take
from streamsoup.training.running import wsm_weights

__all__ = ["Curve", "Method", "Settings", "settings_of"]

Method = Literal["uniform", "ema", "lawa", "wsm"]
Curve = Literal["linear", "cosine", "sqrt"]


class Settings(msgspec.Struct, frozen=True):
    """What decides the values of an average, and where it is kept."""

    method: str
    decay: float | None
    window: int | None
    curve: str | None
    n: int | None
    precision: str
    place: str
    frozen: str
    non_finite: str

    @property
    def folder(self) -> str | None:
        """The folder of sums and windows; None where they are not on a disk."""
        return None if self.place in ("host", "device") else self.place

    @property
    def copies_ahead(self) -> bool:
        """True if a model on a device is copied to memory while the device goes on.

        Not for a folder, which is there to save memory.
        """
        return self.place == "host"

    @property
    def keeps_window(self) -> bool:
        """True if states are kept rather than sums."""
        return self.method == "lawa" or (self.method == "wsm" and self.n is None)

    @property
    def values(self) -> dict[str, Any]:
        """What a saved state must agree on: it may be kept in another place."""
        names = ("method", "decay", "window", "curve", "n", "precision", "frozen")
        return {name: getattr(self, name) for name in names}


def settings_of(
    method: str,
    decay: float | None,
    window: int | None,
    curve: str | None,
    n: int | None,
    precision: str,
    place: str,
    frozen: str,
    non_finite: str,
) -> Settings:
    """Check what the caller asked for. Raises `RecipeError`."""
    check_choice("method", method, get_args(Method))
    check_choice("precision", precision, ("float64", "float32"))
    check_choice("frozen", frozen, ("keep", "average"))
    check_choice("non_finite", non_finite, ("refuse", "propagate"))
    own = {"decay": "ema", "window": "lawa", "curve": "wsm", "n": "wsm"}
    given = {"decay": decay, "window": window, "curve": curve, "n": n}
    for name, owner in own.items():
        if given[name] is not None and method != owner:
            raise RecipeError(f"{name} is for the method {owner}, and this is {method}")
    if method == "ema":
        decay = take("float", "decay", 0.999 if decay is None else decay)
        if not 0 <= decay < 1:
            raise RecipeError(f"decay {decay} is not between 0 and 1, 1 excluded")
    if method == "lawa":
        if window is None:
            raise RecipeError("lawa needs a window: how many of the last updates are averaged")
        window = take("int", "window", window)
        if window < 1:
            raise RecipeError(f"window must be at least 1, got {window}")
    if method == "wsm":
        curve = curve or "linear"
        check_choice("curve", curve, get_args(Curve))
        n = None if n is None else take("int", "n", n)
        wsm_weights(1 if n is None else n, curve)
        if n is None and place in ("host", "device"):
            raise RecipeError(
                "wsm needs n, the number of updates there will be, or a folder for place, in which "
                "the states of all updates are kept until then"
            )
    if precision == "float32" and place not in ("host", "device"):
        raise RecipeError("precision float32 is kept in memory; give place='host' or 'device'")
    return Settings(method, decay, window, curve, n, precision, place, frozen, non_finite)
