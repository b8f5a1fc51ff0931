"""Coefficients are taken as they are, and what they sum to is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, save, tensor
from safetensors.numpy import load_file

import streamsoup
from streamsoup.output.coefficients import doubtful_sums, find_coefficients, told


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two checkpoints, of 1 and 3."""
    return [
        str(save(tmp_path / f"run{n}", {"w": tensor(np.full(4, n, np.float64))})) for n in (1, 3)
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, 1], "sum to 2"),
        ([0.3, 0.3], "sum to 0.6"),
        ([0.4999, 0.4999], "sum to 0.9998"),
        ([-1.0, 1.0], "sum to 0"),
        ([0.5, 0.5], None),
        ([2.0, -1.0], None),
        ([0.1] * 10, None),
        (np.float32([1 / 3] * 3), None),
        (torch.softmax(torch.arange(7.0), 0), None),
        (streamsoup.Coefficients.uniform(3), None),
        (streamsoup.Coefficients.given([1, 1], normalize=True), None),
    ],
)
def test_a_sum_that_is_not_one_is_said(given: Any, said: str | None) -> None:
    """And the rounding of float32 is none."""
    warnings = doubtful_sums(find_coefficients(given))
    assert bool(warnings) == (said is not None)
    assert said is None or said in warnings[0]
    if isinstance(given, list) and sum(given):
        assert not doubtful_sums(find_coefficients(given, normalize=True))


def test_so_is_that_of_single_tensors() -> None:
    """By name, and only of those that are off."""
    rows = {"even": (0.5, 0.5), "odd": (1.0, 1.0)}
    (warning,) = doubtful_sums(streamsoup.Coefficients((1.0, 1.0), 2.0, rows))
    assert warning == "the coefficients of 1 of 2 tensors do not sum to 1: odd"


def test_the_summary_says_which_it_was(pair: list[str], tmp_path: Path) -> None:
    """Taken as they are with a warning, or divided by their sum; and in the plan the same."""
    made = command("mix", *pair, "-c", "1,1", "-o", tmp_path / "doubled")
    assert "warning: the coefficients sum to 2" in made.stderr
    assert "coefficients taken as they are, sum 2" in made.stdout
    assert load_file(tmp_path / "doubled" / "model.safetensors")["w"][0] == 4.0
    made = command("mix", *pair, "-c", "1,1", "--normalize", "-o", tmp_path / "mean")
    assert "warning" not in made.stderr
    assert "coefficients divided by their sum, 2" in made.stdout
    assert load_file(tmp_path / "mean" / "model.safetensors")["w"][0] == 2.0
    made = command("plan", *pair, "-c", "1,1")
    assert "sum to 2, so the soup is 2 times a mean" in made.stdout
    assert "--normalize divides" in made.stdout
    made = command("mix", *pair, "-c", "1,1", "--json", "-q", "-o", tmp_path / "json")
    assert "--normalize divides" in json.loads(made.stdout)["warnings"][0]
    made = command("plan", *pair, "-c", "1,1", "--normalize", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout)
    made = command("plan", *pair, "--normalize")
    assert made.returncode == 2


def test_words_for_each_kind() -> None:
    """Of a soup's coefficients, tensor by tensor, the sums are a range."""
    rows = {"a": (0.5, 0.5), "b": (0.5, 0.75)}
    found = streamsoup.Coefficients((0.5, 0.5), per_tensor=rows)
    assert told(found) == "coefficients of each tensor taken as they are, sums 1 to 1.25"


def test_a_live_mix_says_so_too(pair: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A model is doubled in memory with the same word."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    with caplog.at_level(logging.WARNING, "streamsoup"):
        streamsoup.mix_into(model, pair, [1.0, 1.0])
    assert "sum to 2" in caplog.text
