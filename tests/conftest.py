"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import started

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of remote sources have a server of their own

# A shell that runs the suite in the background lets it, and all that it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """End the commands that a failing test left, which later tests would trip over."""
    yield
    while started:
        with started.pop() as process:  # waits for it, and closes its streams
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: networks as small as those here are slower on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Return six fine-tunes of one network."""
    from networks import ingredients

    return ingredients(tmp_path / "in")
