"""sd-mecha's `n_average`, merged in float32 and written in the dtype of the ingredients."""

from __future__ import annotations

import logging

import sd_mecha
import torch
from files import arguments, shards
from safetensors import safe_open

logging.disable()
output, ingredients = arguments()
(first, *others) = (shards(folder) for folder in ingredients)
assert len(first) == 1, "sd-mecha reads single files"
with safe_open(first[0], "pt") as file:
    dtype = file.get_slice(next(iter(file.keys()))).get_dtype()
models = [sd_mecha.model(str(path)) for (path,) in (first, *others)]
sd_mecha.merge(
    sd_mecha.n_average(*models),
    merge_dtype=torch.float32,
    output_dtype={"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype],
    output=str(output / "model.safetensors"),
)
