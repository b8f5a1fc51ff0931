"""An average beside the Trainer of Lightning: `LightningAverage`, a callback.

Checkpoints have the layout of Lightning's own ``WeightAveraging``: ``state_dict`` is the average,
so that ``load_from_checkpoint`` opens it, and ``current_model_state`` the model itself, which a run
that resumes goes on with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from streamsoup.errors import MismatchError, some
from streamsoup.training.average import Average, Method
from streamsoup.training.scheduled import ScheduledAverage

__all__ = ["LightningAverage"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two names of the library: classes of one are not those of the other."""


def _callback() -> Any:
    """Return the class of callbacks of the package that is used already, or else is there."""
    used = [name for name in _PACKAGES if name in sys.modules]
    for name in used or _PACKAGES:
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    raise ModuleNotFoundError(
        "LightningAverage needs lightning; pip install 'streamsoup[lightning]'"
    )


def _is_fitting(trainer: Any) -> bool:
    """Return True during a training, its validations included."""
    return str(getattr(trainer.state.fn, "value", "")) == "fit"


class LightningAverage(_callback()):  # type: ignore[misc]
    """Average a module while Lightning trains it.

    The state of the average is part of each checkpoint, so a run that resumes goes on bit for bit.
    Danger: a ``ModelCheckpoint`` with ``save_weights_only`` asks no callback, so its checkpoints
    hold the model itself.
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
            evaluate: Validate with the average during the training, once it has had an update.
            save: Make the average the ``state_dict`` of each checkpoint.
            settings: Of `streamsoup.Average`: `decay`, `window`, `curve`, `n`, `place` and others.

        Raises:
            RecipeError: A setting makes no sense.
        """
        super().__init__()
        self.average = Average(method, **settings)
        self.evaluate, self.save = evaluate, save
        self._scheduled = ScheduledAverage(self.average, every_n_steps, start_step)
        self._loaded: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue the average of the checkpoint from which the run resumes."""
        if self._loaded is not None:
            self._scheduled.load(self._loaded, pl_module)
            self._loaded = None
        elif trainer.global_step == 0:
            self._scheduled.reset(0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step."""
        self._scheduled.after_step(trainer.global_step, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the module; not after the training, and not before."""
        if self.evaluate and _is_fitting(trainer):
            self._scheduled.swap_in(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the module's own values back."""
        self._scheduled.swap_out()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the module's own values back: Lightning may save a checkpoint of what was reached."""
        self._scheduled.swap_out()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average, which Lightning saves in its checkpoints."""
        return self._scheduled.state() if self._loaded is None else dict(self._loaded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the training starts, and the module is there."""
        self._loaded = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Make the average the weights of the checkpoint; the module's own stand beside it."""
        if not (self.save and self.average.ready):
            return
        own, average = checkpoint["state_dict"], self.average.result()
        if missing := [name for name in average if name not in own]:
            raise MismatchError(
                f"{some(missing)}: not in the checkpoint that Lightning saves, so the average "
                "cannot take its place; give save=False"
            )
        checkpoint["current_model_state"] = own
        checkpoint["state_dict"] = {**own, **average}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load the module's own values, where the average had their place."""
        if "current_model_state" in checkpoint and _is_fitting(trainer):
            pl_module.load_state_dict(checkpoint["current_model_state"])
