"""Ingredients and scores for greedy searches, whose outcome is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import nn

from streamsoup import greedy
from streamsoup.errors import (
    TaskError,
)


def weights(folder: str | Path) -> bytes:
    """Return the bytes of a soup's file."""
    return (Path(folder) / "model.safetensors").read_bytes()


def by_score(scores: Sequence[float]) -> list[int]:
    """Order best first; ties as given."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def table(scores: dict[tuple[int, ...], float], default: float = 0.0) -> Any:
    """Score by what is in the soup: parameters are powers of ten, so the mean tells."""

    def look(model: nn.Module, split: str, to_beat: float | None = None) -> float:
        marks = model.w.detach()
        found = tuple(int(i) for i in marks.nonzero().flatten())
        return scores.get(found, default)

    return look


class Marks(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))


def marks(folder: Path, n: int) -> list[str]:
    """Make ingredients that are unit vectors: a mean shows its members."""
    from safetensors.torch import save_file

    folder.mkdir()
    paths = []
    for i in range(n):
        paths.append(str(folder / f"{i}.safetensors"))
        save_file({"w": torch.eye(n)[i]}, paths[-1])
    return paths


class Killed(BaseException):
    """A kill, as far as a test can have it."""


def interrupted(paths: list[str], output: Path) -> Path:
    """Leave a search that failed at its third score; give its journal."""
    calls: list[int] = []

    def task(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no more")
        return networks.score(model)

    with pytest.raises(TaskError, match="ValueError: no more"):
        greedy(paths, task, model=networks.build(), output=output)
    return Path(f"{output}.search") / "journal"


def failing(model: nn.Module) -> float:
    """Score nothing."""
    raise AssertionError("this is not to be scored")


def task_of_two(model: nn.Module) -> float:
    """Score otherwise."""
    return -networks.score(model)
