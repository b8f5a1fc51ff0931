"""An update of `streamsoup.Average` against one of torch's `AveragedModel`, in pairs.

A model of 124M parameters in the shapes of GPT-2, on the CPU. Its values are tested elsewhere.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.rows import Session

__all__ = ["run"]


def run(session: Session, *, rounds: int = 9) -> None:
    """Measure `rounds` pairs of updates for two methods and two dtypes."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from streamsoup import Average

    ema: dict[str, Any] = {"multi_avg_fn": get_ema_multi_avg_fn(0.999)}
    for dtype in (torch.float32, torch.bfloat16):
        model = _network(dtype)
        for method, settings in (("uniform", {}), ("ema", ema)):
            theirs, ours = AveragedModel(model, **settings), Average(method)  # type: ignore[arg-type]
            updates: Mapping[str, Callable[[Any], None]] = {
                "AveragedModel": theirs.update_parameters,
                "streamsoup.Average": ours.update,
            }
            case = f"{method}, {str(dtype).removeprefix('torch.')}"
            times: dict[str, list[float]] = {tool: [] for tool in updates}
            for round_ in range(-2, rounds):
                _change(model)
                for tool, update in updates.items():
                    began = time.perf_counter()
                    update(model)
                    seconds = time.perf_counter() - began
                    if round_ >= 0:
                        session.add("average", tool, case, round=round_, seconds=seconds)
                        times[tool].append(seconds)
            ratios = [b / a for a, b in zip(*times.values(), strict=True)]
            held = ours.memory(model).host_nbytes
            print(
                f"{case}: Average / AveragedModel {statistics.median(ratios):.2f}, "
                f"{min(ratios):.2f} to {max(ratios):.2f}; holds {held / 1e6:.0f} MB",
                file=sys.stderr,
            )


def _network(dtype: Any) -> Any:
    """Return a module with the parameters of GPT-2."""
    import torch
    from torch import nn

    d = 768
    layer = [(d, 3 * d), (3 * d,), (d, d), (d,), (d, 4 * d), (4 * d,), (4 * d, d), *[(d,)] * 5]
    shapes = [(50257, d), (1024, d), *layer * 12, (d,), (d,)]
    torch.manual_seed(0)
    module = nn.Module()
    module.parts = nn.ParameterList(nn.Parameter(torch.randn(*s, dtype=dtype)) for s in shapes)
    return module


def _change(model: Any) -> None:
    """Change a model a little, as a step of training does."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
