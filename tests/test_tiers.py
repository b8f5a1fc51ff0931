"""Kernels come in tiers that give the same bits: fast == plain == reference; one switch chooses."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import load, save, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsoup import Coefficients, Options, mix, uniform
from streamsoup.engine import reduce
from streamsoup.engine.reduce import Engine
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError
from streamsoup.kernels import cpu, inner, plain, reference, tiers
from streamsoup.kernels.constants import MEAN_TILE, TILE
from streamsoup.kernels.fast import objects
from streamsoup.output.make import order
from streamsoup.tensors import DTYPES, DType

FLOATS = [dtype for dtype in DTYPES.values() if dtype.averaged]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
KERNELS = Path(cpu.__file__).parent
Bits = np.ndarray[Any, Any]

plain_mixers = functools.cache(cpu.plain_mixers)


def special(dtype: DType) -> list[int]:
    """List zeros, subnormals, the largest, what is not finite, and their neighbours, both signs."""
    one = 1 << (dtype.fraction or 0)
    positive = [0, 1, 2, one - 1, one, one + 1, dtype.largest - 1, dtype.largest]
    positive += [dtype.overflow, dtype.nan, (1 << (dtype.nbits - 1)) - 1]
    return positive + [each | 1 << (dtype.nbits - 1) for each in positive]


def rows(dtype: DType, k: int, n: int, seed: int) -> list[Bits]:
    """Make ingredients close to each other, with special values, equal ones and strangers."""
    rng = np.random.default_rng(seed)
    word = WORDS[dtype.itemsize]
    base = rng.integers(dtype.largest // 4, dtype.largest // 2, n).astype(np.uint64)
    made = [(base + rng.integers(0, 3, n).astype(np.uint64)).astype(word) for _ in range(k)]
    for i, row in enumerate(made):
        at = rng.integers(0, n, n // 8)
        row[at] = np.array(special(dtype), word)[rng.integers(0, 22, len(at))]
        row[n // 2 : n // 2 + n // 6] = made[0][n // 2 : n // 2 + n // 6]
        if i % 2:
            row[-n // 6 :] = rng.integers(0, 2**dtype.nbits, len(row[-n // 6 :]), word)
    return made


def made_by(
    mixer: cpu.Mixer, inputs: Sequence[Bits], factors: Sequence[float], divisor: float, to: DType
) -> tuple[bytes, bool]:
    """Mix in one call; return the bytes, and whether a result is not finite."""
    made = np.zeros(len(inputs[0]), WORDS[to.itemsize])
    at = [row.ctypes.data for row in inputs]
    spoiled = mixer(0, at, factors, True, divisor, made.ctypes.data, len(made))
    return made.tobytes(), spoiled


def check(source: DType, output: DType, k: int, n: int, weighted: bool, seed: int) -> None:
    """Compare all tiers on the same blocks."""
    inputs = rows(source, k, n, seed)
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal(k).tolist() if weighted else [1.0] * k
    divisor = 0.7 if weighted else float(k)
    fast = made_by(cpu.mixer(source, output), inputs, factors, divisor, output)
    mixers = plain_mixers().of([source] * k, output)
    assert fast == made_by(mixers, inputs, factors, divisor, output)
    some = slice(n // 2 - 40, n // 2 + 40)
    patterns = [row[some].tolist() for row in inputs]
    law = reference.mix(patterns, source, factors, divisor, output)
    assert np.frombuffer(fast[0], WORDS[output.itemsize])[some].tolist() == law


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 33, 64, 65]),
    n=st.sampled_from([96, TILE, MEAN_TILE + 1, 3 * MEAN_TILE + 77, 20 * MEAN_TILE + 5]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_all_tiers_give_the_same_bits(
    dtype: DType, k: int, n: int, weighted: bool, seed: int
) -> None:
    """Fast == plain == reference, bit for bit, in every dtype, special values included."""
    check(dtype, dtype, k, n, weighted, seed)


@pytest.mark.parametrize(("source", "output"), [("BF16", "F32"), ("F32", "BF16"), ("F64", "F16")])
def test_all_tiers_convert_alike(source: str, output: str) -> None:
    """The same holds from one dtype to another."""
    for k in (1, 3, 8):
        check(DTYPES[source], DTYPES[output], k, 2000, k == 3, k)


@pytest.mark.parametrize("output", FLOATS, ids=lambda dtype: dtype.name)
def test_plain_loops_take_several_dtypes(output: DType) -> None:
    """Ingredients of every dtype in one block: each is widened its own way, sums go on in groups.

    Compared with float64 in Python, in recipe order, rounded by the specification.
    """
    n, k = 300, len(FLOATS)
    inputs = [rows(dtype, 1, n, i)[0] for i, dtype in enumerate(FLOATS)]
    factors = [0.5, 1.0, -0.25, 0.1, 2.0, 1.0]
    values = [
        [reference.widen(int(bits), dtype) for bits in row]
        for row, dtype in zip(inputs, FLOATS, strict=True)
    ]
    law = []
    for column in zip(*values, strict=True):
        total = -0.0
        for factor, value in zip(factors, column, strict=True):
            total += factor * value
        law.append(reference.narrow(total / 3.0, output))
    made, spoiled = made_by(plain_mixers().of(FLOATS, output), inputs, factors, 3.0, output)
    assert np.frombuffer(made, WORDS[output.itemsize]).tolist() == law
    assert spoiled
    # In two groups, whose sums wait in between.
    sums, again = np.zeros(n), np.zeros(n, WORDS[output.itemsize])
    for first, last in ((0, 4), (4, k)):
        mixer = plain_mixers().of(FLOATS[first:last], output)
        at = [row.ctypes.data for row in inputs[first:last]]
        to = again.ctypes.data if last == k else 0
        mixer(sums.ctypes.data, at, factors[first:last], first == 0, 3.0, to, n)
    assert again.tobytes() == made


def test_a_wrong_kernel_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the comparison fails for a kernel that sums in another order."""
    dtype = DTYPES["F64"]
    right = cpu.mixer(dtype, dtype)

    def backwards(
        sums: int, at: Any, factors: Any, fresh: bool, divisor: float, output: int, n: int
    ) -> bool:
        return right(sums, at[::-1], factors[::-1], fresh, divisor, output, n)

    check(dtype, dtype, 8, 2000, True, 0)
    monkeypatch.setattr(cpu, "mixer", lambda *_: backwards)
    with pytest.raises(AssertionError):
        check(dtype, dtype, 8, 2000, True, 0)


# Which tier is used


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make two small models, in a world in which compiling pays at once and no cache is filled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 1)
    rng = np.random.default_rng(0)
    return [
        save(tmp_path / f"m{i}", {"w": tensor(rng.standard_normal(5000).astype(np.float32))})
        for i in range(2)
    ]


def tier_of(models: Sequence[Path], **options: Any) -> str:
    """Name the tier that an engine takes for a soup of some models."""
    equal = Linear(Coefficients.uniform(len(models)))
    planned = order(list(models), equal, method="uniform", options=Options(**options))
    tensor = planned.plan.tensors[0]
    mixer = Engine(planned.plan).mixer([each.dtype for each in tensor.sources], tensor.dtype)
    return "numpy" if mixer is None else "fast" if mixer.makes_digests else "plain"


def test_kernels_are_really_compiled(
    models: list[Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """On the numba that is installed the fast tier compiles, is kept, and nothing is warned of."""
    assert tier_of(models) == "fast"
    assert inner.make_products() is not None
    assert sorted(path.name[:5] for path in tmp_path.glob("cache/streamsoup/*")) == [
        "inner",
        "mix-f",
    ]
    assert not caplog.records


@pytest.mark.parametrize("tier", ["fast", "plain", "numpy"])
def test_the_switch_chooses(
    tier: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is read when an engine is made; soups and their digests are the same."""
    monkeypatch.setenv(tiers.VARIABLE, tier)
    assert tier_of(models) == tier
    soup = uniform(models, output=tmp_path / "out").provenance
    monkeypatch.setenv(tiers.VARIABLE, "numpy")
    other = uniform(models, output=tmp_path / "other").provenance
    assert load(tmp_path / "out") == load(tmp_path / "other")
    assert soup.tensors == other.tensors


def test_an_unknown_tier_is_refused(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable, what was found, and what there is."""
    monkeypatch.setenv(tiers.VARIABLE, "fastest")
    with pytest.raises(RecipeError, match="STREAMSOUP_KERNELS must be one of fast, plain"):
        tier_of(models)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("streamsoup.kernels.fast.mix._compile", AttributeError("no _library")),
        ("streamsoup.kernels.fast.mix._compile", TypeError("intrinsic")),
        ("streamsoup.kernels.fast.mix.compile_mix", ImportError("infer_global")),
    ],
)
def test_another_numba_has_plain_loops(
    where: str,
    error: Exception,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the fast tier fails with, plain loops stand in, not numpy, with one warning."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(where, fail)
    assert tier_of(models) == "plain"
    (record,) = caplog.records
    assert str(error) in record.getMessage()
    assert "plain ones make the same sums" in record.getMessage()


def test_a_renamed_symbol_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's internals are looked up before anything is compiled, so that no run waits for it."""
    from numba.core.codegen import CodeLibrary, CPUCodeLibrary

    compiled: list[int] = []
    monkeypatch.setattr(plain, "mix", plain.mix)
    for library in CPUCodeLibrary.__mro__:
        if "serialize_using_object_code" in vars(library):
            monkeypatch.delattr(library, "serialize_using_object_code")
    assert issubclass(CPUCodeLibrary, CodeLibrary)
    with pytest.raises(AttributeError):
        objects.object_file(lambda: compiled.append(1))
    assert not compiled


def test_a_broken_numba_has_numpy(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where not even plain loops compile, numpy does the work, with one warning."""

    def fail(*arguments: object) -> None:
        raise ImportError("numba is half installed")

    monkeypatch.setattr("streamsoup.kernels.fast.mix.compile_mix", fail)
    monkeypatch.setattr("streamsoup.kernels.plain.compile_mix", fail)
    assert tier_of(models) == "numpy"
    (record,) = caplog.records
    assert "half installed; numpy makes the same sums" in record.getMessage()


def test_several_dtypes_are_mixed_by_plain_loops(tmp_path: Path, models: list[Path]) -> None:
    """A large soup of float32 and bfloat16 does not wait for numpy."""
    brain = np.arange(5000, dtype=np.uint16)
    other = save(tmp_path / "b", {"w": tensor(brain, "BF16")})
    assert tier_of([models[0], other], dtype="f32") == "plain"
    mix([models[0], other], [0.5, 0.5], output=tmp_path / "out", options=Options(dtype="f32"))
    values = np.frombuffer(load(models[0])["w"][2], np.float32).astype(float) * 0.5
    values += (brain.astype(np.uint32) << 16).view(np.float32).astype(float) * 0.5
    made = np.frombuffer(load(tmp_path / "out")["w"][2], np.float32)
    assert (made == values.astype(np.float32)).all()


def test_plain_loops_need_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba finds no folder to write to, it compiles anew."""
    import numba

    cfunc = numba.cfunc

    def nowhere(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(*arguments, **options)

    monkeypatch.setattr(numba, "cfunc", nowhere)
    assert plain.compile_products().address


# What kernels are made of


def imported(name: str) -> set[str]:
    """List the files of `kernels` that one of them imports, lazily as well."""
    found = set()
    for node in ast.walk(ast.parse((KERNELS / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "streamsoup.kernels"
        ):
            folder = str(node.module).split(".")[2:]
            for path in ([*folder], *([*folder, alias.name] for alias in node.names)):
                file = "/".join(path) + ".py"
                if path and (KERNELS / file).is_file():
                    found.add(file)
    return found


def below(name: str, leave_out: Sequence[str] = ()) -> set[str]:
    """List what a file is made of, itself included."""
    found, todo = set(), [name]
    while todo:
        each = todo.pop()
        if each not in found and each not in leave_out:
            found.add(each)
            todo.extend(imported(each))
    return found


@pytest.mark.parametrize(
    ("name", "rooms"), [("fast/mix.py", cpu._ROOMS), ("fast/products.py", inner._ROOMS)]
)
def test_a_kernel_is_named_after_all_it_is_made_of(name: str, rooms: tuple[str, ...]) -> None:
    """A cache from before a change would otherwise be used after it; nothing else is hashed."""
    assert below(name, leave_out=["fast/objects.py"]) == set(rooms)


def test_plain_loops_are_made_of_one_file() -> None:
    """Numba's cache looks at the file of a function alone: what is compiled stands in it."""
    assert imported("plain.py") == {"constants.py"}


def test_no_kernels_import_each_other_in_a_circle() -> None:
    """Not lazily either."""
    for path in KERNELS.rglob("*.py"):
        name = str(path.relative_to(KERNELS))
        assert name not in set().union(*(below(each) for each in imported(name)), set()), name
