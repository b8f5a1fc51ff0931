"""The values of whole soups, through all of streamsoup, with either engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load, load_array, save, tensor
from kernels import (
    FLOATS,
    WORDS,
    patterns,
)

from streamsoup import Options, mix, uniform
from streamsoup.engine import reduce
from streamsoup.errors import MismatchError, NonFiniteError
from streamsoup.recipe import Coefficients
from streamsoup.tensors import DTYPES, DType

# Soups, through all of streamsoup, with either engine


@pytest.fixture(params=["numpy", "numba", "both", "read"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Return options of a run with one engine, with both by turns, or by plain reads."""
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
