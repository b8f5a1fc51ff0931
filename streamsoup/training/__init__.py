"""Averages while a model trains: the accumulator, callbacks for trainers, and the watch of a run.

`average` holds `Average`: `live` reads the tensors of a model or state dict, `running` and `window`
keep what the methods need (`host`, `device` and `rooms` say where), and `arithmetic` adds and
rounds blocks of them with the kernels of every soup, so that the bytes are those of the commands
over saved checkpoints. `trainer` and `lightning` are callbacks for those libraries, which are
imported only there. `watch` keeps the average of a run's newest checkpoints up to date, on disk.

It may import what makes soups of files; only the command line imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamsoup.training.average import Average as Average
    from streamsoup.training.lightning import LightningAverage as LightningAverage
    from streamsoup.training.trainer import TrainerAverage as TrainerAverage

_HOMES = {
    "Average": "average",
    "LightningAverage": "lightning",
    "TrainerAverage": "trainer",
}
"""Public names, and the modules they live in: each is imported on first use."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the callbacks need libraries that may not be there."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
