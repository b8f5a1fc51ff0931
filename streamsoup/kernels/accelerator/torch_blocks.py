"""The arithmetic in torch, with no allocation and no choice that depends on values.

The same law and the same bits as `reference`, in operations that round the same on every
device: `add_` without a factor, a product rounded before it is added, division by a 0-d tensor
(CUDA multiplies by the reciprocal of a number), and one rounding at the end. torch's own
conversion from float64 to 16 bits goes through float32 and rounds twice, so `round_` rounds to
the output's grid while still in float64, after which any conversion is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamsoup.kernels.reference import widen
from streamsoup.tensors import DTYPES, TORCH_NAMES, DType

if TYPE_CHECKING:
    import torch

__all__ = [
    "Constants",
    "Room",
    "add_",
    "carried",
    "compare_",
    "finish_",
    "spoils",
    "torch_dtype",
]

_SIGN = -(2**63)
_EXPONENT = 0x7FF0000000000000


def carried(dtype: DType, *, output: bool) -> DType:
    """Return the dtype in which `dtype` travels: float8 as float32 in, as float16 out, exactly.

    Too few of torch's operations know float8. The host widens it, and narrows it, in `blocks`.
    """
    if dtype.nbits > 8:
        return dtype
    return DTYPES["F16" if output else "F32"]


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's name of a dtype that is carried."""
    import torch

    return getattr(torch, TORCH_NAMES[dtype.name])  # type: ignore[no-any-return]


def word_dtype(dtype: DType) -> torch.dtype:
    """Return the integers of the same width."""
    import torch

    return {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]


class Room(NamedTuple):
    """Room for `finish_`, of the length of the sums."""

    rounded: torch.Tensor
    """float64."""
    spare: torch.Tensor
    """float64."""
    mask: torch.Tensor
    """bool."""


class Constants(NamedTuple):
    """0-d tensors on the device: a number from the host may be worked with in another way."""

    divisor: torch.Tensor
    """float64."""
    least: torch.Tensor
    """float64: the smallest normal value of the output; below it the grid is even."""
    most: torch.Tensor
    """float64: twice the power of two above all finite values of the output."""
    nan: torch.Tensor
    """The output's one NaN, as a word."""

    @classmethod
    def within(cls, room: torch.Tensor, output: DType) -> Constants:
        """Return the places in `room` ``(4,) float64`` that the constants of an output have."""
        word = word_dtype(carried(output, output=True))
        return cls(room[0], room[1], room[2], room[3:].view(word)[0])

    def fill_(self, divisor: float, output: DType) -> None:
        """Set them."""
        narrow = output.nbits < 32
        self.divisor.fill_(divisor)
        self.least.fill_(2.0 ** (1 - output.bias) if narrow else 0.0)
        self.most.fill_(2.0 ** (output.bias + 2) if narrow else 0.0)
        self.nan.fill_(carried(output, output=True).nan)


def add_(
    sums: torch.Tensor, values: torch.Tensor, factor: float, product: torch.Tensor, fresh: bool
) -> None:
    """Add `factor` times `values` to float64 `sums`; with `fresh`, start them, so that -0 stays.

    `product` is float64 room of the same length; it is not touched where the factor is 1.
    """
    if factor == 1.0:
        # Of unlike dtypes, one fused operation that widens as it goes.
        if fresh:
            sums.copy_(values)
        else:
            sums.add_(values)
        return
    target = sums if fresh else product
    target.copy_(values)
    target.mul_(factor)
    if not fresh:
        sums.add_(product)


def compare_(
    values: torch.Tensor, first: torch.Tensor, differ: torch.Tensor, room: torch.Tensor, fresh: bool
) -> None:
    """Note in int64 `differ` which float64 `values` have other bits than those in `first`.

    With `fresh`, `values` become the first. `room` is float64 of the same length.
    """
    import torch

    words = values.view(torch.int64)
    if fresh:
        first.copy_(words)
        differ.zero_()
        return
    spare = room.view(torch.int64)
    torch.bitwise_xor(words, first, out=spare)
    differ.bitwise_or_(spare)


def finish_(
    sums: torch.Tensor,
    output: DType,
    constants: Constants,
    room: Room,
    target: torch.Tensor,
    worst: torch.Tensor,
    *,
    divide: bool,
    alike: tuple[torch.Tensor, torch.Tensor] | None,
    canonical: bool,
) -> None:
    """Divide float64 `sums`, round them once to `output` into `target`, and find the largest.

    `target` has the dtype that `carried` gives. `worst`, 0-d float64, becomes the largest
    magnitude before rounding, NaN where there is one: see `spoils`. `alike` is the pair that
    `compare_` filled: where nothing differed, the common value is the result. With `canonical`,
    NaNs become the output's one NaN (a run that refuses them has none to care for).
    """
    import torch

    if divide:
        sums.div_(constants.divisor)
    if alike is not None:
        first, differ = alike
        torch.eq(differ, 0, out=room.mask)
        torch.where(room.mask, first.view(torch.float64), sums, out=sums)
    torch.abs(sums, out=room.spare)
    torch.amax(room.spare, dim=0, out=worst)
    if output.nbits < 32:
        round_(sums, output, constants, room.rounded, room.spare, infinite=canonical)
        target.copy_(room.rounded)
    else:
        target.copy_(sums)
    if canonical:
        words = target.view(word_dtype(carried(output, output=True)))
        torch.ne(sums, sums, out=room.mask)
        torch.where(room.mask, constants.nan, words, out=words)


def spoils(worst: float, output: DType) -> bool:
    """Return whether a largest magnitude of `worst` rounds to something that is not finite."""
    largest = widen(output.largest, output)
    halfway = largest + (largest - widen(output.largest - 1, output)) / 2
    # A tie goes to the even one: down for E4M3, whose last pattern is NaN; up for all others.
    return not (worst < halfway or (worst == halfway and output.largest % 2 == 0))


def round_(
    values: torch.Tensor,
    output: DType,
    constants: Constants,
    rounded: torch.Tensor,
    spare: torch.Tensor,
    *,
    infinite: bool,
) -> None:
    """Round float64 `values` to the grid of a dtype below float32, ties to even, in `rounded`.

    Adding and subtracting 1.5·2⁵² times the grid's spacing leaves the rounded multiple, whichever
    the sign (T. J. Dekker 1971, https://doi.org/10.1007/BF01397083, section 4, for one spacing;
    here it follows each value's exponent). Sums that round to zero keep their sign. What is beyond
    the output's range stays so; Inf only with `infinite`, else it becomes NaN.
    """
    import torch

    assert output.fraction is not None
    bits, exponents = values.view(torch.int64), spare.view(torch.int64)
    torch.bitwise_and(bits, _EXPONENT, out=exponents)
    torch.maximum(spare, constants.least, out=spare)
    if infinite:
        torch.minimum(spare, constants.most, out=spare)
    spare.mul_(1.5 * 2.0 ** (52 - output.fraction))
    torch.add(values, spare, out=rounded)
    rounded.sub_(spare)
    torch.bitwise_and(bits, _SIGN, out=exponents)
    words = rounded.view(torch.int64)
    torch.bitwise_or(words, exponents, out=words)
