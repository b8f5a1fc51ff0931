"""A run of Lightning with an average, which may kill itself: see the test.

Run as ``python lightning_run.py FOLDER KILL_AT METHOD``; with KILL_AT 0 it runs to its end. It
resumes from ``last.ckpt`` in the folder, if there is one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

from streamsoup.training import LightningAverage

SETTINGS: dict[str, dict[str, Any]] = {
    "ema": {"method": "ema", "decay": 0.5},
    "lawa": {"method": "lawa", "window": 3, "every_n_steps": 2},
    "wsm": {"method": "wsm", "n": 12, "curve": "cosine"},
}


class Module(pl.LightningModule):
    """Two layers with BatchNorm; keeps its state after each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], i: int) -> Tensor:
        """Return the loss of a batch."""
        return ((self.layers(batch[0]) - batch[0].sum(1, keepdim=True)) ** 2).mean()

    def validation_step(self, batch: list[Tensor], i: int) -> None:
        """Log the loss of a batch."""
        loss = self.training_step(batch, i)
        self.losses.append(float(loss))
        self.log("val_loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum, whose state matters to a run that resumes."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Killer(pl.Callback):
    """Kills the process after the training of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *more: Any) -> None:
        """Kill."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def loader(seed: int) -> Any:
    """Return four batches of random numbers, the same each time."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def trainer(folder: Path, callbacks: list[Any], **more: Any) -> pl.Trainer:
    """Return a run of three epochs of four steps, with a checkpoint after each."""
    saving = pl.callbacks.ModelCheckpoint(
        dirpath=str(folder / "checkpoints"),
        filename="{epoch}-{step}-{val_loss:.4f}",
        monitor="val_loss",
        save_top_k=-1,
        save_last=True,
    )
    arguments: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [saving, *callbacks],
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**(arguments | more))


def main(folder: Path, kill_at: int, method: str) -> None:
    """Train, from the last checkpoint on; save the average of the end."""
    average, module = LightningAverage(**SETTINGS[method]), Module()
    last = folder / "checkpoints" / "last.ckpt"
    running = trainer(folder, [average, Killer(kill_at)])
    running.fit(module, loader(0), loader(1), ckpt_path=str(last) if last.exists() else None)
    end = {"average": average.average.result(), "model": module.state_dict()}
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
