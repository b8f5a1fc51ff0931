"""What a checkpoint holds and what a soup would take, from headers alone: the verbs that only look.

Each verb returns one record. The command line prints it in words or, with ``--json``, as it is.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable

import msgspec

from streamsoup.engine.read import mapped_nbytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.options import Options
from streamsoup.output.card import CARD_NAME
from streamsoup.output.coefficients import AnyRule, find_rule, for_adapters
from streamsoup.output.make import Order, order
from streamsoup.recipe import Coefficients, rule_name
from streamsoup.rule import usual_passes

__all__ = ["CheckpointRecord", "PlanRecord", "TensorRecord", "inspect", "plan", "record_of"]


class TensorRecord(msgspec.Struct, frozen=True):
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int


class CheckpointRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a checkpoint holds."""

    checkpoint: str
    """Its path as it was given."""
    files: tuple[str, ...]
    n_tensors: int
    n_parameters: int
    dtypes: dict[str, int]
    """Elements by dtype, the most common first."""
    nbytes: int
    """Bytes of all tensors together."""
    tensors: dict[str, TensorRecord] = {}
    """By name, where they were asked for."""
    notes: tuple[str, ...] = ()
    """What is worth a warning about how it is read."""


class PlanRecord(msgspec.Struct, frozen=True):
    """What a soup would read, write and hold."""

    ingredients: tuple[str, ...]
    n_tensors: int
    operations: dict[str, int]
    """Tensors by what becomes of them: ``mix`` averaged, ``same`` copied if equal, ``first`` copied
    from the first, ``code`` parts of quantised weights copied if equal."""
    nbytes_read: int
    """Bytes of weights that one pass reads."""
    n_passes: int
    """Passes at most: rules that take statistics measure before they make."""
    usual_passes: int
    """Passes that such a soup usually takes."""
    nbytes_written: int
    files: dict[str, int]
    """Bytes of each shard, by name."""
    side_files: tuple[str, ...]
    peak_nbytes: int
    """Upper bound of the anonymous memory of the process."""
    mapped_nbytes: int
    """Bytes of mapped files besides, which the system can take back."""
    running_sum_nbytes: int
    """More, where a search keeps a running sum."""
    threads: int
    device: str
    summed_on: str
    """On which device the sums would be made, and why there."""
    device_nbytes: int
    pinned_nbytes: int
    io: str
    free_nbytes: int
    """Bytes that are free on the disk of the current folder."""
    warnings: tuple[str, ...]


def inspect(
    checkpoint: AnyIngredient,
    *,
    tensors: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> CheckpointRecord:
    """Return what a checkpoint holds, from its headers alone.

    Args:
        checkpoint: A path, a state dict, a module or an open ingredient.
        tensors: Whether to list every tensor.
        options: How its files are read; other options are not used.

    Raises:
        FormatError: It is damaged, or of a format that is not read; the message names the file.

    Reads headers and the index, no weight.
    """
    (ingredient,) = open_ingredients([checkpoint], options.reading)
    layout, paths = ingredient.layout, ingredient.source.files
    root = ingredient.folder if paths else None  # that of a remote one would be downloaded
    files = tuple(os.path.relpath(path, root) if root else os.path.basename(path) for path in paths)
    mirrored = len(files) == len(ingredient.file_names)
    homes = files if mirrored else tuple(ingredient.file_names)
    dtypes: Counter[str] = Counter()
    for _, spec in layout.places.values():
        dtypes[spec.dtype.name] += spec.n_elements
    listed = {
        name: TensorRecord(spec.dtype.name, spec.shape, homes[number], spec.nbytes)
        for name, (number, spec) in layout.places.items()
    }
    return CheckpointRecord(
        checkpoint=ingredient.name,
        files=files or homes,
        n_tensors=len(layout.places),
        n_parameters=layout.n_parameters,
        dtypes=dict(dtypes.most_common()),
        nbytes=layout.nbytes,
        tensors=listed if tensors else {},
        notes=tuple(ingredient.source.notes),
    )


def plan(
    ingredients: Iterable[AnyIngredient],
    rule: AnyRule | None = None,
    *,
    options: Options = Options(),  # noqa: B008 - frozen
) -> PlanRecord:
    """Return what a soup would take, without making it.

    Args:
        ingredients: As for `uniform`.
        rule: Coefficients, a soup that has some, or any rule; None for the mean.
        options: As for every verb.

    Raises:
        StreamsoupError: Whatever the soup would be refused for before a weight is read.

    Reads headers, configurations and tokenizers, no weight.
    """
    opened = open_ingredients(ingredients, options.reading)
    chosen = find_rule(Coefficients.uniform(len(opened)) if rule is None else rule)
    method = "uniform" if rule is None else rule_name(chosen)
    if isinstance(chosen, Linear):
        opened, coefficients, options = for_adapters(opened, chosen.coefficients, options)
        chosen = Linear(coefficients)
    return record_of(order(opened, chosen, method=method, options=options))


def record_of(ordered: Order, n_before: int = 0) -> PlanRecord:
    """Return the record of a soup that was planned, with `n_before` passes before its rule's."""
    made, memory = ordered.plan, ordered.memory
    on_device = ordered.on_device.plan if ordered.on_device is not None else None
    cards = [CARD_NAME] if ordered.card else []
    return PlanRecord(
        ingredients=tuple(each.name for each in made.ingredients),
        n_tensors=len(made.tensors),
        operations=dict(Counter(tensor.operation for tensor in made.tensors)),
        nbytes_read=made.nbytes_read,
        n_passes=n_before + made.recipe.rule.n_passes,
        usual_passes=n_before + usual_passes(made.recipe.rule),
        nbytes_written=sum(file.nbytes for file in ordered.files.files),
        files={file.name: file.nbytes for file in ordered.files.files},
        side_files=(*(file.name for file in ordered.side_files), *cards),
        peak_nbytes=memory.peak_nbytes,
        mapped_nbytes=mapped_nbytes(made, memory, mapped=ordered.mapped),
        running_sum_nbytes=made.nbytes_summed,
        threads=memory.threads,
        device=str(on_device.device) if on_device is not None else "cpu",
        summed_on=ordered.summed_on,
        device_nbytes=on_device.device_nbytes if on_device is not None else 0,
        pinned_nbytes=on_device.pinned_nbytes if on_device is not None else 0,
        io="mmap" if ordered.mapped else "read",
        free_nbytes=shutil.disk_usage(os.curdir).free,
        warnings=tuple(ordered.warnings),
    )
