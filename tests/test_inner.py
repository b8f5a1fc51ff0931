"""Inner products: all kernels against the law in plain Python, to the bit, for any rows."""

from __future__ import annotations

import functools
import math
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from streamsoup import Options
from streamsoup.engine import inner, reduce
from streamsoup.engine.plan import MixPlan
from streamsoup.kernels import blocks, cpu, reference
from streamsoup.kernels import inner as kernels_inner
from streamsoup.kernels.constants import GRAIN, LANES, PRODUCT_ROWS
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.kernels.inner import (
    Products,
    find_products,
    has_products,
    in_numpy,
    make_plain_products,
    make_products,
)
from streamsoup.methods.angles import plan_geometry
from streamsoup.tensors import DTYPES, DType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
FLOATS = [dtype for dtype in DTYPES.values() if dtype.averaged]
LENGTHS = [1, 31, 32, 33, 511, 513, 4095, 4096, 4097, 2 * GRAIN + 777]
WAYS = {"base": (0, False), "mean": (0, True), "dot": (1, False)}
"""Rows are differences to the first, to the mean, or to the second, for a vector's products."""


def compiled() -> Products:
    """Return the compiled kernel."""
    return find_products() or make_products()


@functools.cache
def plain() -> Products:
    """Return the plain kernel."""
    return make_plain_products()


@functools.cache
def of_another_width() -> Products:
    """Return the kernel for processors of the other kind: 16 registers of 4 lanes, or 32 of 8."""
    from llvmlite import binding as llvm

    from streamsoup.kernels.fast.products import compile_for

    wide = llvm.get_host_cpu_features().get("avx512f")
    kernel = compile_for(*((PRODUCT_ROWS - 1, 4) if wide else (PRODUCT_ROWS, 8)))
    return Products(Kernel(kernel.address, kernel))


def specified(x: Floats, y: Floats) -> float:
    """Add up a grain as the law says, in plain Python: rows into lanes, lanes folded by halves."""
    lanes = [0.0] * LANES
    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        lanes[i % LANES] += a * b
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[half + i] for i in range(half)]
    return lanes[0]


def expected(values: list[Floats], way: str) -> Floats:
    """Return what each grain of some rows should give."""
    reference_row, to_mean = WAYS[way]
    n, length = len(values), len(values[0])
    rows = np.zeros((n, -(-length // GRAIN) * GRAIN))
    for i, row in enumerate(values):
        rows[i, :length] = row - values[reference_row] if i > reference_row else row
    counts = np.count_nonzero(rows.reshape(n, -1, GRAIN)[1:], axis=2).T
    if to_mean:
        mean = rows[1].copy()
        for row in rows[2:]:
            mean = mean + row
        mean = mean / (n - 1)
        rows = np.stack([rows[0] + mean, *(row - mean for row in rows[1:])])
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    if way == "dot":
        pairs = [(0, j) for j in range(1, n)]
    grains = np.split(rows, rows.shape[1] // GRAIN, axis=1)
    products = np.array([[specified(rows[i], rows[j]) for i, j in pairs] for rows in grains])
    return products if way == "dot" else np.hstack([products, counts])


def found_by(
    kernel: inner.Products, data: list[Bytes], dtypes: list[DType], way: str, n_values: int
) -> Floats:
    """Multiply raw rows; see that nothing beside the result was written."""
    length = len(data[0]) // dtypes[0].itemsize
    n_grains = -(-length // GRAIN)
    room = np.full((n_grains + 2, n_values), 7.0)
    reference_row, to_mean = WAYS[way]
    out = room[1:-1]
    kernel(data, dtypes, length, out, reference=reference_row, to_mean=to_mean)
    assert (room[[0, -1]] == 7.0).all()
    return out


def some(rng: np.random.Generator, dtype: DType, n: int) -> Bytes:
    """Make raw elements of which some are zero, of either sign, or subnormal."""
    values = rng.standard_normal(n) * np.exp2(rng.integers(-4, 4, n))
    values[rng.random(n) < 0.1] = 0.0
    values *= np.where(rng.random(n) < 0.1, 2.0 ** (1 - dtype.bias), 1.0)
    values[rng.random(n) < 0.1] *= -0.0
    data = np.empty(n * dtype.itemsize, np.uint8)
    blocks.narrow(values, dtype, data)
    return data


def widened(data: Bytes, dtype: DType) -> Floats:
    """Widen raw elements by the specification, one by one."""
    words = data.view(f"u{dtype.itemsize}").tolist()
    return np.array([reference.widen(word, dtype) for word in words])


@given(
    st.lists(st.sampled_from(FLOATS), min_size=2, max_size=9),
    st.sampled_from(LENGTHS),
    st.sampled_from(sorted(WAYS)),
    st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_all_kernels_add_up_in_the_order_specified(
    dtypes: list[DType], length: int, way: str, seed: int
) -> None:
    """Every product has the bits of the plain Python loop, in whichever tile it was made."""
    rng = np.random.default_rng(seed)
    data = [some(rng, dtype, length) for dtype in dtypes]
    law = expected([widened(*row) for row in zip(data, dtypes, strict=True)], way)
    for kernel in (in_numpy, plain(), compiled(), of_another_width()):
        assert found_by(kernel, data, dtypes, way, law.shape[1]).tobytes() == law.tobytes()


def test_another_order_has_other_bits() -> None:
    """Planted fault: what the comparisons above rest on."""
    x, y = np.random.default_rng(0).standard_normal((2, GRAIN))
    assert specified(x, y) != specified(x[::-1], y[::-1])
    assert specified(x, y) != math.fsum(x * y)


@pytest.mark.parametrize("n", [1, 32, 33, 64, 95, 130])
@pytest.mark.parametrize("way", WAYS)
def test_all_kernels_agree_on_many_rows(n: int, way: str) -> None:
    """One row alone, and more rows than the lanes of all their pairs have room at once."""
    if n == 1 and way != "base":
        return
    rng = np.random.default_rng(n)
    dtypes = [FLOATS[i % 6] for i in range(n)]
    data = [some(rng, dtype, GRAIN + 100) for dtype in dtypes]
    n_values = n - 1 if way == "dot" else n * (n + 1) // 2 + n - 1
    kernels = (in_numpy, plain(), compiled(), of_another_width())
    bits = {found_by(kernel, data, dtypes, way, n_values).tobytes() for kernel in kernels}
    assert len(bits) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_every_pattern_is_widened_exactly(dtype: DType) -> None:
    """Each finite pattern of a small dtype counts as much as the next: none may be wrong."""
    if dtype.nbits <= 16:
        bits = np.arange(1 << dtype.nbits)
    else:
        bits = np.random.default_rng(0).integers(0, 2**dtype.nbits, 5000, np.uint64)
    words = bits.astype(f"u{dtype.itemsize}")
    values = widened(words.view(np.uint8), dtype)
    finite = np.isfinite(values)
    words, values = words[finite], values[finite]
    scales = np.ldexp(1.0, np.clip(-np.frexp(values)[1], -1000, 1000))
    scales *= np.random.default_rng(1).integers(1, 1000, len(scales))
    data, dtypes = [scales.view(np.uint8), words.view(np.uint8)], [DTYPES["F64"], dtype]
    law = expected([scales, values], "dot")
    for kernel in (in_numpy, plain(), compiled(), of_another_width()):
        out = np.empty_like(law)
        kernel(data, dtypes, len(words), out, reference=1, to_mean=False)
        assert out.tobytes() == law.tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("at", [0, 17, GRAIN - 1, GRAIN + 2])
def test_what_is_not_finite_stays_so(dtype: DType, at: int) -> None:
    """A NaN anywhere in a grain is seen in its products, and counts as changed."""
    rng = np.random.default_rng(2)
    words = [some(rng, dtype, GRAIN + 3).view(f"u{dtype.itemsize}") for _ in range(3)]
    words[1][at] = dtype.nan
    data = [each.view(np.uint8) for each in words]
    changed = np.stack([widened(row, dtype) != widened(data[0], dtype) for row in data[1:]])
    assert changed[0, at]
    for kernel in (in_numpy, plain(), compiled(), of_another_width()):
        out = found_by(kernel, data, [dtype] * 3, "base", 8)
        assert out[:, 6:].sum(axis=0).tolist() == changed.sum(axis=1).tolist()
        assert np.isfinite(out[at // GRAIN]).tolist() == [
            True,
            False,
            True,
            *[False] * 2,
            *[True] * 3,
        ]
        assert np.isfinite(out[1 - at // GRAIN]).all()


def test_rows_may_lie_anywhere() -> None:
    """Tensors in files begin at any byte, and threads share a kernel."""
    rng = np.random.default_rng(3)
    dtypes = [DTYPES[name] for name in ("F32", "F64", "BF16", "F16", "F32")]
    data = [some(rng, dtype, 3 * GRAIN) for dtype in dtypes]
    law = found_by(in_numpy, data, dtypes, "base", 19)
    kernel = compiled()
    found: dict[int, bool] = {}

    def work(shift: int) -> None:
        moved = []
        for row in data:
            room = np.empty(len(row) + 8, np.uint8)
            room[shift : shift + len(row)] = row
            moved.append(room[shift : shift + len(row)])
        outs = [found_by(kernel, moved, dtypes, "base", 19) for _ in range(20)]
        found[shift] = all(out.tobytes() == law.tobytes() for out in outs)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def test_a_kept_kernel_needs_no_numba() -> None:
    """Loaded from the cache in a process of its own, it calls what it needs, and nothing else."""
    compiled()
    code = (
        "import sys, numpy as np\n"
        "from streamsoup.kernels.inner import find_products, in_numpy\n"
        "from streamsoup.tensors import DTYPES\n"
        "rows = [row.view(np.uint8) for row in np.random.default_rng(0).normal(size=(7, 5000))]\n"
        "one, other = np.empty((2, 34)), np.empty((2, 34))\n"
        "for kernel, out in ((find_products(), one), (in_numpy, other)):\n"
        "    kernel(rows, [DTYPES['F64']] * 7, 5000, out, reference=0, to_mean=True)\n"
        "assert (one == other).all()\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_processor_has_no_fast_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the instruction that widens float16 no fast kernel is loaded."""
    compiled()
    monkeypatch.setattr(kernels_inner, "has_kernel", lambda dtype: False)
    assert find_products() is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have the instruction")
@pytest.mark.parametrize(
    ("variable", "value"), [("NUMBA_CPU_NAME", "generic"), ("NUMBA_CPU_FEATURES", "+sse2,-f16c")]
)
def test_where_numba_compiles_for_any_processor(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters of several kinds are told so; LLVM would end the process for want of a function."""
    monkeypatch.setenv(variable, value)
    assert not any(cpu.has_kernel(DTYPES[name]) for name in ("F16", "F8_E4M3", "F8_E5M2"))
    assert all(cpu.has_kernel(DTYPES[name]) for name in ("BF16", "F32", "F64"))
    assert not has_products()


def small_plan(folder: Path) -> MixPlan:
    """Plan a pass over a thousand elements."""
    save_file({"w": np.ones(1000, "f4")}, folder / "w.safetensors")
    plan, _, _ = plan_geometry([folder / "w.safetensors"], base=None, options=Options())
    return plan


def test_many_small_jobs_are_worth_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What earlier runs spent in numpy counts: jobs of 2 s each compile at the third."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan, made = small_plan(tmp_path), compiled()
    monkeypatch.setattr(inner, "find_products", lambda: None)
    monkeypatch.setattr(inner, "make_products", lambda: made)
    monkeypatch.setattr(reduce, "memory_limit", lambda: math.inf)

    def chosen() -> list[bool]:
        runs = (inner.fastest_products(plan, 10**6, compiles=True) for _ in range(4))
        return [run is made for run in runs]

    assert chosen() == [False, False, True, True]
    (note,) = (tmp_path / "cache" / "streamsoup").glob("*.txt")
    assert float(note.read_text()) == pytest.approx(4 * 2.0, rel=1e-3)
    for torn in (b"", b"\xff\x00", b"nan", b"-inf", b"1e300"):
        note.write_bytes(torn)
        assert chosen() == [False, False, True, True], torn
    # Where there is no cache, every run counts for itself.
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert chosen() == [False] * 4


def test_the_kernel_is_chosen_by_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only large jobs wait for numba, and none in too small a group; what is there is used.

    The same rule as for soups: compiling in a small memory group would crawl.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan = small_plan(tmp_path)
    kept, made = compiled(), compiled()
    cache: list[Products | None] = [kept]
    allowed = [math.inf]
    monkeypatch.setattr(inner, "find_products", lambda: cache[0])
    monkeypatch.setattr(inner, "make_products", lambda: made)
    monkeypatch.setattr(reduce, "memory_limit", lambda: allowed[0])
    assert inner.fastest_products(plan, 10, compiles=False) is kept
    cache[0] = None
    assert inner.fastest_products(plan, 10**6, compiles=True) is in_numpy
    assert inner.fastest_products(plan, 10**9, compiles=True) is made
    assert inner.fastest_products(plan, 10**9, compiles=False) is in_numpy
    allowed[0] = 150e6
    assert inner.fastest_products(plan, 10**9, compiles=True) is in_numpy
    allowed[0] = math.inf
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert inner.fastest_products(plan, 10**9, compiles=True) is in_numpy
    cache[0] = kept
    assert inner.fastest_products(plan, 10**9, compiles=True) is kept
    monkeypatch.setenv("STREAMSOUP_KERNELS", "numpy")
    assert inner.fastest_products(plan, 10**9, compiles=True) is in_numpy
