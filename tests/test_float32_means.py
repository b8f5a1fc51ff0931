"""Means taken by way of float32 have the bits of those taken in float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernels import (
    WORDS,
    Bits,
    by_small,
    in_numba,
    in_numpy,
)

from streamsoup.kernels import constants, cpu, reference
from streamsoup.kernels.fast import objects
from streamsoup.tensors import DTYPES, DType


@by_small
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 13, 33, 63, 64, 65])
def test_means_by_way_of_float32_are_those_of_float64(dtype: DType, k: int) -> None:
    """The compiled kernel's shortcut gives numpy's bits, at the ends of where it is exact too."""
    rng = np.random.default_rng(k)
    fraction = dtype.fraction or 0
    n, top = 9000, dtype.largest >> fraction
    # How far exponents lie apart grows along the tensor: none, a few, and most elements are wide.
    spread = np.linspace(0, top, n).astype(np.int64)
    high = rng.integers(0, top + 1, n)
    exponents = np.maximum(high - rng.integers(0, spread + 1, (k, n)), 0)
    codes = (exponents << fraction) + rng.integers(0, 1 << fraction, (k, n))
    codes = np.minimum(codes, dtype.largest) | (rng.integers(0, 2, (k, n)) << (dtype.nbits - 1))
    codes[:, ::7] = codes[:1, ::7]  # the same in all
    codes[rng.random((k, n)) < 0.05] = 0
    codes[:, ::11] = 1 << (dtype.nbits - 1)  # -0 in all
    codes[-1, ::997] = dtype.nan
    codes[0, ::1993] = dtype.overflow
    codes[:, -700:] = dtype.largest
    inputs = list(codes.astype(WORDS[dtype.nbits]))
    for divisor in (float(k), 3.0):
        ours = in_numpy(inputs, dtype, [1.0] * k, divisor, dtype)
        assert (in_numba(inputs, dtype, [1.0] * k, divisor, dtype) == ours).all()


def among_ones(columns: Bits, dtype: DType) -> list[Bits]:
    """Put columns ``(ingredient, element)`` between ordinary ones, too few to give up on them."""
    whole = np.full((len(columns), 32 * columns.shape[1]), reference.narrow(1.0, dtype))
    whole[:, ::32] = columns
    return list(whole.astype(WORDS[dtype.nbits]))


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E5M2"])
@pytest.mark.parametrize("k", [3, 4, 7, 8, 33, 63, 64])
def test_a_unit_beside_a_tie_counts_up_to_the_last(name: str, k: int) -> None:
    """A sum one unit of its smallest value beside a tie, about as large as a float32 can hold."""
    dtype = DTYPES[name]
    assert dtype.fraction is not None
    rng = np.random.default_rng(k)
    values = np.array([reference.widen(code, dtype) for code in range(dtype.largest + 1)])
    units = np.round(values / values[1])
    # As wide as allowed, by the argument in `means`, and an exponent less or more.
    doublings = 23 - dtype.fraction - (k - 1).bit_length()
    size = doublings + rng.integers(-1, 2, 3000)
    odd = 2 * rng.integers(1 << dtype.fraction, 2 << dtype.fraction, 3000) + 1
    middle = odd * np.exp2(size - 1)
    left = k * middle + rng.choice([-1.0, 1.0], 3000)
    columns = np.zeros((k, 3000), np.int64)
    for i in range(k):
        wanted = middle * rng.uniform(0.7, 1.4, 3000) if i < k - 4 else left
        codes = np.searchsorted(units, np.abs(wanted), side="right") - 1
        left -= np.copysign(units[codes], wanted)
        columns[i] = codes + (wanted < 0) * (1 << (dtype.nbits - 1))
    columns = columns[:, left == 0]
    assert columns.shape[1] > 300
    inputs = among_ones(columns, dtype)
    ours = in_numpy(inputs, dtype, [1.0] * k, float(k), dtype)
    assert (in_numba(inputs, dtype, [1.0] * k, float(k), dtype) == ours).all()


@pytest.mark.parametrize("k", [2, 3, 8, 63, 64])
def test_sums_that_a_float32_cannot_hold(k: int) -> None:
    """Means of the largest bfloat16 are finite, whatever their sums."""
    dtype = DTYPES["BF16"]
    codes = np.arange(dtype.largest - 1200, dtype.largest + 1)
    for columns in (np.tile(codes, (k, 1)), np.tile(codes | 1 << 15, (k, 1))):
        found = in_numba(among_ones(columns, dtype), dtype, [1.0] * k, float(k), dtype)
        assert (found[::32] == columns[0]).all()


@pytest.mark.parametrize(("name", "tie", "tiny"), [("BF16", -6, -30), ("F16", -9, -24)])
def test_what_float32_would_lose_decides_a_tie(name: str, tie: int, tiny: int) -> None:
    """4 + 2ᵗ is halfway when divided by 4; a value too small for a float32 sum lifts it up."""
    dtype = DTYPES[name]
    values = [4.0, 2.0**tie, 2.0**tiny, 0.0]
    assert np.float32(values[0] + values[1]) + np.float32(values[2]) == values[0] + values[1]
    inputs = [np.full(1000, reference.narrow(value, dtype), np.uint16) for value in values]
    for column in inputs:
        column[1:] = inputs[0][0]  # one wide element among others that are not
    one = reference.narrow(1.0, dtype)
    assert in_numba(inputs, dtype, [1.0] * 4, 4.0, dtype)[0] == one + 1
    inputs[2][0] = 0
    assert in_numba(inputs, dtype, [1.0] * 4, 4.0, dtype)[0] == one


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_what_cancels_leaves_every_bit_of_the_rest(name: str) -> None:
    """256 + x - 256 is x, however far below 256 it lies: float32 would cut off its last bit."""
    dtype = DTYPES[name]
    fraction = dtype.fraction or 0
    xs = [2.0 ** (8 - d) * (1 + 2.0**-fraction) for d in range(8, 23)]
    assert any(np.float32(256) + np.float32(x) - np.float32(256) != x for x in xs)
    for x in xs:
        values = [256.0, x, -256.0]
        # A block of ordinary elements around it: so few wide ones are looked after one by one.
        one = [reference.narrow(1.0, dtype)]
        rows = [[reference.narrow(v, dtype)] + one * constants.MEAN_TILE for v in values]
        inputs = [np.array(row, np.uint16) for row in rows]
        found = in_numba(inputs, dtype, [1.0] * 3, 3.0, dtype)
        assert found[0] == reference.narrow(x / 3, dtype)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_the_last_bit_of_the_smallest_decides_a_tie(name: str) -> None:
    """At every distance: the sum is at its largest when the smallest is added to it."""
    dtype = DTYPES[name]
    fraction = dtype.fraction or 0
    ulp = 2.0**-fraction
    tie = [1.5] * 5 + [0.5 + 4 * ulp]  # a mean of eight that is halfway between 1 and 1 + ulp
    one = reference.narrow(1.0, dtype)
    n_lost = 0
    for d in range(4, 24 - fraction):
        tiny = [2.0**-d * (1 + ulp), -(2.0**-d)]
        in_float32 = np.float32(0)
        for value in tie + tiny:
            in_float32 += np.float32(value)
        n_lost += in_float32 == np.float32(sum(tie))
        values = [reference.narrow(value, dtype) for value in tie + tiny]
        inputs = [np.full(2 * constants.MEAN_TILE, one, np.uint16) for _ in values]
        for column, value in zip(inputs, values, strict=True):
            column[:7] = value
        assert (in_numba(inputs, dtype, [1.0] * 8, 8.0, dtype)[:7] == one + 1).all(), d
    assert n_lost, "float32 alone would have done"


def relatives(dtype: DType, k: int) -> list[Bits]:
    """Make ingredients that lie close together, with zeros, and with stretches of small values.

    The first has subnormal numbers only, the second the smallest normal ones as well, of any sign.
    """
    rng = np.random.default_rng(k)
    n = 20 * constants.MEAN_TILE + 77
    top = dtype.largest >> 1
    codes = rng.integers(top // 4, top, n) + rng.integers(-1, 2, (k, n))
    codes |= rng.integers(0, 2, n) << (dtype.nbits - 1)
    codes[:, ::5] = 0
    codes[:, ::7] = 1 << (dtype.nbits - 1)
    some = slice(4 * constants.MEAN_TILE, 6 * constants.MEAN_TILE)
    codes[:, some] = rng.integers(0, 1 << (dtype.fraction or 0), (k, 2 * constants.MEAN_TILE))
    some = slice(6 * constants.MEAN_TILE, 9 * constants.MEAN_TILE)
    codes[:, some] = rng.integers(0, 6 << (dtype.fraction or 0), (k, 3 * constants.MEAN_TILE))
    codes[:, some] |= rng.integers(0, 2, (k, 3 * constants.MEAN_TILE)) << (dtype.nbits - 1)
    return list(codes.astype(WORDS[dtype.nbits]))


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E5M2", "F8_E4M3"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 9, 12, 33, 64])
def test_means_of_relatives(name: str, k: int) -> None:
    """Fine-tuned models lie close together: no sum is rounded, whole tensors go the fastest way.

    Among them is what is not finite and cancelled by others.
    """
    dtype = DTYPES[name]
    inputs = relatives(dtype, k)
    ours = in_numpy(inputs, dtype, [1.0] * k, float(k), dtype)
    assert (in_numba(inputs, dtype, [1.0] * k, float(k), dtype) == ours).all()
    # After some stretches that went well: largest values, with signs in turn, and what is beyond.
    at = 10 * constants.MEAN_TILE + 3
    for bad in (dtype.overflow, dtype.nan):
        for i in {0, k - 1}:
            for j, x in enumerate(inputs):
                x[at] = dtype.largest | (j % 2) << (dtype.nbits - 1)
            inputs[i][at] = bad
            ours = in_numpy(inputs, dtype, [1.0] * k, float(k), dtype)
            assert (in_numba(inputs, dtype, [1.0] * k, float(k), dtype) == ours).all()


@pytest.mark.parametrize("name", ["F16", "F8_E5M2", "F8_E4M3"])
def test_kernels_for_other_processors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled otherwise for AMD's processors and for Intel's gives the same bits."""
    from streamsoup.kernels.fast import means, mix, sums, xxh3

    dtype = DTYPES[name]
    monkeypatch.setattr(means, "SLOW_SUBNORMALS", not means.SLOW_SUBNORMALS)
    for room in (means, sums, xxh3):
        monkeypatch.setattr(room, "FORESEEN", 8 - room.FORESEEN)
    kernel = cpu.Mixer(objects._load(*mix.compile_mix(dtype, dtype)))
    monkeypatch.setattr(cpu, "mixer", lambda *_: kernel)
    for k in (1, 2, 3, 8, 9, 33, 64):
        inputs = relatives(dtype, k)
        ours = in_numpy(inputs, dtype, [1.0] * k, float(k), dtype)
        assert (in_numba(inputs, dtype, [1.0] * k, float(k), dtype) == ours).all()
