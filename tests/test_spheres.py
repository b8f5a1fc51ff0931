"""Karcher, multi-SLERP and NuSLERP against vectors written out in numpy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamsoup
from streamsoup.errors import RecipeError

Floats = Any


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """A base and three fine-tunes of it, which lie at large angles; ``still`` moves in none."""
    rng = np.random.default_rng(3)
    base = {"a": rng.normal(size=(9, 4)), "b": rng.normal(size=7), "still": rng.normal(size=5)}
    found = []
    for i in range(4):
        moved = {
            name: value if i == 0 or name == "still" else value + rng.normal(size=value.shape)
            for name, value in base.items()
        }
        save_file(moved, tmp_path / f"{i}.safetensors")
        found.append(str(tmp_path / f"{i}.safetensors"))
    return found


def vectors(paths: list[str], name: str, base: str | None) -> tuple[list[Floats], Floats]:
    """Read a tensor of each as a vector, from the base if there is one."""
    start = np.zeros(1) if base is None else load_file(base)[name].ravel()
    return [load_file(path)[name].ravel() - start for path in paths], start


def soup(path: Path, name: str) -> Floats:
    """Read a tensor of a soup."""
    return load_file(path / "model.safetensors")[name].ravel()


@pytest.mark.parametrize("based", [False, True])
def test_the_karcher_mean_is_where_directions_cancel(
    paths: list[str], tmp_path: Path, based: bool
) -> None:
    """The weighted logarithms of all ingredients add up to zero there; lengths are averaged."""
    base, others, w = paths[0] if based else None, paths[1:], np.array([0.5, 0.2, 0.3])
    streamsoup.karcher(others, [5, 2, 3], base=base, output=tmp_path / "soup")
    for name in ("a", "b"):
        found, start = vectors(others, name, base)
        mean = soup(tmp_path / "soup", name) - start
        lengths = np.array([np.linalg.norm(each) for each in found])
        assert np.linalg.norm(mean) == pytest.approx(w @ lengths, rel=1e-9)
        point = mean / np.linalg.norm(mean)
        pull = np.zeros_like(point)
        for share, each, length in zip(w, found, lengths, strict=True):
            cosine = each @ point / length
            way = each / length - cosine * point
            pull += share * np.arccos(cosine) * way / np.linalg.norm(way)
        assert np.linalg.norm(pull) < 1e-7


@pytest.mark.parametrize("based", [False, True])
def test_multislerp_is_one_step_on_the_sphere(
    paths: list[str], tmp_path: Path, based: bool
) -> None:
    """It is the step as its formula has it, made of whole vectors."""
    base, others, w = paths[0] if based else None, paths[1:], np.array([0.5, 0.2, 0.3])
    streamsoup.multislerp(others, [5, 2, 3], base=base, output=tmp_path / "soup")
    for name in ("a", "b"):
        found, start = vectors(others, name, base)
        lengths = np.array([np.linalg.norm(each) for each in found])
        units = [each / length for each, length in zip(found, lengths, strict=True)]
        m = sum(share * unit for share, unit in zip(w, units, strict=True))
        m = m / np.linalg.norm(m)
        t = sum(s * (unit - (unit @ m) * m) for s, unit in zip(w, units, strict=True))
        size = np.linalg.norm(t)
        point = np.cos(size) * m + (np.sin(size) * t / size if size > 1e-12 else 0)
        expected = start + point * (w @ lengths)
        assert np.allclose(soup(tmp_path / "soup", name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("based", [False, True])
def test_nuslerp_turns_from_the_first_to_the_second(
    paths: list[str], tmp_path: Path, based: bool
) -> None:
    """It is the textbook's SLERP of vectors as they are, at the second share."""
    base, others, t = paths[0] if based else None, paths[1:3], 0.3
    streamsoup.nuslerp(others, [0.7, 0.3], base=base, output=tmp_path / "soup")
    for name in ("a", "b"):
        (first, second), start = vectors(others, name, base)
        angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
        turned = np.sin((1 - t) * angle) * first + np.sin(t * angle) * second
        expected = start + turned / np.sin(angle)
        assert np.allclose(soup(tmp_path / "soup", name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["karcher", "multislerp", "nuslerp"])
def test_what_has_no_angle_is_averaged_and_named(
    paths: list[str], tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Opposite tensors have their straight mean, and are named; what nothing moves stays."""
    base = load_file(paths[0])
    for i, sign in ((1, 1.0), (2, -1.0)):
        save_file(base | {"a": base["a"] + sign, "b": base["b"] + i}, paths[i])
    with caplog.at_level(logging.WARNING, "streamsoup"):
        verb = getattr(streamsoup, method)
        made = verb(paths[1:3], [3, 1], base=paths[0], output=tmp_path / "soup")
    assert made.provenance.report["straight"] == "a"
    assert "the straight mean is taken: a" in caplog.text
    assert np.array_equal(soup(tmp_path / "soup", "still"), base["still"])
    expected = base["a"].ravel() + 0.75 - 0.25
    assert np.allclose(soup(tmp_path / "soup", "a"), expected, rtol=1e-12)
    assert streamsoup.verify(made.path).rederived


def test_what_fits_no_sphere_is_refused(paths: list[str], tmp_path: Path) -> None:
    """NuSLERP takes two; weights are as many as ingredients, and none is negative."""
    with pytest.raises(RecipeError, match="got 3"):
        streamsoup.nuslerp(paths[1:], output=tmp_path / "soup")
    with pytest.raises(RecipeError, match="2 weights for 3"):
        streamsoup.karcher(paths[1:], [1, 2], output=tmp_path / "soup")
    with pytest.raises(RecipeError, match="none negative"):
        streamsoup.multislerp(paths[1:], [1, 2, -1], output=tmp_path / "soup")
