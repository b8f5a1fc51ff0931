"""Learned soups: coefficients by gradient on the held-out loss, with one model in memory.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, appendix I::

    minimise over c and β   mean loss(β · f(x; Σᵢ cᵢ·θᵢ), y)   on held-out examples
    with c = softmax(z), one c for all tensors or one for each ("by layer")

The paper holds all ingredients in memory (its code asks for 490 GB). Here a step mixes from disk
into one live model, takes one backward pass, and streams ⟨∇L, θᵢ⟩ (`slopes`, `backward`). As each
step reads all ingredients twice, few steps are worth more than cheap ones: `lbfgs` looks at all
held-out batches at each of some tens of steps; `adamw` is the paper's minibatch way (lr 0.05, 5
epochs).

Every fifth held-out batch, or a split of its own, is not learned from: it watches. A mixture
becomes the soup only if its loss is lower there, and no higher on what is learned from, than that
of the best before it (`Look.beats`); the search ends when the watched loss has stopped falling.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.statistics import note_of
from streamsoup.errors import OutputExistsError, RecipeError, printable
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.live.mix import put_into
from streamsoup.options import Options, check_options
from streamsoup.output.destination import check_output
from streamsoup.output.make import Soup, digest_beside, make, order
from streamsoup.output.verification import read_provenance
from streamsoup.recipe import Coefficients
from streamsoup.search.folder import bound_ingredients
from streamsoup.search.learning.descending import SETTINGS, LearningOptions, Look, Search
from streamsoup.search.learning.notebook import Notebook
from streamsoup.task import AnyTask, Task, load_task
from streamsoup.task.code import digest_model
from streamsoup.task.loading import place_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from streamsoup.output.make import Order

__all__ = ["LearnedSoup", "learned_soup"]


class LearnedSoup(Soup, frozen=True):
    """A soup whose coefficients were learned."""

    groups: tuple[str, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    """Coefficients ``(group, ingredient)``."""
    beta: float = 1.0
    """The factor of the logits; 1 unless it was learned."""
    looks: tuple[Look, ...] = ()
    """In order; the first is the uniform soup."""
    best: int = 0
    """The look whose mixture was made."""
    report: Mapping[str, Any] = {}


def learned_soup(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    learning: LearningOptions = LearningOptions(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> LearnedSoup:
    """Learn the coefficients of a soup on a task's held-out loss, and write it into `output`.

    `task` has a `loss` (see `streamsoup.task`); `model` is the live model to learn in, else the
    task builds one; it is left with the soup in it. Starts from the uniform soup, and never ends
    with a mixture whose watched loss is higher than that one's. Progress is kept in a folder
    ``OUT.search`` beside the output: the same call, made again after a kill, goes on from there.

    Holds the model, one gradient at most (in float32 where the model's floats are narrower), and
    blocks; reads what differs between ingredients twice for each look (``lbfgs``) or each batch
    (``adamw``). Buffers are mixed too, but have no slopes. Raises `TaskError` if the task fails,
    `MismatchError` if the model does not fit, `RecipeError` in torch's inference mode, and the
    errors of `make`.
    """
    import torch

    check_options(learning, LearningOptions)
    learning.check()
    if torch.is_inference_mode_enabled():
        raise RecipeError("nothing has a gradient in torch.inference_mode(): learn outside of it")
    opened = open_ingredients(ingredients)
    if len(opened) < 2:
        raise RecipeError("there is nothing to learn with less than two ingredients")
    equal = Coefficients.uniform(len(opened))
    ordered = order(opened, Linear(equal), method="learned", options=options)
    loaded = load_task(task)
    loaded.need("loss")
    split = loaded.check_split(learning.split)
    if learning.guard is not None and loaded.check_split(learning.guard) == split:
        raise RecipeError(f"the split {printable(split)!r} cannot both learn and watch")
    target = os.path.realpath(os.fsdecode(output))
    resumed = os.path.lexists(target + ".search") and not learning.restart
    if not resumed:
        check_output(os.fsdecode(output), opened, overwrite=options.overwrite, resumes=False)
    bound_to = _bound_to(ordered, loaded, model, learning, split)
    about = [bound_to, ordered.plan.recipe.shard_size]
    identity = digest_bytes(json.dumps(about, sort_keys=True).encode())
    with Notebook(target, bound_to, restart=learning.restart) as notebook:
        known = _known(target, identity, notebook) if resumed else None
        if known is not None:
            put_into(model, known, options)
            notebook.finish()
            return known
        check_output(os.fsdecode(output), opened, overwrite=options.overwrite, resumes=resumed)
        search = Search(ordered, loaded, model, split, learning, options, notebook)
        search.run()
        report = search.report(identity)
        coefficients = search.mixture.coefficients(search.chosen)
        final = order(opened, Linear(coefficients), method="learned", options=options)
        # Averaged statistics need no word here: they were there while this was learned.
        warnings = [each for each in final.warnings if each != note_of(final.plan)]
        final = replace(final, warnings=warnings)
        try:
            soup = make(replace(final, report=report), output=output, options=options)
        except OutputExistsError:
            # Where a kill came as `make` tidied up, only the soup itself says whose it is.
            known = _known(target, identity, notebook) if resumed else None
            if known is None:
                raise
            soup = known
        put_into(model, soup, options)
        notebook.finish()
    return soup if isinstance(soup, LearnedSoup) else _described(soup)


def _bound_to(
    ordered: Order, task: Task, model: nn.Module | None, learning: LearningOptions, split: str
) -> dict[str, Any]:
    """Say what the search depends on: not a look of it is of use for anything else."""
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
    } | {name: getattr(learning, name) for name in SETTINGS}


def _known(target: str, identity: str, notebook: Notebook) -> LearnedSoup | None:
    """Give the soup that an earlier run of this very search had put in place."""
    started = time.monotonic()
    if os.path.lexists(target + ".partial"):
        return None  # `make` knows more
    try:
        provenance = read_provenance(target)
    except RecipeError:
        return None
    # One search of these very things may have been over long ago, and another be under way.
    report = provenance.report
    if report.get("search") != identity or not notebook.is_of(report.get("run")):
        return None
    elapsed_s = time.monotonic() - started
    return _described(Soup(target, provenance.recipe, provenance, 0, 0, elapsed_s, finished=True))


def _described(soup: Soup) -> LearnedSoup:
    """Add what its report says."""
    report: Mapping[str, Any] = soup.provenance.report
    looks = [Look(*(math.nan if x is None else x for x in look)) for look in report["looks"]]
    return LearnedSoup(
        **msgspec.structs.asdict(soup),
        groups=tuple(report["groups"]),
        rows=tuple(tuple(row) for row in report["rows"]),
        beta=float(report["beta"]),
        looks=tuple(looks),
        best=int(report["best"]),
        report=report,
    )
