"""The average of a run is kept up to date while checkpoints are written, renamed and removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, content, save, tensor
from safetensors.numpy import load_file

import streamsoup
from streamsoup import Note, Options
from streamsoup.errors import OutputExistsError, RecipeError
from streamsoup.training import watch as module


def checkpoint(run: Path, step: int, value: float | None = None, shape: int = 3) -> Path:
    """Write a checkpoint whose weights are its step, as a Trainer does."""
    weights = np.full(shape, float(step if value is None else value), np.float32)
    folder = save(run / f"checkpoint-{step}", {"w": tensor(weights)})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def value(folder: Path) -> float:
    """Return the number that an output holds."""
    return float(load_file(folder / "model.safetensors")["w"][0])


class Script:
    """A run, played one step at each look of the watch; the watch ends when it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.out, self.notes = out, [""]
        self.seen: list[float | None] = []
        self._steps: Iterator[Callable[[], object]] = iter(())
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=self._next))

    def _next(self, seconds: float) -> None:
        self.seen.append(value(self.out) if self.out.exists() else None)
        step = next(self._steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    def allow(self, *steps: Callable[[], object]) -> None:
        """Set the steps that are played."""
        self._steps, self.seen = iter(steps), []

    def play(self, run: Path, *steps: Callable[[], object], **settings: Any) -> list[float | None]:
        """Watch while the steps are played; return what the output held at each look."""
        self.allow(*steps)
        options = settings.pop("options", Options())
        options = Options(overwrite=options.overwrite, on_event=self._hear)
        with pytest.raises(KeyboardInterrupt):
            streamsoup.watch(run, output=self.out, options=options, **settings)
        return self.seen

    def _hear(self, event: object) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """A script whose output is ``soup``."""
    return Script(monkeypatch, tmp_path / "soup")


def nothing() -> None:
    """Let a look pass."""


def test_the_newest_are_averaged_as_they_are_completed(script: Script, tmp_path: Path) -> None:
    """Before the run is there, while there are fewer, and then the last of them."""
    run = tmp_path / "run"
    seen = script.play(
        run,
        lambda: checkpoint(run, 10),
        nothing,
        lambda: checkpoint(run, 20),
        nothing,
        lambda: checkpoint(run, 100),
        nothing,
        last=2,
    )
    # None at first; each is seen at one look and averaged at the next, when it is unchanged.
    assert seen == [None, None, 10.0, 10.0, 15.0, 15.0, 60.0]
    assert "lawa of 1 checkpoint, and 2 were asked for: steps 10" in script.notes[1]
    assert script.notes[-1].endswith("lawa of 2 checkpoints: steps 20, 100")
    streamsoup.lawa(run, last=2, output=tmp_path / "other")
    one, two = (tmp_path / each / "model.safetensors" for each in ("soup", "other"))
    assert one.read_bytes() == two.read_bytes()
    assert streamsoup.verify(tmp_path / "soup")


def test_files_that_are_being_written_are_waited_for(script: Script, tmp_path: Path) -> None:
    """A file that grows, one without its end, a shard that is missing, and a folder not renamed."""
    run = tmp_path / "run"
    whole = content({"w": tensor(np.full(3, 30.0, np.float32))})
    part = run / "checkpoint-30" / "model.safetensors"
    checkpoint(run, 10)
    shards = run / "checkpoint-20"
    save(shards, {"w": tensor(np.full(3, 20.0, np.float32))}, name="model-00001-of-00002")

    def write(n: int) -> None:
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(whole[:n])

    seen = script.play(
        run,
        lambda: write(len(whole) - 5),  # has its header, and grows
        lambda: write(len(whole) - 1),
        nothing,  # unchanged in two looks, but without its end
        nothing,
        lambda: write(len(whole)),
        lambda: (part.parent / "optimizer.pt").write_bytes(b"1"),  # still being written to
        nothing,
        lambda: checkpoint(run, 0).joinpath().rename(run / "tmp-checkpoint-40"),
        nothing,
        nothing,
        method="uniform",
    )
    assert seen[:7] == [None, *[10.0] * 6]
    assert seen[7:] == [20.0] * 4  # the mean of 10 and 30
    unread = [note for note in script.notes if note.startswith("not read so far: ")]
    assert len(script.notes) - len(unread) == 3
    assert len(set(unread)) == len(unread) <= 3  # each is told once


def test_a_watch_started_anew_makes_nothing_twice(script: Script, tmp_path: Path) -> None:
    """The output says what it was made of; other settings, or other files, are made anew."""
    run = tmp_path / "run"
    for step in (10, 20):
        checkpoint(run, step)
    script.play(run, nothing, last=2)
    before = os.stat(tmp_path / "soup").st_ino
    assert script.play(run, nothing, nothing, last=2) == [15.0] * 3
    assert os.stat(tmp_path / "soup").st_ino == before
    assert len(script.notes) == 2
    script.allow(nothing)
    assert streamsoup.watch(run, output=tmp_path / "soup", last=2, until=20) is None
    assert script.play(run, nothing, nothing, last=1)[-1] == 20.0
    # The run is started anew from step 10, and writes other weights at step 20.
    shutil.rmtree(run / "checkpoint-20")
    seen = script.play(run, nothing, lambda: checkpoint(run, 20, 70.0), nothing, nothing, last=1)
    assert seen == [20.0, 10.0, 10.0, 70.0, 70.0]


def test_checkpoints_that_are_removed(script: Script, tmp_path: Path) -> None:
    """What is left is averaged, and nothing is undone when the whole run is gone."""
    run = tmp_path / "run"
    for step in (10, 20, 30):
        checkpoint(run, step)
    seen = script.play(
        run,
        nothing,
        lambda: shutil.rmtree(run / "checkpoint-10"),
        lambda: shutil.rmtree(run),
        nothing,
        last=3,
    )
    assert seen == [None, 20.0, 25.0, 25.0, 25.0]


def test_a_checkpoint_that_changes_meanwhile(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output stays what it was, and the checkpoint is looked at again."""
    run = tmp_path / "run"
    checkpoint(run, 10)
    real = module.make
    changes = iter([False, True, False, False])

    def make(ordered: Any, **more: Any) -> Any:
        if next(changes):
            checkpoint(run, 20, 50.0)
        return real(ordered, **more)

    monkeypatch.setattr(module, "make", make)
    seen = script.play(
        run, nothing, lambda: checkpoint(run, 20), nothing, nothing, nothing, nothing, last=1
    )
    assert seen[:4] == [None, 10.0, 10.0, 10.0]
    assert seen[-1] == 50.0
    assert "a checkpoint changed, so it is looked at again" in script.notes[2]


@pytest.mark.parametrize("fault", [{"value": np.nan}, {"shape": 4}])
def test_what_cannot_be_averaged_is_passed_over(
    script: Script, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """It is told once, the output stays, and later checkpoints are averaged."""
    run = tmp_path / "run"
    checkpoint(run, 10)
    seen = script.play(
        run,
        nothing,
        lambda: checkpoint(run, 20, **fault),
        nothing,
        nothing,
        lambda: checkpoint(run, 30),
        nothing,
        lambda: checkpoint(run, 40),
        nothing,
        last=2,
    )
    assert seen[1] == seen[5] == 10.0
    assert seen[-1] == 35.0
    assert [note.partition(":")[0] for note in script.notes[2:4]] == ["not averaged"] * 2
    assert len(script.notes) == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "uniform"}, 20.0),
        ({"method": "ema", "decay": 0.5}, 22.5),
        ({"method": "wsm", "curve": "linear"}, 20.0),
        ({"last": 3, "every": 2}, 20.0),
        ({"last": 1}, 30.0),
    ],
)
def test_methods(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    """Each as the verb of its name; `until` a step ends the watch with the last soup."""
    for step in (10, 20, 30):
        checkpoint(tmp_path / "run", step)
    soup = streamsoup.watch(
        tmp_path / "run", output=tmp_path / "soup", until=30, poll_s=0.01, **settings
    )
    assert soup is not None
    assert value(Path(soup.path)) == expected
    assert soup.provenance.report["steps"][-1] == 30  # type: ignore[index]


def test_files_of_lightning(tmp_path: Path) -> None:
    """One folder below the run's, ordered by the steps in their names."""
    for step in (5, 40):
        values = {"w": tensor(np.full(3, float(step), np.float32))}
        save(tmp_path / "run" / "checkpoints", values, name=f"epoch={step % 7}-step={step}")
    soup = streamsoup.watch(
        tmp_path / "run", output=tmp_path / "soup", last=1, until=40, poll_s=0.01
    )
    assert soup is not None
    (file,) = Path(soup.path).glob("*.safetensors")
    assert load_file(file)["w"][0] == 40.0


def test_a_checkpoint_that_needs_an_option_is_told(script: Script, tmp_path: Path) -> None:
    """A pickle with two sets of weights is not waited for in silence, and is named once."""
    run = tmp_path / "run"
    run.mkdir()
    one = {"w": torch.ones(3)}
    two = {"w": torch.zeros(3)}
    torch.save({"state_dict": one, "state_dict_ema": two}, run / "epoch=1-step=10.ckpt")
    script.play(run, nothing, nothing, nothing, last=1)
    (told,) = script.notes[1:]
    assert told.startswith("not read so far: ")
    assert "step=10.ckpt" in told
    assert "key" in told


def test_an_output_of_something_else_is_not_replaced(script: Script, tmp_path: Path) -> None:
    """Not a checkpoint, not the average of another run; unless it is asked for."""
    run, other = tmp_path / "run", tmp_path / "other"
    for each in (run, other):
        checkpoint(each, 10)
    streamsoup.uniform([run / "checkpoint-10"], output=tmp_path / "soup")
    with pytest.raises(OutputExistsError, match="not made by watching"):
        streamsoup.watch(run, output=tmp_path / "soup", last=1)
    script.play(run, nothing, last=1, options=Options(overwrite=True))
    with pytest.raises(OutputExistsError, match="not made by watching"):
        streamsoup.watch(other, output=tmp_path / "soup", last=1)
    with pytest.raises(RecipeError, match="is the run itself"):
        streamsoup.watch(run, output=run, last=1)


def test_an_output_within_the_run_is_no_checkpoint(tmp_path: Path) -> None:
    """Though its name ends in a number."""
    run = tmp_path / "run"
    for step, expected in ((10, 10.0), (20, 15.0), (30, 20.0)):
        checkpoint(run, step)
        out = run / "average-99"
        streamsoup.watch(run, output=out, method="uniform", until=step, poll_s=0.01)
        assert value(out) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "lawa needs last"),
        ({"last": 0}, "last must be at least 1"),
        ({"last": 1, "every": 0}, "every must be at least 1"),
        ({"method": "swa"}, "method must be one of"),
        ({"method": "ema", "decay": 1.0}, "not between 0 and 1"),
        ({"method": "wsm", "curve": "x"}, "curve must be one of"),
        ({"last": 1, "poll_s": 0}, "poll_s must be above 0"),
        ({"last": 1, "until": 1.5}, "not a whole number"),
        ({"last": 1, "options": Options(part="1/2")}, "part"),
    ],
)
def test_wrong_settings(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    """Each is refused at once, not after the first checkpoint."""
    with pytest.raises(RecipeError, match=message):
        streamsoup.watch(tmp_path / "run", output=tmp_path / "soup", **wrong)


def watching(run: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command."""
    arguments = ["watch", str(run), "--last", "2", "-o", str(out), "--poll", "0.05", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "streamsoup", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(out: Path, expected: float) -> None:
    """Wait until the output holds a number; it is never anything incomplete."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if out.exists() and value(out) == expected:
            return
        time.sleep(0.05)
    raise AssertionError(f"{out} never held {expected}")


def test_the_command_is_killed_and_started_again(tmp_path: Path) -> None:
    """Killed at once, it goes on; Ctrl-C ends it with 0, a step with the last average."""
    run, out = tmp_path / "run", tmp_path / "soup"
    checkpoint(run, 10)
    child = watching(run, out)
    wait_for(out, 10.0)
    child.kill()
    child.communicate()
    checkpoint(run, 20)
    child = watching(run, out)
    wait_for(out, 15.0)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == 0, stderr
    assert "stopped; the same command goes on from here" in stderr
    checkpoint(run, 30)
    child = watching(run, out, "--until", "30", "--json")
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    assert json.loads(stdout)["recipe"]["method"] == "lawa"
    assert value(out) == 25.0
    assert not (tmp_path / "soup.partial").exists()
    wrong = command("watch", str(run), "-o", str(out))
    assert (wrong.returncode, "lawa needs --last" in wrong.stderr) == (2, True)
