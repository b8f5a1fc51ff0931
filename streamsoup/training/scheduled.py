"""An average that is updated every so many steps: what the callbacks of trainers share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamsoup.errors import RecipeError, printable
from streamsoup.options import take
from streamsoup.system.libc import sync
from streamsoup.training.average import Average

__all__ = ["ScheduledAverage", "load_state", "save_state"]


class ScheduledAverage:
    """An average, when it is updated, and whether a model holds it at the moment."""

    def __init__(self, average: Average, every_n_steps: int, start_step: int) -> None:
        """Check the numbers. Raises `RecipeError`."""
        self.average = average
        self.every_n_steps = take("int", "every_n_steps", every_n_steps)
        self.start_step = take("int", "start_step", start_step)
        if self.every_n_steps < 1:
            raise RecipeError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if self.start_step < 0:
            raise RecipeError(f"start_step must be at least 0, got {start_step}")
        self._last_step = 0
        self._swapped: contextlib.ExitStack | None = None

    @property
    def swapped(self) -> bool:
        """True while a model holds the average."""
        return self._swapped is not None

    def after_step(self, step: int, model: nn.Module) -> None:
        """Update after an optimizer step, if it is one of those; once for each step."""
        if step <= self._last_step:
            return
        self._last_step = step
        since = step - self.start_step
        if since >= 0 and since % self.every_n_steps == 0:
            self.average.update(model)

    def swap_in(self, model: nn.Module) -> None:
        """Put the average into the model, if there is one, until `swap_out`."""
        if self.average.ready and self._swapped is None:
            stack = contextlib.ExitStack()
            stack.enter_context(self.average.swap(model))
            self._swapped = stack

    def swap_out(self) -> None:
        """Put the model's own values back, if it holds the average."""
        swapped, self._swapped = self._swapped, None
        if swapped is not None:
            swapped.close()

    def reset(self, step: int) -> None:
        """Forget all updates, as another training begins, or one goes on without them."""
        self.average.reset()
        self._last_step = step

    def state(self) -> dict[str, Any]:
        """Return the average, and the last step it knows of."""
        return {"average": self.average.state_dict(), "last_step": self._last_step}

    def load(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from what `state` returned. Raises `RecipeError`."""
        if not {"average", "last_step"} <= set(state):
            raise RecipeError("not the state of an average; give what a callback saved")
        self.average.load_state_dict(state["average"], model)
        self._last_step = int(state["last_step"])


def save_state(path: str, state: Mapping[str, Any]) -> None:
    """Write a state to a file, whole or not at all."""
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        sync(file.fileno())
    os.replace(partial, path)


def load_state(path: str) -> dict[str, Any]:
    """Read what `save_state` wrote; no code in it is run. Raises `RecipeError`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of torch's unpickler: any
        raise RecipeError(
            f"{printable(path)}: the state of an average cannot be read: {printable(error)}; "
            "remove it to begin the average anew"
        ) from None
    if not isinstance(state, dict):
        raise RecipeError(f"{printable(path)}: is not the state of an average")
    return state
