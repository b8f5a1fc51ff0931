"""The same bits through the pipeline as the specification gives, on the CPU as torch has it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from streamsoup.kernels import blocks
from streamsoup.kernels.accelerator import torch_blocks
from streamsoup.kernels.accelerator.device import HostDevice
from streamsoup.selftest.lanes import (
    COEFFICIENTS,
    FLOATS,
    random_ingredients,
    specified,
    through_lane,
)
from streamsoup.tensors import DTYPES, DType


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS.keys())
@pytest.mark.parametrize("output", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", FLOATS, ids=lambda dtype: dtype.name)
def test_bits_are_those_of_the_specification(
    source: DType, output: DType, coefficients: tuple[tuple[float, ...], float]
) -> None:
    """Every dtype into every other, uniform and weighted, over random patterns and over ties."""
    factors, divisor = coefficients
    for ties in (False, True):
        ingredients = random_ingredients(source, len(factors), 201, ties=ties)
        expected = specified(ingredients, source, output, factors, divisor)
        soup, _ = through_lane(
            HostDevice(), ingredients, source, output, factors, divisor, block=64
        )
        assert soup.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 8])
def test_neither_blocks_nor_slots_change_bits(n: int, n_slots: int) -> None:
    """Sizes around the block, and rings shorter and longer than the ingredients are many."""
    source = DTYPES["BF16"]
    factors = (0.5, 0.3, 0.1, 0.1, -0.1)
    ingredients = random_ingredients(source, 5, n)
    expected = specified(ingredients, source, source, factors, 1.0)
    for block in (1, 7, 64, 4096) if n_slots == 2 else (64,):
        soup, _ = through_lane(
            HostDevice(), ingredients, source, source, factors, 1.0, block=block, n_slots=n_slots
        )
        assert soup.tobytes() == expected.tobytes()


@pytest.mark.parametrize("output", FLOATS, ids=lambda dtype: dtype.name)
def test_not_finite_is_noticed(output: DType) -> None:
    """The largest value that rounds to a finite one passes, the next is noticed, as is NaN."""
    float64 = DTYPES["F64"]
    assert output.fraction is not None
    largest = torch_blocks.widen(output.largest, output)
    cases = {largest: False, -largest: False, float("inf"): True, float("nan"): True}
    if output.name != "F64":
        halfway = largest + (largest - torch_blocks.widen(output.largest - 1, output)) / 2
        tie = output.name != "F8_E4M3"  # there, the even one of the two is finite
        below, above = (float(np.nextafter(halfway, to)) for to in (0, np.inf))
        cases |= {below: False, halfway: tie, -halfway: tie, above: True}
    for value, bad in cases.items():
        data = np.array([1.0, value, 2.0]).view(np.uint8)
        soup, spoiled = through_lane(HostDevice(), [data], float64, output, (1.0,), 1.0, block=8)
        assert spoiled == bad
        finite = blocks.widen(soup, output)
        assert bool(np.isfinite(finite).all()) != bad


def test_narrowing_every_16_bit_neighbourhood() -> None:
    """Each bfloat16 and float16, its two neighbours in float64, and the ties beside it."""
    for name in ("BF16", "F16", "F8_E4M3", "F8_E5M2"):
        dtype = DTYPES[name]
        codes = np.arange(dtype.largest + 1, dtype=np.uint16)
        data = codes.astype(np.uint8) if dtype.nbits == 8 else codes
        values = blocks.widen(data.view(np.uint8), dtype).astype(np.float64)
        ties = (values[1:] + values[:-1]) / 2
        points = np.concatenate([values, ties])
        points = np.concatenate(
            [points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)]
        )
        points = np.concatenate([points, -points])
        expected = np.empty(len(points) * dtype.itemsize, np.uint8)
        blocks.narrow(points, dtype, expected)
        soup, _ = through_lane(
            HostDevice(), [points.view(np.uint8)], DTYPES["F64"], dtype, (1.0,), 1.0, block=1 << 14
        )
        assert soup.tobytes() == expected.tobytes()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bits_do_not_depend_on_vector_units(capability: str) -> None:
    """Torch chooses other loops for other processors: the bits stay."""
    code = """
from streamsoup.selftest.lanes import *
from streamsoup.kernels.accelerator.device import HostDevice
import torch
for source in FLOATS:
    for output in FLOATS:
        for factors, divisor in COEFFICIENTS.values():
            ingredients = random_ingredients(source, len(factors), 67)
            soup, _ = through_lane(
                HostDevice(), ingredients, source, output, factors, divisor, block=64
            )
            expected = specified(ingredients, source, output, factors, divisor)
            assert soup.tobytes() == expected.tobytes(), (source.name, output.name, factors)
print(torch.backends.cpu.get_cpu_capability())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.path.dirname(__file__),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    units = done.stdout.strip().replace("NO AVX", "DEFAULT")  # the word of older torch
    assert units == capability.upper()


def test_torchs_own_narrowing_would_not_do() -> None:
    """The planted fault: float64 to bfloat16 by `copy_` alone rounds twice, and is found out."""
    value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0
    data = value.numpy().view(np.uint8)
    soup, _ = through_lane(
        HostDevice(), [data], DTYPES["F64"], DTYPES["BF16"], (1.0,), 1.0, block=8
    )
    assert blocks.widen(soup, DTYPES["BF16"])[0] == 1 + 2**-7
