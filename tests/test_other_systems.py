"""Systems that lack what only Linux has: its calls are hidden here, as macOS does not have them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from networks import ingredients

HIDDEN_IN_OS = (
    *("sched_getaffinity", "posix_fadvise", "posix_fallocate", "pidfd_open", "O_PATH", "waitid"),
    *("memfd_create", "copy_file_range", "eventfd", "POSIX_FADV_DONTNEED"),
)
HIDDEN_IN_LIBC = ("renameat2", "fallocate", "sync_file_range", "prctl")

PREAMBLE = f"""
import builtins, ctypes, io, os, shutil, sys  # shutil looks at os before it is changed
for name in {HIDDEN_IN_OS!r}:
    if hasattr(os, name):
        delattr(os, name)
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in {HIDDEN_IN_LIBC!r}:
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
def hide(real):
    def call(path=".", *rest, **more):
        if isinstance(path, (str, bytes)) and os.fspath(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *rest, **more)
    return call
builtins.open = io.open = hide(open)
os.listdir, os.stat = hide(os.listdir), hide(os.stat)
"""


def run(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run a command with the calls hidden, in the processes that it starts, too."""
    (folder / "hidden").mkdir(exist_ok=True)
    (folder / "hidden" / "sitecustomize.py").write_text(PREAMBLE)
    return subprocess.run(
        [sys.executable, "-m", "streamsoup", *map(str, argv)],
        env={"PYTHONPATH": f"{folder / 'hidden'}:{Path(__file__).parent}", "PATH": "/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Return the paths of three small fine-tunes."""
    return ingredients(tmp_path / "in")[:3]


def test_the_calls_are_hidden(tmp_path: Path) -> None:
    """The preamble hides what it names, or the tests below would show nothing."""
    (tmp_path / "p.py").write_text(
        PREAMBLE
        + "assert not hasattr(os, 'pidfd_open')\n"
        + "assert not hasattr(ctypes.CDLL(None), 'prctl')\n"
        + "assert not os.path.exists('/proc/self')\n"
    )
    subprocess.run([sys.executable, tmp_path / "p.py"], check=True)


def test_soups_are_made_replaced_and_verified(tmp_path: Path, runs: list[str]) -> None:
    """A soup has the same bytes, replaces an old one, and is verified."""
    here = [sys.executable, "-m", "streamsoup", "uniform", *runs, "-o", str(tmp_path / "usual")]
    subprocess.run(here, check=True, capture_output=True)
    for more in ((), ("--overwrite", "--io", "read")):
        made = run(tmp_path, "uniform", *runs, "-o", "soup", *more)
        assert made.returncode == 0, made.stderr
    names = [path.name for path in (tmp_path / "usual").iterdir() if path.suffix == ".safetensors"]
    for name in names:
        assert (tmp_path / "soup" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()
    assert not (tmp_path / "soup.partial").exists()
    checked = run(tmp_path, "verify", "soup")
    assert checked.returncode == 0, checked.stderr


def test_commands_score_and_are_ended(tmp_path: Path, runs: list[str]) -> None:
    """A search by a command ends as elsewhere; a command that takes too long is killed."""
    script = tmp_path / "score.py"
    script.write_text(
        "import os, sys; print(os.path.getsize(sys.argv[1] + '/model.safetensors'))\n"
    )
    line = f"{sys.executable} -S {script} {{checkpoint}}"
    found = run(tmp_path, "greedy", *runs, "--command", line, "-o", "soup", "--json")
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)["report"]["members"]) == 3
    late = ("--command", "sleep 60 # {checkpoint}", "--timeout", 0.5)
    slow = run(tmp_path, "greedy", *runs, *late, "-o", "other")
    assert slow.returncode == 1
    assert "took longer than 0.5 s" in slow.stderr


def test_workers_score_side_by_side(tmp_path: Path, runs: list[str]) -> None:
    """Two worker processes score a task file; one that dies is named."""
    task = tmp_path / "task.py"
    task.write_text(
        "import os\nfrom networks import build\n"
        "def score(model):\n"
        "    if os.path.exists('die'): os._exit(3)\n"
        "    return float(next(model.parameters()).sum())\n"
    )
    found = run(tmp_path, "greedy", *runs, "--task", task, "--jobs", 2, "-o", "soup", "-q")
    assert found.returncode == 0, found.stderr
    (tmp_path / "die").write_text("")
    dead = run(tmp_path, "greedy", *runs, "--task", task, "--jobs", 2, "-o", "other", "-q")
    assert dead.returncode == 1
    assert "ended itself with status 3" in dead.stderr
