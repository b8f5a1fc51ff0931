"""How the scripts here read and write: by safetensors, with the fastest call it has."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["arguments", "load", "save"]


def arguments() -> tuple[Path, list[Path]]:
    """Return the output and the ingredients, all of them folders."""
    output, *ingredients = map(Path, sys.argv[1:])
    output.mkdir(parents=True)
    return output, ingredients


def shards(folder: Path) -> list[Path]:
    """List the shards of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Load a whole checkpoint. The tensors are mapped, and copied where they are worked on."""
    tensors: dict[str, torch.Tensor] = {}
    for path in shards(folder):
        tensors |= load_file(path)
    return tensors


def save(tensors: dict[str, torch.Tensor], output: Path) -> None:
    """Write a whole checkpoint into one file."""
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
