"""BatchNorm: averaged statistics are said; variances below zero are neither written nor scored."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from checkpoints import command
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import nn

import streamsoup
from streamsoup.errors import RecipeError
from streamsoup.live.recalibration import negative_variances

VARIANCES = [1.0, 4.0, 9.0]


def build() -> nn.Module:
    """A small network with BatchNorm in it."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three checkpoints whose variances are 1, 4 and 9."""
    base = build().state_dict()
    made = []
    for number, variance in enumerate(VARIANCES):
        state = {n: t + 0.1 * torch.randn(t.shape) if t.dim() else t for n, t in base.items()}
        state["1.running_var"] = torch.full((3,), variance)
        made.append(str(tmp_path / f"{number}.safetensors"))
        save_file(state, made[-1])
    return made


class Scored:
    """A task with labels, and inputs to measure statistics on."""

    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    labels = (inputs.sum(1) > 0).long()
    splits = ("val", "test")

    def build(self) -> nn.Module:
        """Build the network."""
        return build()

    def score(self, model: nn.Module, split: str) -> float:
        """Return the share of right answers."""
        return float((model(self.inputs).argmax(1) == self.labels).double().mean())

    def predictions(self, model: nn.Module, split: str) -> Iterator[Any]:
        """Yield logits and labels."""
        yield model(self.inputs), self.labels

    def recalibration(self) -> Iterator[torch.Tensor]:
        """Yield inputs."""
        yield self.inputs


@pytest.mark.parametrize("dtype", ["same", "bf16", "f16", "f64"])
def test_a_variance_below_zero_is_not_written(paths: list[str], tmp_path: Path, dtype: str) -> None:
    """Whatever verb and dtype: refused by name before anything is there, with the way on."""
    options, output = streamsoup.Options(dtype=dtype), tmp_path / "soup"
    verbs: list[Any] = [
        lambda: streamsoup.interpolate(*paths[:2], -1.0, output=output, options=options),
        lambda: streamsoup.arithmetic(
            paths[1:], -2.0, base=paths[0], output=output, options=options
        ),
        lambda: streamsoup.mix(paths, [0.5, 1.0, -0.6], output=output, options=options),
    ]
    for verb in verbs:
        with pytest.raises(RecipeError, match=r"1\.running_var: BatchNorm variances below zero"):
            verb()
        assert not list(tmp_path.glob("soup*"))
    # (1 - α)·1 + α·4 is below zero from α = -1/3 on.
    streamsoup.interpolate(*paths[:2], -0.33, output=output, options=options)


def test_zero_is_no_variance_below_zero(paths: list[str], tmp_path: Path) -> None:
    """Neither 0 nor −0 is: such a unit is dead, and its outputs are numbers."""
    soup = streamsoup.mix(paths[:2], [4.0, -1.0], output=tmp_path / "soup")
    (file,) = Path(soup.path).glob("*.safetensors")
    assert load_file(file)["1.running_var"].tolist() == [0.0] * 3


def test_a_name_alone_is_no_statistic(tmp_path: Path) -> None:
    """Without a running mean beside it, a tensor of that name may be anything."""
    states = [{"running_var": torch.tensor([float(n)])} for n in (1, 4)]
    streamsoup.mix(states, [-1.0, 0.5], output=tmp_path / "soup")


def test_the_way_on_that_is_named(paths: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Into a live model it is mixed with a word; measured anew, its outputs are numbers."""
    model = build().eval()
    with caplog.at_level(logging.WARNING, "streamsoup"):
        streamsoup.mix_into(model, paths[:2], [2.0, -1.0])
    assert "1.running_var: BatchNorm variances below zero" in caplog.text
    assert model(Scored.inputs).isnan().any()
    assert streamsoup.recalibrate(model, [Scored.inputs]) == 1
    assert not negative_variances(model)
    assert model(Scored.inputs).isfinite().all()


def test_points_without_a_score_stay_white(
    paths: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A plane is a number just where the variance is one, and all of it once measured anew."""
    settings = streamsoup.LandscapeSettings(resolution=7, margin=0.7)
    more: dict[str, Any] = {"settings": settings}
    with caplog.at_level(logging.WARNING, "streamsoup"):
        found = streamsoup.landscape(*paths, Scored(), cache=tmp_path / "cache", **more)
    below = np.array(
        [
            [float(np.dot(found.plane.coefficients(x, y), VARIANCES)) < 0 for x in found.xs]
            for y in found.ys
        ]
    )
    assert 0 < below.sum() < below.size
    np.testing.assert_array_equal(np.isnan(found.values["val"]), below)
    np.testing.assert_array_equal(np.isnan(found.losses["val"]), below)
    assert (
        f"not scored, for a negative coefficient: {below.sum()} mixtures; BatchNorm" in caplog.text
    )
    again = streamsoup.landscape(*paths, Scored(), cache=tmp_path / "cache", **more)
    assert again.n_measured == 0
    np.testing.assert_array_equal(again.values["val"], found.values["val"])
    settings = replace(settings, recalibrate=True)
    anew = streamsoup.landscape(*paths, Scored(), cache=tmp_path / "anew", settings=settings)
    assert np.isfinite(anew.values["val"]).all()


def test_a_sweep_beyond_both_ends(paths: list[str], tmp_path: Path) -> None:
    """α with a variance below zero have no score, and the best one is chosen among the others."""
    found = streamsoup.wise_ft(
        paths[2], paths[0], Scored(), [0.0, 0.5, 1.0, 1.1, 1.2], cache=tmp_path / "cache"
    )
    assert [math.isnan(value) for value in found.values["val"]] == [False] * 4 + [True]
    assert found.best <= 1.1


def test_averaged_statistics_are_said(
    paths: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By uniform and compare, and by neither without BatchNorm or with --recalibrate."""
    made = command("uniform", *paths, "-o", tmp_path / "soup")
    assert "statistics of 1 layer of BatchNorm (1.running_var" in made.stderr
    assert "streamsoup.recalibrate(model, batches)" in made.stderr
    with caplog.at_level(logging.WARNING, "streamsoup"):
        settings = streamsoup.CompareSettings(orders=0, curve=0, pairs=0, theory=False, learned=())
        found = streamsoup.compare(paths, Scored(), output=tmp_path / "1", settings=settings)
        assert caplog.text.count("averaged running statistics of BatchNorm") == 1
        assert any("averaged running statistics" in note for note in found.notes)
        caplog.clear()
        settings = streamsoup.CompareSettings(
            orders=0, curve=0, pairs=0, theory=False, learned=(), recalibrate=True
        )
        streamsoup.compare(paths, Scored(), output=tmp_path / "2", settings=settings)
        streamsoup.uniform(networks.ingredients(tmp_path / "in", 2), output=tmp_path / "3")
    assert "averaged running statistics" not in caplog.text


def test_one_rule_for_greedy_and_compare(paths: list[str], tmp_path: Path) -> None:
    """Recalibrated, both score a soup of one as its file, and a soup of several the same."""

    class Scores(Scored):
        predictions = None  # type: ignore[assignment]

    settings = streamsoup.CompareSettings(
        orders=0, curve=0, pairs=0, theory=False, learned=(), recalibrate=True
    )
    compared = streamsoup.compare(paths, Scores(), output=tmp_path / "compare", settings=settings)
    search = streamsoup.GreedySettings(recalibrate=True, split="val")
    soup = streamsoup.greedy(paths, Scores(), output=tmp_path / "greedy", settings=search)
    singles = [row for row in compared.rows if row.kind == "ingredient"]
    model = build().eval()
    for path, row, trial in zip(paths, singles, soup.singles, strict=True):
        model.load_state_dict(load_file(path))
        with torch.no_grad():
            value = Scored().score(model, "val")
        assert value == row.cells["val"].value == trial.score.value
    (row,) = (row for row in compared.rows if row.name == "greedy soup")
    assert row.cells["val"].value == soup.score
