"""What timm's `avg_checkpoints.py` does: sums in float64, then a clamp, all written as float32.

After https://github.com/huggingface/pytorch-image-models (2025), in our words: the script is not
in timm's package. It also reads the output again, for its SHA-256.
"""

from __future__ import annotations

import hashlib

import torch
from files import arguments, load, save

output, ingredients = arguments()
sums: dict[str, torch.Tensor] = {}
for folder in ingredients:
    for name, tensor in load(folder).items():
        if name in sums:
            sums[name] += tensor.to(torch.float64)
        else:
            sums[name] = tensor.clone().to(torch.float64)
limits = torch.finfo(torch.float32)
soup = {}
for name, total in sums.items():
    total.div_(len(ingredients))
    soup[name] = total.clamp(limits.min, limits.max).to(torch.float32)
save(soup, output)
print(hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest())
