"""Closed forms against the formula written out by hand, in numpy."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command
from safetensors.numpy import load_file, save_file

import streamsoup
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import NonFiniteError, OutputExistsError, RecipeError
from streamsoup.methods.angles import Place
from streamsoup.methods.averages import wsm_coefficients
from streamsoup.methods.closed import sphere_factors, stock_ratio
from streamsoup.output.make import make, order

N = 4
OPTIONS = streamsoup.Options()


@pytest.fixture
def states(tmp_path: Path) -> list[dict[str, np.ndarray]]:
    """A base and `N` fine-tunes, also on disk; the table moved in none."""
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(9, 4))
    base = {"a": rng.normal(size=(9, 4)), "b": rng.normal(size=7), "table": rng.normal(size=5)}
    found = [base]
    for _ in range(N):
        moved = {
            "a": base["a"] + 0.1 * (shared + rng.normal(size=(9, 4))),
            "b": base["b"] + 0.1 * rng.normal(size=7),
            "table": base["table"],
        }
        found.append(moved)
    for i, state in enumerate(found):
        save_file(state, tmp_path / f"{i}.safetensors")
    return found


@pytest.fixture
def paths(states: Any, tmp_path: Path) -> list[str]:
    """Their files, the base first."""
    return [str(tmp_path / f"{i}.safetensors") for i in range(N + 1)]


def test_every_verb_takes_what_can_be_gone_through(paths: list[str], tmp_path: Path) -> None:
    """A generator, such as a folder's glob, and an array of paths are lists of ingredients."""
    base, *tuned = paths
    n = len(tuned)
    verbs: list[Any] = [
        (streamsoup.uniform,),
        (streamsoup.mix, [0.25] * n),
        (streamsoup.ema,),
        (streamsoup.lawa, 2),
        (streamsoup.wsm,),
        (streamsoup.arithmetic, 0.3, base),
        (streamsoup.stock, None, base),
        (streamsoup.slerp, [0.25] * n, None),
    ]
    for verb, *rest in verbs:
        given, more = rest[:1], {"base": rest[1]} if rest[1:] else {}
        given = [] if given == [None] else given
        made = []
        for number, many in enumerate((tuned, (path for path in tuned), np.array(tuned))):
            output = tmp_path / f"{verb.__name__}-{number}"
            made.append(verb(many, *given, output=output, **more))
        assert all(soup.recipe == made[0].recipe for soup in made), verb.__name__
        for soup in made[1:]:
            np.testing.assert_equal(load(soup), load(made[0]))
        with pytest.raises(RecipeError, match="is one path; expected a list"):
            verb(tuned[0], *given, output=tmp_path / "out", **more)
    found, same = (streamsoup.geometry(many, base=base) for many in (iter(tuned), tuned))
    np.testing.assert_equal(found.total.rows, same.total.rows)
    given = (path for path in tuned)
    assert streamsoup.verify(tmp_path / "uniform-0", ingredients=given).rederived
    for wrong in (None, 3, {tuned[0]}):
        with pytest.raises(RecipeError, match=f"expected a list of ingredients, got {wrong}"):
            streamsoup.uniform(wrong, output=tmp_path / "out")  # type: ignore[arg-type]


def test_what_has_no_angle_cannot_pass(paths: list[str], tmp_path: Path) -> None:
    """Stock and slerp refuse to let NaN pass, and nothing is advised that could not be done."""
    base, *tuned = paths
    options = streamsoup.Options(non_finite="propagate")
    for verb, more in (
        (streamsoup.stock, {"base": base}),
        (streamsoup.slerp, {"weights": [1] * N}),
    ):
        with pytest.raises(RecipeError, match="leave out non_finite='propagate'"):
            verb(tuned, output=tmp_path / "out", options=options, **more)  # type: ignore[operator]
    spoiled = {**load_file(tuned[0]), "b": np.full(7, np.nan)}
    save_file(spoiled, tmp_path / "spoiled.safetensors")
    with pytest.raises(
        NonFiniteError, match=r"spoil what is measured; leave this ingredient \(\d of \d\) out$"
    ):
        streamsoup.geometry([*tuned, tmp_path / "spoiled.safetensors"], base=base)
    huge = {**load_file(tuned[0]), "b": np.full(7, 1e200)}
    save_file(huge, tmp_path / "huge.safetensors")
    with pytest.raises(NonFiniteError, match=r"products are too large for F64, .*; nothing can be"):
        streamsoup.geometry([*tuned, tmp_path / "huge.safetensors"], base=base)


def test_numbers_of_numpy_and_torch_are_numbers(paths: list[str], tmp_path: Path) -> None:
    """They give the same soup, and the same recipe, as Python's own."""
    made = []
    for n, number in enumerate((0.75, np.float64(0.75), np.float32(0.75), torch.tensor(0.75))):
        soup = streamsoup.ema(paths, number, output=tmp_path / f"e{n}")  # type: ignore[arg-type]
        made.append((load(soup), soup.provenance.report))
    for other, report in made[1:]:
        assert report == made[0][1]
        for name, array in made[0][0].items():
            np.testing.assert_array_equal(other[name], array)
    narrow = streamsoup.interpolate(paths[0], paths[0], np.float16(0.1), output=tmp_path / "i")  # type: ignore[arg-type]
    assert math.fsum(narrow.recipe.rule.coefficients.values) == 1


def test_what_a_callback_raises_is_the_callers(paths: list[str], tmp_path: Path) -> None:
    """An error of a tracker that is gone is not one of the disk, whatever its kind."""

    def report(progress: Any) -> None:
        raise ConnectionResetError("tracker gone")

    options = streamsoup.Options(on_event=report)
    with pytest.raises(ConnectionResetError, match="tracker gone"):
        streamsoup.uniform(paths, output=tmp_path / "out", options=options)
    streamsoup.uniform(paths, output=tmp_path / "out")


class Stop(Exception):
    """What a caller raises to stop a run."""


def test_a_callback_stops_a_run(paths: list[str], tmp_path: Path) -> None:
    """Its exception comes out as it is, nothing is there, and the same call goes on."""
    told = []

    def stop(event: Any) -> None:
        told.append(event)
        raise Stop

    output = tmp_path / "out"
    with pytest.raises(Stop):
        streamsoup.uniform(paths, output=output, options=streamsoup.Options(on_event=stop))
    assert len(told) == 1
    assert not output.exists()
    assert streamsoup.verify(streamsoup.uniform(paths, output=output).path).rederived
    searched = tmp_path / "searched"
    model = torch.nn.Module()
    for name in ("a", "b", "table"):
        shape = load_file(paths[0])[name].shape
        model.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
    n_scored = []

    def score(model: torch.nn.Module) -> float:
        n_scored.append(1)
        return float(model.b.sum())  # type: ignore[operator]

    def stop_at_a_trial(event: Any) -> None:
        if isinstance(event, streamsoup.Trial):
            raise Stop

    options = streamsoup.Options(on_event=stop_at_a_trial)
    with pytest.raises(Stop):
        streamsoup.greedy(paths[:2], score, model=model, output=searched, options=options)
    assert (len(n_scored), searched.exists()) == (1, False)
    soup = streamsoup.greedy(paths[:2], score, model=model, output=searched)
    assert soup.report["n_resumed"] == 1


def load(soup: Any) -> dict[str, np.ndarray]:
    """Load a soup, once it is verified."""
    assert streamsoup.verify(soup.path).rederived
    (file,) = Path(soup.path).glob("*.safetensors")
    return load_file(file)


def same(soup: Any, expected: dict[str, np.ndarray]) -> None:
    """Compare with what was computed by hand."""
    made = load(soup)
    for name, tensor in expected.items():
        np.testing.assert_allclose(made[name], tensor, rtol=1e-12, atol=1e-13)


def test_ema_is_the_recurrence(states: Any, paths: list[str], tmp_path: Path) -> None:
    """The coefficients are those of m ← d·m + (1−d)·θ, begun at the first."""
    mean = states[0]
    for state in states[1:]:
        mean = {name: 0.8 * mean[name] + 0.2 * state[name] for name in state}
    soup = streamsoup.ema(paths, 0.8, output=tmp_path / "soup")
    same(soup, mean)
    assert math.fsum(soup.recipe.rule.coefficients.values) == pytest.approx(1, abs=1e-15)
    assert soup.recipe.method == "ema"
    with pytest.raises(RecipeError):
        streamsoup.ema(paths, 1.0, output=tmp_path / "other")


def test_lawa_is_the_mean_of_the_latest(states: Any, paths: list[str], tmp_path: Path) -> None:
    """Of five, the latest two."""
    soup = streamsoup.lawa(paths, 2, output=tmp_path / "soup")
    same(soup, {n: (states[-2][n] + states[-1][n]) / 2 for n in states[0]})
    assert soup.recipe.ingredients == tuple(paths[-2:])
    for window in (0, 6):
        with pytest.raises(RecipeError, match="window"):
            streamsoup.lawa(paths, window, output=tmp_path / "other")


def test_wsm_is_a_decay_of_the_learning_rate(states: Any, paths: list[str], tmp_path: Path) -> None:
    """Step j enters with the weight that the curve gives to it: wⱼ = Σ of the later cᵢ."""
    for curve, function in (
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
    ):
        found = wsm_coefficients(6, curve)
        factors = [value / found.divisor for value in found.values]
        for j in range(6):
            assert math.fsum(factors[j:]) == pytest.approx(function(j / 6), abs=1e-12)
        assert min(factors) >= 0
    steps = [{n: b[n] - a[n] for n in a} for a, b in itertools.pairwise(states)]
    made = dict(states[0])
    for j, step in enumerate(steps, 1):
        made = {n: made[n] + (1 + math.cos(math.pi * j / 5)) / 2 * step[n] for n in made}
    same(streamsoup.wsm(paths, "cosine", output=tmp_path / "soup"), made)
    with pytest.raises(RecipeError, match="must be one of"):
        wsm_coefficients(3, "steps")


def test_a_linear_decay_is_the_mean_to_the_bit(tmp_path: Path) -> None:
    """On values that are exact ties half the time, where factors a last digit off round wrong."""
    rng = np.random.default_rng(5)
    n = 7
    states = [{"w": rng.integers(-8, 8, 4000).astype(np.float16)} for _ in range(n)]
    for state in states:
        state["w"] *= np.float16(2**-13) + np.float16(1)
    linear = streamsoup.wsm([*map(by_torch, states)], output=tmp_path / "linear")
    mean = streamsoup.uniform([*map(by_torch, states)], output=tmp_path / "mean")
    assert linear.recipe.rule == mean.recipe.rule
    assert linear.provenance.tensors == mean.provenance.tensors
    # Planted fault: the factors themselves, of which some are no float.
    plain = [(1 - j / n) - (1 - (j + 1) / n) for j in range(n)]
    other = streamsoup.mix([*map(by_torch, states)], plain, output=tmp_path / "plain")
    assert other.provenance.tensors != mean.provenance.tensors
    for k in range(1, 400):
        assert wsm_coefficients(k, "linear") == streamsoup.Coefficients.uniform(k), k
    assert wsm_coefficients(2, "cosine") == streamsoup.Coefficients.uniform(2)
    # The three weights of cosine are 1, 3/4 and 1/4; with four they are no fractions.
    assert wsm_coefficients(3, "cosine") == streamsoup.Coefficients((1.0, 2.0, 1.0), 4.0)
    assert wsm_coefficients(4, "cosine").divisor == wsm_coefficients(4, "sqrt").divisor == 1.0


def by_torch(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Make torch's tensors of numpy's."""
    return {name: torch.from_numpy(array) for name, array in state.items()}


def test_soups_of_older_wsm_still_verify(paths: list[str], tmp_path: Path) -> None:
    """A provenance carries its own coefficients: those of linear were factors a digit off 1/k."""
    old = [1 - j / 5 - (1 - (j + 1) / 5 if j < 4 else 0.0) for j in range(5)]
    assert old != [0.2] * 5
    rule = Linear(streamsoup.Coefficients.given(old))
    ordered = order(paths, rule, method="wsm", options=OPTIONS)
    made = make(ordered, output=tmp_path / "old", options=OPTIONS)
    assert streamsoup.verify(made.path).rederived
    assert made.recipe.rule.coefficients.values == tuple(old)


def test_task_arithmetic(states: Any, paths: list[str], tmp_path: Path) -> None:
    """Base plus λ times each task vector, with one λ or with one for each."""
    base, *others = states
    with pytest.raises(RecipeError, match="scales that sum to inf"):
        streamsoup.arithmetic(paths[1:], 1e308, base=paths[0], output=tmp_path / "soup")
    for number, scale in enumerate((0.4, [0.5, -1.0, 0.25, 0.0], np.float32(0.5))):
        each = scale if isinstance(scale, list) else [float(scale)] * N
        expected = {
            n: base[n] + sum(s * (o[n] - base[n]) for s, o in zip(each, others, strict=True))
            for n in base
        }
        output = tmp_path / f"soup{number}"
        same(streamsoup.arithmetic(paths[1:], scale, base=paths[0], output=output), expected)
    with pytest.raises(RecipeError, match="scale: 3 values for 4 ingredients"):
        streamsoup.arithmetic(paths[1:], [1, 2, 3], base=paths[0], output=tmp_path / "x")


def test_model_stock(states: Any, paths: list[str], tmp_path: Path) -> None:
    """t·mean + (1−t)·base with t of the mean pairwise cosine; what nobody moved stays."""
    base, *others = states
    expected = {"table": base["table"]}
    ratios = []
    for name in ("a", "b"):
        d = np.stack([(o[name] - base[name]).ravel() for o in others])
        unit = d / np.linalg.norm(d, axis=1, keepdims=True)
        cosine = np.mean([unit[i] @ unit[j] for i in range(N) for j in range(i)])
        t = max(N * cosine / (1 + (N - 1) * cosine), 0.0)
        ratios.append(t)
        expected[name] = t * np.mean([o[name] for o in others], axis=0) + (1 - t) * base[name]
    soup = streamsoup.stock(paths[1:], base=paths[0], output=tmp_path / "soup")
    same(soup, expected)
    assert np.array_equal(load(soup)["table"], base["table"])
    report = soup.provenance.report
    assert report["ratio_max"] == pytest.approx(max(ratios))
    assert soup.recipe.ingredients[0] == paths[0]


def test_the_ratio_for_two_is_the_papers(tmp_path: Path) -> None:
    """For two, t = 2cos φ / (1 + cos φ); negative ratios become the base, and are named."""
    gram = np.array([[4.0, 1.0], [1.0, 1.0]])
    rows = np.zeros((3, 3))
    rows[1:, 1:] = gram
    cosine = 1 / 2
    ratio = stock_ratio(Place("w", 3, rows[np.triu_indices(3)], np.zeros(2, np.int64)))
    assert ratio == pytest.approx(2 * cosine / (1 + cosine))
    for i, w in enumerate(([0.0, 0.0], [1.0, 0.2], [-1.0, 0.2])):
        save_file({"w": np.array(w)}, tmp_path / f"{i}.safetensors")
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    soup = streamsoup.stock(paths[1:], base=paths[0], output=tmp_path / "soup")
    assert load(soup)["w"].tolist() == [0.0, 0.0]
    assert soup.provenance.report["n_negative"] == 1
    assert soup.provenance.report["negative"] == "w"
    with pytest.raises(RecipeError, match="two"):
        streamsoup.stock(paths[1:2], base=paths[0], output=tmp_path / "other")
    with pytest.raises(OutputExistsError):
        streamsoup.stock(paths[1:], base=paths[0], output=tmp_path / "soup")


@pytest.mark.parametrize("based", [True, False])
def test_slerp_of_two(states: Any, paths: list[str], tmp_path: Path, based: bool) -> None:
    """Shoemake's formula, on whole weights or on task vectors."""
    expected = {}
    for name in ("a", "b"):
        origin = states[0][name] if based else 0.0
        x, y = (states[i][name] - origin for i in (1, 2))
        angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        expected[name] = origin + (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(
            angle
        )
    soup = streamsoup.slerp(
        paths[1:3], [0.7, 0.3], base=paths[0] if based else None, output=tmp_path / "soup"
    )
    made = load(soup)
    for name, tensor in expected.items():
        np.testing.assert_allclose(made[name], tensor, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(made["table"], states[0]["table"], rtol=1e-12)
    assert soup.provenance.report["n_straight"] == based


def test_the_barycentre_of_many() -> None:
    """Seen from it, the weighted directions to all cancel; it lies on the sphere."""
    rng = np.random.default_rng(4)
    for spread in (0.001, 0.1, 1.0):
        vectors = rng.normal(size=8) + spread * rng.normal(size=(5, 8))
        shares = np.array([0.1, 0.3, 0.2, 0.2, 0.2])
        factors = sphere_factors(vectors @ vectors.T, shares)
        assert factors is not None
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        point = factors @ units
        assert np.linalg.norm(point) == pytest.approx(1, abs=1e-9)
        angles = np.arccos(np.clip(units @ point, -1, 1))
        ways = (units - np.cos(angles)[:, None] * point) / np.sin(angles)[:, None]
        pull = (shares * angles) @ ways
        assert np.linalg.norm(pull) < 1e-7 * spread


_ON_SPHERES = """
import numpy as np
from streamsoup.methods.closed import sphere_factors
rng = np.random.default_rng(5)
for n in (2, 3, 8, 40):
    for _ in range(20):
        vectors = rng.normal(size=50) + rng.normal(size=(n, 50))
        gram = (vectors[:, None] * vectors).cumsum(axis=2)[..., -1]
        print(sphere_factors(gram, np.full(n, 1 / n) if n > 2 else np.array([0.7, 0.3])).tobytes())
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Before and since numpy 2.4; it ignores names that it does not know.
        ("NPY_DISABLE_CPU_FEATURES", "AVX512F AVX512CD AVX512_SKX X86_V4"),
        ("OPENBLAS_CORETYPE", "Prescott"),
    ],
)
def test_numpy_has_no_say_in_the_barycentre(name: str, value: str) -> None:
    """Neither its vector functions nor its BLAS, which depend on the processor, touch the soup."""
    bare = {each: setting for each, setting in os.environ.items() if each != name}
    here, there = (
        subprocess.run(
            [sys.executable, "-c", _ON_SPHERES], env=settings, capture_output=True, check=True
        ).stdout
        for settings in (bare, {**bare, name: value})
    )
    assert here == there


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_more_vectors_than_elements(n: int, size: int) -> None:
    """A bias of few elements has its mean on the sphere, or none; and no coefficient explodes."""
    rng = np.random.default_rng(0)
    n_found = 0
    for _ in range(300):
        vectors = rng.normal(size=(n, size))
        factors = sphere_factors(vectors @ vectors.T, np.full(n, 1 / n))
        if factors is None:
            continue
        n_found += 1
        assert np.abs(factors).sum() <= 100.001
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        point = factors @ units
        assert np.linalg.norm(point) == pytest.approx(1, abs=1e-8)
        angles = np.arccos(np.clip(units @ point, -1, 1))
        stretch = np.where(angles > 1e-6, angles / np.sin(np.maximum(angles, 1e-6)), 1.0)
        pull = stretch @ (units - np.cos(angles)[:, None] * point) / n
        assert np.linalg.norm(pull) < 1e-6
    assert n_found > (200 if size > 1 else 0)


def test_spheres_without_a_mean() -> None:
    """Opposite vectors, and a vector of length zero, leave no spherical mean."""
    half = np.array([0.5, 0.5])
    assert sphere_factors(np.array([[1.0, -1.0], [-1.0, 1.0]]), half) is None
    assert sphere_factors(np.array([[1.0, 0.0], [0.0, 0.0]]), half) is None
    same_twice = sphere_factors(np.ones((2, 2)), np.array([0.25, 0.75]))
    assert same_twice is not None
    np.testing.assert_allclose(same_twice, [0.25, 0.75])


def test_weights_on_a_sphere_are_shares(paths: list[str], tmp_path: Path) -> None:
    """Negative, missing and infinite weights are refused."""
    for weights in ([1.0, -1.0], [1.0], [0.0, 0.0], [1.0, math.inf], [1e308, 1e308]):
        with pytest.raises(RecipeError, match="weight"):
            streamsoup.slerp(paths[:2], weights, output=tmp_path / "soup")


def test_a_soups_coefficients_make_another(states: Any, paths: list[str], tmp_path: Path) -> None:
    """Those of a Model Stock, tensor by tensor, from its folder, its JSON, or written by hand."""
    stock = streamsoup.stock(paths[1:], base=paths[0], output=tmp_path / "stock")
    record = tmp_path / "stock" / "streamsoup.json"
    whole = json.loads(record.read_text())
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(whole["recipe"]["rule"]["coefficients"]))
    for number, given in enumerate(
        (tmp_path / "stock", record, str(bare), stock.recipe.rule.coefficients)
    ):
        soup = streamsoup.mix(paths, given, output=tmp_path / f"{number}")
        assert soup.provenance.tensors == stock.provenance.tensors
        assert soup.recipe.method == "mix"
        assert streamsoup.verify(soup.path).rederived
    done = command("mix", *paths, "-c", tmp_path / "stock", "-o", tmp_path / "cli", "--json")
    assert json.loads(done.stdout)["recipe"]["rule"] == whole["recipe"]["rule"]
    assert command("plan", *paths, "-c", bare).returncode == 0
    done = command("mix", *paths[1:], "-c", bare, "-o", tmp_path / "few")
    assert "5 coefficients for 4 ingredients" in done.stderr
    done = command("mix", *paths, "-c", bare, "--normalize", "-o", tmp_path / "few")
    assert "only a list of factors can be normalized" in done.stderr
    assert "no such file" in command("mix", *paths, "-c", "stok", "-o", tmp_path / "few").stderr
    given = np.array([0.5, 0.5])
    assert (
        streamsoup.mix(paths[:2], given, output=tmp_path / "np").recipe.rule.coefficients.divisor
        == 1
    )


@pytest.mark.parametrize(
    "text", ["", "3", "[1, 2]", "{}", '{"recipe": 1}', '{"values": ["a"]}', '{"values": [NaN]}']
)
def test_a_file_without_coefficients_is_refused(
    paths: list[str], tmp_path: Path, text: str, states: Any
) -> None:
    """Whatever else it holds, it is named, and the message says what to give."""
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(RecipeError, match=r"c\.json: holds no coefficients .*give a soup"):
        streamsoup.mix(paths[:1], tmp_path / "c.json", output=tmp_path / "soup")
    with pytest.raises(RecipeError, match=r"streamsoup\.json: cannot be read: .*; give a soup"):
        streamsoup.mix(paths[:1], tmp_path, output=tmp_path / "soup")


def test_the_way_to_the_second_on_the_command_line(paths: list[str], tmp_path: Path) -> None:
    """-t is how far to go from the first checkpoint to the second; not together with weights."""
    done = command("slerp", *paths[:2], "-t", "0.25", "-o", tmp_path / "soup")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert made["report"]["weights"] == [0.75, 0.25]
    same = streamsoup.slerp(paths[:2], [0.75, 0.25], output=tmp_path / "same")
    assert same.provenance.tensors == made["tensors"]
    done = command("slerp", *paths[:2], "-t", "0.5", "-w", "1,1", "-o", tmp_path / "both")
    assert done.returncode == 2
    assert "-t and --weights are two ways to give the same; use one of them" in done.stderr
