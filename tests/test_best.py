"""The best checkpoints of a run, by the metrics that the run itself noted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import command, save, tensor
from safetensors.numpy import load_file

import streamsoup
from streamsoup.errors import RecipeError
from streamsoup.methods.best import best_of
from streamsoup.methods.checkpoints import choose

LOSSES = {100: 0.9, 200: 0.4, 300: 0.6, 400: 0.4, 500: 0.7}


def state(step: int, losses: dict[int, float], *, best: float | None = None) -> str:
    """Return what the Trainer writes after a step: training logs, evaluations, the best so far."""
    history: list[dict[str, Any]] = []
    for at, loss in losses.items():
        if at <= step:
            history.append({"epoch": 0.1, "loss": 9.0, "grad_norm": math.nan, "step": at})
            history.append({"eval_loss": loss, "eval_accuracy": 1 - loss, "step": at})
    return json.dumps(
        {"best_metric": best, "global_step": step, "log_history": history, "is_hyper": False}
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the Trainer, whose weights are its steps."""
    for step in LOSSES:
        folder = save(tmp_path / "run" / f"checkpoint-{step}", {"w": tensor(np.full(3, step / 1))})
        (folder / "trainer_state.json").write_text(state(step, LOSSES))
    return tmp_path / "run"


def steps(given: Any, n: int | None, metric: str | None, direction: Any = None, **more: Any) -> Any:
    """Return the steps of those chosen."""
    found = choose(given, best=best_of(n, metric, direction), **more)
    return [each.step for each in found.checkpoints]


def test_the_best_are_chosen_and_stay_in_their_order(run: Path) -> None:
    """The lowest of a loss, the newer of equal ones; thinned and cut afterwards."""
    assert steps(run, 1, "eval_loss") == [400]
    assert steps(run, 2, "eval_loss") == [200, 400]
    assert steps(run, 3, "eval_loss") == [200, 300, 400]
    assert steps(run, 2, "eval_loss", "highest") == [100, 500]
    assert steps(run, 3, "eval_accuracy", "highest") == [200, 300, 400]
    assert steps(run, 3, "eval_loss", last=2) == [300, 400]
    assert steps(run, 3, "eval_loss", every=2) == [200, 400]


def test_the_run_says_which_values_are_the_best(run: Path) -> None:
    """By the value that the Trainer kept as the best; else nothing does, but for losses."""
    with pytest.raises(RecipeError, match="nothing says which; give direction 'lowest' or"):
        steps(run, 2, "eval_accuracy")
    newest = run / "checkpoint-500" / "trainer_state.json"
    newest.write_text(state(500, LOSSES, best=1 - 0.4))
    assert steps(run, 2, "eval_accuracy") == [200, 400]
    newest.write_text(state(500, LOSSES, best=1 - 0.9))
    assert steps(run, 2, "eval_accuracy") == [100, 500]
    assert steps(run, 2, "eval_accuracy", "highest") == [200, 400]


@pytest.mark.parametrize(
    ("n", "metric", "direction", "message"),
    [
        (2, "eval_f1", None, "no checkpoint has the metric 'eval_f1'; there are .*eval_accuracy"),
        (6, "eval_loss", None, "the best 6 are asked for, and 5 of 5 checkpoints"),
        (0, "eval_loss", None, "best must be at least 1"),
        (1.5, "eval_loss", None, "not a whole number"),
        (2, None, None, "give metric, such as eval_loss"),
        (None, "eval_loss", None, "give best"),
        (None, None, "lowest", "give best"),
        (2, "eval_loss", "down", "direction must be one of"),
    ],
)
def test_wrong_choices(run: Path, n: Any, metric: Any, direction: Any, message: str) -> None:
    """Each is refused, and says what there is."""
    with pytest.raises(RecipeError, match=message):
        steps(run, n, metric, direction)


def test_what_was_not_evaluated_is_left_out(run: Path) -> None:
    """With a word: a checkpoint without the metric, or with NaN for it."""
    (run / "checkpoint-200" / "trainer_state.json").write_text(
        state(200, {100: 0.9, 150: 0.1}).replace('"step": 200', '"step": 199')
    )
    (run / "checkpoint-300" / "trainer_state.json").write_text(state(300, {300: math.nan}))
    found = choose(run, best=best_of(2, "eval_loss", None))
    assert [each.step for each in found.checkpoints] == [400, 500]
    assert "checkpoint-200, checkpoint-300: left out" in found.warnings[-1]


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"log_history": 5}', "\udcff", "{"])
def test_records_that_cannot_be_read(run: Path, text: str) -> None:
    """They are refused by name: the best may be among them."""
    path = run / "checkpoint-300" / "trainer_state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=r"checkpoint-300/trainer_state\.json: "):
        steps(run, 2, "eval_loss")


def test_a_pipe_for_a_record_is_not_waited_for(run: Path) -> None:
    """What is no regular file is not opened."""
    path = run / "checkpoint-300" / "trainer_state.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        steps(run, 2, "eval_loss")


def lightning(folder: Path) -> Path:
    """Make a run of Lightning: files whose names have metrics, and the table of its CSV logger."""
    rows = ["epoch,step,train_loss,val_acc"]
    for epoch, (loss, accuracy) in enumerate([(0.5, 0.1), (0.25, 0.3), (0.75, 0.2)]):
        step = 10 * (epoch + 1)
        name = f"epoch={epoch}-step={step}-val_loss={loss}"
        save(folder / "checkpoints", {"w": tensor(np.full(3, float(step)))}, name=name)
        rows += [f"{epoch},{step - 1},0.9,", f"{epoch},{step - 1},,{accuracy}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_folder_of_lightning(tmp_path: Path) -> None:
    """Its folder stands for the checkpoints in it; names and the table hold the metrics."""
    run = lightning(tmp_path / "version_0")
    for given in (run, run / "checkpoints"):
        assert steps(given, None, None) == [10, 20, 30]
        assert steps(given, 2, "val_loss") == [10, 20]
        assert steps(given, 2, "val_acc", "highest") == [20, 30]
    with pytest.raises(RecipeError, match="there are epoch, step, train_loss, val_acc, val_loss"):
        steps(run, 2, "f1")
    assert streamsoup.uniform(run, last=2, output=tmp_path / "soup").path


def test_the_choice_on_the_command_line(run: Path, tmp_path: Path) -> None:
    """The summary and the provenance say what was chosen, and by what."""
    best = ("--best", "2", "--metric", "eval_loss")
    for verb, more in (("uniform", ()), ("lawa", ("--last", "2")), ("ema", ()), ("wsm", ())):
        made = command(verb, str(run), *best, *more, "-o", str(tmp_path / verb))
        assert made.returncode == 0, made.stderr
        assert "steps 200, 400; of lowest eval_loss: 0.4, 0.4" in made.stdout
    (file,) = (tmp_path / "uniform").glob("*.safetensors")
    assert load_file(file)["w"][0] == 300.0
    report = json.loads((tmp_path / "uniform" / "streamsoup.json").read_text())["report"]
    assert (report["best"], report["metric"]) == ("lowest", "eval_loss")
    high = command("uniform", str(run), *best, "--highest", "-o", str(tmp_path / "high"))
    assert "steps 100, 500; of highest eval_loss" in high.stdout, high.stderr
    wrong = command("ema", str(run), "--best", "2", "-o", str(tmp_path / "no"))
    assert (wrong.returncode, "give --metric, such as eval_loss" in wrong.stderr) == (1, True)
    wrong = command("ema", str(run), *best[:2], "--metric", "eval_accuracy", "-o", "no")
    assert "give --lowest or --highest" in wrong.stderr
