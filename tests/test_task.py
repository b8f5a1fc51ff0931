"""Tasks say what is missing; hostile ones are named, and harm nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import psutil
import pytest
import torch

from streamsoup import SearchOptions, greedy_soup
from streamsoup.cli.greedy import lines
from streamsoup.errors import TaskError
from streamsoup.task import Score, command, family, load_task, read_score
from streamsoup.task.command import command_task


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give the ingredients' folders."""
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
        ({"acc": 1, "examples": [[1]]}, "'examples' is no list"),
    ],
)
def test_what_is_no_score_is_named(answer: Any, message: str) -> None:
    """What a task answered instead of a score is shown."""
    with pytest.raises(TaskError, match=f"task.py: score.*{message}"):
        read(answer)


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
    with pytest.raises(TaskError, match="no split 'dev', only val, test"):
        task.check_split("dev")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "cannot be loaded: SyntaxError"),
        ("import not_there_at_all", "ModuleNotFoundError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("score = 3", "score is no function"),
        ("splits = 'val'\ndef score(m): ...", "splits is empty or no list"),
    ],
)
def test_task_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    """Errors while loading a task file name it."""
    (tmp_path / "task.py").write_text(text)
    with pytest.raises(TaskError, match=f"task.py.*{message}"):
        load_task(tmp_path / "task.py")


def test_where_tasks_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, modules, objects in modules, classes and functions are tasks; others are refused."""
    text = "class Mine:\n    main = 'b'\n    def score(self, model, split):\n"
    text += "        return {'a': 1, 'b': 2}\n"
    (tmp_path / "my_soup_task.py").write_text(text + "mine = Mine()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for given in ("my_soup_task:mine", "my_soup_task:Mine", f"{tmp_path}/my_soup_task.py:mine"):
        assert load_task(given).score(None, "val").value == 2
    assert load_task(lambda model: 0.5).score(None, "val").value == 0.5
    with pytest.raises(TaskError, match="no such task file"):
        load_task("nowhere.py")
    with pytest.raises(TaskError, match="there is no module 'nowhere_at_all'"):
        load_task("nowhere_at_all:x")
    with pytest.raises(TaskError, match="has no 'other'"):
        load_task("my_soup_task:other")


def test_a_task_may_lie_in_a_folder_with_a_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is a path; a colon after it names an object all the same."""
    monkeypatch.chdir(tmp_path)
    Path("run:3").mkdir()
    Path("run:3/task.py").write_text("class Mine:\n    score = min\ndef score(model): return 3\n")
    assert load_task("run:3/task.py").score(None, "val").value == 3
    assert load_task("run:3/task.py:Mine").has("score")
    with pytest.raises(TaskError, match=r"run:4/task\.py: no such task file"):
        load_task("run:4/task.py")


def test_loading_a_task_leaves_the_world_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the working folder nor numpy's error handling is the task's to choose."""
    monkeypatch.chdir(tmp_path)
    change = "os.chdir('/'); np.seterr(all='raise')"
    head = "import os\nimport numpy as np\n"
    Path("task.py").write_text(f"{head}{change}\ndef score(model): return 1\n")
    Path("later.py").write_text(
        f"{head}class Mine:\n    def __init__(self): {change}\n"
        f"    def splits(self): {change}; return ['a']\n    def score(self, model): return 1\n"
    )
    before = np.geterr()
    for task in ("task.py", "later.py:Mine"):
        load_task(task)
        assert Path.cwd() == tmp_path
        assert np.geterr() == before


def test_each_task_file_has_what_lies_beside_it(tmp_path: Path) -> None:
    """A helper of one name beside two task files is two helpers, in whatever order they load."""
    before = list(sys.path)
    for number, name in enumerate("ab"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "__init__.py").write_text("from inner.deep import V\n")
        (tmp_path / name / "inner" / "deep.py").write_text(f"V = {number}\n")
        (tmp_path / name / "helper.py").write_text("from inner import V\n")
        (tmp_path / name / "task.py").write_text(
            "from helper import V\ndef score(model, split): return V\n"
        )
    loaded = [load_task(str(tmp_path / name / "task.py")) for name in "aba"]
    assert [task.score(None, "val").value for task in loaded] == [0, 1, 0]
    assert sys.path == before
    assert not {"helper", "inner", "inner.deep"} & sys.modules.keys()


def test_a_script_that_changes_as_it_is_used(tmp_path: Path, paths: list[str]) -> None:
    """Scores of two scripts make no soup."""
    script, helper = tmp_path / "ev.py", tmp_path / "helper.py"
    script.write_text(f"import helper\nprint(1)\nopen({str(helper)!r}, 'a').write('V = 1')")
    helper.write_text("")
    task = command_task(f"{sys.executable} {script} {{checkpoint}}", main=None, timeout=60)
    with pytest.raises(TaskError, match=r"ev\.py, or what it imports, changed as it was used"):
        greedy_soup(paths, task, output=tmp_path / "out")


def test_a_command_may_tidy_up(tmp_path: Path, paths: list[str]) -> None:
    """It may remove its candidate, or put a link in its place: what that leads to stays."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "work").write_text("")
    for number, end in enumerate(("", f"; ln -s {mine} {{checkpoint}}")):
        line = "test -e {checkpoint}/model.safetensors && echo 1; rm -r {checkpoint}" + end
        task = command_task(line, main=None, timeout=60)
        soup = greedy_soup(paths, task, output=tmp_path / f"out{number}")
        assert len(soup.members) == len(paths)
        assert [path.name for path in mine.iterdir()] == ["work"]
        assert not (tmp_path / f"out{number}.search").exists()


def test_the_time_of_a_search_holds_for_its_command(tmp_path: Path, paths: list[str]) -> None:
    """A command without a limit of its own has that of the search."""
    task = command_task("sleep 60; : {checkpoint}", main=None, timeout=None)
    for jobs in (1, 2):
        search = SearchOptions(timeout=0.2, jobs=jobs)
        with pytest.raises(TaskError, match=r"took longer than 0\.2 s"):
            greedy_soup(paths, task, output=tmp_path / "out", search=search)


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
    search = SearchOptions(isolate=True, timeout=3.0)
    task = hostile(tmp_path, body)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(TaskError, match=f"(?s)task.py: .*{message}"):
        greedy_soup(paths, task, output=tmp_path / "out", search=search)
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
    search = SearchOptions(isolate=True)
    started = time.monotonic()
    with pytest.raises(TaskError, match=f"task.py: score: {message} that is not its own"):
        greedy_soup(paths, task, output=tmp_path / "out", search=search)
    assert time.monotonic() - started < 50


def test_a_fork_does_not_answer_twice(tmp_path: Path, paths: list[str]) -> None:
    """The child of a task that forked is not taken for the task."""
    search = SearchOptions(isolate=True)
    task = hostile(tmp_path, "os.fork()\n    return networks.score(model)")
    soup = greedy_soup(paths, task, output=tmp_path / "out", search=search)
    assert soup.singles[0].score.value == networks.mean_score(paths, [0])


def run_command(command: str, timeout: float | None = 20.0, main: str | None = None) -> Score:
    """Score a folder by a command."""
    return command_task(command, main=main, timeout=timeout).run("/some where", "val", None)


@pytest.mark.parametrize(
    ("command", "score"),
    [
        ("echo 0.5 # {checkpoint}", 0.5),
        ("echo accuracy: 93.5%; echo done {checkpoint} | tr -d /", 93.5),
        ("echo 1; echo 2; # {checkpoint}", 2.0),
        ("""echo '{"acc": 0.25, "model": "m"}' # {checkpoint}""", 0.25),
        ("""printf '{\\n "acc": 0.25\\n}\\n' # {checkpoint}""", 0.25),
        ("test {checkpoint} = '/some where' && echo -1e-3", -1e-3),
        ("yes no | head -c 6000000; echo 7 {checkpoint}", 7.0),
        ("sleep 60 & echo 3 # {checkpoint}", 3.0),
    ],
)
def test_the_last_number_of_a_command(command: str, score: float) -> None:
    """The last number or JSON object on standard output counts, whatever else there is."""
    started = time.monotonic()
    assert run_command(command).value == score
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo oops >&2; exit 3; {checkpoint}", r"ended with status 3.*\n  \| oops"),
        ("kill -9 $$ # {checkpoint}", "killed by SIGKILL"),
        ("echo nothing {checkpoint}", "printed no score"),
        ("echo 1 2 # {checkpoint}", "has 2 of them"),
        ("echo begun; sleep 60; {checkpoint}", r"longer than 1 s.*\n  \| begun"),
        ("""echo '{"a": 1, "b": 2}' # {checkpoint}""", "which one counts is not clear"),
    ],
)
def test_commands_that_fail(command: str, message: str) -> None:
    """A command that fails, is late or prints no score is named, with the end of its output."""
    with pytest.raises(TaskError, match=f"(?s){message}"):
        run_command(command, timeout=1.0)


def printed(folder: Path, text: str) -> Score:
    """Score by a command that prints a text."""
    (folder / "printed").write_text(text)
    return run_command(f"cat {folder}/printed # {{checkpoint}}")


_BLOCK = """***** eval metrics *****
  epoch                   =        1.0
  eval_accuracy           =        0.9
  eval_loss               =        0.3
  eval_runtime            = 0:00:01.23
  eval_samples_per_second =      100.0
  eval_steps_per_second   =       10.0"""


@pytest.mark.parametrize(
    ("printed", "metric", "score"),
    [
        (_BLOCK, "eval_accuracy", 0.9),
        (_BLOCK, "eval_loss", 0.3),
        (_BLOCK, "accuracy", None),
        (_BLOCK, None, None),
        ("acc: 0.5\nacc: 0.75 of all\nPeak memory: 123 MB", "acc", 0.75),
        ("acc: 0.5\nPeak memory: 123 MB", None, None),
        ("accuracy: 0.85\n12.3 it/s", None, None),
        ("accuracy: 0.85\n2 passed in 0.12s", None, None),
        ("0.85", "acc", 0.85),
        ("acc: 0.85\n100%", "acc", 0.85),
        ("acc=85%", "acc", 85.0),
    ],
)
def test_the_number_that_counts_is_taken_by_its_name(
    tmp_path: Path, printed: str, metric: str | None, score: float | None
) -> None:
    """Trainers end with how fast they were: that is no score, and the named one is found above."""
    (tmp_path / "said").write_text(printed)
    task = command_task(f"cat {tmp_path}/said # {{checkpoint}}", main=metric, timeout=None)
    if score is None:
        with pytest.raises(TaskError, match=r"no score can be read|printed no accuracy|has \d"):
            task.run("folder", "val", None)
    else:
        assert task.run("folder", "val", None).value == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Evaluated 200 examples\nAccuracy: 0.85.\n", 0.85),
        ("epoch 3\nIt is 0.85!\n", 0.85),
        ("epoch 3\nacc 85%, as before\n", 85.0),
        ("Loaded 200\n\x1b[1;32m0.85\x1b[0m\n", 0.85),
        ("\x1b]0;run 3\x07acc: 0.85\x1b[K\n", 0.85),
        ("epoch 3\n\u22120.5\n", -0.5),
        ("epoch 3\nnp.float64(0.85)\n", 0.85),
        ("0.85 (170/200)\n", 0.85),
        ("0.85\n\nAll done, bye :)\n", 0.85),
        ('step 3: {"acc": 0.85}\n', 0.85),
        ('{\n "acc": 0.85,\n "of": {\n  "n": 3\n }\n}\n', 0.85),
        ("10% 1\r100% 2\racc 0.85\r\n", 0.85),
        ("0.5\nscore -inf\n", float("-inf")),
        ("0.5\nscore=inf\n", float("inf")),
        ("0.5\nNaN\n", float("nan")),
        ("0.5\nval loss: nan\n", float("nan")),
        ("0.5\naccuracy nan\n", float("nan")),
        ("0.5\ntensor(nan)\n", float("nan")),
    ],
)
def test_what_scripts_print_last(tmp_path: Path, text: str, score: float) -> None:
    """Sentences, colours, signs and words for numbers are read as they are meant."""
    assert printed(tmp_path, text).value == pytest.approx(score, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    "line",
    [
        "{'accuracy': 0.85}",
        '{"accuracy": 0.85,}',
        ' "of": {"n": 3}',
        "acc=0.85s",
        "Done in 12s",
        "Done in 12.5 seconds",
        "3/4",
        "2024-01-31 done",
        "saved to run/3",
        "127.0.0.1",
        "finished without nan",
        "no nan",
        "nan-free",
        "  0.5000])",
        "n_examples=200)",
        "]",
    ],
)
def test_a_line_that_cannot_be_read_hides_no_other(tmp_path: Path, line: str) -> None:
    """What may be the score, but is none for sure, is named; the line above it is no score."""
    with pytest.raises(TaskError, match=r"no score can be read from .*print the score last") as no:
        printed(tmp_path, f"Evaluating 200\n{line}\n")
    assert repr(line.strip()) in str(no.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_long_object_is_read_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    """Thousands of examples are no matter; where they are too many, none of them is the score."""
    found = {"accuracy": 0.75, "examples": [1.0, 0.0] * 50_000}
    text = json.dumps(found, indent=indent)
    score = printed(tmp_path, text)
    assert score.value == 0.75
    assert score.examples is not None
    assert score.examples.tolist() == found["examples"]
    monkeypatch.setattr("streamsoup.task.command.OUTPUT_NBYTES", 100_000)
    with pytest.raises(TaskError, match=r"no score.* that it printed, and no more are held"):
        printed(tmp_path, text)
    assert printed(tmp_path, f"{text}\n0.5").value == 0.5


def test_what_stands_for_what_in_a_command(tmp_path: Path) -> None:
    """A path that looks like another placeholder is a path."""
    path = tmp_path / "a{split}{to_beat}"
    path.write_text("3")
    task = command_task("cat {checkpoint}; : {split} {to_beat}", main=None, timeout=20.0)
    assert task.run(str(path), "val", 0.5).value == 3


def test_a_late_command_is_killed_with_its_children(tmp_path: Path) -> None:
    """After a timeout no process of the command is left, not even one in a session of its own."""
    mark = tmp_path / "pids"
    command = f"(setsid sleep 61 & echo $! >> {mark}; sleep 62 & echo $! >> {mark}; sleep 63)"
    command += " # {checkpoint}"
    with pytest.raises(TaskError, match="longer than"):
        run_command(command, timeout=1.0)
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
    """Whether a process is there yet."""
    try:
        return psutil.Process(int(pid)).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def test_daemons_do_not_outlive_the_scoring(tmp_path: Path, paths: list[str]) -> None:
    """What left its group and its parent is killed too, by the mark in its environment."""
    mark = tmp_path / "command"
    (tmp_path / "daemon.py").write_text(DAEMON.format(mark=str(mark)))
    command = f"{sys.executable} {tmp_path}/daemon.py; echo 3 # {{checkpoint}}"
    assert run_command(command).value == 3
    assert not is_alive(mark.read_text())
    mark = tmp_path / "task"
    task = hostile(tmp_path, f"exec({DAEMON.format(mark=str(mark))!r})\n    os._exit(3)")
    with pytest.raises(TaskError, match="ended itself with status 3"):
        greedy_soup(paths, task, output=tmp_path / "out", search=SearchOptions(isolate=True))
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
    """Whether something is so within half a minute."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_command_scores_fresh_candidates(tmp_path: Path, paths: list[str]) -> None:
    """Each candidate has a path of its own and the bits of the soup; ingredients are not given."""
    script = tmp_path / "eval.py"
    script.write_text(
        "import sys, os\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import networks\nfrom safetensors.torch import load_file\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write(sys.argv[1] + chr(10))\n"
        "model = networks.build()\n"
        "model.load_state_dict(load_file(sys.argv[1] + '/model.safetensors'))\n"
        "print('score', networks.score(model.eval()))\n"
        "open(sys.argv[1] + '/model.safetensors', 'r+b').write(b'spoiled')\n"
        "open(sys.argv[1] + '/stray', 'w')\n"
    )
    before = [Path(path, "model.safetensors").read_bytes() for path in paths]
    task = command_task(f"{sys.executable} {script} {{checkpoint}}", main=None, timeout=60)
    soup = greedy_soup(paths, task, output=tmp_path / "out")
    found = [trial.score.value for trial in (*soup.singles, *soup.runs[0].trials)]
    trials = [trial.members for trial in (*soup.singles, *soup.runs[0].trials)]
    assert found == [networks.mean_score(paths, members) for members in trials]
    candidates = (tmp_path / "log").read_text().splitlines()
    assert len(set(candidates)) == len(candidates) == 3
    assert all(str(tmp_path / "out.search") in candidate for candidate in candidates)
    assert before == [Path(path, "model.safetensors").read_bytes() for path in paths]
    assert not (tmp_path / "out.search").exists()


def test_the_table_fits_the_terminal(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names are cut in the middle, so that no row of the table is wrapped."""
    long = [
        str(shutil.copytree(path, tmp_path / ("long" * 20) / f"run{i}"))
        for i, path in enumerate(paths)
    ]
    soup = greedy_soup(long, networks.score, model=networks.build(), output=tmp_path / "out")
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
    assert "beyond scoring" in made.stdout
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


def test_what_ended_while_we_were_stopped_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back from Ctrl-Z after the deadline looks once more before judging."""
    monkeypatch.setattr(command, "_drain", lambda *_: time.sleep(1))  # as if stopped there
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(["sleep", "0.2"], **pipes) as process:
        deadline = time.monotonic() + 0.5
        assert command._follow(process, deadline, family.Tail(), family.Tail()) == 0


def test_signals_without_a_name(tmp_path: Path) -> None:
    """A real-time signal has none, and is told by its number."""
    task = command_task("kill -40 $$; echo {checkpoint}", main=None, timeout=9)
    paths = networks.ingredients(tmp_path / "in", 2)
    with pytest.raises(TaskError, match="was killed by signal 40"):
        greedy_soup(paths, task, output=tmp_path / "out")


def test_what_the_caller_imports_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str]
) -> None:
    """A helper of a task is no module of the program that calls, before, while or after it runs."""
    for name in ("task", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helping.py").write_text(f"WHOSE = {name!r}\n")
    task, _ = networks.task_file(tmp_path / "task")
    late = "\ndef score(model, split):\n    from helping import WHOSE\n    return len(WHOSE)\n"
    task.write_text(f"import helping\n{task.read_text()}{late}")
    greedy_soup(paths, task, output=tmp_path / "a")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    import helping  # type: ignore[import-not-found]

    assert helping.WHOSE == "mine"
    soup = greedy_soup(paths, task, output=tmp_path / "b")
    assert soup.score == len("task")
    assert sys.modules["helping"] is helping
    del sys.modules["helping"]


def test_task_files_in_threads_import_what_lies_beside_them(tmp_path: Path) -> None:
    """Also as they score, when another's folder was looked in last."""
    ingredients = networks.ingredients(tmp_path / "in", 2)
    wrong: list[object] = []

    def search(number: int) -> None:
        folder = tmp_path / f"task{number}"
        folder.mkdir()
        (folder / "metric_of_it.py").write_text(f"V = {number}\n")
        task, _ = networks.task_file(folder)
        late = "\ndef score(model, split):\n    from metric_of_it import V\n    return V\n"
        task.write_text(task.read_text() + late)
        try:
            for n in range(5):
                soup = greedy_soup(ingredients, task, output=folder / f"out{n}")
                wrong.extend([] if soup.score == number else [(number, soup.score)])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
