"""Law 1: float64 sums in recipe order, one rounding; held against exact rationals and torch."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load, load_array, save, tensor

from streamsoup import Options, mix, uniform
from streamsoup.engine import reduce
from streamsoup.errors import MismatchError, NonFiniteError
from streamsoup.kernels import blocks, constants, cpu, reference
from streamsoup.kernels.fast import objects
from streamsoup.recipe import Coefficients
from streamsoup.tensors import DTYPES, DType

FLOATS = [dtype for dtype in DTYPES.values() if dtype.averaged]
SMALL = [dtype for dtype in FLOATS if dtype.nbits <= 16]
WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Bits = np.ndarray[Any, Any]
Kernel = Callable[[Sequence[Bits], DType, Sequence[float], float, DType], Bits]

by_name = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
by_small = pytest.mark.parametrize("dtype", SMALL, ids=lambda dtype: dtype.name)


def in_reference(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the specification."""
    soup = reference.mix([list(map(int, x)) for x in inputs], source, factors, divisor, output)
    return np.array(soup, WORDS[output.nbits])


def in_numpy(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the numpy kernel."""
    sums = np.empty(len(inputs[0]))
    result = np.empty(len(sums), WORDS[output.nbits])
    data = [np.ascontiguousarray(x).view(np.uint8) for x in inputs]
    blocks.accumulate(sums, data, [source] * len(data), factors, True)
    spoiled = blocks.finish(sums, divisor, output, result.view(np.uint8))
    assert spoiled == _has_non_finite(result, output)
    return result


def in_numba(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the compiled kernel, in one call."""
    data = [np.ascontiguousarray(x) for x in inputs]
    result = np.empty(len(data[0]), WORDS[output.nbits])
    addresses = [x.ctypes.data for x in data]
    mix = cpu.mixer(source, output)
    spoiled = mix(0, addresses, factors, True, divisor, result.ctypes.data, len(result))
    assert spoiled == _has_non_finite(result, output)
    return result


def _has_non_finite(bits: Bits, dtype: DType) -> bool:
    return bool((bits & WORDS[dtype.nbits]((1 << (dtype.nbits - 1)) - 1) > dtype.largest).any())


def in_torch(bits: Bits, dtype: DType) -> np.ndarray[Any, Any]:
    """Widen with torch."""
    signed = bits.view(f"i{dtype.nbits // 8}").copy()
    values: np.ndarray[Any, Any] = torch.from_numpy(signed).view(TORCH[dtype.name]).double().numpy()
    return values


def patterns(dtype: DType) -> Bits:
    """Return all patterns of a small dtype, or the telling ones and random ones of a large."""
    if dtype.nbits <= 16:
        return np.arange(1 << dtype.nbits).astype(WORDS[dtype.nbits])
    rng = np.random.default_rng(dtype.nbits)
    word = WORDS[dtype.nbits]
    one = 1 << (dtype.fraction or 0)
    telling = [0, 1, 2, one - 1, one, one + 1, dtype.largest, dtype.overflow, dtype.nan]
    telling += [dtype.overflow + 1, dtype.largest - 1, (1 << (dtype.nbits - 1)) - 1]
    positive = np.array(telling, word)
    random = rng.integers(0, 2**dtype.nbits, 3000, word)
    return np.concatenate([positive, positive | word(1 << (dtype.nbits - 1)), random])


def same_values(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Whether float64 values are the same, signs of zeros included; all NaNs are one."""
    nan = np.isnan(a)
    return bool(
        (nan == np.isnan(b)).all()
        and (a[~nan].view(np.uint64) == b[~nan].astype(np.float64).view(np.uint64)).all()
    )


# Widening


@by_name
def test_every_pattern_widens_as_in_torch(dtype: DType) -> None:
    """Reference and numpy widen each pattern exactly, NaNs, infinities and subnormals included."""
    bits = patterns(dtype)
    theirs = in_torch(bits, dtype)
    assert same_values(np.array([reference.widen(int(b), dtype) for b in bits]), theirs)
    ours = blocks.widen(bits.view(np.uint8), dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        assert same_values(ours.astype(np.float64), theirs)


@by_small
def test_every_pattern_comes_back(dtype: DType) -> None:
    """A soup of one gives back each pattern; every NaN becomes the one of the dtype."""
    bits = patterns(dtype)
    expected = np.where(np.isnan(in_torch(bits, dtype)), WORDS[dtype.nbits](dtype.nan), bits)
    for kernel in (in_reference, in_numpy, in_numba) if dtype.nbits == 16 else (in_numpy,):
        assert (kernel([bits], dtype, [1.0], 1.0, dtype) == expected).all()


# Narrowing


def table(dtype: DType) -> list[Fraction]:
    """Return the values of the patterns from 0 to the first that overflows, from torch's."""
    codes = np.arange(dtype.largest + 1).astype(WORDS[dtype.nbits])
    values = [Fraction(float(value)) for value in in_torch(codes, dtype)]
    # One more step of the last spacing: beyond its half, everything overflows.
    return [*values, 2 * values[-1] - values[-2]]


def nearest(value: Fraction, dtype: DType, values: list[Fraction]) -> int:
    """Round an exact number by looking for its neighbours: slow, and nothing to get wrong."""
    sign = 1 << (dtype.nbits - 1) if value < 0 else 0
    value = abs(value)
    at = bisect_left(values, value)
    if at == len(values):
        return sign | dtype.overflow
    if values[at] != value:
        below, above = value - values[at - 1], values[at] - value
        at -= below < above or (below == above and (at - 1) % 2 == 0)
    return sign | (at if at <= dtype.largest else dtype.overflow)


@by_small
@pytest.mark.parametrize("kernel", [in_reference, in_numpy, in_numba], ids=lambda k: k.__name__)
def test_every_midpoint_rounds_to_even(dtype: DType, kernel: Kernel) -> None:
    """Halfway between each two neighbours goes to the even one, and a hair beside it, its way."""
    if kernel is in_numba and dtype.nbits == 8:
        pytest.skip("compiled in the slow comparison of all pairs")
    values = np.array([float(value) for value in table(dtype)])
    middles = (values[1:] + values[:-1]) / 2
    below = np.arange(len(middles))
    expected = {
        "at": np.where(below % 2 == 0, below, below + 1),
        "under": below,
        "over": below + 1,
        "on": below,
    }
    points = {
        "at": middles,
        "under": np.nextafter(middles, 0),
        "over": np.nextafter(middles, np.inf),
        "on": values[:-1],
    }
    if kernel is in_reference and dtype.nbits == 16:
        keep = np.r_[0:300, 1000:1100, len(middles) - 300 : len(middles)]
    else:
        keep = np.arange(len(middles))
    for name, points_ in points.items():
        codes = expected[name][keep]
        codes = np.where(codes > dtype.largest, dtype.overflow, codes)
        bits = points_[keep].view(np.uint64)
        found = kernel([bits], DTYPES["F64"], [1.0], 1.0, dtype)
        assert (found == codes).all(), name
        negative = bits | np.uint64(1 << 63)
        found = kernel([negative], DTYPES["F64"], [1.0], 1.0, dtype)
        assert (found == codes + (1 << (dtype.nbits - 1))).all(), name


@pytest.mark.parametrize("kernel", [in_reference, in_numpy, in_numba], ids=lambda k: k.__name__)
def test_extremes_round_as_they_should(kernel: Kernel) -> None:
    """Infinities, huge and tiny values overflow and vanish with their sign, in every dtype."""
    values = np.array([np.inf, 1e300, 5e-324, 0.0, -0.0, -5e-324, -1e300, -np.inf, np.nan, -np.nan])
    for dtype in FLOATS:
        if dtype.name == "F64" or (kernel is in_numba and dtype.nbits == 8):
            continue
        sign = 1 << (dtype.nbits - 1)
        expected = [dtype.overflow, dtype.overflow, 0, 0, sign, sign]
        expected += [sign | dtype.overflow] * 2 + [dtype.nan] * 2
        found = kernel([values.view(np.uint64)], DTYPES["F64"], [1.0], 1.0, dtype)
        assert found.tolist() == expected, dtype.name


def test_float64_does_not_round_twice() -> None:
    """1 + 2⁻⁸ + 2⁻⁴⁰, above a tie of bfloat16, rounds up; by way of float32 it would not."""
    value = np.array([1 + 2**-8 + 2**-40])
    for kernel in (in_reference, in_numpy, in_numba):
        found = kernel([value.view(np.uint64)], DTYPES["F64"], [1.0], 1.0, DTYPES["BF16"])
        assert found.tolist() == [0x3F81]
    # Planted fault: what rounding twice gives is caught.
    twice = torch.from_numpy(value.astype(np.float32)).bfloat16().view(torch.int16).item()
    assert twice == 0x3F80


# Sums


@by_small
@pytest.mark.parametrize("k", [2, 3, 7, 10])
def test_the_mean_is_the_correctly_rounded_one(dtype: DType, k: int) -> None:
    """The uniform soup of 16- and 8-bit floats is the exact rational mean, rounded once."""
    rng = np.random.default_rng(k)
    values = table(dtype)
    word = WORDS[dtype.nbits]
    # Exponents within 30 of each other, as in any network; zeros and subnormals among them.
    low = max(0, dtype.largest - 30 * 2 ** (dtype.fraction or 0))
    magnitudes = rng.integers(low, dtype.largest, (k, 400)).astype(word)
    magnitudes[:, :100] = rng.integers(0, min(40, dtype.largest), (k, 100))
    bits = magnitudes | (rng.integers(0, 2, (k, 400)) << (dtype.nbits - 1)).astype(word)
    exact = [
        sum(
            (values[m] if b == m else -values[m])
            for b, m in zip(map(int, column), map(int, sizes), strict=True)
        )
        / k
        for column, sizes in zip(bits.T, magnitudes.T, strict=True)
    ]
    expected = np.array([nearest(value, dtype, values) for value in exact], word)
    zero = np.array([value == 0 for value in exact])
    kernels = [in_reference, in_numpy] + ([in_numba] if dtype.nbits == 16 else [])
    for kernel in kernels:
        found = kernel(list(bits), dtype, [1.0] * k, float(k), dtype)
        assert (found[~zero] == expected[~zero]).all()
        assert (found[zero] << 1 == 0).all()


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_wide_floats_are_within_half_an_ulp(name: str) -> None:
    """Means of F32 and F64 are within 0.5 ulp + k·2⁻⁵³·Σ|θ|/k of the exact rational mean."""
    rng = np.random.default_rng(3)
    dtype = DTYPES[name]
    kind = {"F32": np.float32, "F64": np.float64}[name]
    k = 9
    values = (rng.standard_normal((k, 300)) * 10.0 ** rng.integers(-3, 3, (k, 300))).astype(kind)
    bits = list(values.view(WORDS[dtype.nbits]))
    for kernel in (in_reference, in_numpy, in_numba):
        found = kernel(bits, dtype, [1.0] * k, float(k), dtype).view(kind)
        for result, column in zip(found, values.T, strict=True):
            exact = sum((Fraction(float(v)) for v in column), Fraction(0)) / k
            spread = sum(abs(Fraction(float(v))) for v in column) / k
            allowed = Fraction(float(np.spacing(abs(result)))) / 2 + k * Fraction(2) ** -53 * spread
            assert abs(Fraction(float(result)) - exact) <= allowed


@by_name
@pytest.mark.parametrize("k", [2, 3, 5, 10, 49, 64])
def test_identical_ingredients_give_their_bits_back(dtype: DType, k: int) -> None:
    """The uniform soup of k times the same is the same, the largest and the smallest included."""
    bits = patterns(dtype)[:2000]
    finite = bits[~np.isnan(in_torch(bits, dtype))]
    kernels = [in_reference, in_numpy] + ([in_numba] if dtype.nbits > 8 else [])
    for kernel in kernels:
        if kernel is in_numpy and dtype.name == "F64":
            continue  # `reduce` adds this rule to the numpy kernel: see the test of soups below
        found = kernel([finite] * k, dtype, [1.0] * k, float(k), dtype)
        assert (found == finite).all()


def test_sums_keep_their_order() -> None:
    """Ingredients are added in recipe order: 10¹⁶ + 1 - 10¹⁶ is 0, and 10¹⁶ - 10¹⁶ + 1 is 1."""
    dtype = DTYPES["F64"]
    big, one = np.array([1e16]).view(np.uint64), np.array([1.0]).view(np.uint64)
    minus = np.array([-1e16]).view(np.uint64)
    for kernel in (in_reference, in_numpy, in_numba):
        for inputs, expected in (([big, one, minus], 0.0), ([big, minus, one], 1.0)):
            found = kernel(inputs, dtype, [1.0] * 3, 1.0, dtype).view(np.float64)
            assert found.tolist() == [expected]


def test_products_are_rounded_before_they_are_added() -> None:
    """A product minus its own rounding is zero; a fused multiply-add would leave a rest."""
    dtype = DTYPES["F64"]
    x, c = 0.1, 0.3
    product = c * x
    rest = Fraction(c) * Fraction(x) - Fraction(product)
    assert rest != 0  # planted fault: this is what a fused multiply-add gives
    n = 5000
    first = np.full(n, -product).view(np.uint64)
    second = np.full(n, x).view(np.uint64)
    for kernel in (in_reference, in_numpy, in_numba):
        found = kernel([first, second], dtype, [1.0, c], 1.0, dtype).view(np.float64)
        assert set(found.tolist()) == {0.0}
        found = kernel([second, first], dtype, [c, 1.0], 1.0, dtype).view(np.float64)
        assert set(found.tolist()) == {0.0}


def test_the_division_is_a_true_one() -> None:
    """1/49 of 49·x is x; times the reciprocal of 49 it is not always."""
    rng = np.random.default_rng(2)
    x = rng.integers(1, 2**46, 5000).astype(np.float64)
    assert ((49 * x) * (1 / 49.0) != x).any()  # planted fault
    bits = x.view(np.uint64)
    rest = (48 * x).view(np.uint64)
    for kernel in (in_reference, in_numpy, in_numba):
        found = kernel([bits, rest], DTYPES["F64"], [1.0, 1.0], 49.0, DTYPES["F64"])
        assert (found == bits).all()


def test_zeros_keep_their_sign() -> None:
    """-0 and -0 make -0; -0 and 0 make 0, as in IEEE 754."""
    minus, plus = np.array([1 << 15], np.uint16), np.array([0], np.uint16)
    for kernel in (in_reference, in_numpy, in_numba):
        for name in ("BF16", "F16"):
            dtype = DTYPES[name]
            assert kernel([minus, minus], dtype, [1.0, 1.0], 2.0, dtype).tolist() == [1 << 15]
            assert kernel([minus, plus], dtype, [1.0, 1.0], 2.0, dtype).tolist() == [0]
            assert kernel([minus], dtype, [1.0], 1.0, dtype).tolist() == [1 << 15]


QUICK = [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F64", "F64"), ("F64", "BF16")]
PAIRS = list(itertools.product([dtype.name for dtype in FLOATS], repeat=2))
CASES = [pytest.param(*pair, id="-".join(pair)) for pair in QUICK] + [
    pytest.param(*pair, id="-".join(pair), marks=pytest.mark.slow)
    for pair in PAIRS
    if pair not in QUICK
]


@pytest.mark.parametrize(("source", "output"), CASES)
def test_all_kernels_give_the_same_bits(source: str, output: str) -> None:
    """Reference, numpy and numba agree to the bit on random bits, for each pair of dtypes."""
    rng = np.random.default_rng(7)
    a, b = DTYPES[source], DTYPES[output]
    for k, n in ((1, 100), (2, 3000), (5, 2500), (6, 9000)):
        inputs = list(rng.integers(0, 2**a.nbits, (k, n), WORDS[a.nbits]))
        inputs[-1][: n // 3] = inputs[0][: n // 3]
        given = rng.standard_normal(k).tolist()
        for factors, divisor in (
            ([1.0] * k, 1.0),
            ([1.0] * k, 3.0),
            ([1.0] * k, 4.0),
            ([1.0, *given[1:]], 1.0),
            (given, 0.7),
        ):
            ours = in_numpy(inputs, a, factors, divisor, b)
            assert (in_numba(inputs, a, factors, divisor, b) == ours).all()
            few = [x[:300] for x in inputs]
            assert (in_reference(few, a, factors, divisor, b) == ours[:300]).all()


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


def test_a_wrong_kernel_would_be_caught() -> None:
    """Planted fault: summing in bfloat16, as scripts do, is not the correctly rounded mean."""
    rng = np.random.default_rng(0)
    k, n = 8, 500
    values = torch.from_numpy(rng.standard_normal((k, n))).bfloat16()
    total = values[0].clone()
    for value in values[1:]:
        total += value
    naive = (total / k).view(torch.int16).numpy().view(np.uint16)
    bits = list(values.view(torch.int16).numpy().view(np.uint16))
    ours = in_numpy(bits, DTYPES["BF16"], [1.0] * k, float(k), DTYPES["BF16"])
    assert (naive != ours).mean() > 0.1


# Soups, through all of streamsoup, with either engine


@pytest.fixture(params=["numpy", "numba", "both", "read"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Give options of a run with one engine, with both by turns, or by plain reads."""
    if request.param == "numpy":
        monkeypatch.setattr(reduce.Engine, "mixer", lambda self, sources, output: None)
        return Options(threads=2)
    original = reduce.Engine.mixer
    turns = itertools.count()

    def loaded(self: reduce.Engine, sources: Sequence[DType], output: DType) -> Any:
        self.load()
        turn = next(turns)
        return original(self, sources, output) if request.param != "both" or turn % 2 else None

    monkeypatch.setattr(reduce.Engine, "mixer", loaded)
    if request.param == "both":  # kernels that come and go cannot be relied on for digests
        monkeypatch.setattr(reduce.MixWorker, "digests", lambda *_: None)
    # Blocks of four ingredients at a time, some by numpy and some by numba, where files are read.
    return Options(threads=2, io="mmap" if request.param == "numba" else "read")


@pytest.mark.parametrize("k", [2, 3, 6, 13])
def test_soups_of_identical_float64_are_identical(k: int, engine: Options, tmp_path: Path) -> None:
    """Copies of the same F64 checkpoint give itself, even where the sum of the values overflows."""
    bits = patterns(DTYPES["F64"])
    values = bits.view(np.float64)
    finite = values[np.isfinite(values)]
    path = save(tmp_path / "m", {"w": tensor(finite)})
    uniform([path] * k, output=tmp_path / "out", options=engine)
    assert load(tmp_path / "out")["w"][2] == finite.tobytes()


def test_weighted_soups_follow_the_law(engine: Options, tmp_path: Path) -> None:
    """Σ cᵢ·θᵢ with rounded products in order, as numpy's float64 has it, rounded once."""
    rng = np.random.default_rng(4)
    k, factors = 6, [0.5, 1.0, -0.25, 0.1, 0.3, 1.0]
    values = rng.standard_normal((k, 70_001)).astype(np.float32)
    paths = [save(tmp_path / f"m{i}", {"w": tensor(v)}) for i, v in enumerate(values)]
    mix(paths, factors, output=tmp_path / "out", options=engine)
    total = values[0].astype(np.float64) * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total = total + value.astype(np.float64) * factor
    assert (load_array(tmp_path / "out", "w") == total.astype(np.float32)).all()
    backwards = mix(paths[::-1], factors[::-1], output=tmp_path / "back", options=engine)
    assert [Path(name) for name in backwards.recipe.ingredients] == paths[::-1]


def test_mixed_dtypes_widen_each_its_own_way(engine: Options, tmp_path: Path) -> None:
    """F64, F32, BF16 and F16 ingredients in one soup, F64 first, are each widened exactly."""
    rng = np.random.default_rng(8)
    n = 1001
    parts = [rng.standard_normal(n), rng.standard_normal(n).astype(np.float32)]
    half = rng.standard_normal(n).astype(np.float16)
    brain = torch.from_numpy(rng.standard_normal(n)).bfloat16()
    tensors = [tensor(parts[0]), tensor(parts[1]), tensor(half)]
    tensors.append(("BF16", (n,), brain.view(torch.int16).numpy().tobytes()))
    paths = [save(tmp_path / f"m{i}", {"w": each}) for i, each in enumerate(tensors)]
    uniform(paths, output=tmp_path / "out", options=Options(dtype="f64", io=engine.io))
    expected = (((parts[0] + parts[1]) + half.astype(float)) + brain.double().numpy()) / 4
    assert (load_array(tmp_path / "out", "w") == expected).all()
    with pytest.raises(MismatchError, match="differ in the dtype of 1 tensor"):
        uniform(paths, output=tmp_path / "no", options=engine)


def test_per_tensor_coefficients_are_used(engine: Options, tmp_path: Path) -> None:
    """A tensor with factors of its own is mixed by them, undivided; the others by the rest."""
    a = {name: tensor(np.full(5, 2.0, np.float32)) for name in "xy"}
    b = {name: tensor(np.full(5, 4.0, np.float32)) for name in "xy"}
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    coefficients = Coefficients((1.0, 1.0), 2.0, {"y": (10.0, 1.0)})
    mix(paths, coefficients, output=tmp_path / "out", options=engine)
    assert load_array(tmp_path / "out", "x").tolist() == [3.0] * 5
    assert load_array(tmp_path / "out", "y").tolist() == [24.0] * 5


@pytest.mark.parametrize("name", [dtype.name for dtype in FLOATS])
def test_a_nan_is_refused_by_name(name: str, engine: Options, tmp_path: Path) -> None:
    """A NaN stops the soup and is named: ingredient, file, tensor, and where in it."""
    dtype = DTYPES[name]
    bits = np.zeros((4, 5), WORDS[dtype.nbits])
    good = save(tmp_path / "good", {"t": (name, (4, 5), bits.tobytes())})
    # A signalling NaN, where the dtype has some.
    bits[2, 3] = dtype.nan if dtype.overflow == dtype.nan else dtype.overflow + 1
    bad = save(tmp_path / "bad", {"t": (name, (4, 5), bits.tobytes())})
    with pytest.raises(NonFiniteError) as refused:
        uniform([good, bad], output=tmp_path / "out", options=engine)
    assert str(refused.value).startswith(f"{bad}/model.safetensors: t: holds nan at [2, 3]")
    assert not (tmp_path / "out").exists()
    spread = Options(non_finite="propagate", io=engine.io)
    uniform([bad, good], output=tmp_path / "out", options=spread)
    expected = np.zeros((4, 5), WORDS[dtype.nbits])
    expected[2, 3] = dtype.nan
    assert load(tmp_path / "out")["t"][2] == expected.tobytes()


def test_what_is_not_finite_in_a_scalar_is_named(engine: Options, tmp_path: Path) -> None:
    """An infinity in a 0-d tensor is named too, and one times zero is still a NaN."""
    good = save(tmp_path / "good", {"s": tensor(np.float32(1))})
    bad = save(tmp_path / "bad", {"s": tensor(np.float32(np.inf))})
    with pytest.raises(NonFiniteError, match=r"bad/model\.safetensors: s: holds inf at \[\]"):
        mix([good, bad], [1.0, 0.0], output=tmp_path / "out", options=engine)


def test_what_is_not_finite_in_many_dimensions_is_named(engine: Options, tmp_path: Path) -> None:
    """Where in a tensor is said however many dimensions it has; numpy knows no more than 64."""
    values = np.zeros(24, np.float32)
    values[17] = np.nan  # 17 = 2·6 + 1·3 + 2
    shape = (1,) * 70 + (4, 2, 3)
    bad = save(tmp_path / "bad", {"t": ("F32", shape, values.tobytes())})
    with pytest.raises(NonFiniteError) as refused:
        uniform([bad], output=tmp_path / "out", options=engine)
    assert f"holds nan at {[0] * 70 + [2, 1, 2]}, which" in str(refused.value)


def test_overflow_of_finite_values_is_named(engine: Options, tmp_path: Path) -> None:
    """Finite ingredients whose sum is too large for the output are refused, with advice."""
    big = {"t": tensor(np.array([0, 60000], np.float16))}
    paths = [save(tmp_path / "a", big), save(tmp_path / "b", big)]
    with pytest.raises(NonFiniteError, match=r"^t: the sum is too large for F16.*wider dtype"):
        mix(paths, [1.0, 1.0], output=tmp_path / "out", options=engine)
    mix(paths, [1, 1], output=tmp_path / "out", options=Options(dtype="f32", io=engine.io))
    assert load_array(tmp_path / "out", "t").tolist() == [0, 120000]


def test_unaligned_tensors_are_read_right(engine: Options, tmp_path: Path) -> None:
    """Tensors at odd offsets, which the format allows, are summed like any other."""
    rng = np.random.default_rng(6)
    arrays = [rng.standard_normal(3001).astype(np.float32) for _ in range(3)]
    odd = ("U8", (3,), b"abc")
    paths = [
        save(tmp_path / f"m{i}", {"odd": odd, "w": tensor(array), "v": tensor(array.astype(float))})
        for i, array in enumerate(arrays)
    ]
    uniform(paths, output=tmp_path / "out", options=engine)
    total = arrays[0].astype(float) + arrays[1] + arrays[2]
    assert (load_array(tmp_path / "out", "v") == total / 3).all()
    assert (load_array(tmp_path / "out", "w") == (total / 3).astype(np.float32)).all()
