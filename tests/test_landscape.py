"""Sweeps and landscapes against plain in-memory code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import PARTS, SPLITS, Counting, accuracy, plain_logits
from networks import build
from safetensors.torch import load_file

from streamsoup.errors import (
    MismatchError,
    RecipeError,
)
from streamsoup.study.landscape.landscape import LandscapeSettings, landscape
from streamsoup.study.landscape.paths import wise_ft as sweep

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sweep_equals_plain_code(folders: list[str], tmp_path: Path) -> None:
    """Each point is the plain interpolation; more points later cost what is new."""
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders[:2]]
    found = sweep(*folders[:2], Counting(), [0, 0.5, 1], cache=tmp_path / "cache")
    for split in SPLITS:
        expected = [
            accuracy(plain_logits(some, split), split) for some in (states[:1], states, states[1:])
        ]
        assert found.values[split] == pytest.approx(expected)
    task = Counting()
    more = sweep(*folders[:2], task, [0, 0.25, 0.5, 1], cache=tmp_path / "cache")
    assert len(task.asked) == 4
    assert more.best in more.alphas
    of_numpy = sweep(*folders[:2], Counting(), np.linspace(0, 1, 5)[:2], cache=tmp_path / "cache")
    assert of_numpy.values["val"] == more.values["val"][:2]
    barrier = more.barrier("test")
    assert barrier is not None
    assert barrier.over_chord >= 0
    lines = [json.loads(line) for line in more.to_lines()]
    assert sum(line["kind"] == "point" for line in lines) == 16
    with pytest.raises(RecipeError):
        sweep(*folders[:2], task, [math.nan], cache=tmp_path / "cache")


def test_a_model_that_is_an_ingredient_is_refused(folders: list[str], tmp_path: Path) -> None:
    """The first mixture would overwrite it, and all later ones would be of something else."""
    model = build()
    before = model[0].weight.clone()
    with pytest.raises(MismatchError, match="shares memory with the model"):
        sweep(model, folders[0], Counting(), [0.5, 0], cache=tmp_path / "cache", model=model)
    assert torch.equal(model[0].weight, before)


def test_landscape_equals_plain_code(folders: list[str], tmp_path: Path) -> None:
    """A grid point is the plain mixture at that place; a second run measures nothing."""
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders[:3]]

    def draw(task: Counting) -> Any:
        return landscape(
            *folders[:3],
            task,
            cache=tmp_path / "cache",
            settings=LandscapeSettings(resolution=5, splits=("test",)),
        )

    found, again = draw(Counting()), Counting()
    y, x = 1, 3
    c = found.plane.coefficients(found.xs[x], found.ys[y])
    model = build().eval()
    mixed = {
        n: sum(k * s[n].double() for k, s in zip(c, states, strict=True)).float()
        if states[0][n].is_floating_point()
        else states[0][n]
        for n in states[0]
    }
    model.load_state_dict(mixed)
    with torch.no_grad():
        logits = model(PARTS["test"][0]).double().numpy()
    expected = accuracy(logits, "test")
    assert found.values["test"][y, x] == pytest.approx(expected)
    assert [mark.name for mark in found.marks[:3]] == ["run0", "run1", "run2"]
    np.testing.assert_array_equal(draw(again).values["test"], found.values["test"])
    assert again.asked == []
    with pytest.raises(RecipeError, match="on one line"):
        landscape(*folders[:2], folders[1], again, cache=tmp_path / "none")
    assert again.asked == []


def test_recalibrated_points_equal_plain_code(folders: list[str], tmp_path: Path) -> None:
    """BatchNorm statistics are those of the mixture: of each point of a path, but its ends."""

    class Recalibrating(Counting):
        def recalibration(self) -> Iterator[torch.Tensor]:
            yield PARTS["val"][0]

    states = [load_file(Path(folder) / "model.safetensors") for folder in folders[:2]]
    found = sweep(
        *folders[:2], Recalibrating(), [0, 0.25, 1], cache=tmp_path / "cache", recalibrate=True
    )
    model = build()
    for alpha, nll in zip((0, 0.25, 1), found.losses["test"], strict=True):
        model.load_state_dict(
            {
                n: ((1 - alpha) * t.double() + alpha * states[1][n].double()).float()
                if t.is_floating_point()
                else t
                for n, t in states[0].items()
            }
        )
        if alpha == 0.25:
            torch.optim.swa_utils.update_bn([PARTS["val"][0]], model)
        model.eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(PARTS["test"][0]), PARTS["test"][1])
        assert nll == pytest.approx(float(loss), rel=1e-5)
