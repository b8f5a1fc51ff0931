"""What scores hang on: the code of a task and all that it imports, settings, models, commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamsoup.task import load_task
from streamsoup.task.code import digest_model
from streamsoup.task.command import command_task


def test_what_a_task_imports_from_its_folder_counts(tmp_path: Path) -> None:
    """A changed helper is another task, and is what scores from then on; what is beside is not."""
    task = tmp_path / "task.py"
    task.write_text(
        "import json, broken_namespace\nfrom kit import deep\n"
        "def score(model):\n    from late import V\n    return V + deep.V\n"
    )
    files = {
        "kit/__init__.py": "from .near import W\n",
        "kit/near.py": "def late():\n    from ..absent import V\nW = 1\n",
        "kit/deep.py": "import kit.near, task\nV = 10\n",
        "late.py": "V = 1\n",
    }
    others = {
        "unused.py": "import late\n",
        "kit/unused.py": "def (",
        "t.txt": "",
    }
    (tmp_path / "broken_namespace").mkdir()
    (tmp_path / "kit").mkdir()
    for name, text in (files | others).items():
        (tmp_path / name).write_text(text)
    first = load_task(task)
    assert first.score(None, "val").value == 11
    assert load_task(os.path.relpath(task)).fingerprint == first.fingerprint
    for name in others:
        (tmp_path / name).write_text("V = 5\n")
    assert load_task(task).fingerprint == first.fingerprint
    known = {first.fingerprint}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}U = 5\n")
        known.add(load_task(task).fingerprint)
    assert len(known) == 1 + len(files)
    (tmp_path / "late.py").write_text("V = 2000\n")
    changed = load_task(task)
    assert changed.fingerprint not in known
    assert changed.score(None, "val").value == 2010


def test_a_task_in_a_package_has_what_lies_beside_it(tmp_path: Path) -> None:
    """Its imports are found beside the file, as Python finds them, and above its package."""
    package = tmp_path / "evals"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("V = 1\n")
    task = package / "task.py"
    task.write_text("from helper import V\ndef score(model): return V\n")
    first = load_task(task)
    (package / "helper.py").write_text("V = 1000\n")
    second = load_task(task)
    (package / "__init__.py").write_text("# changed\n")
    assert len({first.fingerprint, second.fingerprint, load_task(task).fingerprint}) == 3
    assert [each.score(None, "val").value for each in (first, second)] == [1, 1000]


def test_each_loading_executes_the_text_as_it_is(tmp_path: Path) -> None:
    """A helper rewritten within a second, at the same size, is what scores and what is digested."""
    task = tmp_path / "task.py"
    (tmp_path / "kit").mkdir()
    deep = tmp_path / "kit" / "deep.py"
    task.write_text("from kit import deep\ndef score(model): return deep.V\n")
    loaded = []
    for value in (1, 2, 1):
        deep.write_text(f"class Net: pass\nV = {value}\n")
        os.utime(deep, (1, 1))
        loaded.append(load_task(task))
    assert [each.score(None, "val").value for each in loaded] == [1, 2, 1]
    assert loaded[0].fingerprint == loaded[2].fingerprint != loaded[1].fingerprint
    assert not (tmp_path / "kit" / "__pycache__").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import os, helper",
        "from helper import (\n    V,\n)",
        "from \\\n    helper import V",
        "if True: import helper as h",
        "def late():\n    import helper",
        "import json; import helper",
        "try: import helper\nexcept ImportError: pass",
        "from . import helper",
        "from kit.deep import V",
    ],
)
def test_however_an_import_is_written(tmp_path: Path, statement: str) -> None:
    """Every form of an import statement names its files; prose in a docstring names none."""
    (tmp_path / "kit").mkdir()
    for name in ("helper.py", "kit/deep.py", "prose.py"):
        (tmp_path / name).write_text("V = 1\n")
    task = tmp_path / "task.py"
    task.write_text(f'"""A word of prose."""\n{statement}\ndef score(model): return 1\n')
    before = load_task(task).fingerprint
    (tmp_path / "prose.py").write_text("V = 2\n")
    assert load_task(task).fingerprint == before
    (tmp_path / ("kit/deep.py" if "kit" in statement else "helper.py")).write_text("V = 2\n")
    assert load_task(task).fingerprint != before


def test_libraries_are_not_read_through(tmp_path: Path) -> None:
    """What is installed is known by its file alone, and of what lies beside, the nearest."""
    for folder, changes in (("site-packages", False), ("project", True)):
        (tmp_path / folder).mkdir()
        task = tmp_path / folder / "lib.py"
        task.write_text("def score(model):\n    import more_0\n")
        for i in range(600):
            (tmp_path / folder / f"more_{i}.py").write_text(f"import more_{i + 1}\n")
        before = load_task(task).fingerprint
        (tmp_path / folder / "more_599.py").write_text("")
        assert load_task(task).fingerprint == before
        (tmp_path / folder / "more_1.py").write_text("import more_2, more_0\n")
        assert (load_task(task).fingerprint != before) == changes


def test_what_a_task_imports_by_name_counts(tmp_path: Path) -> None:
    """Not by statements alone: whatever of its folder was imported as it was loaded."""
    task, plugin = tmp_path / "task.py", tmp_path / "plugin.py"
    task.write_text(
        "import importlib\nV = importlib.import_module('plug' + 'in').V\n"
        "def score(model): return V\n"
    )
    known = set()
    for text in ("V = 1\n", "V = 22\n", "V = 1\n"):
        plugin.write_text(text)
        known.add(load_task(task).fingerprint)
    assert len(known) == 2


def test_settings_of_a_task_object_count() -> None:
    """Plain attributes do, but private ones; of what is called as a task, too."""

    class Judge:
        def __init__(self, **settings: Any) -> None:
            vars(self).update(settings)

        def __call__(self, model: Any) -> float:
            return 0.0

    class Asked(Judge):
        score = Judge.__call__

    for kind in (Judge, Asked):
        some = [{"k": 1}, {"k": 2}, {"k": 1, "cfg": {"a": 1}}, {"k": 1, "cfg": {"a": 2}}]
        assert len({load_task(kind(**each)).fingerprint for each in some}) == 4
        same = [{"k": 1}, {"k": 1, "_calls": 3}, {"k": 1, "log": [1]}, {"k": 1, "data": len}]
        assert len({load_task(kind(**each)).fingerprint for each in same}) == 1


def test_a_model_is_known_by_what_it_computes() -> None:
    """By its modules and their settings, not by its weights, nor by where it lies in memory."""

    def net(function: torch.nn.Module, p: float = 0.1) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 3), function, torch.nn.Dropout(p))

    class Odd(torch.nn.Module):
        def extra_repr(self) -> str:
            return f"at {id(self):#x}"

    relu = digest_model(net(torch.nn.ReLU()))
    assert digest_model(net(torch.nn.ReLU())) == relu
    others = [net(torch.nn.Tanh()), net(torch.nn.ReLU(), 0.2), net(Odd())]
    assert len({relu, *map(digest_model, others)}) == 4
    assert digest_model(net(Odd())) == digest_model(net(Odd()))


def test_the_metric_that_counts_is_in_the_fingerprint() -> None:
    """Scores of one are none of another, also where the task is an object."""
    score = load_task(SimpleNamespace(score=len, main="acc")).fingerprint
    assert load_task(SimpleNamespace(score=len, main="f1")).fingerprint != score
    assert load_task(SimpleNamespace(score=len, main="acc")).fingerprint == score


def fingerprint_of(code: str, name: str = "score") -> str:
    """Return the fingerprint of a task that was typed in."""
    known: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<stdin>", "exec"), known)
    return load_task(known[name]).fingerprint


TYPED = [
    "def score(model): return {}",
    "def score(model, at={}): return at",
    "def score(model, *, at={}): return at",
    "def score(model): return (lambda: {})()",
    "AT = {}\ndef score(model): return AT",
    "def helper(): return {}\ndef score(model): return [helper() for _ in 'a'][0]",
    "def make(at):\n    return lambda model: at\nscore = make({})",
    "import functools\nscore = functools.partial(lambda model, at: at, at={})",
    "import functools\n@functools.cache\ndef score(model): return {}",
    "import contextlib\n@contextlib.contextmanager\ndef score(model): yield {}",
    "class T:\n    def score(self, model): return {}\nscore = T",
    "class T:\n    def score(self, model): return {}\nscore = T()",
    "class T:\n    at = {}\n    def score(self, model): return self.at\nscore = T()",
    "class B:\n    @property\n    def at(self): return {}\n"
    "class T(B):\n    def score(self, model): return self.at\nscore = T()",
    "class T:\n    @staticmethod\n    def score(model): return {}\nscore = T()",
    "class T:\n    def own(self, model): return {}\nscore = T().own",
    "class T:\n    def __call__(self, model): return {}\nscore = T()",
    "import types\nscore = types.SimpleNamespace(score=lambda model: {})",
    "import functools\nclass T:\n    @functools.cache\n    def at(self): return {}\n"
    "    def score(self, model): return self.at()\nscore = T()",
    "import functools\nclass T:\n    @functools.cached_property\n    def at(self): return {}\n"
    "    def score(self, model): return self.at\nscore = T()",
    "class T:\n    at = ({},)\n    def score(self, model): return self.at[0]\nscore = T()",
    "class T:\n    class I:\n        at = {}\n"
    "    def score(self, model): return self.I.at\nscore = T()",
    "AT = dict(a={})\ndef score(model): return AT['a']",
    "def score(model, at=[{}]): return at[0]",
    "def score(model, *, at=dict(a={})): return at['a']",
    "import functools\nscore = functools.partial(lambda model, at: at[0], at=[{}])",
]


@pytest.mark.parametrize("code", TYPED)
def test_the_fingerprint_of_what_was_typed_in(code: str) -> None:
    """In a notebook, what is defined anew is another task; the same code is the same."""
    assert fingerprint_of(code.format("1")) == fingerprint_of("\n\n" + code.format("1"))
    assert fingerprint_of(code.format("1")) != fingerprint_of(code.format("2"))


def test_fingerprints_are_those_of_another_process() -> None:
    """They do not hang on the order of a set, which each process chooses."""
    code = "def score(model): return model in {'a', 'b', 'c', 'd', 'e'}"
    script = f"{code}\nfrom streamsoup.task import load_task\nprint(load_task(score).fingerprint)"
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_functions_of_one_file_differ() -> None:
    """Two lambdas of a file are two tasks, and a wrapper from elsewhere does not hide its own."""
    tasks = [lambda model: 1, lambda model: 2, torch.no_grad()(lambda model: 1)]
    tasks += [torch.no_grad()(lambda model: 2)]
    assert len({load_task(task).fingerprint for task in tasks}) == 4


def test_the_fingerprint_follows_the_code(tmp_path: Path) -> None:
    """The same file has the same fingerprint, a changed one another."""
    path = tmp_path / "task.py"
    path.write_text("def score(model): return 1\n")
    before = load_task(path).fingerprint
    assert load_task(path).fingerprint == before
    path.write_text("def score(model): return 2\n")
    assert load_task(path).fingerprint != before


def test_the_fingerprint_of_a_command(tmp_path: Path) -> None:
    """It follows the scripts that are named, not the logs that output goes to."""
    script, log = tmp_path / "eval.py", tmp_path / "log"
    script.write_text("print(1)")
    commands = [
        f"python {script} {{checkpoint}} {where} {log}" for where in (">>", "2>", "2>&1 1>", "&>")
    ]
    before = [command_task(c, main=None, timeout=None).fingerprint for c in commands]
    log.write_text("so far")
    assert [command_task(c, main=None, timeout=None).fingerprint for c in commands] == before
    script.write_text("print(2)")
    after = [command_task(c, main=None, timeout=None).fingerprint for c in commands]
    assert not set(before) & set(after)
    config, helper = tmp_path / "eval.yaml", tmp_path / "helper.py"
    script.write_text("import helper")
    for line in (
        f"python {script} {{checkpoint}} --config={config}",
        f"sh -c 'python {script} {{checkpoint}} {config}' \"it's all\"",
    ):
        known = set()
        for text in ("1", "22", "333"):
            for path in (config, helper):
                path.write_text(text)
                known.add(command_task(line, main=None, timeout=None).fingerprint)
        known.add(command_task(line, main="acc", timeout=None).fingerprint)
        assert len(known) == 7, line


def test_what_a_command_runs_in_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module, as a folder, by a variable, or out of a shell script: it counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHERE", str(tmp_path))
    (tmp_path / "kit").mkdir()
    (tmp_path / "run.sh").write_text('python "$WHERE/ev.py" $1\n')
    for line, file in (
        ("python -m ev {checkpoint}", "ev.py"),
        ("python -m kit.ev {checkpoint}", "kit/ev.py"),
        ("python kit {checkpoint}", "kit/__main__.py"),
        ("python $WHERE/ev.py {checkpoint}", "ev.py"),
        ("sh run.sh {checkpoint}", "ev.py"),
    ):
        known = set()
        for text in ("1", "22"):
            (tmp_path / file).write_text(text)
            known.add(command_task(line, main=None, timeout=None).fingerprint)
        assert len(known) == 2, line


def test_a_setting_that_holds_itself() -> None:
    """It counts once, and what is beside it counts too."""

    def fingerprint(value: float) -> str:
        settings: dict[str, Any] = {"value": value}
        settings["itself"] = [settings]
        return load_task(SimpleNamespace(score=len, settings=settings)).fingerprint

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(2.0)
