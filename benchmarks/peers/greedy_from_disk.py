"""A greedy search without streamsoup: ``greedy_from_disk.py HOW OUTPUT INGREDIENT...``.

``loaded`` is the paper's way (model-soups `main.py`, step 4, 2022, in our words): each candidate is
loaded from disk again and averaged with the soup so far, in memory and in the dtype of storage.
``files`` is what a merge tool asks for: each trial is written as a checkpoint, the float32 mean of
its ingredients, and loaded. Prints how many were kept, and the bytes that were loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from files import load, save

sys.path.append(str(Path(__file__).parent.parent))
import live_task

Weights = dict[str, torch.Tensor]

N_LOADED_BYTES = 0


def loaded(folder: Path) -> Weights:
    """Load a checkpoint, and count its bytes."""
    global N_LOADED_BYTES
    weights = load(folder)
    N_LOADED_BYTES += sum(tensor.nbytes for tensor in weights.values())
    return weights


def joined(soup: Weights, n: int, candidate: Path) -> Weights:
    """Return the mean of a soup of `n` and one more."""
    more = loaded(candidate)
    return {name: soup[name] * (n / (n + 1)) + more[name] * (1 / (n + 1)) for name in soup}


def written(ingredients: Sequence[Path], output: Path) -> Weights:
    """Write the mean of ingredients, and load it."""
    total: Weights = {}
    dtypes = {}
    for folder in ingredients:
        for name, tensor in loaded(folder).items():
            dtypes[name] = tensor.dtype
            total[name] = total[name].add_(tensor) if name in total else tensor.float()
    mean = {name: (sums / len(ingredients)).to(dtypes[name]) for name, sums in total.items()}
    output.mkdir(parents=True, exist_ok=True)
    save(mean, output)
    return loaded(output)


def main() -> None:
    """Score all, best first, and keep what does not make the soup worse."""
    how, place, *folders = sys.argv[1:]
    output, ingredients = Path(place), [Path(folder) for folder in folders]
    model = live_task.build()

    def scored(weights: Weights) -> float:
        model.load_state_dict(weights)
        return live_task.score(model)

    alone = {folder: scored(loaded(folder)) for folder in ingredients}
    first, *others = sorted(ingredients, key=alone.__getitem__, reverse=True)
    kept, soup, best = [first], loaded(first), alone[first]
    for candidate in others:
        if how == "loaded":
            trial = joined(soup, len(kept), candidate)
        else:
            trial = written([*kept, candidate], output.with_name(output.name + "-trial"))
        score = scored(trial)
        if score >= best:
            kept, soup, best = [*kept, candidate], trial, score
    output.mkdir(parents=True, exist_ok=True)
    save(soup, output)
    print(json.dumps({"n_kept": len(kept), "loaded_nbytes": N_LOADED_BYTES}))


main()
