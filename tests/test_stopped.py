"""Runs that are stopped by a signal, killed, or started without standard streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import (
    MANY,
    finish,
    large,
    run,
    small,
    start,
    wait_for_work,
)


def test_a_worker_that_is_stopped_by_itself_says_by_what(tmp_path: Path) -> None:
    """As some batch systems signal every process."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    os.kill(wait_for_work(tmp_path / "soup.partial"), signal.SIGTERM)
    status, stderr = finish(command)
    assert status == 143
    assert stderr.startswith("interrupted by SIGTERM")


def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    """When the working process is killed, the command says so in one line, and can be resumed."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    os.kill(wait_for_work(tmp_path / "soup.partial"), signal.SIGKILL)
    status, stderr = finish(command)
    assert status == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: the working process was killed by SIGKILL")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("whom", ["parent", "group"])
@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_stopped_by_a_signal(tmp_path: Path, whom: str, name: str, status: int) -> None:
    """Ctrl-C and its kin, twice in a row, end the run in two seconds and one line."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    wait_for_work(tmp_path / "soup.partial")
    started = time.monotonic()
    for _ in range(2):
        kill = os.killpg if whom == "group" else os.kill
        kill(command.pid, getattr(signal, f"SIG{name}"))
    end = finish(command)
    assert time.monotonic() - started < 2
    assert end == (status, f"interrupted by SIG{name}; the same command goes on from there\n")
    assert not (tmp_path / "soup").exists()


def test_stopped_before_it_begins(tmp_path: Path) -> None:
    """Ctrl-C while the command line is still being imported ends in one line, too."""
    # The first thing the command line imports: this one is interrupted.
    (tmp_path / "click.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert run("uniform", "a", "-o", "b", env=os.environ | {"PYTHONPATH": path}) == (
        130,
        "interrupted\n",
    )


def test_nohup_is_respected(tmp_path: Path) -> None:
    """A signal that was ignored when the command started stays ignored."""
    a = small(tmp_path / "a")
    words = ("uniform", a, a, "-o", tmp_path / "soup")
    command = start(*words, ignored=[signal.SIGHUP, signal.SIGCHLD])
    for _ in range(20):
        command.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    assert finish(command) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| true", ">/dev/full"])
def test_without_standard_streams(tmp_path: Path, closed: str) -> None:
    """Closed, broken or full streams change nothing about the soup."""
    a = small(tmp_path / "a")
    line = f"'{sys.executable}' -m streamsoup uniform a a -o soup {closed}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == (1 if "full" in closed else 0)
    assert "Traceback" not in done.stderr
    assert ("error: stdout: cannot be written" in done.stderr) == ("full" in closed)
    assert run("verify", tmp_path / "soup", "-i", a, "-i", a)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "soup"]


@pytest.mark.parametrize("command", ["inspect a", "plan a a", "verify --help", "--version"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_looking_without_standard_streams(tmp_path: Path, command: str, closed: str) -> None:
    """Nor do they change what commands come to that only look: in one line, if in any."""
    small(tmp_path / "a")
    line = f"'{sys.executable}' -m streamsoup {command} {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if "full" in closed else 0)
    assert done.stderr.count("\n") == ("full" in closed)
    assert ("stdout: cannot be written" in done.stderr) == ("full" in closed)
