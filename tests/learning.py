"""A small network, its fine-tunes and a task, for learned soups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from streamsoup.engine.rules.linear import Linear
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.live.model import ModelSink
from streamsoup.options import Options
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients
from streamsoup.search.learned import learned
from streamsoup.search.learning.parametrisation import parametrise
from streamsoup.search.learning.settings import LearnedSettings
from streamsoup.search.learning.slopes import Slopes, find_equal
from streamsoup.task import load_task

K = 4


class Net(nn.Module):
    """Two blocks, tied embedding and head, a norm with buffers, and a frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.table = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).mean(1) + self.table
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def make_state(seed: int, *, tied_name: bool = True) -> dict[str, torch.Tensor]:
    """Weights of one fine-tune: near to a common base; the norms' weights never moved."""
    base = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(100 + seed)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in Net().double().state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
            continue
        start = torch.randn(tensor.shape, generator=base, dtype=torch.float64)
        moved = 0.3 * torch.randn(tensor.shape, generator=own, dtype=torch.float64)
        state[name] = start.abs() + 0.5 if "running_var" in name else start
        if not name.endswith("1.weight"):
            state[name] = state[name] + (moved.abs() if "running_var" in name else moved)
    state["head.weight"] = state["embed.weight"].clone()
    if not tied_name:
        del state["head.weight"]
    return state


def make_batches(n: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Held-out batches of different sizes."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5 + i % 3 for i in range(n)]
    return [
        (
            torch.randint(0, 11, (size, 3), generator=generator),
            torch.randint(0, 11, (size,), generator=generator),
        )
        for size in sizes
    ]


def task_of(batches: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The task of classifying them, weighed by examples."""

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in batches:
            yield nn.functional.cross_entropy(model(x), y), len(y)

    def build() -> nn.Module:
        return Net().to(dtype)

    def score(model: nn.Module) -> float:
        return 0.0

    return SimpleNamespace(loss=loss, build=build, score=score, splits=["val"])


def files(folder: Path) -> list[str]:
    """Write the files of all ingredients."""
    paths = [str(folder / f"{i}.safetensors") for i in range(K)]
    for i, path in enumerate(paths):
        save_file(make_state(i), path)
    return paths


def make_slopes(
    paths: list[str], task: Any, mixture_kind: dict[str, Any], guard_every: int = 0, **options: Any
) -> Slopes:
    """Plan the passes of a search."""
    opts = Options(non_float="first", **options)
    plan = order(
        open_ingredients(paths),
        Linear(Coefficients.uniform(len(paths))),
        method="learned",
        options=opts,
    ).plan
    loaded = load_task(task)
    sink = ModelSink(loaded.build(), plan)
    mapped = opts.io != "read"
    equal, _ = find_equal(plan, mapped=mapped, options=opts)
    assert equal["blocks.0.1.weight"] == equal["blocks.1.1.weight"] == (0,) * len(paths)
    names = [tensor.name for tensor in plan.tensors if tensor.operation == "mix"]
    mixture = parametrise(names, sink.tied, len(paths), **mixture_kind)
    return Slopes(
        loaded,
        sink,
        mixture,
        equal,
        split="val",
        guard_split=None,
        guard_every=guard_every,
        mapped=mapped,
        options=opts,
    )


class InMemory:
    """The learned soup as the paper's code has it: all in memory, autograd through the sum."""

    def __init__(self, paths: list[str], mixture: Any) -> None:
        self.states = [load_file(path) for path in paths]
        self.mixture = mixture
        self.model = Net().double().eval()

    def coefficients(self, raw: torch.Tensor) -> torch.Tensor:
        k = len(self.states)
        n = len(self.mixture.groups) * k
        z = raw[:n].reshape(-1, k)
        if self.mixture.constraint == "softmax":
            return torch.softmax(z, dim=1)
        if self.mixture.constraint == "affine":
            return z - z.mean(dim=1, keepdim=True) + 1 / k
        return z

    def loss(self, raw: torch.Tensor, batches: Any) -> torch.Tensor:
        rows = self.coefficients(raw)
        mixed = {}
        for name, group in self.mixture.group_of.items():
            stacked = torch.stack([state[name] for state in self.states])
            mixed[name] = torch.tensordot(rows[group], stacked, dims=1)
            if "running" in name:
                mixed[name] = mixed[name].detach()
        mixed["head.weight"] = mixed["embed.weight"]
        beta = raw[-1] if self.mixture.temperature else 1.0
        total, n = torch.zeros((), dtype=torch.float64), 0
        for x, y in batches:
            logits = torch.func.functional_call(self.model, mixed, (x,), tie_weights=False)
            total = total + nn.functional.cross_entropy(beta * logits, y) * len(y)
            n += len(y)
        return total / n

    def gradient(self, raw: np.ndarray, batches: Any) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(raw, requires_grad=True)
        loss = self.loss(leaf, batches)
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad.numpy()


def learn(paths: list[str], output: Path, task: Any = None, **learning: Any) -> Any:
    """Learn a soup of all."""
    options = Options(non_float="first", threads=1)
    return learned(
        paths,
        task or task_of(make_batches(10)),
        output=output,
        settings=LearnedSettings(**learning),
        options=options,
    )


class Stop(BaseException):
    pass
