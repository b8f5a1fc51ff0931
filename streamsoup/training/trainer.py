"""An average beside the Trainer of transformers: `TrainerAverage`, a callback.

The state of the average is on disk before the Trainer writes a checkpoint of the same step, and is
then moved into it: whatever instant a run is killed at, each checkpoint it can resume from has one.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from typing import Any

from torch import nn

from streamsoup.errors import RecipeError
from streamsoup.formats.memory import unwrapped
from streamsoup.options import Options
from streamsoup.training.average import Average, Method
from streamsoup.training.scheduled import ScheduledAverage, load_state, save_state

try:
    from transformers import TrainerCallback
except ImportError:
    raise ModuleNotFoundError(
        "TrainerAverage needs transformers; pip install 'streamsoup[transformers]'"
    ) from None

__all__ = ["TrainerAverage"]

STATE = "average_state"
"""How the names of files begin that hold the state of an average."""

FOLDER = "average"
"""The folder in a checkpoint that holds the average."""

log = logging.getLogger("streamsoup")


class TrainerAverage(TrainerCallback):  # type: ignore[misc]
    """Average a model while the Trainer of transformers trains it.

    Each ``checkpoint-N`` gets the average in ``average/``, which ``from_pretrained`` opens, and
    what resuming needs in ``average_state.pt``. A run that resumes from it goes on bit for bit.
    """

    def __init__(
        self,
        method: Method = "ema",
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        evaluate: bool = True,
        save: bool = True,
        **settings: Any,
    ) -> None:
        """Set up; nothing is reserved before the first update.

        Args:
            method: As for `streamsoup.Average`.
            every_n_steps: Optimizer steps from one update to the next.
            start_step: The step of the first update; 0 for `every_n_steps`.
            evaluate: Evaluate with the average during the training, once it has had an update.
                Metrics, and the best checkpoint chosen by them, are then those of the average.
            save: Write the average into each checkpoint.
            settings: Of `streamsoup.Average`: `decay`, `window`, `curve`, `n`, `place` and others.

        Raises:
            RecipeError: A setting makes no sense.
        """
        self.average = Average(method, **settings)
        self.evaluate, self.save = evaluate, save
        self._scheduled = ScheduledAverage(self.average, every_n_steps, start_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Continue the average of the checkpoint from which the run resumes."""
        self._scheduled.swap_out()
        step, model = state.global_step, more["model"]
        self._scheduled.reset(step)
        if step == 0:
            return
        folder = _checkpoint(args, step)
        name = _state_name(model)
        there = [os.path.join(folder, f"{name}.pt"), _early(args, step, name)]
        path = next((each for each in there if os.path.exists(each)), None)
        if path is None:
            log.warning(
                "%s: holds no state of an average, so the average begins anew at step %d",
                folder,
                step,
            )
            return
        self._scheduled.load(load_state(path), model)
        # Killed between the checkpoint and the average in it.
        if os.path.isdir(folder) and not os.path.isdir(os.path.join(folder, FOLDER)):
            self._save(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Update; then get ready for an evaluation and a checkpoint that come next."""
        self._scheduled.after_step(state.global_step, more["model"])
        self._before(args, state, control, more["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Get ready for an evaluation and a checkpoint at the end of an epoch."""
        self._before(args, state, control, more["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Put the model's own values back."""
        metrics = more.get("metrics") or {}
        if self._scheduled.swapped and "eval_runtime" not in metrics:
            raise RecipeError(
                "evaluating with the average works with one evaluation data set, and the Trainer "
                "has several; give evaluate=False"
            )
        self._scheduled.swap_out()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Complete the checkpoint that the Trainer wrote: the average, and its state."""
        folder = _checkpoint(args, state.global_step)
        if not os.path.isdir(folder):
            log.warning("%s: is not there, so the average is not saved in it", folder)
            return
        name = _state_name(more["model"])
        early = _early(args, state.global_step, name)
        if _takes_part(args, more["model"]):
            if not os.path.exists(early):  # not known before, as for the best checkpoint
                save_state(early, self._scheduled.state())
            os.replace(early, os.path.join(folder, f"{name}.pt"))
        self._save(args, state, more["model"])

    def _before(self, args: Any, state: Any, control: Any, model: nn.Module) -> None:
        if control.should_save and _takes_part(args, model):
            path = _early(args, state.global_step, _state_name(model))
            os.makedirs(args.output_dir, exist_ok=True)
            save_state(path, self._scheduled.state())
        if control.should_evaluate and self.evaluate:
            self._scheduled.swap_in(model)

    def _save(self, args: Any, state: Any, model: nn.Module) -> None:
        """Write the average into the checkpoint; in all processes where each has a part."""
        if not (self.save and self.average.ready and _takes_part(args, model)):
            return
        target = os.path.join(_checkpoint(args, state.global_step), FOLDER)
        if hasattr(unwrapped(model), "peft_config"):
            self._save_adapter(target, unwrapped(model))
        else:
            self.average.save(target, model, options=Options(overwrite=True))

    def _save_adapter(self, target: str, model: Any) -> None:
        """Write an adapter of PEFT as it writes them itself."""
        partial, old = f"{target}.partial", f"{target}.old"
        for left in (partial, old):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        model.save_pretrained(partial, state_dict=self.average.result())
        with suppress(FileNotFoundError):
            os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)


def _checkpoint(args: Any, step: int) -> str:
    """Return the folder of a checkpoint."""
    return os.path.join(args.output_dir, f"checkpoint-{step}")


def _early(args: Any, step: int, name: str) -> str:
    """Return where a state lies until its checkpoint is complete."""
    return os.path.join(args.output_dir, f"{name}-{step}.pt")


def _is_sharded(model: nn.Module) -> bool:
    return any(type(each).__name__ == "DTensor" for each in model.parameters())


def _state_name(model: nn.Module) -> str:
    """Return the name of the state: where each process has a part, one for each."""
    if not _is_sharded(model):
        return STATE
    import torch.distributed as dist

    return f"{STATE}_rank{dist.get_rank()}"


def _takes_part(args: Any, model: nn.Module) -> bool:
    return bool(args.should_save) or _is_sharded(model)
