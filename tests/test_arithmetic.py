"""Law 1: float64 sums in recipe order, one rounding; held against exact rationals and torch."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernels import (
    FLOATS,
    WORDS,
    Kernel,
    by_name,
    by_small,
    in_numba,
    in_numpy,
    in_reference,
    in_torch,
    patterns,
    same_values,
)

from streamsoup.kernels import blocks, reference
from streamsoup.tensors import DTYPES, DType

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
