"""The careful twenty lines: tensor by tensor, one ingredient at a time, in float64."""

from __future__ import annotations

import torch
from files import arguments, save, shards
from safetensors import safe_open

output, ingredients = arguments()
where = [
    {name: path for path in shards(folder) for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    for folder in ingredients
]
files = {path: safe_open(path, "pt") for each in where for path in set(each.values())}
soup: dict[str, torch.Tensor] = {}
for name in where[0]:
    first = files[where[0][name]].get_tensor(name)
    total = first.to(torch.float64)
    for each in where[1:]:
        total += files[each[name]].get_tensor(name)
    soup[name] = (total / len(ingredients)).to(first.dtype)
save(soup, output)
