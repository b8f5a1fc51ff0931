"""Several scorers at once: the outcome is that of one, also where candidates fail."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from safetensors.torch import save_file

from streamsoup import GreedySettings, GreedySoup, Options, greedy
from streamsoup.errors import TaskError
from streamsoup.task.command import command_task

N = 5

TASK = """
import os, time, torch
from torch import nn

SCORES = {scores}
POISON = {poison}

class Marks(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))

def build():
    return Marks()

def score(model, split, to_beat):
    found = tuple(int(i) for i in model.w.detach().nonzero().flatten())
    if found == POISON:
        {body}
    time.sleep(0.02 * (5 - found[-1]))
    value = SCORES.get(found, 0.0)
    if to_beat is not None and value < to_beat - 0.3:
        return {{"at_most": value + 0.1}}
    return value
"""
SCORES = {(0,): 0.5, (0, 1): 0.6, (0, 1, 2): 0.2, (0, 1, 3): 0.6, (0, 1, 3, 4): 0.4}
"""What one scorer asks for; (0, 2) and the like are asked for by several only."""


@pytest.fixture
def marks(tmp_path: Path) -> list[Path]:
    """Make ingredients that are unit vectors, so that a mean shows its members."""
    for i in range(N):
        save_file({"w": torch.eye(N)[i]}, tmp_path / f"{i}.safetensors")
    return [tmp_path / f"{i}.safetensors" for i in range(N)]


def search(marks: list[Path], *, jobs: int, **task: Any) -> GreedySoup:
    """Search in the order given, with a task that fails for one candidate."""
    folder = marks[0].parent
    file = folder / "task.py"
    file.write_text(TASK.format(**{"scores": SCORES, "poison": None, "body": "pass"} | task))
    search = GreedySettings(order="given", jobs=jobs, isolate=True, passes=2, restart=True)
    return greedy(
        marks, file, output=folder / "out", settings=search, options=Options(overwrite=True)
    )


def trials(soup: GreedySoup) -> list[tuple[Any, ...]]:
    """Return what was decided, and why."""
    return [(t.members, t.score.value, t.decision, t.known) for t in soup.runs[0].trials]


def test_what_one_would_not_try_may_fail(marks: list[Path]) -> None:
    """A candidate that was tried ahead and is not wanted any more fails for nobody."""
    one = search(marks, jobs=1)
    assert one.members == (0, 1, 3)
    for body in ("raise ValueError('no')", "os._exit(3)", "return float('nan')"):
        several = search(marks, jobs=3, poison=(0, 2), body=body)
        assert trials(several) == trials(one)
        assert several.members == one.members
        assert several.report["n_scored"] >= one.report["n_scored"] == len(SCORES) + 1


def test_workers_of_a_process_with_many_files(marks: list[Path]) -> None:
    """Descriptors above 1023 are watched as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1200:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        assert search(marks, jobs=2).members == (0, 1, 3)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_one_would_try_fails_alike(marks: list[Path]) -> None:
    """A candidate that one scorer would try fails with the same message for several."""
    said = []
    for jobs in (1, 3):
        with pytest.raises(TaskError, match="ValueError: no") as error:
            search(marks, jobs=jobs, poison=(0, 1, 2), body="raise ValueError('no')")
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_task_of_the_script_itself_is_refused(marks: list[Path], tmp_path: Path) -> None:
    """Its workers could not import it, which is said before one is started."""
    call = f"greedy({[str(path) for path in marks]}, score, output='out', settings=search)"
    script = "from streamsoup import GreedySettings, greedy\n"
    script += "def score(model): return 1\nsearch = GreedySettings(jobs=2)\n"
    script += f"try: {call}\nexcept ValueError as error: print(error)\n"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "in its process alone); give a task file" in ran.stdout


def test_commands_run_at_once(tmp_path: Path, marks: list[Path]) -> None:
    """Commands have a candidate each, and find what one finds; nothing of theirs is left."""
    script, log = tmp_path / "eval.py", tmp_path / "log"
    script.write_text(
        "import sys\nfrom safetensors.numpy import load_file\n"
        f"open({str(log)!r}, 'a').write(sys.argv[1] + chr(10))\n"
        "marks = load_file(sys.argv[1] + '/model.safetensors')['w']\n"
        f"print({SCORES}.get(tuple(map(int, marks.nonzero()[0])), 0.1))\n"
    )
    task = command_task(f"{sys.executable} {script} {{checkpoint}}", main=None, timeout=60)
    soups = [
        greedy(marks, task, output=tmp_path / f"out{jobs}", settings=GreedySettings(jobs=jobs))
        for jobs in (1, 2)
    ]
    assert trials(soups[0]) == trials(soups[1])
    candidates = [line for line in log.read_text().splitlines() if "out2.search" in line]
    assert len(set(candidates)) == len(candidates)
    makers = {Path(line).name.split("-")[1] for line in candidates}
    assert len(makers) == 2
    assert not (tmp_path / "out2.search").exists()


def test_a_failing_command_says_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    """With several at once, a failure reads as that of one; what holds no score is removed."""
    paths = networks.ingredients(tmp_path / "in", 2)
    task = command_task("echo why >&2; exit 3; {checkpoint}", main=None, timeout=60)
    said = []
    for jobs in (1, 2):
        search = GreedySettings(jobs=jobs)
        with pytest.raises(TaskError, match=r"ended with status 3.*\n  \| why") as error:
            greedy(paths, task, output=tmp_path / "out", settings=search)
        said.append(str(error.value))
        assert os.listdir(tmp_path) == ["in"]
    assert said[0] == said[1]
