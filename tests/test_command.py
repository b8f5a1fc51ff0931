"""Commands score: their last number counts, and failures are named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import networks
import pytest

from streamsoup import GreedySettings, greedy
from streamsoup.errors import TaskError
from streamsoup.task import Score, command, processes
from streamsoup.task.command import command_task


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ingredients' folders."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"), 2)


def test_a_script_that_changes_as_it_is_used(tmp_path: Path, paths: list[str]) -> None:
    """Scores of two scripts make no soup."""
    script, helper = tmp_path / "ev.py", tmp_path / "helper.py"
    script.write_text(f"import helper\nprint(1)\nopen({str(helper)!r}, 'a').write('V = 1')")
    helper.write_text("")
    task = command_task(f"{sys.executable} {script} {{checkpoint}}", main=None, timeout=60)
    with pytest.raises(TaskError, match=r"ev\.py, or what it imports, changed as it was used"):
        greedy(paths, task, output=tmp_path / "out")


def test_a_command_may_tidy_up(tmp_path: Path, paths: list[str]) -> None:
    """It may remove its candidate, or put a link in its place: what that leads to stays."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "work").write_text("")
    for number, end in enumerate(("", f"; ln -s {mine} {{checkpoint}}")):
        line = "test -e {checkpoint}/model.safetensors && echo 1; rm -r {checkpoint}" + end
        task = command_task(line, main=None, timeout=60)
        soup = greedy(paths, task, output=tmp_path / f"out{number}")
        assert len(soup.members) == len(paths)
        assert [path.name for path in mine.iterdir()] == ["work"]
        assert not (tmp_path / f"out{number}.search").exists()


def test_the_time_of_a_search_holds_for_its_command(tmp_path: Path, paths: list[str]) -> None:
    """A command without a limit of its own has that of the search."""
    task = command_task("sleep 60; : {checkpoint}", main=None, timeout=None)
    for jobs in (1, 2):
        search = GreedySettings(timeout=0.2, jobs=jobs)
        with pytest.raises(TaskError, match=r"took longer than 0\.2 s"):
            greedy(paths, task, output=tmp_path / "out", settings=search)


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
        ("0.5\nNaN\n", float("nan")),
        ("0.5\nval loss: nan\n", float("nan")),
        ("0.5\naccuracy nan\n", float("nan")),
        ("0.5\ntensor(nan)\n", float("nan")),
    ],
)
def test_what_scripts_print_last(tmp_path: Path, text: str, score: float) -> None:
    """Sentences, colours, signs and words for numbers are read as they are meant."""
    assert printed(tmp_path, text).value == pytest.approx(score, rel=0, abs=0, nan_ok=True)


def test_infinity_is_no_score(tmp_path: Path) -> None:
    """Nothing could beat it: the command and the split are named."""
    with pytest.raises(TaskError, match=r"on 'val': answered with inf"):
        printed(tmp_path, "0.5\nscore=inf\n")


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
    soup = greedy(paths, task, output=tmp_path / "out")
    found = [trial.score.value for trial in (*soup.singles, *soup.runs[0].trials)]
    trials = [trial.members for trial in (*soup.singles, *soup.runs[0].trials)]
    assert found == [networks.mean_score(paths, members) for members in trials]
    candidates = (tmp_path / "log").read_text().splitlines()
    assert len(set(candidates)) == len(candidates) == 3
    assert all(str(tmp_path / "out.search") in candidate for candidate in candidates)
    assert before == [Path(path, "model.safetensors").read_bytes() for path in paths]
    assert not (tmp_path / "out.search").exists()


def test_what_ended_while_we_were_stopped_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back from Ctrl-Z after the deadline looks once more before judging."""
    monkeypatch.setattr(command, "_drain", lambda *_: time.sleep(1))  # as if stopped there
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(["sleep", "0.2"], **pipes) as process:
        deadline = time.monotonic() + 0.5
        assert command._follow(process, deadline, processes.Tail(), processes.Tail()) == 0


def test_signals_without_a_name(tmp_path: Path) -> None:
    """A real-time signal has none, and is told by its number."""
    task = command_task("kill -40 $$; echo {checkpoint}", main=None, timeout=9)
    paths = networks.ingredients(tmp_path / "in", 2)
    with pytest.raises(TaskError, match="was killed by signal 40"):
        greedy(paths, task, output=tmp_path / "out")
