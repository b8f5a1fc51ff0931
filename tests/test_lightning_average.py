"""An average beside the real Trainer of Lightning: killed and resumed, validated and saved."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamsoup import Average
from streamsoup.errors import MismatchError, RecipeError
from streamsoup.methods.best import best_of
from streamsoup.methods.checkpoints import choose

try:
    pytest.importorskip("lightning.pytorch", exc_type=ImportError)
except pytest.skip.Exception:
    pytest.importorskip("pytorch_lightning", exc_type=ImportError)

import lightning_run
from lightning_run import Module, loader, pl, trainer

from streamsoup.training import LightningAverage

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries


class Recorder(pl.Callback):
    """Keeps the module's state after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *more: Any) -> None:
        """Copy the state."""
        self.states.append({name: t.clone() for name, t in pl_module.state_dict().items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check that two states have the same names and bits."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the average of states that were kept."""
    average = Average()
    for state in states:
        average.update(state)
    return average.result()


def test_checkpoints_open_with_the_average(tmp_path: Path) -> None:
    """By Lightning's own load_from_checkpoint, safely; the module's own weights stand beside."""
    recorder, callback = Recorder(), LightningAverage("lawa", window=2, start_step=2)
    module = Module()
    trainer(tmp_path, [recorder, callback]).fit(module, loader(0), loader(1))
    for epoch in range(3):
        (path,) = (tmp_path / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
        step = 4 * (epoch + 1)
        found = Module.load_from_checkpoint(path, weights_only=True).state_dict()
        same(found, mean_of(recorder.states[step - 2 : step]))
        held = torch.load(path, weights_only=True)
        same(held["current_model_state"], recorder.states[step - 1])
    same(module.state_dict(), recorder.states[-1])


def test_validations_are_of_the_average(tmp_path: Path) -> None:
    """Training goes on as without it; off, nothing changes."""
    runs: dict[str, Module] = {}
    for name, callbacks in (
        ("without", []),
        ("on", [LightningAverage("ema", decay=0.9)]),
        ("off", [LightningAverage("ema", evaluate=False, save=False)]),
    ):
        runs[name] = Module()
        trainer(tmp_path / name, callbacks).fit(runs[name], loader(0), loader(1))
        same(runs[name].state_dict(), runs["without"].state_dict())
    assert runs["off"].losses == runs["without"].losses
    assert runs["on"].losses != runs["without"].losses
    for epoch in range(3):
        (path,) = (tmp_path / "on" / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
        module = Module.load_from_checkpoint(path)
        trainer(tmp_path / "again", []).validate(module, loader(1), verbose=False)
        # After the two batches of the sanity check, four of each epoch.
        assert runs["on"].losses[2 + 4 * epoch : 6 + 4 * epoch] == module.losses
        (path,) = (tmp_path / "off" / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
        assert "current_model_state" not in torch.load(path, weights_only=True)


def test_another_training_begins_another_average(tmp_path: Path) -> None:
    """A callback that is used again does not go on from the training before."""
    callback = LightningAverage("uniform")
    for name in ("first", "second"):
        recorder = Recorder()
        running = trainer(tmp_path / name, [callback, recorder])
        running.fit(Module(), loader(0), loader(1))
        assert callback.average.n_updates == 12
        same(callback.average.result(), mean_of(recorder.states))


def test_accumulated_gradients_make_one_update(tmp_path: Path) -> None:
    """An update belongs to a step of the optimizer, not to a batch."""
    callback = LightningAverage("uniform")
    running = trainer(tmp_path, [callback], accumulate_grad_batches=2)
    running.fit(Module(), loader(0), loader(1))
    assert callback.average.n_updates == running.global_step == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ema", "lawa", "wsm"])
def test_a_killed_run_resumes_with_its_average(tmp_path: Path, method: str) -> None:
    """To the same bits as one that was not killed: average and model."""

    def run(folder: Path, kill_at: int) -> int:
        script = [sys.executable, lightning_run.__file__, str(folder), str(kill_at), method]
        return subprocess.run(script, check=False, capture_output=True, timeout=300).returncode

    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 7) == -signal.SIGKILL
    assert run(tmp_path / "killed", 10) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    whole, killed = (
        torch.load(tmp_path / each / "end.pt", weights_only=True) for each in ("whole", "killed")
    )
    for what in ("average", "model"):
        same(whole[what], killed[what])


def test_an_error_in_a_validation_leaves_the_own_weights(tmp_path: Path) -> None:
    """What Lightning saves then is not the average twice."""

    class Failing(Module):
        def validation_step(self, batch: list[Tensor], i: int) -> None:
            super().validation_step(batch, i)
            if self.trainer.global_step:
                raise ZeroDivisionError

    recorder, module = Recorder(), Failing()
    running = trainer(tmp_path, [recorder, LightningAverage("ema")])
    with pytest.raises(ZeroDivisionError):
        running.fit(module, loader(0), loader(1))
    same(module.state_dict(), recorder.states[-1])


def test_the_best_by_the_names_of_files(tmp_path: Path) -> None:
    """The metrics in the names that ModelCheckpoint writes choose the best of a run."""
    module = Module()
    trainer(tmp_path, []).fit(module, loader(0), loader(1))
    paths = sorted((tmp_path / "checkpoints").glob("epoch=*.ckpt"))
    losses = {
        4 * (epoch + 1): round(sum(module.losses[2 + 4 * epoch : 6 + 4 * epoch]) / 4, 4)
        for epoch in range(3)
    }
    chosen = choose([str(each) for each in paths], best=best_of(2, "val_loss", None))
    expected = sorted(sorted(losses, key=lambda step: losses[step])[:2])
    assert [each.step for each in chosen.checkpoints] == expected
    assert list(chosen.scores) == pytest.approx([losses[step] for step in expected], abs=1e-4)


def test_the_best_by_the_table_of_the_logger(tmp_path: Path) -> None:
    """The CSV logger's steps are those of the checkpoints, though it counts them from 0."""
    logger = pl.loggers.CSVLogger(str(tmp_path), name="", version="run")
    module = Module()
    trainer(tmp_path / "run", [], logger=logger).fit(module, loader(0), loader(1))
    named = (tmp_path / "run" / "checkpoints").glob("epoch=*.ckpt")
    paths = [path.rename(path.with_name(f"step={path.name.split('=')[2]}.ckpt")) for path in named]
    paths.sort(key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in paths] == [
        "step=4-val_loss.ckpt",
        "step=8-val_loss.ckpt",
        "step=12-val_loss.ckpt",
    ]
    chosen = choose([str(each) for each in paths], best=best_of(3, "val_loss", None))
    losses = [sum(module.losses[2 + 4 * epoch : 6 + 4 * epoch]) / 4 for epoch in range(3)]
    assert list(chosen.scores) == pytest.approx(losses, rel=1e-5)


def test_a_checkpoint_without_the_tensors_is_refused() -> None:
    """One of a part of the module alone: the average cannot take its place."""
    callback, module = LightningAverage("ema"), Module()
    callback.average.update(module)
    with pytest.raises(MismatchError, match="give save=False"):
        callback.on_save_checkpoint(None, module, {"state_dict": {}})


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"start_step": -1}, {"decay": 2.0}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    """They are refused when the callback is made, not in the training."""
    with pytest.raises(RecipeError):
        LightningAverage(**wrong)
