"""Ingredients that shrink, grow or are replaced while they are read: named, never averaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import content, tensor
from commands import (
    MANY,
    finish,
    large,
    start,
    wait_for_work,
)

# -- an ingredient that changes -------------------------------------------------------------------


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(content({"weight": tensor(np.ones(3, "f4"))}))
    new.rename(path)


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80?")


def _blink(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 4096)
    time.sleep(0.05)
    os.truncate(path, size)


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("change", [_shrink, _grow, _replace, Path.unlink, _rewrite, _blink])
def test_an_ingredient_that_changes(tmp_path: Path, io: str, change: object) -> None:
    """A shard that changes while it is read is named; never a SIGBUS, never a mixture."""
    a, b = large(tmp_path / "a"), large(tmp_path / "b")
    words = (*[a] * (MANY - 1), b, "-o", tmp_path / "soup", "--io", io, "--threads", "2")
    command = start("uniform", *words)
    wait_for_work(tmp_path / "soup.partial")
    assert callable(change)
    change(b / "model.safetensors")
    status, stderr = finish(command)
    assert status == 1
    assert str(b / "model.safetensors") in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "soup").exists()
