"""The settings of a learned search."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from streamsoup.errors import RecipeError, check_choice
from streamsoup.options import settle
from streamsoup.search.learning.parametrisation import Constraint, Granularity

__all__ = ["DECIDING", "LearnedSettings"]


class LearnedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What to learn, and how."""

    granularity: Granularity = "global"
    """One coefficient for each ingredient, or one in each ``layer``, or in each ``tensor``."""
    constraint: Constraint = "softmax"
    """``softmax``: positive, sum 1; ``affine``: sum 1; ``free``: any."""
    temperature: bool = False
    """Learn a factor β of the logits too, as the paper does. The soup's files do not hold it."""
    optimizer: Literal["lbfgs", "adamw"] = "lbfgs"
    """All batches at each step and few steps, or the paper's minibatch way."""
    evaluations: int = 40
    """Most evaluations, each of all batches, for ``lbfgs``."""
    tolerance: float = 1e-5
    """Relative gain of two steps in a row below which ``lbfgs`` ends."""
    epochs: int = 5
    """Passes over all batches, for ``adamw``."""
    lr: float = 0.05
    """Learning rate of ``adamw``."""
    patience: int = 6
    """Evaluations (epochs, for ``adamw``) without a lower validation loss that end the search."""
    split: str | None = None
    """The split to learn on; None for the first of the task."""
    guard: str | None = None
    """A split to validate on; None for a part of the first one."""
    guard_every: int = 5
    """Without `guard`, hold out every n-th batch for validation; 0 disables it."""
    restart: bool = False
    """Forget an unfinished search of the same output."""

    def __post_init__(self) -> None:
        """Convert numbers of other libraries to Python's. Raises `RecipeError`."""
        settle(self)

    def check(self) -> None:
        """Raise `RecipeError` for settings that contradict each other."""
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("constraint", self.constraint, get_args(Constraint))
        check_choice("optimizer", self.optimizer, ("lbfgs", "adamw"))
        for name in ("evaluations", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.guard_every < 0 or self.guard_every == 1:
            raise RecipeError("guard_every is 0 for none, or 2 and more: some batches must learn")
        if not (self.lr > 0 and math.isfinite(self.lr)) or not self.tolerance >= 0:
            raise RecipeError(f"lr {self.lr} must be above 0, tolerance {self.tolerance} 0 or more")


DECIDING = (
    "granularity",
    "constraint",
    "temperature",
    "optimizer",
    "evaluations",
    "tolerance",
    "epochs",
    "lr",
    "patience",
    "guard",
    "guard_every",
)
"""The settings that decide what is found."""
