"""Addresses such as ``s3://bucket/x`` are refused by name at every door, and make no folder.

Ingredients are read from ``s3://`` and ``gs://`` (test_stores), and from no other store.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save, tensor

import streamsoup
from streamsoup.cli import cli
from streamsoup.errors import MissingFileError, OutputError, RecipeError, StreamsoupError, TaskError
from streamsoup.system.schemes import check_local
from streamsoup.task import load_task

AT = "s3://bucket/x"
NOT_READ = "az://bucket/x"
TASK = """
def build():
    raise SystemExit("built")
def score(model, split):
    return 0.5
def loss(model, split):
    raise SystemExit("scored")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two checkpoints, ``a`` and ``b``, and a task."""
    for name in ("a", "b"):
        save(tmp_path / name, {"w": tensor(np.ones(3))})
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        f"uniform a b -o {AT}",
        f"uniform a {NOT_READ} -o out",
        f"mix a b -c {AT} -o out",
        f"interpolate a {NOT_READ} -o out",
        f"interpolate a b --alphas 0,1 --task task.py -o {AT}",
        f"ema {NOT_READ} -o out",
        f"arithmetic a --base {NOT_READ} --scale 1 -o out",
        f"stock a b --base {NOT_READ} -o out",
        f"stock a b --base a -o {AT}",
        f"slerp a b -o {AT}",
        f"greedy a b --task task.py -o {AT}",
        f"greedy a b --task {AT}.py -o out",
        f"greedy a b --task task.py --scores {AT} -o out",
        f"learned a b --task task.py -o {AT}",
        f"compare a b --task task.py -o {AT}",
        f"compare a b --task task.py --base {NOT_READ} -o out",
        f"landscape a b a --task task.py --plot {AT}.png",
        f"geometry a b --plot {AT}.png",
        f"geometry {NOT_READ} b",
        f"inspect {NOT_READ}",
        f"plan a {NOT_READ}",
        f"plan a b -c {AT}",
        f"verify {AT}",
        f"demo -o {AT}",
        f"selftest --folder {AT}",
    ],
)
def test_every_door_of_the_command_line(here: Path, words: str) -> None:
    """Status 1, the scheme by name, and nothing of that name is made."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = run_here(words.split())
    assert status == 1, words
    scheme = "az" if NOT_READ in words else "s3"
    assert f"{scheme}:// is not supported yet" in said.getvalue(), words
    assert said.getvalue().count("error:") == 1
    assert not [name for name in os.listdir(here) if "s3" in name or "az" in name]


def run_here(words: list[str]) -> int:
    """Run a command in this process, with what it prints on stderr caught."""
    import streamsoup.system.supervise as supervise

    def unsupervised(child: Callable[[], int], explain: Any) -> int:
        return child()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervise, "supervised", unsupervised)
        patch.setattr("streamsoup.cli.common.supervised", unsupervised)
        return cli(words)


def test_every_door_of_the_library(here: Path) -> None:
    """Paths as text, and as `pathlib` mangles them."""
    read = ("https://", "hf://", "s3://", "gs://")  # by ingredients: see test_remote, test_stores
    for at in (
        *(AT, Path(AT), "gs://b/x", "https://host/x", "hf://org/model", "file:///tmp/x"),
        *("az://b/x", "memory://x", "r2://b/x"),
    ):
        with pytest.raises(OutputError, match="not supported yet"):
            streamsoup.uniform(["a", "b"], output=at)
        if not str(at).startswith(read):
            with pytest.raises(MissingFileError, match="not supported yet"):
                streamsoup.uniform(["a", at], output="out")
            with pytest.raises(MissingFileError, match="not supported yet"):
                streamsoup.open_ingredients([at])
        with pytest.raises(RecipeError, match="not supported yet"):
            streamsoup.verify(at)
        with pytest.raises(TaskError, match="not supported yet"):
            load_task(at)
        with pytest.raises(OutputError, match="not supported yet"):
            streamsoup.wise_ft("a", "b", "task.py", [0.0, 1.0], cache=at)
        with pytest.raises(OutputError, match="not supported yet"):
            streamsoup.compare(["a", "b"], "task.py", output=at)
    assert sorted(os.listdir(here)) == ["a", "b", "task.py"]


@pytest.mark.parametrize(
    "path", ["C:/models/run", "C:\\run", "c:x", "run:1/x", "./s3://bucket", "/tmp/s3://x", "a//b"]
)
def test_what_is_no_address(path: str) -> None:
    """Drives, colons in names, and addresses behind a folder are paths."""
    check_local(path, StreamsoupError)


def test_a_folder_that_is_there_is_a_path(here: Path) -> None:
    """One slash is an address only where no folder has the name of the scheme."""
    with pytest.raises(StreamsoupError):
        check_local("s3:/x", StreamsoupError)
    (here / "s3:").mkdir()
    check_local("s3:/x", StreamsoupError)
    with pytest.raises(StreamsoupError):
        check_local(AT, StreamsoupError)
