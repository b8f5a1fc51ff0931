"""Sources in another process: each kind is pickled, and reads the same tensors there."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from adapters import factors, save_adapter
from checkpoints import random_model, save, tensor

from streamsoup.formats.files import Access
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.reading import Reading

RNG = np.random.default_rng(5)
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}


def quantised(folder: Path) -> str:
    """Save codes of 8 bits with one scale for each row."""
    codes = RNG.integers(0, 0x70, (6, 8), dtype=np.uint8)
    scales = tensor(np.full((6, 1), 0.5, np.float32))
    save(folder, {"m.weight": ("F8_E4M3", (6, 8), codes.tobytes()), "m.weight_scale": scales})
    return str(folder)


def adapted(folder: Path) -> str:
    """Save a base with an adapter."""
    a, b = factors(RNG, 70, 90, 4)
    save(folder / "base", {"m.weight": tensor(RNG.standard_normal((70, 90)).astype(np.float32))})
    save_adapter(folder / "own", {"m.lora_A.weight": a, "m.lora_B.weight": b})
    return f"{folder / 'base'}+{folder / 'own'}"


def stacked(folder: Path) -> str:
    """Pickle two layers, and stack the first on both."""
    torch.save({f"model.layers.{i}.w": torch.full((3,), float(i)) for i in range(2)}, folder)
    return f"{folder}[0:2],{folder}[0:1]"


def pickled(folder: Path) -> str:
    """Pickle a state dict."""
    torch.save({"a": torch.arange(12.0).reshape(3, 4).t(), "b": torch.ones(3)}, folder)
    return str(folder)


KINDS: dict[str, Any] = {
    "plain": (lambda folder: str(save(folder, random_model(1)) or folder), Reading()),
    "pickled": (pickled, Reading()),
    "renamed": (pickled, Reading(rename=("a=>c",), exclude=("b",), drop=True)),
    "quantised": (quantised, Reading(dequantize=True)),
    "adapted": (adapted, Reading()),
    "stacked": (stacked, Reading()),
    "pipeline": (lambda folder: str(pipelines.diffusers(folder, 1)), Reading()),
}


def held(source: Any) -> dict[str, Any]:
    """Read all tensors of a source."""
    found = {}
    cursor = source.cursor(Access(mapped=False))
    for name, each in source.tensors.items():
        block = bytearray(math.prod(each.shape) * WIDTHS.get(each.dtype, 1))
        cursor.read(name, 0, block)
        found[name] = (each, bytes(block))
    cursor.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_source_can_be_sent_to_another_process(kind: str, tmp_path: Path) -> None:
    """A source that was pickled has the same identity, and the same bytes."""
    make, reading = KINDS[kind]
    (ingredient,) = open_ingredients([make(tmp_path / "a")], reading)
    source = ingredient.source
    sent = pickle.loads(pickle.dumps(source))
    assert sent.fingerprint == source.fingerprint
    assert held(sent) == held(source)
