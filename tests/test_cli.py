"""The command line: help, statuses, one line for an error, JSON on stdout alone, and light feet."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import networks
import numpy as np
import pytest
import safetensors.torch
from checkpoints import command, load_array, random_model, save, save_sharded, tensor
from click.shell_completion import BashComplete

import streamsoup
from streamsoup.cli import cli, main
from streamsoup.cli.common import _explain
from streamsoup.cli.contents import COMMANDS
from streamsoup.kernels.fast import processor
from streamsoup.reading import Reading
from streamsoup.search.report import beyond_scoring

HEAVY = ("torch", "numba", "llvmlite", "matplotlib", "ray", "pandas", "sklearn", "transformers")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Make two small checkpoints."""
    one, other = random_model(0), random_model(1)
    del one["empty"], other["empty"]  # of which a warning would be given
    return save(tmp_path / "a", one), save(tmp_path / "b", other)


def walk(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """List all commands, those of groups within groups included."""
    found = [path]
    for name in sorted(group.commands):
        inner = group.commands[name]
        if isinstance(inner, click.Group):
            found += walk(inner, (*path, name))
        else:
            found.append((*path, name))
    return found


@pytest.mark.parametrize("words", walk(main), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command explains itself and each of its options, with status 0, in lines that fit."""
    for flag in ("--help", "-h"):
        assert cli([*words, flag]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.startswith(f"Usage: streamsoup {' '.join(words)}".rstrip())
        assert max(map(len, printed.out.splitlines())) <= 80
    inner: click.Command = main
    for word in words:
        assert isinstance(inner, click.Group)
        inner = inner.commands[word]
    assert inner.help
    for parameter in inner.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            named = parameter.help or parameter.show_default
            assert named, f"{words}: {parameter.name} says nothing"


@pytest.mark.parametrize("columns", [80, 40])
def test_help_keeps_words_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is longer than the terminal is wide, no word is cut, and the example is whole."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in walk(main):
        assert cli([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns, words
        inner: click.Command = main
        for word in words:
            assert isinstance(inner, click.Group)
            inner = inner.commands[word]
        printed = text.replace("-", " ").split()
        for parameter in inner.params:
            for word in (getattr(parameter, "help", None) or "").replace("-", " ").split():
                assert word in printed, (words, word)
        if words:
            entry = COMMANDS[words[0]]
            example = text.partition("Example:")[2].partition("More:")[0].replace("\\\n", " ")
            assert shlex.split(example) == shlex.split(entry.example)
            assert text.endswith(f"{entry.page}\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gre", "plain,greedy"),
        ("uniform run", "file,run"),
        ("uniform a -o so", "file,so"),
        ("ties a --base ba", "file,ba"),
        ("geometry a --report re", "file,re"),
        ("greedy a --task ta", "file,ta"),
        ("sweep ties a", "file,a"),
        ("run re", "file,re"),
        ("verify so", "file,so"),
        ("uniform a --non-float f", "plain,first"),
        ("uniform a --overw", "plain,--overwrite"),
        ("uniform a --dtype f", ""),
    ],
)
def test_a_shell_completes_commands_options_and_paths(line: str, expected: str) -> None:
    """What bash is told at the end of a line: our own words, or to complete a path."""
    words = ["streamsoup", *line.split()]
    asked = {"_STREAMSOUP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
    completer = BashComplete(main, {}, "streamsoup", "_STREAMSOUP_COMPLETE")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**asked, "COMP_CWORD": str(len(words) - 1)}.items():
            patch.setenv(name, value)
        assert completer.complete() == expected


def test_wrong_usage_has_status_2(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What click can refuse ends with status 2, and says so on stderr."""
    a, b = map(str, pair)
    out = ["-o", str(tmp_path / "out")]
    for words in (
        ["nonsense"],
        ["uniform"],
        ["uniform", a],
        ["uniform", *out],
        ["uniform", a, b, *out, "--io", "carrier-pigeon"],
        ["uniform", a, b, *out, "--threads", "0"],
        ["uniform", a, b, *out, "--threads", "many"],
        ["uniform", a, b, *out, "--memory", "lots"],
        ["uniform", a, b, *out, "--shard-size", "0"],
        ["slerp", a, b, *out, "-t", "1.5"],
        ["uniform", a, b, *out, "--unknown"],
        ["mix", a, b, *out],
        ["mix", a, b, *out, "--coefficients", "a,b"],
        ["mix", a, b, *out, "--coefficients", ""],
        ["interpolate", a, *out],
        ["interpolate", a, b, *out, "--alpha", "x"],
        ["interpolate", a, b, *out, "--alphas", "0,1", "--task", "t.py", "--alpha", ".5"],
        ["interpolate", a, b, *out, "--alphas", "0,1", "--task", "t.py", "--overwrite"],
        ["greedy", a, b, *out, "--task", "t.py", "--scores", "no/such.json"],
        ["inspect"],
        ["verify"],
        ["verify", a, "--quick", "-i", b],
    ):
        assert cli(words) == 2, words
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Error: " in printed.err


@pytest.mark.parametrize("number", ["1_0", "٣", "３", "1e٣", " 1_000 "])
def test_numbers_are_plain(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What only Python takes for a number, in any option of any command, is refused as usage."""
    out = ["-o", "out"]
    asked = 0
    for words in (["mix", "a", "b", *out, "-c", f"1,{number}"], ["slerp", "a", *out, "-w", number]):
        assert cli(words) == 2, words
        assert "is not a list of numbers" in capsys.readouterr().err
    for name, each in main.commands.items():
        for option in each.params:
            if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
                arguments = ["x"] * sum(isinstance(p, click.Argument) for p in each.params)
                assert cli([name, *arguments, option.opts[0], number]) == 2, (name, option.name)
                assert "is not a number in plain digits" in capsys.readouterr().err
                asked += 1
    assert asked > 20


def test_refusals_have_status_1(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What the library refuses ends with status 1, one error on stderr, and no output."""
    a, b = map(str, pair)
    out = ["-o", str(tmp_path / "out")]
    mine = str(tmp_path / "mine")
    (tmp_path / "mine" / "life's work").mkdir(parents=True)
    for words, phrase in (
        (["uniform", a, str(tmp_path / "none"), *out], "no such file or folder"),
        (["mix", a, b, *out, "-c", "1"], "1 coefficient for 2 ingredients"),
        (["mix", a, b, *out, "-c", "1,-1", "--normalize"], "cannot be normalized"),
        (["mix", a, b, *out, "-c", "1e308,1e308", "--normalize"], "cannot be normalized"),
        (["mix", a, b, *out, "-c", "nan,1"], "not finite"),
        (["interpolate", a, b, *out, "--alpha", "inf"], "not finite"),
        (["uniform", a, b, *out, "--dtype", "int4"], "cannot be averaged in"),
        (["uniform", a, b, *out, "--memory", "1MB"], "too small"),
        (["uniform", a, b, "-o", a], "lies in the ingredient"),
        (["uniform", a, b, "-o", mine], "choose another folder or remove it yourself"),
        (["verify", a], "only a folder made by streamsoup"),
    ):
        ran = command(*words)
        assert (ran.returncode, ran.stdout) == (1, ""), words
        assert ran.stderr.startswith("error: "), words
        assert phrase in ran.stderr
        assert ran.stderr.count("\n") == 1, ran.stderr
        assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "mine"}


def test_a_soup_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The last line says what was made, on stdout; with --json it is JSON, and nothing else."""
    a, b = pair
    ran = command("uniform", a, b, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("\n") == 1
    for part in (f"uniform soup of 2 in {tmp_path}/out", "read in", "/s)", "peak memory"):
        assert part in ran.stdout
    ran = command("mix", a, b, "-c", ".25,.75", "-o", tmp_path / "out2", "--json")
    told = json.loads(ran.stdout)
    assert told["path"] == str(tmp_path / "out2")
    assert told["recipe"]["rule"]["coefficients"]["values"] == [0.25, 0.75]
    assert told["nbytes_read"] == 2 * told["nbytes_written"]
    again = command("uniform", a, b, "-o", tmp_path / "out")
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert command("uniform", b, b, "-o", tmp_path / "out", "--overwrite").returncode == 0
    assert (load_array(tmp_path / "out", "embed.weight") == load_array(b, "embed.weight")).all()


def test_a_soup_of_nothing_is_one_too(tmp_path: Path) -> None:
    """Checkpoints without a tensor make one without: nothing is read, and nothing was finished."""
    a = save(tmp_path / "a", {})
    ran = command("uniform", a, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "0 B read in" in ran.stdout
    assert not streamsoup.uniform([a], output=tmp_path / "out2").finished


def test_a_soup_that_only_lacked_its_name_is_said_to_be(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed just before the rename, or just after: the next run reads nothing, and says so."""
    from streamsoup.output import staging

    rename = staging.Staging._put_in_place

    def killed_before(self: staging.Staging) -> None:
        raise KeyboardInterrupt

    def killed_after(self: staging.Staging) -> None:
        rename(self)
        raise KeyboardInterrupt

    for number, killed in enumerate((killed_before, killed_after)):
        words = ["uniform", *map(str, pair), "-o", str(tmp_path / f"out{number}")]
        monkeypatch.setattr(staging.Staging, "_put_in_place", killed)
        assert cli(words) == 130
        monkeypatch.setattr(staging.Staging, "_put_in_place", rename)
        assert cli(words) == 0
        assert capfd.readouterr().out.endswith(": an earlier run had finished it\n")


def test_the_three_recipes_mean_what_they_say(tmp_path: Path) -> None:
    """Uniform, mix, normalized mix and interpolation give the numbers of their formulas."""
    for name, value in (("a", 1.0), ("b", 5.0)):
        save(tmp_path / name, {"t": tensor(np.float32(value))})
    for words, expected in (
        (["uniform", "a", "b"], 3.0),
        (["mix", "a", "b", "-c", "2,0.5"], 4.5),
        (["mix", "a", "b", "-c", "1,3", "--normalize"], 4.0),
        (["interpolate", "a", "b", "--alpha", "0.25"], 2.0),
        (["interpolate", "a", "b"], 3.0),
        (["interpolate", "a", "b", "--alpha", "-1"], -3.0),
    ):
        ran = command(*words, "-o", "out", "--overwrite", cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert load_array(tmp_path / "out", "t") == expected, words


def test_the_output_opens_in_safetensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Shards and index of a soup are what the reference reader expects, with `format: pt`."""
    a, b = pair
    assert command("uniform", a, b, "-o", tmp_path / "out", "--shard-size", "5kB").returncode == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = n_parameters = 0
    for name in set(index["weight_map"].values()):
        tensors = safetensors.torch.load_file(tmp_path / "out" / name)
        total += sum(each.nbytes for each in tensors.values())
        n_parameters += sum(each.numel() for each in tensors.values())
        assert {index["weight_map"][key] for key in tensors} == {name}
        with safetensors.safe_open(tmp_path / "out" / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"] == {"total_parameters": n_parameters, "total_size": total}


def test_inspect_and_plan_look_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Inspect and plan tell what is there and what would be done, for people and machines."""
    a, b = pair
    words = command("inspect", a, "--tensors").stdout
    assert "embed.weight  F32  [50, 40]  model.safetensors" in words
    told = json.loads(command("inspect", a, "--json").stdout)
    assert (told["n_tensors"], told["n_parameters"]) == (7, 2000 + 3000 + 129 + 1 + 3 + 33 + 3)
    told = json.loads(command("plan", a, b, "--json", "--threads", "1").stdout)
    assert told["threads"] == 1
    assert told["nbytes_read"] == 28652
    assert told["running_sum_nbytes"] == 8 * (2000 + 3000 + 129 + 1 + 33)
    ran = command("plan", a, b, "--dtype", "bf16")
    assert ran.returncode == 0
    assert "peak memory" in ran.stdout
    assert "running sum  41.3 kB more, where a search keeps one" in ran.stdout
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    sharded = save_sharded(tmp_path / "c", [random_model(0)])
    assert json.loads(command("inspect", sharded, "--json").stdout)["n_tensors"] == 8


def test_control_characters_never_reach_a_terminal(tmp_path: Path) -> None:
    """Names out of files, in results, warnings and errors, are escaped on either stream."""
    evil = "x\x1b]0;owned\x07\u202e\n"
    a = save(tmp_path / "a", {evil: tensor(np.int64(1)), "w": tensor(np.float32(1))})
    b = save(tmp_path / "b", {evil: tensor(np.int64(2)), "w": tensor(np.float32(1))})
    (a / "evil\x1b[2J.txt").write_text("")
    for words in (
        ["inspect", a, "--tensors"],
        ["plan", a, b],
        ["uniform", a, b, "-o", tmp_path / "out"],
        ["uniform", a, tmp_path / "none\x1b[2J", "-o", tmp_path / "out"],
        ["verify", tmp_path / "none\x1b[2J"],
    ):
        ran = command(*words)
        for line in (ran.stdout + ran.stderr).splitlines():
            assert line.isprintable(), (words, line)


def test_a_terminal_of_few_characters_is_enough(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What a terminal cannot show is escaped, rather than failing after the work is done."""
    out = tmp_path / "süppchen"
    ran = command("uniform", *pair, "-o", out, env={"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "s\\xfcppchen" in ran.stdout


def test_a_name_that_cannot_be_said_here(tmp_path: Path) -> None:
    """An index names a file that this locale has no name for: refused in words."""
    a = save_sharded(tmp_path / "a", [random_model(0)])
    path = a / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of-00001", "m\\u00e9"))
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = command("inspect", a, env=ascii_alone)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(f"error: {path}: names the file 'm")
    assert "which cannot be said in" in ran.stderr


def test_a_time_in_the_future_is_no_proof(tmp_path: Path) -> None:
    """Of a child that died of SIGBUS, only what was written since it began is blamed."""
    a, b = (save(tmp_path / name, random_model(0)) / "model.safetensors" for name in "ab")
    started = time.time()
    os.utime(a, (started + 3600, started + 3600))
    os.utime(b, (started, started))

    def explained(started: float) -> str:
        return _explain(signal.SIGBUS, started, [str(a), str(b)], "", Reading())

    assert explained(started).startswith(f"{b}: was rewritten while it was being read")
    assert explained(started + 10).startswith("a mapped ingredient could not be read")


@pytest.mark.parametrize("verb", ["verify", "compare"])
def test_what_shrank_is_named_though_it_was_not_given(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    """An ingredient that the provenance alone names, and the base of a comparison."""
    a, b = pair
    streamsoup.uniform([a, b], output=tmp_path / "soup")

    def shrink(*arguments: object, **options: object) -> None:
        os.truncate(b / "model.safetensors", 100)
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr("streamsoup.output.verification.verify", shrink)
    monkeypatch.setattr("streamsoup.study.comparison.table.compare", shrink)
    more = [a, "--base", b, "--task", "t.py", "-o", tmp_path / "out"]
    words = [tmp_path / "soup"] if verb == "verify" else more
    assert cli([verb, *map(str, words)]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"error: an ingredient shrank while it was being read: {b}")


def test_the_unforeseen_is_said_in_one_line(
    pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours ends with status 1, what happened and where, and no traceback."""
    from streamsoup.methods import fixed

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("oh\x1b")

    monkeypatch.setattr(fixed, "uniform", broken)
    assert cli(["uniform", *map(str, pair), "-o", "out"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ZeroDivisionError: oh\\x1b (at ")
    assert f"{Path(__file__).name}:" in said
    assert said.count("\n") == 1


def test_a_failing_system_is_no_defect_of_ours(
    pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call that fails unforeseen is said to be one, with the place."""
    from streamsoup.methods import fixed

    def broken(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fixed, "uniform", broken)
    assert cli(["uniform", *map(str, pair), "-o", "out"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: the system failed at ")
    assert f"{Path(__file__).name}:" in said
    assert said.endswith(": Input/output error\n")


def test_nobody_reading_is_no_failure_to_speak_of(pair: tuple[Path, Path]) -> None:
    """When the reader of a long listing goes away, the command ends without a traceback."""
    words = [sys.executable, "-m", "streamsoup", "inspect", str(pair[0]), "--tensors"]
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ran.stderr == ""


@pytest.mark.parametrize("verb", ["greedy", "learned"])
def test_a_search_goes_on_when_nobody_listens(tmp_path: Path, verb: str) -> None:
    """Whoever read stderr is gone after a line, as with `2>&1 | head -1`: the soup is made."""
    paths = networks.ingredients(tmp_path / "in", 2)
    task, _ = networks.task_file(tmp_path)
    with task.open("a") as file:
        file.write("def loss(model, split):\n    yield model(networks.INPUTS).square().mean()\n")
    more = ["--guard-every", "0", "--evaluations", "2"] if verb == "learned" else []
    words = [verb, *paths, "--task", task, "-o", tmp_path / "soup", *more]
    call = [sys.executable, "-m", "streamsoup", *map(str, words)]
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(call, stderr=writing, stdout=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, verb in ran.stdout) == (0, True)
    assert (tmp_path / "soup" / "streamsoup.json").exists()


def test_no_plot_is_put_into_an_ingredient(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """It would be copied into every soup of it."""
    a, b = map(str, pair)
    plot = ["--plot", f"{a}/plot.png"]
    for words in (
        ["geometry", a, b, *plot],
        ["landscape", b, a, b, "--task", "task.py", *plot],
        ["learned", a, b, "--task", "task.py", "-o", str(tmp_path / "out"), *plot],
    ):
        ran = command(*words)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"error: {a}/plot.png: lies in the ingredient {a};"), words
    assert os.listdir(a) == ["model.safetensors"]


def test_paths_that_are_not_unicode_are_reported(tmp_path: Path) -> None:
    """A report says which command made it, whatever the bytes of its arguments."""
    paths = networks.ingredients(tmp_path / "in", 2)
    task, _ = networks.task_file(tmp_path)
    folder = tmp_path / os.fsdecode(b"r\xe9port")
    more = ["--task", task, "--quiet", "-o", folder]
    ran = command("interpolate", *paths, "--alphas", "0,1", *more)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "r\\udce9port" in (folder / "report.md").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever a command has to say: if stdout takes it no more, that is the one line of error."""
    a, b = pair
    out = tmp_path / "out"
    streamsoup.uniform([a], output=out)
    with open("/dev/full", "w") as full:
        for words in (
            ["inspect", a],
            ["inspect", a, "--json"],
            ["plan", a, b],
            ["verify", out],
            ["geometry", a, b, "--quiet"],
            ["uniform", a, b, "-o", tmp_path / "out2"],
        ):
            call = [sys.executable, "-m", "streamsoup", *words]
            ran = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, check=False)
            assert ran.returncode == 1
            assert ran.stderr.decode() == (
                "error: stdout: cannot be written: No space left on device; all work is done, "
                "but its result is not printed\n"
            )
        for helping in (["--help"], ["--version"], ["uniform", "-h"]):
            call = [sys.executable, "-m", "streamsoup", *helping]
            ran = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, check=False)
            assert ran.returncode == 1
            assert ran.stderr == b"error: stdout: cannot be written: No space left on device\n"


def imported(words: list[str], cwd: Path) -> set[str]:
    """Run a command in a process that says which packages it imported, its children's too."""
    script = (
        "import atexit, os, sys\n"
        "def tell(*_):\n"
        "    names = {name.split('.')[0] for name in sys.modules}\n"
        "    with open('imported', 'a') as file: file.write(' '.join(names) + '\\n')\n"
        "leave = os._exit\n"
        "os._exit = lambda status: (tell(), leave(status))\n"
        "from streamsoup.cli import cli\n"
        f"status = cli({words!r})\n"
        "tell()\n"
        "sys.exit(status)\n"
    )
    (cwd / "imported").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", script], cwd=cwd, check=True, capture_output=True)
    return set((cwd / "imported").read_text().split())


def test_commands_import_no_more_than_they_need(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Help, inspect, plan and quick verify load neither torch nor numba, making soups no torch."""
    for words in (["--help"], ["uniform", "--help"], ["--version"]):
        names = imported(words, tmp_path)
        assert not names.intersection((*HEAVY, "numpy", "rich", "psutil")), words
    heavy = {*HEAVY, "numpy"}
    assert not imported(["inspect", "a"], tmp_path).intersection(heavy)
    assert not imported(["plan", "a", "b"], tmp_path).intersection(heavy)
    averaged = imported(["uniform", "a", "b", "-o", "out", "--quiet"], tmp_path)
    assert "xxhash" in averaged  # what the child imports does show
    assert not imported(["verify", "out", "--quick"], tmp_path).intersection(heavy)
    # Kernels that are kept are loaded by LLVM where they are not of an x86-64.
    working = {*HEAVY, "psutil"} - (set() if processor.is_x86() else {"llvmlite"})
    assert not averaged.intersection(working)
    assert not imported(["verify", "out"], tmp_path).intersection(working)
    search = ["greedy", "a", "b", "--command", "echo 1 {checkpoint}", "-o", "found", "--quiet"]
    assert "torch" not in imported(search, tmp_path)


def test_import_does_nothing_heavy() -> None:
    """`import streamsoup` loads no numpy, and each public name is there."""
    script = "import sys, streamsoup; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"numpy", "click", "msgspec"}.intersection(ran.stdout.split())
    for name in dir(streamsoup):
        assert getattr(streamsoup, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = streamsoup.nothing


@pytest.mark.parametrize("kind", ["deep", "fifo", "device", "folder", "large"])
def test_scores_come_from_a_regular_file_of_some_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever --scores names, it is refused in one line, at once, and its name is said."""
    from streamsoup.cli import greedy
    from streamsoup.errors import RecipeError

    path = tmp_path / "scores.json"
    if kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        (path / "streamsoup.json").mkdir(parents=True)
    else:
        monkeypatch.setattr(greedy, "REPORT_LIMIT", 10)
        path.write_text('{"report": {}}')
    with pytest.raises(RecipeError, match=f"{path}.*(cannot be read|is not the report)"):
        greedy._read_scores(str(path))


def test_handlers_of_signals_are_given_back() -> None:
    """A caller of selftest or demo keeps its own handlers; ignored signals stay ignored."""
    import signal

    from streamsoup.cli import common

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def own(number: int, frame: object) -> None:
        raise AssertionError

    try:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with common.ending_in_order():
            assert signal.getsignal(signal.SIGTERM) != own
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(SystemExit, match="143"):
                signal.raise_signal(signal.SIGTERM)
        assert [signal.getsignal(number) for number in numbers] == [own, signal.SIG_IGN]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["selftest", "demo"])
def test_commands_that_end_in_order_give_handlers_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands themselves do: called from another program, they leave its handlers alone."""
    import signal

    from streamsoup import cli

    seen = []

    def work(*_: object, **__: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        raise KeyError(name)

    before = signal.getsignal(signal.SIGTERM)
    place = "streamsoup.selftest.selftest" if name == "selftest" else "streamsoup.demo.main"
    monkeypatch.setattr(place, work)
    monkeypatch.chdir(tmp_path)
    cli.cli([name])
    assert len(seen) == 1
    assert seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_share_of_a_search_is_at_most_all_of_it() -> None:
    """Scores that take next to nothing leave a share of 100 %, not 11,612; rounding leaves 0."""
    for search, scoring, share in ((0.117, 0.001, 0.9915), (2.0, 2.0001, 0.0), (0.0, 0.0, 0.0)):
        found = beyond_scoring({"search": search, "scoring": scoring})
        assert found == pytest.approx(share, abs=1e-4)
        assert 0 <= found <= 1
