"""Tasks say what is missing; hostile ones are named, and harm nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import psutil
import pytest
import torch

from streamsoup import GreedySettings, greedy, wise_ft
from streamsoup.cli.greedy import lines
from streamsoup.errors import TaskError
from streamsoup.task import Score, load_task, read_score
from streamsoup.task.command import command_task


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ingredients' folders."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"), 2)


def read(answer: Any, main: str | None = None, to_beat: float | None = None) -> Score:
    """Read an answer as a task's."""
    return read_score(answer, main=main, to_beat=to_beat, where="task.py: score")


@pytest.mark.parametrize(
    "answer", [1, 1.0, True, np.float32(1), torch.tensor(1.0), torch.tensor([1]), {"any": 1}]
)
def test_a_number_is_a_score(answer: Any) -> None:
    """Numbers of Python, numpy and torch are scores, and so is a lone metric."""
    assert read(answer).value == 1.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "None; does the function return"),
        ("0.9", "str '0.9'"),
        ((0.5, 0.6), "tuple"),
        ([0.5], "list"),
        (np.zeros(2), "ndarray"),
        (torch.zeros(2), "Tensor"),
        (1j, "complex"),
        ({}, r"the metrics \(none\)"),
        ({"a": 1, "b": 2}, "a, b, and which one counts is not clear; name it"),
        ({"a": "x"}, "'a': answered with str"),
        ({"acc": 1, "examples": [[1]]}, "'examples' is not a list"),
        (float("inf"), "answered with inf, which no other score could beat"),
        (torch.tensor(float("inf")), "answered with inf"),
        ({"acc": np.float32("inf"), "loss": 1}, "answered with inf"),
        ({"examples": [1.0, float("inf")]}, "answered with inf"),
    ],
)
def test_what_is_no_score_is_named(answer: Any, message: str) -> None:
    """What a task answered instead of a score is shown."""
    with pytest.raises(TaskError, match=f"task.py: score.*{message}"):
        read(answer)


def test_a_score_names_task_and_split() -> None:
    """As there may be several of both."""
    task = load_task(lambda model, split: float("inf"))
    with pytest.raises(TaskError, match=r"<lambda>: score on 'val': answered with inf"):
        task.score(None, "val")


def test_what_is_worth_nothing_may_say_so() -> None:
    """NaN and -inf never win, and a metric that does not count may be anything."""
    assert read(float("-inf")).value == float("-inf")
    assert np.isnan(read(float("nan")).value)
    assert read({"acc": 0.5, "perplexity": float("inf")}, main="acc").value == 0.5


def test_an_answer_with_a_gradient_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """And taken without it."""
    weight = torch.tensor(0.5, requires_grad=True)
    with caplog.at_level(logging.WARNING, "streamsoup"):
        assert read({"acc": weight * 1}).value == 0.5
    assert "task.py: score: 'acc': the answer carries a gradient" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "streamsoup"):
        read(weight.detach())
    assert not caplog.records


@pytest.mark.parametrize("how", ["score", "predictions", "stubborn"])
def test_training_mode_is_said_once(
    tmp_path: Path, paths: list[str], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Where a task puts its model there, or a module cannot be put elsewhere; in every command."""

    class Trains:
        splits = ("val", "test")

        def build(self) -> torch.nn.Module:
            model = networks.build()
            if how == "stubborn":
                model[1].train = lambda mode=True: model[1]  # type: ignore[assignment]
            return model

        def score(self, model: torch.nn.Module, split: str) -> float:
            model.train(how == "score")
            return 0.5

    if how == "predictions":

        def predictions(self: Any, model: torch.nn.Module, split: str) -> Any:
            model.train()
            yield torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)

        Trains.predictions = predictions  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "streamsoup"):
        wise_ft(*paths, Trains(), [0.0, 1.0], cache=tmp_path / "cache")
    assert caplog.text.count("was in training mode") == 1
    if how == "predictions":
        return
    caplog.clear()
    with caplog.at_level(logging.WARNING, "streamsoup"):
        greedy(paths, Trains(), output=tmp_path / "soup")
    assert caplog.text.count("score on 'val': the model was in training mode") == 1


def test_a_score_survives_the_journal() -> None:
    """Every bit of a score comes back from its record, NaN and examples included."""
    for value in (0.1, float("inf"), -0.0):
        score = Score(value, {"b": 1 / 3}, np.array([0.1, 1.0]), False)
        again = Score.from_record(json.loads(json.dumps(score.to_record())))
        assert (again.value, again.metrics) == (score.value, score.metrics)
        assert again.examples is not None
        assert again.examples.tobytes() == np.array([0.1, 1.0]).tobytes()
    assert np.isnan(Score.from_record(Score(float("nan")).to_record()).value)


def test_what_is_missing_is_asked_for_with_an_example(tmp_path: Path) -> None:
    """A task without a function that is needed gets its name and an example."""
    (tmp_path / "task.py").write_text("splits = ['val', 'test']\ndef build(): ...\n")
    with pytest.raises(TaskError, match=r"score is missing; add, for example:\n    def score\("):
        load_task(tmp_path / "task.py")
    (tmp_path / "task.py").write_text("splits = ['val', 'test']\ndef score(model): return 1\n")
    task = load_task(tmp_path / "task.py")
    for name in ("build", "loss", "predictions", "recalibration"):
        assert not task.has(name)
        with pytest.raises(TaskError, match=rf"{name} is missing; add, .*\n    def {name}\("):
            task.need(name)
    assert task.check_split(None) == "val"
    with pytest.raises(
        TaskError,
        match=r"no split 'dev', only val, test; .*\n    splits = \['val', 'test', 'dev'\]$",
    ):
        task.check_split("dev")
    with pytest.raises(
        TaskError,
        match=r"splits is missing, so val is .*not 'test'.*\n    splits = \['val', 'test'",
    ):
        load_task(len).check_split("test")


@pytest.mark.parametrize("has", ["loss", "predictions"])
def test_score_is_asked_for_only_where_it_is_used(
    tmp_path: Path, paths: list[str], has: str
) -> None:
    """A task of a loss or of predictions alone is a task; a search by score says what it lacks."""
    path = tmp_path / "task.py"
    path.write_text(f"def {has}(model, split): yield 1\ndef build(): ...\n")
    assert load_task(path).has(has)
    with pytest.raises(TaskError, match=r"score is missing; add"):
        greedy(paths, path, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "cannot be loaded: SyntaxError"),
        ("import not_there_at_all", "ModuleNotFoundError"),
        ("import sys; sys.exit(3)", r"it called sys.exit\(3\)"),
        ("score = 3", "score is not a function"),
        ("splits = 'val'\ndef score(m): ...", "splits is empty or not a list"),
    ],
)
def test_task_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    """Errors while loading a task file name it."""
    (tmp_path / "task.py").write_text(text)
    with pytest.raises(TaskError, match=f"task.py.*{message}"):
        load_task(tmp_path / "task.py")


def hostile(folder: Path, body: str) -> Path:
    """Write a task whose scoring is hostile."""
    path, _ = networks.task_file(folder)
    text = path.read_text()
    path.write_text(f"{text}\ndef score(model, split):\n    import os, sys, time\n    {body}\n")
    return path


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no')", r"score failed: ValueError: no \(line \d+ of .*, in score\)"),
        ("return 'high'", "answered with str 'high'"),
        ("return 1.0, 2.0", "answered with tuple"),
        ("sys.exit(0)", r"it called sys.exit\(0\)"),
        ("print('last', flush=True); os._exit(0)", r"ended itself with status 0.*\n  \| last"),
        ("os.abort()", "killed by SIGABRT;"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV;"),
        ("import signal; os.kill(os.getpid(), signal.SIGSTOP)", "longer than 3 s"),
        ("sys.stdout.close(); print(1)", "closed file[^|]*$"),
        ("os.closerange(3, 64)", r"ended itself with status 1.*\n  \| OSError: "),
        ("print('so far', flush=True); time.sleep(60)", r"longer than 3 s.*\n  \| so far"),
        ("[print('y' * 99) for _ in range(50000)]\n    raise KeyError", r"KeyError.*(\n  \| y+)+$"),
        ("os.fork()\n    time.sleep(0.2)\n    return 1 / 0", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_hostile_tasks_in_a_process(
    tmp_path: Path, paths: list[str], body: str, message: str
) -> None:
    """Whatever scoring does to its process, it is named with its output; the search survives."""
    search = GreedySettings(isolate=True, timeout=3.0)
    task = hostile(tmp_path, body)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(TaskError, match=f"(?s)task.py: .*{message}"):
        greedy(paths, task, output=tmp_path / "out", settings=search)
    assert not (tmp_path / "out").exists()
    assert set(psutil.Process().children(recursive=True)) <= before


INTO_SOCKETS = """
    import stat
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{{name}}"
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            {does}
    {then}
"""


SLEEPS = "time.sleep(100)"


@pytest.mark.parametrize(
    ("does", "then", "message"),
    [
        ("os.write(int(name), b'hello world')", SLEEPS, "wrote into a file descriptor"),
        ("os.write(int(name), b'\\xff\\xff\\xff')", SLEEPS, "wrote into a file descriptor"),
        ("os.write(int(name), bytes(4))", SLEEPS, "wrote into a file descriptor"),
        ("os.write(int(name), b'\\x93so')", "return 1.0", "wrote into a file descriptor"),
        ("os.write(int(name), b'x' * 100_000)", SLEEPS, "wrote into a file descriptor"),
        ("os.close(int(name))", SLEEPS, "closed a file descriptor"),
    ],
)  # fmt: skip
def test_whatever_a_task_does_to_the_connection(
    tmp_path: Path, paths: list[str], does: str, then: str, message: str
) -> None:
    """Garbage where answers are expected, or nothing any more, is told at once, without a clock."""
    task = hostile(tmp_path, INTO_SOCKETS.format(does=does, then=then))
    search = GreedySettings(isolate=True)
    started = time.monotonic()
    with pytest.raises(TaskError, match=f"task.py: score: {message} that is not its own"):
        greedy(paths, task, output=tmp_path / "out", settings=search)
    assert time.monotonic() - started < 50


def test_a_fork_does_not_answer_twice(tmp_path: Path, paths: list[str]) -> None:
    """The child of a task that forked is not taken for the task."""
    search = GreedySettings(isolate=True)
    task = hostile(tmp_path, "os.fork()\n    return networks.score(model)")
    soup = greedy(paths, task, output=tmp_path / "out", settings=search)
    assert soup.singles[0].score.value == networks.mean_score(paths, [0])


def test_a_late_command_is_killed_with_its_children(tmp_path: Path) -> None:
    """After a timeout no process of the command is left, not even one in a session of its own."""
    mark = tmp_path / "pids"
    command = f"(setsid sleep 61 & echo $! >> {mark}; sleep 62 & echo $! >> {mark}; sleep 63)"
    command += " # {checkpoint}"
    with pytest.raises(TaskError, match="longer than"):
        command_task(command, main=None, timeout=1.0).run("/some where", "val", None)
    time.sleep(0.1)
    assert not any(map(is_alive, mark.read_text().split()))


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open({mark!r}, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
    os._exit(0)
while not (os.path.exists({mark!r}) and os.path.getsize({mark!r})):
    time.sleep(0.01)
"""


def is_alive(pid: str) -> bool:
    """Return True if a process still runs."""
    try:
        return psutil.Process(int(pid)).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def test_daemons_do_not_outlive_the_scoring(tmp_path: Path, paths: list[str]) -> None:
    """What left its group and its parent is killed too, by the mark in its environment."""
    mark = tmp_path / "command"
    (tmp_path / "daemon.py").write_text(DAEMON.format(mark=str(mark)))
    command = f"{sys.executable} {tmp_path}/daemon.py; echo 3 # {{checkpoint}}"
    assert command_task(command, main=None, timeout=20).run("/x", "val", None).value == 3
    assert not is_alive(mark.read_text())
    mark = tmp_path / "task"
    task = hostile(tmp_path, f"exec({DAEMON.format(mark=str(mark))!r})\n    os._exit(3)")
    with pytest.raises(TaskError, match="ended itself with status 3"):
        greedy(paths, task, output=tmp_path / "out", settings=GreedySettings(isolate=True))
    assert not is_alive(mark.read_text())


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_nothing_outlives_a_killed_search(tmp_path: Path, paths: list[str], jobs: str) -> None:
    """A command does not go on for hours after SIGKILL of who wanted its score; nor does a task."""
    mark = tmp_path / "mark"
    command = (
        f": {{checkpoint}}; sleep 60 & echo $! >> {mark}; "
        f"(setsid sleep 60 & echo $! >> {mark}) & sleep 60; echo 1"
    )
    task = hostile(tmp_path, f"exec({DAEMON.format(mark=str(mark))!r})\n    time.sleep(60)")
    for how, n in ((["--command", command], 2 * int(jobs)), (["--task", str(task)], 1)):
        mark.unlink(missing_ok=True)
        arguments = ["greedy", *paths, *how, "--jobs", jobs, "-o", str(tmp_path / "out")]
        search = subprocess.Popen(
            [sys.executable, "-m", "streamsoup", *arguments],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        try:
            assert comes_true(lambda n=n: mark.exists() and len(mark.read_text().split()) >= n)
        finally:
            search.kill()
            search.wait()
        assert comes_true(lambda: not any(map(is_alive, mark.read_text().split())))
        shutil.rmtree(tmp_path / "out.search")


def comes_true(condition: Callable[[], bool]) -> bool:
    """Return True if a condition is met within half a minute."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_the_table_fits_the_terminal(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names are cut in the middle, so that no row of the table is wrapped."""
    long = [
        str(shutil.copytree(path, tmp_path / ("long" * 20) / f"run{i}"))
        for i, path in enumerate(paths)
    ]
    soup = greedy(long, networks.score, model=networks.build(), output=tmp_path / "out")
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = lines(soup)[: len(long) + 1]
        assert all(len(row) <= columns for row in rows)
        assert [row for row in rows if "run1  " in row]
        assert len({row.rstrip().rfind(" ") for row in rows[1:]}) == 1


def streamsoup(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "streamsoup", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def test_the_command_line(tmp_path: Path, paths: list[str]) -> None:
    """The command prints trials and a table; refuses no task and several; names a bad one."""
    networks.task_file(tmp_path)
    made = streamsoup("greedy", *paths, "--task", "task.py", "-o", "out", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "in the soup" in made.stdout
    (share,) = re.findall(r"([0-9.]+) % of it beyond scoring", made.stdout)
    assert 0 <= float(share) <= 100
    assert made.stderr.startswith("building the model\n")
    assert "to beat" in made.stderr
    wrong = streamsoup("greedy", *paths, "-o", "x", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "one of --task task.py, --command" in wrong.stderr
    alone = streamsoup(
        "greedy", *paths, "--task", "task.py", "--batch-size", "8", "-o", "x", cwd=tmp_path
    )
    assert "--batch-size goes with --lm-eval" in alone.stderr
    some = streamsoup(
        "greedy", *paths, "--lm-eval", "a", "--batch-size", "some", "-o", "x", cwd=tmp_path
    )
    assert "--batch-size some: give a number, or auto" in some.stderr
    hostile(tmp_path, "os._exit(0)")
    died = streamsoup("greedy", *paths, "--task", "task.py", "-o", "x", "--json", cwd=tmp_path)
    assert died.returncode == 1
    assert died.stdout == ""
    assert died.stderr.startswith("error: task.py: score: the process ended itself with status 0")
    there = streamsoup("greedy", *paths, "--task", "task.py", "-o", "out", cwd=tmp_path)
    assert there.returncode == 1
    assert "--overwrite" in there.stderr


@pytest.mark.parametrize("command", ["greedy", "learned", "compare", "interpolate"])
def test_traceback_shows_every_frame(tmp_path: Path, paths: list[str], command: str) -> None:
    """Without it one line names the last line of the user's own; with it, all frames are there."""
    (tmp_path / "helper.py").write_text("import json\ndef parse(): return json.loads('{')\n")
    path, _ = networks.task_file(tmp_path)
    path.write_text(
        f"{path.read_text()}\nimport helper\ndef score(model, split): return helper.parse()\n"
        "def loss(model, split): yield helper.parse()\n"
    )
    arguments = [command, *paths, "--task", "task.py", "-o", "out"]
    arguments += ["--alphas", "0,1"] if command == "interpolate" else []
    traced = streamsoup(*arguments, "--traceback", cwd=tmp_path)
    assert traced.returncode == 1
    (line,) = [line for line in traced.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"JSONDecodeError: .* \(line 2 of .*helper\.py, in parse\)", line)
    if command == "greedy":
        plain = streamsoup(*arguments, cwd=tmp_path)
        assert line in plain.stderr.splitlines()
        assert "Traceback" not in plain.stderr
    for frame in ("in raw_decode", "in parse", f'File "{tmp_path}/helper.py", line 2'):
        assert frame in traced.stderr
