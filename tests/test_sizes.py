"""Sizes: what people write, and what they are shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save

import streamsoup
from streamsoup import (
    CompareSettings,
    GreedySettings,
    LandscapeSettings,
    LearnedSettings,
    Options,
    uniform,
)
from streamsoup.errors import RecipeError, StreamsoupError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.sizes import nbytes_text, parse_nbytes


def test_sizes_are_read_in_any_common_spelling() -> None:
    """Decimal and binary units, any case, blanks, fractions and exponents; the rest is refused."""
    for text, nbytes in {
        "1": 1,
        "4096B": 4096,
        "150MB": 150 * 10**6,
        "150 mb": 150 * 10**6,
        "5G": 5 * 10**9,
        "5GiB": 5 * 2**30,
        "5gi": 5 * 2**30,
        "1.5k": 1500,
        " 0.5 KiB ": 512,
        "1e9": 10**9,
        "1.5e3MB": 15 * 10**8,
        "2TB": 2 * 10**12,
    }.items():
        assert parse_nbytes(text) == nbytes, text
    bad = ("", " ", "MB", "-1", "0", "0.4", "1.2.3", "nan", "inf", "1e", "5 PB", "5GBB", "1_000")
    for text in (*bad, "0x10", "five", "5,0GB", "\x1b", "٣", "３", "1\u212a", "1\xa0kB"):
        with pytest.raises(RecipeError, match="is not a size"):
            parse_nbytes(text)
    assert parse_nbytes("9" * 500) == 2**63
    assert parse_nbytes(4096) == 4096
    assert parse_nbytes(np.int64(4096)) == 4096  # type: ignore[arg-type]
    for number in (5e9 / 3, 5e9, None, b"5GB"):
        with pytest.raises(RecipeError, match="is not a size; write a whole number of bytes"):
            parse_nbytes(number)  # type: ignore[arg-type]


def test_options_take_whole_numbers(tmp_path: Path) -> None:
    """What is not a whole number is refused before anything is written; numpy's are taken."""
    a = save(tmp_path / "a", random_model(0))
    for wrong in ({"shard_size": 5e9}, {"memory": 3e8}, {"threads": 2.0}, {"threads": "2"}):
        with pytest.raises(RecipeError, match=r"is not a (size; .* )?whole number"):
            uniform([a], output=tmp_path / "out", options=Options(**wrong))  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == ["a"]
    numbers: dict[str, Any] = {"shard_size": 4000, "memory": 10**9, "threads": 2}
    numbers = {name: np.int64(number) for name, number in numbers.items()}
    soup = uniform([a], output=tmp_path / "out", options=Options(**numbers))
    assert soup.recipe.shard_size == 4000


def test_numbers_of_other_libraries_are_numbers() -> None:
    """Options hold Python's own, whoever's were given; what is not a number is refused by name."""
    whole = GreedySettings(seed=np.int64(3), jobs=torch.tensor(2), z=np.float32(0.5))  # type: ignore[arg-type]
    assert whole == GreedySettings(seed=3, jobs=2, z=0.5)
    assert {type(whole.seed), type(whole.jobs), type(whole.z)} == {int, float}
    learning = LearnedSettings(evaluations=np.int32(3), lr=1)  # type: ignore[arg-type]
    assert (type(learning.evaluations), type(learning.lr)) == (int, float)
    assert type(CompareSettings(seed=np.uint8(3)).seed) is int  # type: ignore[arg-type]
    assert LearnedSettings(temperature=np.True_).temperature is True  # type: ignore[arg-type]
    assert GreedySettings(timeout=None).timeout is None
    assert Options(device=torch.device("cuda:1")).device == "cuda:1"
    wrong: list[tuple[Any, str, Any]] = [
        (GreedySettings, "seed", 1.5),
        (GreedySettings, "jobs", None),
        (GreedySettings, "timeout", "1"),
        (LearnedSettings, "lr", None),
        (LearnedSettings, "tolerance", np.ones(2)),
        (GreedySettings, "z", torch.ones(2)),
        (GreedySettings, "min_gain", b"1"),
        (LearnedSettings, "temperature", "no"),
        (CompareSettings, "curve", [8]),
        (Options, "threads", np.float64(2)),
    ]
    for kind, name, value in wrong:
        with pytest.raises(
            RecipeError, match=f"^{name}: .* is not a (whole number|number|truth value)$"
        ):
            kind(**{name: value})


def test_what_is_of_another_kind_is_refused_in_words(tmp_path: Path) -> None:
    """Whatever is given in the place of options, ingredients or numbers, it is named."""
    a = str(save(tmp_path / "a", random_model(0)))
    b, out = a, tmp_path / "out"
    many: Any = {1.0, 2.0}
    wrong: list[tuple[Any, str]] = [
        (lambda: uniform([a], output=out, options=None), "None is not a streamsoup.Options"),
        (lambda: uniform([a], output=out, options={}), "{} is not a streamsoup.Options"),
        (lambda: streamsoup.geometry([a], options=GreedySettings()), "is not a streamsoup.Options"),
        (lambda: uniform([a, 3], output=out), "3 is not an ingredient; give a path"),
        (lambda: uniform([torch.nn.Linear], output=out), "a state dict holds nothing"),
        (lambda: uniform(np.array(3), output=out), "expected a list of ingredients"),
        (lambda: uniform([a], output="a\0b"), "the path holds a NUL"),
        (lambda: streamsoup.mix([a, b], "12", output=out), "12: cannot be read"),
        (lambda: streamsoup.mix([a, b], b"12", output=out), "is not a list of numbers"),
        (lambda: streamsoup.mix([a, b], many, output=out), "is not a list of numbers"),
        (lambda: streamsoup.mix([a, b], ["x", 1], output=out), "is not a list of numbers"),
        (lambda: streamsoup.mix([a, b], 3, output=out), "3: is not a list of numbers"),
        (lambda: streamsoup.mix([a], [1], normalize="no", output=out), "not a truth value"),
        (lambda: streamsoup.interpolate(a, b, "0.5", output=out), "alpha: '0.5' is not a number"),
        (lambda: streamsoup.ema([a, b], None, output=out), "decay: None is not a number"),
        (lambda: streamsoup.lawa([a, b], 1.5, output=out), "window: 1.5 is not a whole number"),
        (lambda: streamsoup.slerp([a, b], "11", output=out), "expected a list of weights"),
        (lambda: streamsoup.arithmetic([], 0.5, base=a, output=out), "at least one ingredient"),
        (
            lambda: streamsoup.arithmetic([a], ["x"], base=b, output=out),
            "scale: 'x' is not a number",
        ),
        (lambda: GreedySettings(scores=["x"]), "scores: 'x' is not a number"),
        (lambda: GreedySettings(scores=3), "are not a list of numbers"),
        (lambda: GreedySettings(jobs=10**9).check(2), "more processes than any machine"),
        (
            lambda: GreedySettings(ties=np.array(["accept"])).check(2),
            "must be one of accept, reject",
        ),
        (lambda: Options(on_event="x"), "on_event: 'x' is not callable"),
        (lambda: LearnedSettings(evaluations=10**400), "evaluations: 1"),
        (lambda: CompareSettings(orders=-1), "orders -1 is below 0"),
        (lambda: LandscapeSettings(resolution=1), "resolution must be at least 2"),
        (lambda: LandscapeSettings(splits="val"), "splits 'val' is one word"),
    ]
    for call, message in wrong:
        with pytest.raises(StreamsoupError) as error:
            call()
        assert message in str(error.value)
        assert len(str(error.value)) < 400
        assert not out.exists()
    soup = uniform([a, b], output=os.fsencode(out))
    with pytest.raises(RecipeError, match="0 ingredients given for a soup of 2"):
        streamsoup.verify(out, ingredients=[])
    shown = [soup, soup.provenance, *open_ingredients([a]), streamsoup.geometry([a, b])]
    assert all(len(repr(each)) < 300 for each in shown)


def test_sizes_are_written_for_people() -> None:
    """Three digits and a decimal unit."""
    sizes = (0, 999, 1000, 999_499, 1_234_567, 10**9, 12_345 * 10**9)
    words = ["0 B", "999 B", "1 kB", "999 kB", "1.23 MB", "1 GB", "12.35 TB"]
    assert [nbytes_text(n) for n in sizes] == words
