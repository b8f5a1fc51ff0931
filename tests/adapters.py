"""Adapters made by hand as PEFT writes them, and the float64 arithmetic to compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensor, content, tensor

Arrays = dict[str, np.ndarray[Any, Any]]

PREFIX = "base_model.model."


def save_adapter(folder: Path, tensors: Mapping[str, Tensor | Any], **config: Any) -> Path:
    """Write an adapter; names are those of the model, without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        PREFIX + name: each if isinstance(each, tuple) else tensor(each)
        for name, each in tensors.items()
    }
    (folder / "adapter_model.safetensors").write_bytes(content(stored, {"format": "pt"}))
    told = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


def factors(rng: np.random.Generator, rows: int, columns: int, rank: int) -> list[Any]:
    """Return A and B in float32."""
    shapes = [(rank, columns), (rows, rank)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def scale(rank: int, alpha: float, rslora: bool = False) -> float:
    """Return the factor of the product."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def in_order(w: Any, a: Any, b: Any, s: float) -> Any:
    """Return W + s·B·A, with the sum over the rank in order, each step rounded to float64."""
    w, a, b = (np.asarray(each, np.float64) for each in (w, a, b))
    total = np.zeros((b.shape[0], a.shape[1]))
    for k in range(a.shape[0]):
        total = total + np.outer(b[:, k], a[k])
    return w + s * total
