"""The straight line between two checkpoints: what is on it, where it is best, what is in the way.

From a base to a fine-tuned model it is the sweep of WiSE-FT: Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903. α is chosen on validation, and judged on the other splits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from streamsoup.errors import RecipeError
from streamsoup.formats.ingredients import AnyIngredient
from streamsoup.options import Options, take
from streamsoup.search.trials import best_first
from streamsoup.study.comparison.table import splits_of
from streamsoup.study.measures.barriers import Barrier, advantage, barrier
from streamsoup.study.measures.bench import Bench
from streamsoup.study.measures.cache import Cache
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.rows import Splits, to_line
from streamsoup.task import AnyTask, load_task

__all__ = ["Sweep", "wise_ft"]


class Sweep(msgspec.Struct, frozen=True):
    """One path, measured."""

    ends: tuple[str, str]
    """Paths of the checkpoints at α = 0 and α = 1."""
    splits: Splits
    metric: str
    alphas: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]
    """The number that counts, for each split; larger is better."""
    losses: Mapping[str, tuple[float, ...]]
    """Negative log-likelihood in nats, for each split, where the task predicts."""
    n_measured: int = 0
    is_share: bool = False
    """True if values lie between 0 and 1 and are shown in percent, as the task said."""

    @property
    def best(self) -> float:
        """The α that is best on validation; the smallest of equals."""
        return self.alphas[best_first(self.values[self.splits.val])[0]]

    def barrier(self, split: str, *, of_loss: bool = False) -> Barrier | None:
        """Measure the barrier of the error (or loss) on a split; None without both ends.

        Where the value is not a share, its negative stands for the error.
        """
        errors = self.losses[split] if of_loss else [-value for value in self.values[split]]
        if 0.0 not in self.alphas or 1.0 not in self.alphas:
            return None
        return barrier(self.alphas, errors)

    def advantage(self, split: str) -> float:
        """Return the interpolation advantage; NaN without α = 0, ½ and 1."""
        at = dict(zip(self.alphas, self.values[split], strict=True))
        if not {0.0, 0.5, 1.0} <= set(at):
            return math.nan
        return advantage(at[0.0], at[0.5], at[1.0])

    def to_lines(self) -> Iterator[str]:
        """Return a JSON line for each α and split, after one that sums up."""
        head = {
            "kind": "sweep",
            "ends": self.ends,
            "metric": self.metric,
            "best_alpha": self.best,
            "chosen_on": self.splits.val,
        }
        yield to_line(head)
        for split in self.splits.all:
            found = self.barrier(split)
            if found is not None:
                gain = self.advantage(split)
                yield to_line(
                    {
                        "kind": "barrier",
                        "split": split,
                        "over_mean_of_ends": found.over_mean,
                        "over_chord": found.over_chord,
                        "at_alpha": found.alpha,
                        "advantage": gain,
                    }
                )
            for n, alpha in enumerate(self.alphas):
                line = {"kind": "point", "split": split, "alpha": alpha}
                line["value"] = self.values[split][n]
                if split in self.losses:
                    line["nll"] = self.losses[split][n]
                yield to_line(line)


def wise_ft(
    first: AnyIngredient,
    second: AnyIngredient,
    task: AnyTask,
    alphas: Iterable[float],
    *,
    cache: str | os.PathLike[str],
    model: object = None,
    recalibrate: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Sweep:
    """Measure (1−α)·first + α·second on every split of `task`, for every α.

    Args:
        first: The checkpoint at α = 0.
        second: The checkpoint at α = 1.
        task: A task object, or the path or name of one.
        alphas: Finite numbers, in any order; below 0 and above 1 they extrapolate.
        cache: Folder for the answers: a killed sweep resumes, and α added later cost only
            themselves.
        model: The live model to measure in; None asks the task for one.
        recalibrate: Measure BatchNorm statistics anew for every mixture.
        options: Memory, threads, device, and the way of reading.

    Returns:
        Values and losses for each split and α, sorted by α, and the best α on validation.

    Raises:
        RecipeError: There is no α, or one is not finite.
        TaskError: The task fails, or lacks what is asked of it.
        MismatchError: The checkpoints, or the model, do not fit each other.

    Costs a pass over both checkpoints for each α and split, and one of the task; holds one model.
    """
    at = tuple(sorted({take("float", "alphas", alpha) for alpha in alphas}))
    if not at or not all(map(math.isfinite, at)):
        raise RecipeError("a sweep needs some finite α")
    loaded = load_task(task)
    splits = splits_of(loaded)
    values: dict[str, list[float]] = {split: [] for split in splits.all}
    losses: dict[str, list[float]] = {split: [] for split in splits.all}
    with Cache(os.fspath(cache)) as answers:
        bench = Bench(
            [first, second],
            loaded,
            answers,
            recalibrate=recalibrate,
            model=model,
            options=options,
        )
        try:
            bench.expect(len(at) * len(splits.all) + 2)
            bench.settle_metric([Mixture.uniform([0]), Mixture.uniform([1])], splits.val)
            for alpha in at:
                mixture = Mixture.of((0, 1), (1.0 - alpha, alpha))
                for split in splits.all:
                    value, loss = bench.point(mixture, split)
                    values[split].append(value)
                    if bench.predicts:
                        losses[split].append(loss)
            bench.expect(0)
        finally:
            bench.close()
        ends = bench.plan.recipe.ingredients
        return Sweep(
            (ends[0], ends[1]),
            splits,
            bench.metric,
            at,
            {split: tuple(each) for split, each in values.items()},
            {split: tuple(each) for split, each in losses.items() if each},
            bench.n_measured,
            bench.is_share and all(0 <= v <= 1 for each in values.values() for v in each),
        )
