"""Two processes that average a model each has a part of (FSDP2), or all of (DDP): see the test.

Run as ``python average_processes.py RANK FOLDER``; each process writes what it found to FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from streamsoup import Average

SETTINGS = (("uniform", {}), ("ema", {"decay": 0.5}), ("lawa", {"window": 2}))


def network() -> nn.Module:
    """Return a model whose rows do not divide by two, with tied weights and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(5, 7))
    model[3].weight = model[0].weight
    return model


def change(tensors: dict[str, Tensor], step: int) -> None:
    """Change all floats, in a way that depends on the step alone."""
    with torch.no_grad():
        for i, name in enumerate(sorted(tensors)):
            if tensors[name].is_floating_point():
                tensors[name].mul_(1.0 + 0.1 * step + 0.01 * i).add_(0.3)


def averaged(model: nn.Module, inner: nn.Module) -> dict[str, Average]:
    """Return averages over three updates of a wrapped model."""
    averages = {method: Average(method, **more) for method, more in SETTINGS}  # type: ignore[arg-type]
    for step in range(3):
        change(dict(inner.named_parameters()), step)
        for average in averages.values():
            average.update(model)
    return averages


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of plain tensors."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def main(rank: int, folder: Path) -> None:
    """Average under DDP and FSDP2, restart the latter from a saved state, and save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, dict[str, Tensor]] = {}
    plain = network()
    ddp = DistributedDataParallel(plain)
    for method, average in averaged(ddp, plain).items():
        found[f"ddp-{method}"] = average.result()
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for method, average in averaged(model, model).items():
        again = Average(method, **dict(SETTINGS)[method])  # type: ignore[arg-type]
        again.load_state_dict(average.state_dict(), model)
        result = again.result()
        held = sum(t.to_local().numel() for t in result.values() if hasattr(t, "to_local"))
        total = sum(t.numel() for t in result.values() if hasattr(t, "to_local"))
        assert 0 < held < total, "each process averages its own part"
        own = model.state_dict()
        assert all(t.stride() == own[name].stride() for name, t in result.items())
        found[f"fsdp-{method}"] = whole(result)
        before = whole(model.state_dict())
        with again.swap(model):
            found[f"swapped-{method}"] = {
                k: v.clone() for k, v in whole(model.state_dict()).items()
            }
        after = whole(model.state_dict())
        assert all(torch.equal(before[name], after[name]) for name in before)
        soup = again.save(folder / f"soup-{method}")
        assert (soup is None) == (rank != 0)
        dist.barrier()
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
