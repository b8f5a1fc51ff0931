"""What anyone would write first: load all, stack, and take the mean in float32."""

from __future__ import annotations

import torch
from files import arguments, load, save

output, ingredients = arguments()
models = [load(folder) for folder in ingredients]
soup = {
    name: torch.stack([model[name] for model in models]).float().mean(dim=0).to(first.dtype)
    for name, first in models[0].items()
}
save(soup, output)
