"""Learned soups: coefficients by gradient on the held-out loss, with one model in memory.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, appendix I::

    minimise over c and β   mean loss(β · f(x; Σᵢ cᵢ·θᵢ), y)   on held-out examples
    with c = softmax(z), one c for all tensors or one for each ("by layer")

The paper holds all ingredients in memory (its code asks for 490 GB). Here a step mixes from disk
into one live model, takes one backward pass, and streams ⟨∇L, θᵢ⟩ (`learning.slopes`). As each step
reads all ingredients twice, few steps are worth more than cheap ones: `lbfgs` evaluates all
held-out batches at each of some tens of steps; `adamw` is the paper's minibatch way (lr 0.05, 5
epochs).

Every fifth held-out batch, or a split of its own, is not learned from, but validated on. A mixture
becomes the soup only if its loss is lower there, and no higher on what is learned from, than that
of the best before it (`Losses.beats`); the search ends when the validation loss stops falling.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.cluster.choice import refuse_spread
from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.statistics import note_of
from streamsoup.errors import RecipeError, printable
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.options import Options, check_options
from streamsoup.output.make import Order, Soup, digest_beside, order
from streamsoup.recipe import Coefficients
from streamsoup.search.folder import bound_ingredients
from streamsoup.search.learning.journal import LearningJournal
from streamsoup.search.learning.search import LearnedSearch, Losses
from streamsoup.search.learning.settings import DECIDING, LearnedSettings
from streamsoup.search.run import SearchRun
from streamsoup.task import AnyTask, Task, load_task
from streamsoup.task.code import digest_model
from streamsoup.task.loading import place_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LearnedSettings", "LearnedSoup", "learned"]


class LearnedSoup(Soup, frozen=True):
    """A soup whose coefficients were learned."""

    groups: tuple[str, ...] = ()
    """What has coefficients of its own: ``all``, layers, or tensors."""
    rows: tuple[tuple[float, ...], ...] = ()
    """Coefficients ``(group, ingredient)``."""
    beta: float = 1.0
    """The factor of the logits; 1 unless it was learned."""
    evaluations: tuple[Losses, ...] = ()
    """The losses of each mixture that was evaluated, in order; the first is the uniform soup."""
    best: int = 0
    """The number of the evaluation whose mixture was made."""
    report: Mapping[str, Any] = {}
    """All of it as plain JSON; also in the soup's ``streamsoup.json``."""


def learned(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    settings: LearnedSettings = LearnedSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> LearnedSoup:
    """Learn the coefficients of a soup on a task's held-out loss, and write it into a folder.

    Starts from the uniform soup, and never ends with a mixture whose validation loss is higher than
    that one's. Progress is kept in a folder ``OUT.search`` beside the output: the same call, made
    again after a kill, resumes. Buffers are mixed too, but have no slopes.

    Args:
        ingredients: Two checkpoints or more.
        task: A task file, ``module:object`` or an object, with a `loss` (see `streamsoup.task`).
        output: The folder to make.
        model: The live model to learn in; else the task builds one. It is left with the soup in it.
        settings: What to learn, and how.
        options: How to make mixtures and the soup.

    Returns:
        The soup, with its coefficients and the losses of every mixture that was evaluated.

    Raises:
        TaskError: If the task fails, or lacks what is needed.
        MismatchError: If the ingredients do not fit together, or not with the model.
        RecipeError: For settings that contradict each other, and in torch's inference mode.
        ResumeError: If an unfinished search of the same output was about something else.
        OutputError: If the output cannot be written, or exists.

    Cost: reads what differs between ingredients twice for each evaluation (``lbfgs``) or batch
    (``adamw``). Holds the model, one gradient at most (in float32 where the model's floats are
    narrower), and blocks.
    """
    import torch

    check_options(settings, LearnedSettings)
    refuse_spread(options, "learned")
    settings.check()
    if torch.is_inference_mode_enabled():
        raise RecipeError("nothing has a gradient in torch.inference_mode(): learn outside of it")
    opened = open_ingredients(ingredients, options.reading.downloading)
    if len(opened) < 2:
        raise RecipeError("there is nothing to learn with less than two ingredients")
    equal = Linear(Coefficients.uniform(len(opened)))
    ordered = order(opened, equal, method="learned", options=options)
    loaded = load_task(task)
    loaded.need("loss")
    split = loaded.check_split(settings.split)
    if settings.guard is not None and loaded.check_split(settings.guard) == split:
        raise RecipeError(f"the split {printable(split)!r} cannot both learn and validate")
    run = SearchRun(output, opened, restart=settings.restart, options=options)
    bound_to = _bound_to(ordered, loaded, model, settings, split)
    about = [bound_to, ordered.plan.recipe.shard_size]
    identity = digest_bytes(json.dumps(about, sort_keys=True).encode())

    def search(journal: LearningJournal) -> Order:
        found = LearnedSearch(ordered, loaded, model, split, settings, options, journal)
        found.run()
        coefficients = found.parametrisation.coefficients(found.chosen)
        final = order(opened, Linear(coefficients), method="learned", options=options)
        # Averaged statistics need no word here: they were there while this was learned.
        warnings = [each for each in final.warnings if each != note_of(final.plan)]
        return replace(final, report=found.report(identity), warnings=warnings)

    soup = run.soup(
        lambda: LearningJournal(run.target, bound_to, restart=settings.restart),
        identity,
        search,
        model,
    )
    return _from_report(soup)


def _bound_to(
    ordered: Order, task: Task, model: nn.Module | None, settings: LearnedSettings, split: str
) -> dict[str, Any]:
    """Return what the search depends on, as plain JSON."""
    recipe = ordered.plan.recipe
    return {
        "kind": "learned",
        "ingredients": bound_ingredients(ordered.plan.ingredients),
        "task": place_of(task.name),
        "model": "" if model is None else digest_model(model),
        "code": task.fingerprint,
        "side_files": digest_beside(ordered),
        "split": split,
        "dtype": recipe.dtype,
        "non_float": recipe.non_float,
        "non_finite": recipe.non_finite,
        **({"reading": recipe.reading.told} if recipe.reading.told else {}),
    } | {name: getattr(settings, name) for name in DECIDING}


def _from_report(soup: Soup) -> LearnedSoup:
    """Add what the soup's report says."""
    report: Mapping[str, Any] = soup.provenance.report
    evaluations = [
        Losses(*(math.nan if loss is None else loss for loss in losses))
        for losses in report["looks"]
    ]
    return LearnedSoup(
        **msgspec.structs.asdict(soup),
        groups=tuple(report["groups"]),
        rows=tuple(tuple(row) for row in report["rows"]),
        beta=float(report["beta"]),
        evaluations=tuple(evaluations),
        best=int(report["best"]),
        report=report,
    )
