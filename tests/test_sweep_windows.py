"""Sweeps over the checkpoints of a run: each window scores as its average does, to the byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import load_array, save, tensor

import streamsoup
from streamsoup.cli import cli
from streamsoup.errors import RecipeError
from streamsoup.search.windows import CURVES, windows

VALUES = (3.0, 10.0, 20.0, 31.0, 40.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Save the checkpoints of a run, each of one value, with steps that names alone misorder."""
    for i, value in enumerate(VALUES):
        folder = save(tmp_path / "run" / f"checkpoint-{8 + i}", {"w": tensor(np.full(5, value))})
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8 + i}))
        (folder / "config.json").write_text("{}")
    return tmp_path / "run"


def task_file(folder: Path, *, wanted: float) -> Path:
    """Write a task that prefers weights near a number."""
    (folder / "task.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))\n"
        "def build():\n"
        "    return Model()\n"
        "def score(model, split):\n"
        f"    return -abs(float(model.w[0]) - {wanted})\n"
    )
    return folder / "task.py"


def value_of(folder: str | Path) -> float:
    """Return the value of a soup."""
    (value,) = set(load_array(Path(folder) / "model.safetensors", "w").tolist())
    return float(value)


def made_by_verb(run: Path, output: Path, values: Mapping[str, Any], decay: float) -> Path:
    """Make the average of a window by the command it stands for."""
    told: dict[str, Any] = {"last": values["last"], "every": values.get("every", 1)}
    curve = values["curve"]
    if curve == "uniform":
        streamsoup.lawa(run, **told, output=output)
    elif curve == "ema":
        streamsoup.ema(run, decay, **told, output=output)
    else:
        streamsoup.wsm(run, curve, **told, output=output)
    return output


def test_each_window_is_the_average_of_its_verb(run: Path, tmp_path: Path) -> None:
    """Each score is that of the soup of `lawa`, `ema` or `wsm`; the best of them is written."""
    task = str(task_file(tmp_path, wanted=27.0))
    soup = streamsoup.sweep_windows(
        run, task, last=[1, 2, 3], every=[1, 2], decay=0.75, output=tmp_path / "out"
    )
    points = soup.report["sweep"]["points"]
    assert (
        len(points) == 1 + 2 * 3 + 2 * 4
    )  # of one, curves are the same; of two, cosine is the mean
    for i, point in enumerate(points):
        made = made_by_verb(run, tmp_path / f"o{i}", point["values"], 0.75)
        assert point["score"] == -abs(value_of(made) - 27.0), point
    best = soup.report["sweep"]["best"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", f"o{best}")]
    assert weights[0] == weights[1]
    assert soup.score == max(point["score"] for point in points)
    assert len(soup.recipe.ingredients) == points[best]["values"]["last"]
    assert streamsoup.verify(soup.path).rederived
    assert not Path(f"{soup.path}.search").exists()


def test_a_window_reads_its_own_checkpoints_alone(run: Path, tmp_path: Path) -> None:
    """A trial costs the bytes of the checkpoints of its window."""
    task = str(task_file(tmp_path, wanted=27.0))
    soup = streamsoup.sweep_windows(
        run, task, last=[1, 4], curves=["uniform"], output=tmp_path / "out"
    )
    assert soup.report["nbytes_read"] == (1 + 4) * 5 * 8
    with pytest.raises(RecipeError, match="no window fits 5 checkpoints"):
        streamsoup.sweep_windows(run, task, last=[6], output=tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lawa", "--window", "1:4:1"], {1: 40.0, 2: 35.5, 3: 91 / 3, 4: 25.25}),
        (["wsm", "--last", "2:4:1"], {2: 35.5, 3: 91 / 3, 4: 25.25}),
        (["uniform", "--every", "1:2:1"], {1: 20.8, 2: 21.0}),
    ],
)
def test_ranges_that_choose_checkpoints(
    run: Path, tmp_path: Path, words: list[str], expected: dict[float, float]
) -> None:
    """Any verb's points may take other checkpoints each: all are scored as what they are."""
    task, out = str(task_file(tmp_path, wanted=27.0)), tmp_path / "out"
    verb, option, numbers = words
    command = ["sweep", verb, str(run), option, numbers, "--task", task, "-o", str(out), "-q"]
    assert cli(command) == 0
    report = json.loads((out / "streamsoup.json").read_text())["report"]
    name = option.removeprefix("--")
    found = {point["values"][name]: point["score"] for point in report["sweep"]["points"]}
    assert found == pytest.approx({at: -abs(value - 27.0) for at, value in expected.items()})
    best = max(expected, key=lambda at: -abs(expected[at] - 27.0))
    assert value_of(out) == pytest.approx(expected[best])


def test_on_the_command_line(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`sweep windows` takes ranges and curves, tells the best in words, and writes its page."""
    task, out = str(task_file(tmp_path, wanted=27.0)), tmp_path / "out"
    more = ["--task", task, "-o", str(out), "--report", str(tmp_path / "r.html")]
    told = ["--last", "1:3:1", "--curve", "uniform,cosine"]
    assert cli(["sweep", "windows", str(run), *told, *more]) == 0
    assert "windows is best at curve uniform, last 3" in capfd.readouterr().out
    assert "cosine" in (tmp_path / "r.html").read_text()
    for wrong, status, message in (
        (["--last", "1.5,2"], 1, "last: 1.5 is not a whole number"),
        (["--curve", "square"], 1, "curve"),
        (["--last", "9"], 1, "no window fits"),
        (["--frobnicate"], 2, "--frobnicate"),
    ):
        command = ["sweep", "windows", str(run), *wrong, "--task", task, "-o", str(tmp_path / "x")]
        assert cli(command) == status, wrong
        assert message in capfd.readouterr().err


def test_points_are_told_apart_by_their_checkpoints() -> None:
    """Windows that are the same are one point; numbers that are none are refused."""
    assert len(windows(3, [1, 2, 3], [1], CURVES)) == 1 + 3 + 4
    assert [point.members for point in windows(4, [2], [1, 3], ["ema"])] == [(2, 3), (0, 3)]
    for wrong in ({"last": [0]}, {"last": []}, {"every": [0]}, {"curves": []}, {"decay": 1.0}):
        with pytest.raises(RecipeError):
            windows(4, **{"last": [1], **wrong})  # type: ignore[arg-type]
