"""A task for searches: a live model of any shape, and a scorer that takes a known time.

The model holds the tensors of the checkpoint at ``$STREAMSOUP_BENCH_LIKE`` and computes nothing;
a score takes ``$STREAMSOUP_BENCH_SCORE_S`` seconds of sleep. Each ingredient scores a little less
than the one before, and of the candidates every other one is an improvement. Run as a script, it
builds the model and scores it as often as its argument says: what any search takes at least.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

N_SCORED = 0
SCORE_S = float(os.environ.get("STREAMSOUP_BENCH_SCORE_S", "0"))
N_INGREDIENTS = int(os.environ.get("STREAMSOUP_BENCH_N", "0"))
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def build() -> torch.nn.Module:
    """Make modules within modules, as the names of the tensors say."""
    model = torch.nn.Module()
    for path in sorted(Path(os.environ["STREAMSOUP_BENCH_LIKE"]).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                *folders, last = name.split(".")
                at = model
                for folder in folders:
                    if folder not in at._modules:
                        at.add_module(folder, torch.nn.Module())
                    at = at.get_submodule(folder)
                tensor = torch.zeros(entry["shape"], dtype=_DTYPES[entry["dtype"]])
                at.register_parameter(last, torch.nn.Parameter(tensor))
    return model


def score(model: torch.nn.Module) -> float:
    """Sleep as long as a score takes; ingredients come first, each worse, then candidates."""
    global N_SCORED
    time.sleep(SCORE_S)
    N_SCORED += 1
    if N_SCORED <= N_INGREDIENTS:
        return 0.5 - N_SCORED / 1000
    trial = N_SCORED - N_INGREDIENTS
    return 0.5 + trial / 1000 if trial % 2 else 0.1


def loss(model: torch.nn.Module, split: str) -> Iterator[torch.Tensor]:
    """One batch whose gradient reaches every element, for little more than reading it."""
    yield torch.stack([p.float().square().mean() for p in model.parameters()]).sum()


if __name__ == "__main__":
    alone = build()
    for _ in range(int(sys.argv[1])):
        score(alone)
