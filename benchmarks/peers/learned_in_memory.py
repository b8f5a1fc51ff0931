"""A learned soup as the paper's code does it: all ingredients in memory, autograd through the mix.

``learned_in_memory.py STEPS INGREDIENT...``: a global softmax over the ingredients, a loss that
reaches every element for little more than reading it, and plain gradient steps. Prints the seconds
of each step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from files import load

steps, *folders = sys.argv[1:]
models = [load(Path(folder)) for folder in folders]
raw = torch.zeros(len(models), requires_grad=True)
seconds = []
for _ in range(int(steps)):
    started = time.perf_counter()
    shares = raw.softmax(0)
    losses = []
    for name in models[0]:
        soup = sum(shares[i] * model[name] for i, model in enumerate(models))
        losses.append(soup.float().square().mean())
    torch.stack(losses).sum().backward()
    with torch.no_grad():
        raw -= 0.05 * raw.grad
        raw.grad = None
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
