"""Norms, angles and distances against exact rationals and numpy; the same bits however read."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import streamsoup
from streamsoup.cli import main
from streamsoup.cli.geometry import describe, write_json
from streamsoup.engine import inner, plan
from streamsoup.engine.read import open_reader
from streamsoup.engine.stream import run
from streamsoup.errors import BudgetError, MismatchError, NonFiniteError, RecipeError
from streamsoup.kernels.constants import GRAIN
from streamsoup.kernels.inner import in_numpy
from streamsoup.methods.angles import geometry, plan_geometry
from streamsoup.options import Options, Progress
from streamsoup.tensors import DTYPES

SIZES = {"big": 3 * GRAIN + 17, "small": 5, "one": 1, "none": 0}


def make_files(folder: Path, k: int, *, scale: float = 0.01, dtype: str = "f4") -> list[str]:
    """Write a base and `k` fine-tunes of it: the base first."""
    rng = np.random.default_rng(5)
    base = {name: rng.normal(size=n).astype(dtype) for name, n in SIZES.items()}
    base["step"] = np.array([3])
    save_file(base, folder / "base.safetensors")
    for i in range(k):
        moved = {
            name: (t + scale * rng.normal(size=t.shape)).astype(dtype) if name in SIZES else t + i
            for name, t in base.items()
        }
        save_file(moved, folder / f"{i}.safetensors")
    return [str(folder / f"{name}.safetensors") for name in ("base", *range(k))]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A base and five fine-tunes of it."""
    return make_files(tmp_path, 5)


def load(path: str) -> dict[str, np.ndarray]:
    """Load a file, floats as float64."""
    from safetensors.numpy import load_file

    return {n: t.astype("f8") for n, t in load_file(path).items() if t.dtype.kind == "f"}


def flat(state: dict[str, np.ndarray]) -> np.ndarray:
    """Put all tensors of floats into one row."""
    return np.concatenate([state[name].ravel() for name in sorted(state)])


def test_small_whole_numbers_are_exact(tmp_path: Path) -> None:
    """On small integers and dyadic fractions the Gram matrix is that of exact rationals."""
    rng = np.random.default_rng(1)
    rows = [(rng.integers(-64, 64, size=GRAIN + 9) / 16).astype("f4") for _ in range(4)]
    for i, row in enumerate(rows):
        save_file({"w": row}, tmp_path / f"{i}.safetensors")
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(4)]
    found = geometry(paths[1:], base=paths[0])
    exact = [[Fraction(float(x)) for x in row] for row in rows]
    for i in range(3):
        for j in range(3):
            product = sum(
                (a - c) * (b - c)
                for a, b, c in zip(exact[1 + i], exact[1 + j], exact[0], strict=True)
            )
            assert Fraction(float(found.total.gram[i, j])) == product


@pytest.mark.parametrize("n_grains", [1, 2, 100])
def test_tensors_of_many_leaves_and_blocks(
    n_grains: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is multiplied with its own part of a vector, and every leaf of a tensor counts."""
    monkeypatch.setattr(plan, "LEAF", n_grains * GRAIN)
    monkeypatch.setattr(inner, "LARGEST_BLOCK", GRAIN)
    rng = np.random.default_rng(2)
    u, *rows = (rng.integers(-9, 9, 5 * GRAIN + 17).astype("f4") for _ in range(4))
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for row, path in zip(rows, paths, strict=True):
        save_file({"w": row}, path)
    steps = np.stack([row - rows[0] for row in rows[1:]]).astype("i8")
    assert geometry(paths[1:], base=paths[0]).total.gram.tolist() == (steps @ steps.T).tolist()
    planned, _, mapped = plan_geometry(paths, base=None, options=Options())
    memory = inner.plan_inner_memory(planned, 3, mapped=mapped, threads=2, budget=10**9)
    vector = inner.Vector(u.view(np.uint8), DTYPES["F32"])
    dot = inner.Dot(planned, memory, {"w": vector}, in_numpy)
    sums = inner.Sums(planned, dot.n_values)
    reader = open_reader(planned, memory, mapped=mapped)
    run(planned, memory, reader, dot, sums)
    assert sums.of_tensors[0].tolist() == [float(u @ rows[0]), *(steps @ u).tolist()]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_against_numpy(tmp_path: Path, dtype: str) -> None:
    """Gram matrix, norms, cosines, angles, distances and shares are numpy's, in float64."""
    files = make_files(tmp_path, 5, dtype=dtype)
    base, *states = [load(path) for path in files]
    found = geometry(files[1:], base=files[0])
    for place in (*found.tensors, found.total):
        pick = flat if not place.name else (lambda state, name=place.name: state[name])
        differences = np.stack([pick(state) - pick(base) for state in states])
        gram = differences @ differences.T
        np.testing.assert_allclose(place.gram, gram, rtol=1e-10, atol=1e-12 * gram.max(initial=0))
        norms = [np.linalg.norm(pick(state)) for state in states]
        np.testing.assert_allclose(place.weight_norms, norms, rtol=1e-12)
        apart = [[np.linalg.norm(a - b) for b in differences] for a in differences]
        np.testing.assert_allclose(place.distances, apart, rtol=1e-7, atol=1e-12)
        np.testing.assert_array_equal(place.n_changed, np.count_nonzero(differences, axis=1))
    cosines = gram / np.outer(np.sqrt(np.diag(gram)), np.sqrt(np.diag(gram)))
    np.testing.assert_allclose(found.total.cosines, cosines, atol=1e-12)
    off = ~np.eye(5, dtype=bool)
    expected = np.degrees(np.arccos(cosines[off]))
    np.testing.assert_allclose(found.total.angles[off], expected, atol=1e-9)
    assert found.nbytes_read == 6 * sum(SIZES.values()) * np.dtype(dtype).itemsize


@pytest.mark.parametrize("base", [True, False])
def test_the_same_bits_however_read(
    files: list[str], base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, threads, blocks, budget and the way of reading leave every bit as it is."""
    anchor = files[0] if base else None
    with monkeypatch.context() as patched:
        patched.setattr(inner, "find_products", lambda: None)
        patched.setattr(inner, "make_products", lambda: None)
        first = geometry(files[1:], base=anchor)
    monkeypatch.setattr(inner, "COMPILE_S", 0.0)
    seen = set()
    for options in (
        Options(threads=1),
        Options(threads=3),
        Options(io="read"),
        Options(threads=2, memory=10**9),
        Options(io="read", threads=1, memory=minimum(files[1:], anchor)),
    ):
        other = geometry(files[1:], base=anchor, options=options)
        assert np.array_equal(first.total.rows, other.total.rows)
        for a, b in zip(first.tensors, other.tensors, strict=True):
            assert np.array_equal(a.rows, b.rows)
        seen.add(plan_geometry(files[1:], base=anchor, options=options)[1].block)
    assert len(seen) > 1


def minimum(paths: list[str], base: str | None) -> int:
    """Find the least budget that is accepted."""
    low, high = 1, 10**9
    while low < high:
        middle = (low + high) // 2
        try:
            plan_geometry(paths, base=base, options=Options(io="read", threads=1, memory=middle))
            high = middle
        except BudgetError:
            low = middle + 1
    return low


def test_a_wrong_order_is_seen(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: a kernel that adds up in another order changes bits."""
    monkeypatch.setattr(inner, "find_products", lambda: None)
    monkeypatch.setattr(inner, "make_products", lambda: None)
    first = geometry(files[1:], base=files[0])

    def other(left: Any, right: Any, triangle: bool, out: Any) -> None:
        out[:] = left @ right.T

    monkeypatch.setattr("streamsoup.kernels.inner.multiply", other)
    changed = geometry(files[1:], base=files[0])
    assert not np.array_equal(first.total.rows, changed.total.rows)
    np.testing.assert_allclose(first.total.gram, changed.total.gram, rtol=1e-6, atol=1e-9)


def test_without_a_base_all_is_measured_from_the_mean(files: list[str]) -> None:
    """Distances are those with a base; norms are distances to the mean."""
    based, bare = geometry(files[1:], base=files[0]), geometry(files[1:])
    np.testing.assert_allclose(bare.total.distances, based.total.distances, rtol=1e-9, atol=1e-12)
    states = np.stack([flat(load(path)) for path in files[1:]])
    to_mean = np.linalg.norm(states - states.mean(axis=0), axis=1)
    np.testing.assert_allclose(bare.total.norms, to_mean, rtol=1e-12)
    np.testing.assert_allclose(bare.total.weight_norms, np.linalg.norm(states, axis=1), rtol=1e-12)
    assert bare.base is None


def test_the_norm_of_a_mix_follows_from_the_gram_matrix(files: list[str], tmp_path: Path) -> None:
    """‖Σcᵢ(θᵢ−θ₀)‖ of a soup that is made equals what the Gram matrix said."""
    found = geometry(files[1:], base=files[0])
    coefficients = [0.4, 0.3, -0.1, 0.2, 0.2]
    options = Options(dtype="f64", non_float="first")
    soup = streamsoup.mix(files[1:], coefficients, output=tmp_path / "soup", options=options)
    (file,) = Path(soup.path).glob("*.safetensors")
    made = flat(load(str(file)))
    norm = np.linalg.norm(made - flat(load(files[0])))
    assert found.total.norm_of_mix(coefficients) == pytest.approx(norm, rel=1e-10)


def test_findings(files: list[str], tmp_path: Path) -> None:
    """Duplicates, near-duplicates, strangers and a wrong base are named."""
    from safetensors.numpy import load_file

    near = {
        n: t * np.float32(1 + 1e-6) if n in SIZES else t for n, t in load_file(files[1]).items()
    }
    save_file(near, tmp_path / "near.safetensors")
    rng = np.random.default_rng(9)
    other = {n: rng.normal(size=t.shape).astype(t.dtype) for n, t in near.items()}
    save_file(other, tmp_path / "other.safetensors")
    near_path, other_path = (str(tmp_path / f"{n}.safetensors") for n in ("near", "other"))
    found = geometry([files[1], files[1], near_path, files[2]], base=files[0])
    assert found.duplicates == ((0, 1),)
    assert found.near_duplicates == ((0, 2), (1, 2))
    assert found.strangers == ()
    assert found.total.distances[0, 1] == 0
    assert "equal, value for value" in found.notes[0]
    found = geometry([files[1], other_path], base=files[0])
    assert found.strangers == ((0, 1),)
    assert "share an initialisation" in found.notes[0]
    found = geometry(files[1:4], base=other_path)
    assert any("not their base" in note for note in found.notes)
    found = geometry([files[0], files[1]], base=files[0])
    assert any("equal to the base" in note for note in found.notes)
    assert np.isnan(found.total.angles[0, 1])
    assert found.to_builtins()["total"]["angles_deg"][0][1] is None


def test_a_coarse_base_is_said_to_be_one(tmp_path: Path) -> None:
    """A base in half precision turns right angles, by about as much as the note says."""
    rng = np.random.default_rng(2)
    exact = rng.normal(size=200_000).astype("f4")
    for name, state in (
        ("half", exact.astype("f2")),
        ("exact", exact),
        *(
            (f"{i}", exact + np.float32(4e-4) * rng.standard_normal(len(exact), "f4"))
            for i in range(2)
        ),
    ):
        save_file({"w": state}, tmp_path / f"{name}.safetensors")
    runs = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    good = geometry(runs, base=str(tmp_path / "exact.safetensors"))
    assert good.total.angles[0, 1] == pytest.approx(90, abs=0.5)
    assert good.notes == ()
    coarse = geometry(runs, base=str(tmp_path / "half.safetensors"))
    assert coarse.total.angles[0, 1] < 85
    (note,) = coarse.notes
    said = float(note.split("as close as ")[1].split("°")[0])
    assert said == pytest.approx(coarse.total.angles[0, 1], abs=2)


@pytest.mark.parametrize("step", [2e-4, 4e-3])
def test_rounding_to_the_base_itself_turns_nothing(tmp_path: Path, step: float) -> None:
    """Where runs are stored as coarsely as the base, few elements move, and only those turn.

    Steps that are far longer than the rounding are worth no note.
    """
    rng = np.random.default_rng(2)
    exact = rng.normal(size=400_000).astype("f4")
    for name in ("base", "0", "1"):
        moved = np.float32(0 if name == "base" else step) * rng.standard_normal(len(exact), "f4")
        save_file({"w": (exact + moved).astype("f2")}, tmp_path / f"{name}.safetensors")
    base, *runs = (str(tmp_path / f"{n}.safetensors") for n in ("base", "0", "1"))
    found = geometry(runs, base=base)
    if step > 1e-3:
        assert found.notes == ()
        return
    (note,) = found.notes
    said = float(note.split("as close as ")[1].split("°")[0])
    assert found.total.shares[0] < 0.6
    assert said == pytest.approx(found.total.angles[0, 1], abs=4)


def test_refusals(files: list[str], tmp_path: Path) -> None:
    """What cannot be measured is refused, by name."""
    with pytest.raises(RecipeError):
        geometry([])
    save_file({"w": np.zeros(3, "f4")}, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match="lacks"):
        geometry([files[1], str(tmp_path / "w.safetensors")])
    save_file({"w": np.array([0, np.nan, 1], "f4")}, tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteError, match=r"nan\.safetensors: w: holds nan at \[1\]"):
        geometry([str(tmp_path / "w.safetensors"), str(tmp_path / "nan.safetensors")])
    with pytest.raises(BudgetError, match="at least"):
        geometry(files, options=Options(memory=10**6))


def test_blocks_shrink_for_many_ingredients(tmp_path: Path) -> None:
    """The bound holds for 64 ingredients that are read into buffers."""
    files = make_files(tmp_path, 4)
    paths = files[1:] * 16
    options = Options(memory="150MB", io="read", threads=2)
    _, memory, _ = plan_geometry(paths, base=files[0], options=options)
    assert memory.peak_nbytes <= 150e6
    assert memory.group == 65
    assert len(geometry(paths, base=files[0], options=options).names) == 64


def test_the_table_is_readable_for_many(files: list[str]) -> None:
    """A line for each ingredient, within the terminal; a matrix where it fits."""
    found = geometry(files[1:] * 14, base=files[0])
    lines = describe(found, 100)
    assert len(lines) == 1 + 70 + 1
    assert max(map(len, lines)) <= 100
    few = describe(geometry(files[1:], base=files[0]), 80)
    assert max(map(len, few)) <= 80
    assert "angles in degrees" in few


@pytest.mark.parametrize("base", [True, False])
def test_on_the_command_line(files: list[str], tmp_path: Path, base: bool) -> None:
    """JSON on stdout alone; a picture where one was asked for."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "angles.png"
    anchor = ["--base", files[0]] if base else []
    command = ["geometry", *files[1:], *anchor, "--plot", str(picture), "--json"]
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "streamsoup", *command], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert len(said["total"]["angles_deg"]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not Path(f"{picture}.partial").exists()
    assert CliRunner().invoke(main, ["geometry", "--help"]).exit_code == 0


def test_measuring_loads_no_torch(files: list[str]) -> None:
    """Geometry and the closed forms work without torch."""
    import subprocess
    import sys

    code = (
        "import sys, streamsoup, tempfile\n"
        f"files = {files!r}\n"
        "streamsoup.geometry(files[1:], base=files[0])\n"
        "options = streamsoup.Options(non_float='first')\n"
        "out = tempfile.mkdtemp() + '/soup'\n"
        "streamsoup.stock(files[1:], base=files[0], output=out, options=options)\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_duplicate_is_equal_in_every_bit(tmp_path: Path) -> None:
    """Two that differ in the last bit of one element are near-duplicates, as far as sums can tell.

    The squared distance, 1e-14, is lost beside squared norms of a million.
    """
    rng = np.random.default_rng(3)
    base = rng.normal(size=GRAIN * 50).astype("f4")
    one = base + rng.normal(size=len(base)).astype("f4")
    other = one.copy()
    other[777] = np.nextafter(other[777], np.float32(9))
    for name, row in {"base": base, "one": one, "other": other, "again": one}.items():
        save_file({"w": row}, tmp_path / f"{name}.safetensors")
    base_path, *paths = (str(tmp_path / f"{n}.safetensors") for n in ("base", "one", "other"))
    found = geometry(paths, base=base_path)
    assert found.total.distances[0, 1] == 0
    assert (found.duplicates, found.near_duplicates) == ((), ((0, 1),))
    found = geometry([paths[0], str(tmp_path / "again.safetensors")], base=base_path)
    assert (found.duplicates, found.near_duplicates) == (((0, 1),), ())


def test_running_statistics_are_no_weights(tmp_path: Path) -> None:
    """Variances of 10⁴ neither turn the angles, nor make fine-tunes look like strangers."""
    rng = np.random.default_rng(4)
    base = rng.normal(size=(300, 30)).astype("f4")
    paths = []
    for name, moved in (("base", 0.0), ("a", 0.01), ("b", 0.01)):
        weight = base + np.float32(moved) * rng.standard_normal((300, 30), "f4")
        variance = np.full(300, 1e4 if name == "base" else 4e4, "f4")
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file({"conv.weight": weight, "norm.running_var": variance}, paths[-1])
    found = geometry(paths[1:], base=paths[0])
    assert found.total.angles[0, 1] == pytest.approx(90, abs=3)
    assert found.total.n_elements == 9000
    assert [place.name for place in found.tensors] == ["conv.weight", "norm.running_var"]
    assert found.tensors[1].angles[0, 1] == pytest.approx(0, abs=1e-4)
    assert found.notes == ()


def test_strangers_are_told_by_their_matrices(tmp_path: Path) -> None:
    """Large gains, alike in all models, do not hide that two began apart."""
    rng = np.random.default_rng(6)
    paths = []
    for i in range(2):
        state = {
            "mlp.weight": (0.02 * rng.normal(size=(64, 64))).astype("f4"),
            "norm.weight": np.full(64, 9, "f4"),
        }
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_file(state, paths[-1])
    found = geometry(paths)
    assert found.total.distances[0, 1] < 0.1 * found.total.weight_norms[0]
    assert found.strangers == ((0, 1),)


def test_fine_tunes_that_went_far_are_no_strangers(tmp_path: Path) -> None:
    """High learning rates took these half their length away, at right angles: 0.7 apart."""
    rng = np.random.default_rng(8)
    base = rng.normal(size=(200, 200))
    paths = []
    for i in range(3):
        moved = base + (0.0 if i == 0 else 0.55) * rng.normal(size=base.shape)
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_file({"w": moved}, paths[-1])
    found = geometry(paths[1:], base=paths[0])
    assert found.total.distances[0, 1] > 0.65 * found.total.weight_norms[0]
    assert found.total.angles[0, 1] == pytest.approx(90, abs=2)
    assert found.strangers == ()
    assert found.notes == ()


def test_no_floats_lie_nowhere(tmp_path: Path) -> None:
    """Checkpoints of integers alone have norms of zero."""
    save_file({"steps": np.arange(3)}, tmp_path / "a.safetensors")
    found = geometry([str(tmp_path / "a.safetensors")] * 2)
    assert found.tensors == ()
    assert found.total.norms.tolist() == [0, 0]


def test_json_is_written_a_tensor_at_a_time(files: list[str]) -> None:
    """What is printed is all of it, and the warnings."""
    found = geometry(files[1:], base=files[0])
    printed = io.StringIO()
    write_json(found, ["a warning"], printed)
    warned = {"warnings": ["a warning"]}
    assert json.loads(printed.getvalue()) == {**found.to_builtins(), **warned}


@pytest.mark.parametrize("method", ["slerp", "stock"])
def test_both_passes_are_counted(tmp_path: Path, method: str) -> None:
    """What is read for the angles counts, too: two passes, and twice the bytes."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    for path in paths:
        save_file({"w": rng.normal(size=(64, 100)).astype("f4")}, path)
    reports: list[object] = []
    options = streamsoup.Options(on_event=reports.append)
    output = tmp_path / "out"
    if method == "slerp":
        soup = streamsoup.slerp(paths, [1, 1, 1], output=output, options=options)
    else:
        soup = streamsoup.stock(paths[1:], base=paths[0], output=output, options=options)
    assert (soup.n_passes, soup.nbytes_read) == (2, 2 * 3 * 64 * 100 * 4)
    ends = [r for r in reports if isinstance(r, Progress) and r.nbytes_done == r.nbytes]
    assert soup.nbytes_read == sum(end.nbytes for end in ends)
    assert soup.elapsed_s >= sum(end.elapsed_s for end in ends)
    plain = streamsoup.uniform(paths, output=tmp_path / "plain")
    assert (plain.n_passes, plain.nbytes_read) == (1, 3 * 64 * 100 * 4)
