"""A run of the Trainer of transformers with an average, which may kill itself: see the test.

Run as ``python trainer_run.py FOLDER KILL_AT MOMENT METHOD``; with KILL_AT 0 it runs to its end.
It resumes from the last checkpoint in the folder, if there is one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from streamsoup.training import TrainerAverage

SETTINGS: dict[str, dict[str, Any]] = {
    "ema": {"method": "ema", "decay": 0.5},
    "lawa": {"method": "lawa", "window": 3},
    "wsm": {"method": "wsm", "n": 8, "curve": "cosine"},
}


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens, the same each time."""

    def __init__(self, n: int, seed: int) -> None:
        self.tokens = torch.randint(0, 30, (n, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def network() -> GPT2LMHeadModel:
    """Return a small GPT-2, whose head is tied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


class Killer(TrainerCallback):  # type: ignore[misc]
    """Kills the process at a step, before or after the Trainer wrote its checkpoint."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def _at(self, moment: str, state: Any) -> None:
        if state.global_step == self.step and self.moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Kill between checkpoints."""
        self._at("step", state)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Kill when the checkpoint is complete, and the average not yet in it."""
        self._at("save", state)


def trainer(
    folder: Path, callbacks: list[Any], *, model: Any = None, evaluate: bool = True, **more: Any
) -> Trainer:
    """Return a run of eight steps on the CPU, with a checkpoint at every other one."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_steps": 2,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return Trainer(
        model=network() if model is None else model,
        args=TrainingArguments(**(arguments | more)),
        train_dataset=Tokens(64, 0),
        eval_dataset=Tokens(8, 1),
        callbacks=callbacks,
    )


def main(folder: Path, kill_at: int, moment: str, method: str) -> None:
    """Train, from the last checkpoint on; save the average of the end."""
    average = TrainerAverage(**SETTINGS[method])
    running = trainer(folder, [Killer(kill_at, moment), average])
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    running.train(resume_from_checkpoint=last)
    torch.save(average.average.result(), folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
