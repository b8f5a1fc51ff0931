"""Shard by shard, tensor by tensor, in float32: in the manner of NeMo-Skills.

After what its `average_checkpoints.py` does (NVIDIA NeMo-Skills, 2025; no package), in our words:
the output mirrors the shards of the first ingredient, and each is saved when it is full.
"""

from __future__ import annotations

import shutil

import torch
from files import arguments, shards
from safetensors import safe_open
from safetensors.torch import save_file

output, ingredients = arguments()
for path in shards(ingredients[0]):
    files = [safe_open(folder / path.name, "pt") for folder in ingredients]
    soup: dict[str, torch.Tensor] = {}
    for name in files[0].keys():  # noqa: SIM118 - not a dict
        first = files[0].get_tensor(name)
        total = first.to(torch.float32)
        for file in files[1:]:
            total += file.get_tensor(name).to(torch.float32)
        soup[name] = (total / len(files)).to(first.dtype)
    save_file(soup, output / path.name, metadata={"format": "pt"})
for path in ingredients[0].glob("*.json"):
    shutil.copy(path, output)
