"""Adapters alone make one adapter of a lower rank: the best approximation of their sum."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_adapters_alone as alone
from adapters import PREFIX, factors, save_adapter
from checkpoints import load, load_array, random_model, save
from test_adapters_alone import delta, three

import streamsoup
from streamsoup import Options, arithmetic, interpolate, mix, plan, uniform, verify
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import NonFiniteError, RecipeError, StreamsoupError, VerificationError
from streamsoup.formats.adapters import truncated
from streamsoup.formats.adapters.joined import coefficients_of_all
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.kernels.truncation import dots, left_singular_vectors
from streamsoup.recipe import Coefficients

RNG = np.random.default_rng(11)


def adapter(folder: Path, ranks: dict[str, int]) -> Path:
    """Save an adapter of 30 × 20 modules with these ranks."""
    return alone.adapter(folder, ranks, rank_pattern=ranks)


def best(whole: Any, rank: int) -> tuple[Any, float]:
    """Return the best approximation of a matrix, and its relative error, by LAPACK."""
    u, values, v = np.linalg.svd(whole, full_matrices=False)
    error = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    return (u[:, :rank] * values[:rank]) @ v[:rank], float(error)


def check(soup: Any, adapters: list[Path], coefficients: Any, rank: int, *modules: str) -> None:
    """Compare the deltas of a soup, and its errors, with the best approximations of the sums."""
    for module in modules:
        whole = sum(c * delta(p, module) for c, p in zip(coefficients, adapters, strict=True))
        expected, error = best(whole, rank)
        found = delta(Path(soup.path), module)
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(whole), module
        told = soup.provenance.report["rank_errors"].get(module)
        if told is None:
            assert error < 1e-14
        else:
            assert told == pytest.approx(error, abs=1e-13), module
    assert soup.provenance.report["rank"] == rank
    assert verify(soup.path).rederived


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_the_best_approximation_of_the_mean(tmp_path: Path, rank: int, io: Any) -> None:
    """Every module has at most so many ranks, and is the truncated singular value decomposition."""
    paths = three(tmp_path)
    soup = uniform(paths, output=tmp_path / "out", options=Options(rank=rank, io=io))
    modules = {
        name.split(".lora_")[0].removeprefix(PREFIX): tensor[1][0]
        for name, tensor in load(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert max(modules.values()) == rank
    check(soup, paths, [1 / 3] * 3, rank, *modules)
    assert not soup.warnings


@pytest.mark.parametrize("given", [[1.0, -0.5], [0.0, 2.0], [-3.0, 1e-3]])
def test_coefficients_of_any_sign(tmp_path: Path, given: list[float]) -> None:
    """The approximation is that of the sum with its coefficients, also by other verbs."""
    paths = [adapter(tmp_path / name, {"q": rank}) for name, rank in (("a", 4), ("b", 3))]
    options = Options(rank=2)
    soup = mix(paths, given, output=tmp_path / "out", options=options)
    check(soup, paths, given, 2, "q")
    alpha = given[1]
    soup = interpolate(*paths, alpha, output=tmp_path / "way", options=options)
    check(soup, paths, [1 - alpha, alpha], 2, "q")
    soup = arithmetic(paths[1:], base=paths[0], scale=alpha, output=tmp_path / "s", options=options)
    check(soup, paths, [1 - alpha, alpha], 2, "q")
    for name in ("streamsoup.json", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).exists()


def test_one_adapter_is_compressed_and_ranks_that_suffice_are_exact(tmp_path: Path) -> None:
    """One adapter alone may be given; where no rank is lost, nothing is approximated."""
    path = adapter(tmp_path / "a", {"q": 6, "k": 2})
    soup = uniform([path], output=tmp_path / "out", options=Options(rank=3))
    check(soup, [path], [1.0], 3, "q", "k")
    assert [*soup.provenance.report["rank_errors"]] == ["q"]
    other = adapter(tmp_path / "b", {"q": 2})
    whole = uniform([path, other], output=tmp_path / "whole")
    same = uniform([path, other], output=tmp_path / "same", options=Options(rank=8))
    assert same.provenance.report["rank_errors"] == {}
    files = [Path(each.path) / "adapter_model.safetensors" for each in (whole, same)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Of equal adapters, half of the ranks add nothing.
    twice = uniform([path, path], output=tmp_path / "twice", options=Options(rank=7))
    assert twice.provenance.report["rank_errors"]["q"] < 1e-12
    check(twice, [path, path], [0.5, 0.5], 7, "q")


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    """Embeddings, convolutions and biases, and adapters that cover different modules."""
    paths = []
    for name in "ab":
        a, b = factors(RNG, 12, 40, 3)
        tensors: Any = {
            "e.lora_embedding_A": a,
            "e.lora_embedding_B": b,
            "c.lora_A.weight": factors(RNG, 6, 4 * 9, 3)[0].reshape(3, 4, 3, 3),
            "c.lora_B.weight": factors(RNG, 6, 4, 3)[1].reshape(6, 3, 1, 1),
            f"only_{name}.lora_A.weight": factors(RNG, 8, 5, 3)[0],
            f"only_{name}.lora_B.weight": factors(RNG, 8, 5, 3)[1],
            "head.weight": RNG.normal(size=(4, 4)).astype(np.float32),
        }
        paths.append(save_adapter(tmp_path / name, tensors, r=3, modules_to_save=["head"]))
    soup = uniform(paths, output=tmp_path / "out", options=Options(rank=2))
    found = load(tmp_path / "out" / "adapter_model.safetensors")
    assert tuple(found[f"{PREFIX}c.lora_A.weight"][1]) == (2, 4, 3, 3)
    assert tuple(found[f"{PREFIX}c.lora_B.weight"][1]) == (6, 2, 1, 1)
    files = [path / "adapter_model.safetensors" for path in (*paths, tmp_path / "out")]
    for kinds in (
        ("e.lora_embedding_A", "e.lora_embedding_B"),
        ("c.lora_A.weight", "c.lora_B.weight"),
    ):
        *each, made = (
            load_array(file, PREFIX + kinds[1]).reshape(-1, n).astype(np.float64)
            @ load_array(file, PREFIX + kinds[0]).reshape(n, -1)
            for file, n in zip(files, (3, 3, 2), strict=True)
        )
        scale = json.loads((paths[0] / "adapter_config.json").read_text())["lora_alpha"] / 3
        expected, _ = best(scale * sum(each) / 2, 2)
        assert np.linalg.norm(made - expected) <= 1e-6 * np.linalg.norm(expected)
    assert set(soup.provenance.report["rank_errors"]) == {"e", "c", "only_a", "only_b"}
    heads = [load_array(file, PREFIX + "head.weight") for file in files]
    assert np.array_equal(heads[2], ((heads[0].astype(float) + heads[1]) / 2).astype(np.float32))
    assert verify(soup.path).rederived


def test_the_bytes_depend_on_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, budgets, how files are read, parts and factors that are made anew change no byte."""
    paths = [adapter(tmp_path / name, {f"m.{i}": 5 for i in range(6)}) for name in "abc"]
    made = set()
    for number, more in enumerate(
        (
            {"threads": 1},
            {"threads": 3, "memory": "200MB"},
            {"io": "read"},
            {"kept": 1},
            {"part": 3},
        )
    ):
        out = tmp_path / f"o{number}"
        monkeypatch.setattr(truncated, "_KEPT", more.pop("kept", 4))
        n_parts: Any = more.pop("part", None)
        for part in range(1, (n_parts or 0) + 1):
            options = Options(rank=4, part=f"{part}/{n_parts}", commit=True)
            uniform(paths, output=out, options=options)
        if n_parts is None:
            uniform(paths, output=out, options=Options(rank=4, **more))
        report = json.loads((out / "streamsoup.json").read_bytes())["report"]
        assert len(report["rank_errors"]) == 6
        made.add((out / "adapter_model.safetensors").read_bytes())
    assert len(made) == 1
    options = Options(rank=4, rank_of=(1.0, 1.0, 1.0))
    opened = open_ingredients(paths, options.reading)
    again = pickle.loads(pickle.dumps(opened[1].source))
    assert again.fingerprint == opened[1].source.fingerprint
    other = open_ingredients(paths, Options(rank=4, rank_of=(1.0, 1.0, 2.0)).reading)
    assert other[1].source.fingerprint != again.fingerprint


def test_another_adapter_that_changed_is_found(tmp_path: Path) -> None:
    """`verify` finds one changed number in any adapter, and another soup is never resumed."""
    paths = [adapter(tmp_path / name, {"q": 3}) for name in "ab"]
    uniform(paths, output=tmp_path / "out", options=Options(rank=2))
    shutil.copytree(paths[1], tmp_path / "kept")
    shutil.rmtree(paths[1])
    adapter(paths[1], {"q": 3})
    with pytest.raises(VerificationError, match="derives differently"):
        verify(tmp_path / "out")
    shutil.rmtree(paths[1])
    shutil.copytree(tmp_path / "kept", paths[1])
    assert verify(tmp_path / "out").rederived


def test_what_is_refused(tmp_path: Path) -> None:
    """A rank is for adapters alone, with coefficients that are the same for all tensors."""
    paths = [adapter(tmp_path / name, {"q": 3}) for name in "ab"]
    base = save(tmp_path / "base", random_model(0))
    out = tmp_path / "out"
    for given in ([base], [base, base]):
        with pytest.raises(RecipeError, match="rank is for LoRA adapters"):
            uniform(given, output=out, options=Options(rank=2))
    for rank in (0, -1, True, 1.5, "2"):
        with pytest.raises(RecipeError, match="rank"):
            uniform(paths, output=out, options=Options(rank=rank))  # type: ignore[arg-type]
    both = [adapter(tmp_path / f"{name}2", {"q": 3, "k": 3}) for name in "ab"]
    with pytest.raises(RecipeError, match="the same for all tensors"):
        mix(both, {"*q*": [1, 2], "*": [1, 1]}, output=out, options=Options(rank=2))
    with pytest.raises(StreamsoupError, match="adapter"):
        streamsoup.ties(paths[1:], 0.5, base=paths[0], output=out, options=Options(rank=2))
    options = Options(rank=2, rank_of=(1.0, 0.0), dtype="f32")
    with pytest.raises(StreamsoupError, match="factors mean nothing apart"):
        streamsoup.apply(paths, Linear(Coefficients.uniform(2)), output=out, options=options)
    opened = open_ingredients(paths, options.reading)
    other = coefficients_of_all(opened[0].source, Coefficients.given([0.0, 1.0]))
    with pytest.raises(StreamsoupError, match="factors mean nothing apart"):
        streamsoup.apply(opened, Linear(other), output=out, options=options)
    right = coefficients_of_all(opened[0].source, Coefficients.given([1.0, 0.0]))
    streamsoup.apply(opened, Linear(right), output=tmp_path / "right", options=options)
    with pytest.raises(RecipeError, match="each point is another sum"):
        streamsoup.sweep(
            paths[1:], "arithmetic", lambda *_: 1.0, {"scale": [0.5, 1.0]}, base=paths[0],
            output=out, options=Options(rank=2),
        )  # fmt: skip
    a, b = factors(RNG, 30, 20, 3)
    b[1, 1] = np.nan
    bad = save_adapter(tmp_path / "n", {"q.lora_A.weight": a, "q.lora_B.weight": b}, r=3)
    with pytest.raises(NonFiniteError, match=r"q\.lora_.*: holds NaN or Inf"):
        uniform([bad, *paths], output=out, options=Options(rank=2))
    with pytest.raises(NonFiniteError, match=r"beyond the range of float64"):
        mix(paths, [1e308, 1e308], output=out, options=Options(rank=2))
    assert not out.exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    """`--rank` plans, makes, prints its recipe and is run again from it; the card tells of it."""
    paths = [str(adapter(tmp_path / name, {"q": 3})) for name in "ab"]

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "streamsoup", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert plan(paths, options=Options(rank=2)).nbytes_written
    out = str(tmp_path / "out")
    assert "rank" in run("uniform", *paths, "--rank", "2", "-o", out)
    run("verify", out)
    recipe = run("uniform", *paths, "--rank", "2", "--print-recipe")
    assert "rank: 2" in recipe
    (tmp_path / "r.yaml").write_text(recipe)
    run("run", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "again"))
    run("run", out, "-o", str(tmp_path / "more"))
    made = {
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("out", "again", "more")
    }
    assert len(made) == 1
    assert "more ranks than 2" in (tmp_path / "out" / "README.md").read_text()


def test_vectors_are_orthogonal_and_sums_are_right() -> None:
    """Against LAPACK, over shapes, and ranks that are not there; sums are those of `math.fsum`."""
    for n, m, k, rank in (
        (30, 20, 6, 3),
        (5, 40, 12, 4),
        (40, 3, 8, 5),
        (1, 1, 3, 2),
        (600, 9, 3, 3),
    ):
        b, a = RNG.normal(size=(k, n)), RNG.normal(size=(k, m))
        if k == 12:
            b[6:], a[6:] = b[:6], a[:6]
        vectors, values = left_singular_vectors(b, a, rank)
        whole = b.T @ a
        expected, _ = best(whole, rank)
        assert np.allclose(vectors.T @ (vectors @ whole), expected, rtol=0, atol=1e-12)
        u = vectors @ vectors.T
        there = np.diag(u) > 0.5
        assert np.allclose(u, np.diag(there.astype(float)), rtol=0, atol=1e-14)
        least = min(len(values), n, m)
        assert np.allclose(values[:least], np.linalg.svd(whole)[1][:least], rtol=0, atol=1e-12)
        assert np.allclose(dots(b, b[0]), b @ b[0])
    assert not left_singular_vectors(np.zeros((2, 3)), np.ones((2, 4)), 2)[0].any()
