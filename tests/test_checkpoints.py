"""Which checkpoints of a run are averaged, and in which order."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, save, tensor
from safetensors.numpy import load_file

import streamsoup
from streamsoup.errors import RecipeError
from streamsoup.methods.checkpoints import choose, choose_any, find_checkpoints, number_in

STEPS = (6, 8, 10, 12, 14, 16)


def checkpoint(folder: Path, value: float, step: int | None = None) -> str:
    """Make a checkpoint of one number; with a `step`, as transformers' Trainer notes it."""
    save(folder, {"w": tensor(np.full(3, value, np.float64))})
    if step is not None:
        history = [{"step": n, "loss": 0.5} for n in range(step)]
        (folder / "trainer_state.json").write_text(
            json.dumps({"epoch": 1.0, "log_history": history, "global_step": step})
        )
    return str(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six checkpoints, whose weights are their steps; a shell lists 10 before 6."""
    for step in STEPS:
        checkpoint(tmp_path / "run" / f"checkpoint-{step}", step, step)
    return tmp_path / "run"


def value(soup: Any) -> float:
    """Return the number that a soup holds."""
    (file,) = Path(soup.path).glob("*.safetensors")
    return float(load_file(file)["w"][0])


def ema_of(values: list[float], decay: float) -> float:
    """Follow the recurrence."""
    mean = values[0]
    for each in values[1:]:
        mean = decay * mean + (1 - decay) * each
    return mean


@pytest.mark.parametrize("verb", ["ema", "lawa", "wsm"])
def test_the_order_of_a_shell_is_refused(run: Path, tmp_path: Path, verb: str) -> None:
    """Sorted names are no order of age: the message says the right one, and nothing is made."""
    paths = sorted(map(str, run.glob("checkpoint-*")))
    assert Path(paths[0]).name == "checkpoint-10"
    more = ["--window", "2"] if verb == "lawa" else []
    made = command(verb, *paths, *more, "-o", str(tmp_path / "soup"))
    assert made.returncode == 1
    assert "steps of these are 10, 12, 14, 16, 6, 8" in made.stderr
    right = ", ".join(f"checkpoint-{step}" for step in STEPS)
    assert f"right order is {right}" in made.stderr
    assert not (tmp_path / "soup").exists()
    made = command(verb, *paths, *more, "--by", "step", "-o", str(tmp_path / "soup"))
    assert made.returncode == 0, made.stderr


def test_a_folder_stands_for_its_checkpoints(run: Path, tmp_path: Path) -> None:
    """In the order of their steps, thinned from the newest on, and then the newest of those."""
    steps = [float(step) for step in STEPS]
    assert value(streamsoup.ema(run, 0.5, output=tmp_path / "1")) == ema_of(steps, 0.5)
    assert value(streamsoup.ema([run], 0.5, last=3, output=tmp_path / "2")) == ema_of(
        [12.0, 14.0, 16.0], 0.5
    )
    thinned = streamsoup.ema(run, 0.5, every=2, last=2, output=tmp_path / "3")
    assert value(thinned) == ema_of([12.0, 16.0], 0.5)
    assert thinned.provenance.report["steps"] == [12, 16]
    assert value(streamsoup.lawa(run, last=2, output=tmp_path / "4")) == 15.0
    assert value(streamsoup.lawa(run, 2, every=5, output=tmp_path / "5")) == 11.0
    assert value(streamsoup.wsm(run, last=2, output=tmp_path / "6")) == 15.0
    assert value(streamsoup.uniform(run, output=tmp_path / "7")) == 11.0
    assert value(streamsoup.uniform(str(run), last=2, output=tmp_path / "8")) == 15.0


@pytest.mark.parametrize(("n", "every"), [*itertools.product(range(1, 7), range(1, 8))])
def test_the_newest_is_always_in(tmp_path: Path, n: int, every: int) -> None:
    """Every K-th counts back from the newest, as a loop by hand does."""
    paths = [tmp_path / f"step_{i:03}" for i in range(n)]
    chosen = choose(paths, every=every).ingredients
    expected = [paths[i] for i in range(n) if (n - 1 - i) % every == 0]
    assert chosen == expected
    assert chosen[-1] == paths[-1]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-10", 10),
        ("step_000500", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("step=1200-epoch=3", 1200),
        ("global_step1000", 1000),
        ("iter_0005000", 5000),
        ("step1000-tokens4B", 1000),
        ("model-v2-step_7.safetensors", 7),
        ("final", None),
        ("best", None),
        ("٣", None),
    ],
)
def test_names_say_steps(name: str, step: int | None) -> None:
    """As the common trainers write them."""
    assert number_in(name) == step


def test_files_are_told_by_the_folder_that_differs(run: Path) -> None:
    """Of ``checkpoint-*/model.safetensors`` the folders are the names."""
    paths = sorted(map(str, run.glob("*/model.safetensors")))
    with pytest.raises(RecipeError, match="right order is checkpoint-6, checkpoint-8"):
        choose(paths)
    steps = [each.step for each in choose(paths, by="step").checkpoints]
    assert steps == list(STEPS)


def test_the_step_counts_where_a_name_says_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a word; a name that counts epochs says nothing else."""
    first = checkpoint(tmp_path / "checkpoint-9", 1.0, 200)
    second = checkpoint(tmp_path / "checkpoint-10", 2.0, 100)
    with caplog.at_level(logging.WARNING, "streamsoup"), pytest.raises(RecipeError, match="200"):
        choose([first, second])
    assert "checkpoint-9: is of step 200" in caplog.text
    chosen = choose([second, first])
    assert chosen.ingredients == [second, first]
    assert len(chosen.warnings) == 2
    checkpoint(tmp_path / "run" / "epoch-1", 1.0, 500)
    checkpoint(tmp_path / "run" / "epoch-2", 1.0, 1000)
    chosen = choose(tmp_path / "run")
    assert [each.step for each in chosen.checkpoints] == [500, 1000]
    assert not chosen.warnings


def test_what_says_no_step_is_taken_as_given(tmp_path: Path) -> None:
    """State dicts, names without numbers, and numbers that end different names tell no age."""
    states = [{"w": torch.full((3,), float(n))} for n in (2, 1)]
    assert value(streamsoup.ema(states, 0.5, output=tmp_path / "soup")) == 1.5
    for names in (["late", "early"], ["seed-3", "trial-1"], ["checkpoint-1", "final"]):
        assert choose(names).ingredients == names
    with pytest.raises(RecipeError, match="has no step to order by"):
        choose(["checkpoint-1", "final"], by="step")
    with pytest.raises(RecipeError, match="has no time"):
        choose(states, by="time")


def test_other_orders(run: Path) -> None:
    """By name with numbers as numbers, by the time of the weights, and as given."""
    paths = sorted(map(str, run.glob("checkpoint-*")))
    for age, path in enumerate(paths):
        os.utime(Path(path, "model.safetensors"), ns=(0, 10**9 * (100 - age)))
    assert choose(paths, by="given").ingredients == paths
    assert choose(paths, by="time").ingredients == paths[::-1]
    assert [each.step for each in choose(run, by="name").checkpoints] == list(STEPS)
    with pytest.raises(RecipeError, match="in no order"):
        choose(run, by="given")
    for path in paths:
        os.utime(Path(path, "model.safetensors"), ns=(0, 10**9))
    with pytest.raises(RecipeError, match="the same time, so none is the older one"):
        choose(paths, by="time")


def test_the_same_step_twice_is_no_order(run: Path) -> None:
    """Neither is the older one."""
    twice = [str(run / "checkpoint-6"), str(run / "checkpoint-6")]
    with pytest.raises(RecipeError, match="of the same step"):
        choose(twice)
    with pytest.raises(RecipeError, match="the same step"):
        choose(twice, by="step")
    assert choose(twice, by="given").ingredients == twice


def test_what_else_lies_in_a_run(run: Path, tmp_path: Path) -> None:
    """Final weights and a checkpoint without any are left out with a word; logs without one."""
    save(run, {"w": tensor(np.ones(3))})
    save(run / "best", {"w": tensor(np.ones(3))})
    (run / "checkpoint-18").mkdir()
    (run / "runs" / "Nov30_12").mkdir(parents=True)
    (run / "training_args.bin").write_bytes(b"no weights")
    warnings: list[str] = []
    found = find_checkpoints(str(run), warnings)
    assert sorted(found) == sorted(str(run / f"checkpoint-{step}") for step in STEPS)
    assert "best, model.safetensors: left out" in warnings[0]
    assert "checkpoint-18: left out, without weights" in warnings[1]
    assert len(warnings) == 2
    assert {*warnings} <= {*streamsoup.lawa(run, last=2, output=tmp_path / "soup").warnings}
    # Where order does not count, a folder with weights is the one ingredient, unless asked.
    assert choose_any([run]) is None
    assert len(choose_any([run], last=2).checkpoints) == 2  # type: ignore[union-attr]


def test_files_of_a_run(tmp_path: Path) -> None:
    """Numbered files in a folder are checkpoints; shards and parts of a pipeline are none."""
    for step in (9, 10):
        save(tmp_path / "files", {"w": tensor(np.full(3, step, float))}, name=f"step_{step}")
    assert value(streamsoup.ema(tmp_path / "files", 0.5, output=tmp_path / "soup")) == 9.5
    pipeline = tmp_path / "pipeline"
    for part in ("text_encoder_1", "text_encoder_2"):
        save(pipeline / part, {"w": tensor(np.ones(3))})
    (pipeline / "model_index.json").write_text("{}")
    for step in (1, 2):
        save(tmp_path / "parts", {"w": tensor(np.ones(3))}, name=f"model-0000{step}-of-00002")
    for folder in (pipeline, tmp_path / "parts"):
        assert choose_any(folder, every=1) is None


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, '{"global_step": "x"}', "\udcff"])
def test_a_state_that_says_nothing(tmp_path: Path, content: str) -> None:
    """The name counts then, with a word."""
    path = checkpoint(tmp_path / "checkpoint-7", 1.0)
    state = Path(path, "trainer_state.json")
    state.write_bytes(content.encode("utf-8", "surrogateescape"))
    chosen = choose([path])
    assert chosen.checkpoints[0].step == 7
    assert "says no step" in chosen.warnings[0]


def test_a_pipe_for_a_state_is_not_waited_for(tmp_path: Path) -> None:
    """What is no regular file is not opened."""
    path = checkpoint(tmp_path / "checkpoint-7", 1.0)
    os.mkfifo(Path(path, "trainer_state.json"))
    assert choose([path]).checkpoints[0].step == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"last": 0}, "last must be at least 1"),
        ({"last": 7}, "the last 7 are asked for, and there are 6"),
        ({"last": 4, "every": 2}, "of which every 2 leaves 3"),
        ({"by": "age"}, "must be one of step"),
        ({"every": 1.5}, "not a whole number"),
    ],
)
def test_wrong_choices(run: Path, wrong: Any, message: str) -> None:
    """Each is refused before anything is opened."""
    with pytest.raises(RecipeError, match=message):
        choose(run, **wrong)


def test_the_choice_on_the_command_line(run: Path, tmp_path: Path) -> None:
    """The same words, and the summary says which checkpoints were averaged."""
    made = command("lawa", str(run), "--last", "2", "-o", str(tmp_path / "soup"))
    assert "2 of 6 checkpoints, oldest first: steps 14, 16" in made.stdout, made.stderr
    made = command("lawa", str(run), "-o", str(tmp_path / "other"))
    assert (made.returncode, "--window or --last" in made.stderr) == (2, True)
    made = command("uniform", str(run), "--every", "3", "-o", str(tmp_path / "other"))
    assert "steps 10, 16" in made.stdout, made.stderr


def test_one_checkpoint_by_two_paths(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that ends another is no trouble."""
    monkeypatch.chdir("/")
    path = str(run / "checkpoint-6")
    with pytest.raises(RecipeError, match="of the same step"):
        choose([path, path.lstrip("/")])
