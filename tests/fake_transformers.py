"""A stand-in for what streamsoup calls of transformers 5, with one family of models to convert.

Checkpoints of the family have a prefix less, other names, one tensor for three projections, one for
each expert's gate and each expert's up, and a matrix that is turned. `load` is the plain reading of
them that results are compared with: it shares nothing with the conversions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

E, F, H = 3, 5, 4
"""Experts, width of each, and width of the model."""


class PreTrainedModel(nn.Module):
    """The class that streamsoup recognises by its name and its module."""

    __module__ = "transformers.modeling_utils"
    base_model_prefix = "body"
    dtype = torch.float32

    def can_generate(self) -> bool:
        return False


class Config(SimpleNamespace):
    def to_json_string(self) -> str:
        return json.dumps(vars(self))


class Body(PreTrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(model_type="fake")
        self.embedding = nn.Linear(6, H)
        self.q, self.k, self.v = (nn.Linear(H, H, bias=False) for _ in range(3))
        self.gate_up = nn.Parameter(torch.randn(E, 2 * F, H) / 2)
        self.down = nn.Parameter(torch.randn(E, F, H) / 2)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        gate, up = torch.einsum("bh,efh->ebf", x, self.gate_up).chunk(2, dim=2)
        return x + torch.einsum("ebf,efh->bh", torch.sigmoid(gate) * up, self.down)


class WithHead(PreTrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(model_type="fake")
        self.body = Body()
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def load(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Read a checkpoint into a model, plainly."""
    prefix = "body." if isinstance(model, WithHead) else ""
    own = {}
    qkv = stored["body.attention.qkv.weight"]
    for i, name in enumerate("qkv"):
        own[f"{prefix}{name}.weight"] = qkv[i * H : (i + 1) * H]
    experts = [f"body.experts.{e}" for e in range(E)]
    own[f"{prefix}gate_up"] = torch.stack(
        [torch.cat([stored[f"{each}.gate"], stored[f"{each}.up"]]) for each in experts]
    )
    own[f"{prefix}down"] = torch.stack([stored[f"{each}.down"].T for each in experts])
    for name in ("weight", "bias"):
        own[f"{prefix}embedding.{name}"] = stored[f"body.old_embedding.{name}"]
        if prefix and f"head.{name}" in stored:
            own[f"head.{name}"] = stored[f"head.{name}"]
    own[f"{prefix}seen"] = stored["body.seen"]
    model.load_state_dict(own, strict=not prefix or "head.weight" in stored)


def make_stored(seed: int, dtype: torch.dtype = torch.float32, head: bool = True) -> dict[str, Any]:
    """Make a checkpoint of random weights."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 2).to(dtype)

    stored = {
        "body.attention.qkv.weight": some(3 * H, H),
        "body.old_embedding.weight": some(H, 6),
        "body.old_embedding.bias": some(H),
        "body.seen": torch.tensor(3),
    }
    for e in range(E):
        stored[f"body.experts.{e}.gate"] = some(F, H)
        stored[f"body.experts.{e}.up"] = some(F, H)
        stored[f"body.experts.{e}.down"] = some(H, F)
    if head:
        stored |= {"head.weight": some(2, H), "head.bias": some(2)}
    return stored


class WeightRenaming:
    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target


class WeightConverter:
    """Some tensors into others by a function of lists of tensors."""

    def __init__(
        self, sources: list[str], targets: list[str], operate: Callable[..., list[Tensor]]
    ) -> None:
        self.source_patterns, self.target_patterns, self.operate = sources, targets, operate
        self.collected: dict[str, list[Tensor]] = {}

    def add_tensor(self, target: str, source: str, pattern: str, tensor: Tensor) -> None:
        self.collected.setdefault(pattern, []).append(tensor)

    def convert(self, first: str, model: Any = None, config: Any = None) -> dict[str, Any]:
        prefix = first.removesuffix(self.target_patterns[0])
        made = self.operate(*(self.collected[pattern] for pattern in self.source_patterns))
        return {
            prefix + target: [each] for target, each in zip(self.target_patterns, made, strict=True)
        }


def gates_and_ups(gates: list[Tensor], ups: list[Tensor]) -> list[Tensor]:
    """Join gates and ups of all experts."""
    return [torch.cat([torch.stack(gates, dim=0), torch.stack(ups, dim=0)], dim=1)]


def conversions(model: Any) -> list[Any]:
    """List what the family does when it loads."""
    return [
        WeightRenaming(r"old_embedding", "embedding"),
        WeightRenaming(r"attention\.qkv", "qkv"),
        WeightConverter(
            ["qkv.weight"],
            ["q.weight", "k.weight", "v.weight"],
            lambda whole: [each.contiguous() for each in torch.chunk(whole[0], 3, dim=0)],
        ),
        WeightConverter(["experts.*.gate", "experts.*.up"], ["gate_up"], gates_and_ups),
        WeightConverter(
            ["experts.*.down"],
            ["down"],
            lambda downs: [torch.stack([each.T.contiguous() for each in downs])],
        ),
    ]


def natural(name: str) -> list[Any]:
    """Order names by their numbers."""
    return [(0, int(step), "") if step.isdigit() else (1, 0, step) for step in name.split(".")]


def rename(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, live: Any
) -> tuple[str, str | None]:
    """Return the live name of a stored tensor, and the pattern of its conversion."""
    found = None
    for each in renamings:
        name = re.sub(each.source, each.target, name)
    for each in converters:
        for pattern in each.source_patterns:
            matched = re.search(re.escape(pattern).replace(r"\*", r"\d+") + "$", name)
            if matched and found is None:
                name = name[: matched.start()] + each.target_patterns[0]
                found = pattern
    if name.startswith(f"{prefix}.") and name.removeprefix(f"{prefix}.") in live:
        name = name.removeprefix(f"{prefix}.")
    elif f"{prefix}.{name}" in live:
        name = f"{prefix}.{name}"
    return name, found


def revert(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do what the family does when it saves."""
    made = {}
    at = "body." if isinstance(model, WithHead) else ""
    for name, tensor in state.items():
        if name == f"{at}gate_up":
            gates, ups = (each.contiguous() for each in torch.chunk(tensor, 2, dim=1))
            for e in range(E):
                made[f"{at}experts.{e}.gate"] = torch.chunk(gates, E, dim=0)[e].squeeze(0)
                made[f"{at}experts.{e}.up"] = torch.chunk(ups, E, dim=0)[e].squeeze(0)
        elif name == f"{at}down":
            for e in range(E):
                made[f"{at}experts.{e}.down"] = torch.chunk(tensor, E)[e].squeeze(0).T.contiguous()
        elif name == f"{at}q.weight":
            parts = [state[f"{at}{each}.weight"] for each in "qkv"]
            made[f"{at}attention.qkv.weight"] = torch.cat(parts, dim=0)
        elif name not in (f"{at}k.weight", f"{at}v.weight"):
            made[name.replace("embedding", "old_embedding")] = tensor
    return made


def install(monkeypatch: pytest.MonkeyPatch, **instead: Any) -> None:
    """Have streamsoup import this for transformers; `instead` replaces or, by None, removes."""
    names = {
        "get_model_conversion_mapping": conversions,
        "WeightRenaming": WeightRenaming,
        "WeightConverter": WeightConverter,
        "dot_natural_key": natural,
        "rename_source_key": rename,
        "revert_weight_conversion": revert,
    } | instead
    mapping = ModuleType("transformers.conversion_mapping")
    core = ModuleType("transformers.core_model_loading")
    for module in (ModuleType("transformers"), mapping, core):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, value in names.items():
        if value is not None:
            setattr(mapping if name == "get_model_conversion_mapping" else core, name, value)
