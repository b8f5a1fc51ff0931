"""Shards and indexes that tests write by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from checkpoints import (
    tensor,
)

A = {"a": tensor(np.zeros(3, np.float32))}
B = {"b": tensor(np.ones((2, 2), np.float16))}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def index(folder: Path, weight_map: object, **more: object) -> None:
    """Replace the index of a folder."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))


def pipe_shard(folder: Path) -> None:
    """Put a FIFO in place of a shard."""
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


def pointer_shard(folder: Path) -> None:
    """Leave a shard unfetched by Git LFS."""
    (folder / SHARDS[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
