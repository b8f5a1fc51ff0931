"""An average beside the real Trainer of transformers: killed and resumed, evaluated and saved."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streamsoup
from streamsoup import Average
from streamsoup.errors import RecipeError

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

import trainer_run  # noqa: E402
from trainer_run import Tokens, network, trainer  # noqa: E402

from streamsoup.training import TrainerAverage  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries


class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Keeps the model's state after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Copy the state."""
        model = more["model"]
        self.states.append({name: t.clone() for name, t in model.state_dict().items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check that two states have the same names and bits."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def loaded(folder: Path) -> dict[str, Tensor]:
    """Return the state of what ``from_pretrained`` opens, with no missing or unexpected keys."""
    model, found = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    state: dict[str, Tensor] = model.state_dict()
    return state


def test_the_average_lies_in_each_checkpoint(tmp_path: Path) -> None:
    """What from_pretrained opens there is the average of the steps until then, to the bit."""
    recorder = Recorder()
    callback = TrainerAverage("lawa", window=2, every_n_steps=2, start_step=2)
    trainer(tmp_path, [recorder, callback]).train()
    for step, until in ((2, [2]), (4, [2, 4]), (8, [6, 8])):
        alone = Average("uniform")
        for each in until:
            alone.update(recorder.states[each - 1])
        same(loaded(tmp_path / f"checkpoint-{step}" / "average"), alone.result())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    streamsoup.verify(tmp_path / "checkpoint-8" / "average", quick=True)


def test_saved_averages_are_those_of_the_file_commands(tmp_path: Path) -> None:
    """The bytes of `lawa` over the run's checkpoints, whose averages are no ingredients."""
    callback = TrainerAverage("lawa", window=3, every_n_steps=2, start_step=2)
    trainer(tmp_path / "run", [callback]).train()
    soup = streamsoup.lawa(tmp_path / "run", last=3, output=tmp_path / "soup")
    live = tmp_path / "run" / "checkpoint-8" / "average"
    one, two = (folder / "model.safetensors" for folder in (live, tmp_path / "soup"))
    assert one.read_bytes() == two.read_bytes()
    assert not [each for each in soup.warnings if "average" in each]
    best = streamsoup.uniform(
        tmp_path / "run", best=2, metric="eval_loss", output=tmp_path / "best"
    )
    states = [
        json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        for step in (2, 4, 6, 8)
    ]
    losses = {s["global_step"]: s["log_history"][-1]["eval_loss"] for s in states}
    expected = sorted(sorted(losses, key=lambda step: losses[step])[:2])
    assert best.provenance.report["steps"] == expected


def test_evaluations_are_of_the_average(tmp_path: Path) -> None:
    """Their losses are those of a model loaded from it; training goes on as without."""
    callback = TrainerAverage("ema", decay=0.9)
    running = trainer(tmp_path / "with", [callback])
    running.train()
    logs = [each for each in running.state.log_history if "eval_loss" in each]
    for entry in logs:
        folder = tmp_path / "with" / f"checkpoint-{entry['step']}" / "average"
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        found = trainer(tmp_path / "other", [], model=model).evaluate()
        assert found["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-6)
    plain = trainer(tmp_path / "without", [])
    plain.train()
    same(running.model.state_dict(), plain.model.state_dict())
    own = [each["eval_loss"] for each in plain.state.log_history if "eval_loss" in each]
    assert own != [each["eval_loss"] for each in logs]
    off = trainer(tmp_path / "off", [TrainerAverage("ema", evaluate=False, save=False)])
    off.train()
    assert own == [e["eval_loss"] for e in off.state.log_history if "eval_loss" in e]
    assert not list((tmp_path / "off").glob("*/average"))


def test_another_training_begins_another_average(tmp_path: Path) -> None:
    """A callback that is used again does not go on from the training before."""
    callback, recorder = TrainerAverage("uniform", save=False), Recorder()
    trainer(tmp_path / "first", [callback]).train()
    trainer(tmp_path / "second", [recorder, callback]).train()
    assert callback.average.n_updates == 8
    alone = Average()
    for state in recorder.states:
        alone.update(state)
    same(callback.average.result(), alone.result())


def test_several_evaluation_sets_are_refused(tmp_path: Path) -> None:
    """As nothing tells when the last of them is done."""
    running = trainer(tmp_path, [TrainerAverage("ema")])
    running.eval_dataset = {"a": Tokens(4, 1), "b": Tokens(4, 2)}
    with pytest.raises(RecipeError, match="give evaluate=False"):
        running.train()


def run(folder: Path, kill_at: int, moment: str, method: str) -> int:
    """Run the script in a process of its own; return its exit status."""
    script = [sys.executable, trainer_run.__file__, str(folder), str(kill_at), moment, method]
    return subprocess.run(script, check=False, capture_output=True, timeout=300).returncode


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ema", "lawa", "wsm"])
def test_a_killed_run_resumes_with_its_average(tmp_path: Path, method: str) -> None:
    """Killed between checkpoints, and between a checkpoint and its average: to the same bits."""
    assert run(tmp_path / "whole", 0, "", method) == 0
    folder = tmp_path / "killed"
    assert run(folder, 4, "save", method) == -signal.SIGKILL
    assert (folder / "checkpoint-4").is_dir()
    assert not (folder / "checkpoint-4" / "average").exists()
    assert (folder / "average_state-4.pt").exists()
    assert run(folder, 7, "step", method) == -signal.SIGKILL
    if method != "wsm":
        same(*(loaded(each / "checkpoint-4" / "average") for each in (folder, tmp_path / "whole")))
    assert run(folder, 0, "", method) == 0
    whole, killed = (
        torch.load(each / "end.pt", weights_only=True) for each in (tmp_path / "whole", folder)
    )
    same(whole, killed)
    same(*(loaded(each / "checkpoint-8" / "average") for each in (folder, tmp_path / "whole")))


def test_a_checkpoint_without_an_average_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning; one of other settings, or a damaged one, is refused."""
    trainer(tmp_path, [], max_steps=4).train()
    callback = TrainerAverage("ema")
    with caplog.at_level(logging.WARNING, "streamsoup"):
        trainer(tmp_path, [callback]).train(resume_from_checkpoint=True)
    assert "the average begins anew at step 4" in caplog.text
    assert callback.average.n_updates == 4
    with pytest.raises(RecipeError, match=r"decay 0\.999, not 0\.5"):
        trainer(tmp_path, [TrainerAverage("ema", decay=0.5)], max_steps=10).train(
            resume_from_checkpoint=True
        )
    (tmp_path / "checkpoint-8" / "average_state.pt").write_bytes(b"no state")
    with pytest.raises(RecipeError, match="cannot be read"):
        trainer(tmp_path, [TrainerAverage("ema")], max_steps=10).train(resume_from_checkpoint=True)


def test_adapters_are_saved_as_adapters(tmp_path: Path) -> None:
    """A LoRA run: only the adapter is averaged, and PEFT opens it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(network(), config)
    recorder = Recorder()
    callback = TrainerAverage("uniform")
    trainer(tmp_path, [recorder, callback], model=model).train()
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert callback.average.memory(model).host_nbytes < 8 * n_trained + 1000
    folder = tmp_path / "checkpoint-8" / "average"
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md"}
    found = load_file(folder / "adapter_model.safetensors")
    mean = Average()
    for state in recorder.states:
        mean.update(state)
    expected = mean.result()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name.replace(".weight", ".default.weight")])
    assert len(found) == 2
    peft.PeftModel.from_pretrained(network(), folder)


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"start_step": -1}, {"decay": 2.0}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    """They are refused when the callback is made, not in the training."""
    with pytest.raises(RecipeError):
        TrainerAverage(**wrong)
