"""The average of a live model as a checkpoint on disk: by the pass that writes every soup."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace
from torch import Tensor, nn

from streamsoup.engine.rules.linear import Linear
from streamsoup.formats.memory import open_tensors
from streamsoup.options import Options
from streamsoup.output.make import Soup, make, order
from streamsoup.recipe import Coefficients

__all__ = ["save"]


def save(
    state: Mapping[str, Tensor],
    module: nn.Module | None,
    folder: str | os.PathLike[str],
    method: str,
    report: Mapping[str, Any],
    options: Options,
) -> Soup | None:
    """Write a state dict into `folder`, as a checkpoint of `module` would be called and stored.

    Of DTensors, all parts are brought to the first process, which alone writes and returns a soup.
    """
    first = True
    if any(type(tensor).__name__ == "DTensor" for tensor in state.values()):
        import torch.distributed as dist

        first = dist.get_rank() == 0
        whole = {}
        for name, tensor in state.items():
            if type(tensor).__name__ == "DTensor":
                tensor = tensor.full_tensor()  # type: ignore[attr-defined]
            if first:
                whole[name] = tensor.cpu()
        state = whole
    if not first:
        return None
    source = open_tensors(_as_stored(state), module)
    copy = Linear(Coefficients.uniform(1))
    ordered = order([source], copy, method=method, options=options)
    return make(replace(ordered, report=dict(report)), output=folder, options=options)


def _as_stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the order in which safetensors stores it: wide dtypes first, by name.

    The file is then that of a soup of the checkpoints that safetensors wrote, byte by byte.
    """
    order: tuple[str, ...] = (
        "bool",
        "uint8",
        "int8",
        "float8_e5m2",
        "float8_e4m3fn",
        "int16",
        "uint16",
    )
    order += ("float16", "bfloat16", "int32", "uint32", "float32", "float64", "int64", "uint64")

    def place(name: str) -> tuple[int, str]:
        dtype = str(state[name].dtype).removeprefix("torch.")
        return -order.index(dtype) if dtype in order else 0, name

    return {name: state[name] for name in sorted(state, key=place)}
