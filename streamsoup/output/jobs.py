"""Soups made by a formula: by one process, or shared out to several that each make a part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from msgspec.structs import replace

from streamsoup.cluster.choice import refuse_spread
from streamsoup.engine.digest import Digests, digest_bytes
from streamsoup.engine.read import open_reader
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.statistics import check_variances
from streamsoup.engine.stream import run
from streamsoup.errors import (
    OutputBusyError,
    OutputError,
    OutputExistsError,
    RecipeError,
    StreamsoupError,
    count,
    option,
    printable,
    some,
)
from streamsoup.formats.identity import identity_of
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.options import Options, Planned, check_options
from streamsoup.output.destination import check_output
from streamsoup.output.make import Order, Soup, check_spread, plan_order, warned
from streamsoup.output.make import make as make_whole
from streamsoup.output.parts import Part, Parts, SharedPlan, part_folder, share
from streamsoup.output.staging import Staging, move_files
from streamsoup.output.verification import read_provenance
from streamsoup.output.write import FileLedger, FileSink
from streamsoup.recipe import ARITHMETIC, DIGEST, IngredientRecord, Provenance
from streamsoup.system.launchers import parse_part
from streamsoup.system.versions import versions

__all__ = ["commit", "make", "paths_of_parts"]

_BESIDE = ("config", "card")
"""The options that decide the files beside the weights."""


def make(ordered: Order, *, output: str | os.PathLike[str], options: Options) -> Soup:
    """Make a planned soup, or the part of it that `Options.part` names.

    Args:
        ordered: The planned soup.
        output: The folder to make.
        options: The caller's options.

    Raises:
        OutputError: As for `output.make.make`; or the parts that are there are of another soup.
        RecipeError: `Options.part` names no part, or the rule cannot be shared out.

    Returns:
        The soup. If parts are still missing, or it was not to be committed, the output is absent,
        and `Soup.missing` names them.
    """
    if options.part is None:
        if options.commit:
            raise RecipeError(f"{option('commit', True)} is for parts: give {option('part')} too")
        return make_whole(ordered, output=output, options=options)
    if ordered.on_device is not None:
        raise RecipeError(
            f"{option('part')}: parts are made on the CPU; leave out {option('device')}"
        )
    check_spread(ordered, options)
    number, n = parse_part(options.part)
    if options.on_event is not None:
        options.on_event(Planned(ordered))
    target = check_output(
        os.fsdecode(output), ordered.plan.ingredients, overwrite=options.overwrite, resumes=True
    )
    shared = _shared_plan(ordered, n, options)
    try:
        with Parts.begin(target, shared) as parts:
            made = _make_part(ordered, parts, shared, (number, n), options)
    except OSError as error:
        if isinstance(error, StreamsoupError) or error.errno is None:
            raise
        raise OutputError(
            f"{printable(part_folder(target))}: cannot be written: {error.strerror}; finished work "
            "is kept in it; fix that and run the same command to resume"
        ) from error
    if options.commit and not made.missing:
        try:
            return commit(output, options=replace(options, part=None, commit=False))
        except OutputBusyError:
            pass  # another last part is at it
    return made


def commit(
    output: str | os.PathLike[str],
    *,
    ingredients: Iterable[AnyIngredient] | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Put a soup in place of which all parts are made.

    Every leaf is read and compared with its noted digest; one that differs is made again.

    Args:
        output: The folder that the parts were told to make.
        ingredients: The ingredients in the same order; None for the paths that the parts had.
        options: Memory, threads and `overwrite`. What decides bytes is in the parts' plan.

    Returns:
        The soup.

    Raises:
        OutputError: Parts are missing, which are named, or the ingredients are not those of the
            parts.

    Reads the output once, and headers of the ingredients. May be killed and called again.
    """
    check_options(options, Options)
    refuse_spread(options, "commit")
    given = os.fsdecode(output)
    target = os.path.realpath(given)
    parts = Parts.find(target)
    if parts is None:
        raise OutputError(f"{printable(given)}: has no parts to commit; run the parts first")
    with parts:
        there = _in_place(target, parts, options)
        if there is not None and not parts.has_plan():
            parts.remove()
            return Soup(target, there.recipe, there, 0, 0, 0.0, finished=True)
        planned = parts.plan()
        recipe = planned.provenance.recipe
        missing = parts.missing(planned.n_parts)
        if missing and there is None:
            names = some([str(each) for each in missing], 12)
            raise OutputError(
                f"{printable(given)}: {count(len(missing), 'part')} of {planned.n_parts} not made "
                f"yet: {names}; run them, and commit again"
            )
        paths = [each.path for each in planned.ingredients]
        opened = open_ingredients(paths if ingredients is None else ingredients, recipe.reading)
        beside: dict[str, Any] = dict(planned.side_files)
        overwrite = options.overwrite and there is None
        options = replace(options, device="cpu", overwrite=overwrite, **beside)
        ordered = plan_order(opened, recipe, options)
        ordered = replace(ordered, report=planned.provenance.report)
        now = _shared_plan(ordered, planned.n_parts, options)
        differences = planned.differences(now)
        if differences:
            raise OutputError(
                f"{printable(given)}: its parts were made of others: {some(differences, 3)}; "
                f"restore them, or remove {printable(part_folder(target))} and run the parts again"
            )

        def hand_over(staging: Staging) -> None:
            for number in range(1, planned.n_parts + 1):
                for record in parts.notes(number):
                    if "leaves" in record:
                        staging.journal.append(record, wait=False)
            staging.journal.sync()
            with parts.soup() as soup:
                move_files(soup, staging.soup)
                soup.sync_below()
            staging.soup.sync()

        try:
            soup = make_whole(
                ordered,
                output=output,
                options=options,
                fingerprint=f"parts {planned.fingerprint}",
                hand_over=hand_over,
                announce=parts.announce,
            )
        except OutputExistsError:
            if there is None:
                raise
            soup = Soup(target, there.recipe, there, 0, 0, 0.0, finished=True)
        parts.remove()
    return replace(soup, nbytes_read=soup.nbytes_written)


def paths_of_parts(output: str | os.PathLike[str]) -> list[str]:
    """Return the paths of the ingredients that the parts of an output are made of, if any."""
    parts = Parts.find(os.path.realpath(os.fsdecode(output)))
    if parts is None:
        return []
    with parts:
        return [each.path for each in parts.plan().ingredients]


def _make_part(
    ordered: Order, parts: Parts, shared: SharedPlan, part: tuple[int, int], options: Options
) -> Soup:
    """Make one part, and note it as done."""
    started = time.monotonic()
    plan, (number, n) = ordered.plan, part
    leaves = share(plan, ordered.files, number, n)
    warnings = warned(ordered.warnings)
    check_variances(plan, mapped=ordered.mapped, memory=options.memory)
    with (
        parts.soup() as folder,
        Part(parts, number, n) as mine,
        closing(FileSink(plan, ordered.files, folder)) as sink,
    ):
        ledger = FileLedger(plan, sink, mine.journal, Digests(plan))
        sink.join(resumes=ledger.resumes)
        reader = open_reader(plan, ordered.memory, mapped=ordered.mapped)
        run(
            plan,
            ordered.memory,
            reader,
            reducer_of(plan, ordered.memory),
            sink,
            ledger=ledger,
            leaves=leaves,
            on_event=options.on_event,
        )
        ledger.checkpoint()
        folder.sync_below()
        mine.journal.append({"done": len(leaves)})
    tensors = [plan.tensors[leaf.tensor] for leaf in leaves]
    n_units = [leaf.n_units for leaf in leaves]
    read = sum(
        units * tensor.unit_nbytes_in(layout)
        for tensor, units in zip(tensors, n_units, strict=True)
        for layout in plan.layout_of
    )
    written = sum(
        units * tensor.unit_nbytes for tensor, units in zip(tensors, n_units, strict=True)
    )
    return Soup(
        parts.target,
        plan.recipe,
        shared.provenance,
        read,
        written,
        time.monotonic() - started,
        summed_on=ordered.summed_on,
        warnings=tuple(warnings),
        part=part,
        missing=tuple(parts.missing(n)),
    )


def _shared_plan(ordered: Order, n: int, options: Options) -> SharedPlan:
    """Return what the processes that make parts have to agree on."""
    plan, files = ordered.plan, ordered.files
    identities = tuple(identity_of(ingredient, "part") for ingredient in plan.ingredients)
    provenance = Provenance(
        recipe=plan.recipe,
        ingredients=tuple(
            IngredientRecord(ingredient.path, ingredient.nbytes, "")
            for ingredient in plan.ingredients
        ),
        shards=(),
        side_files=(),
        tensors={},
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        arithmetic=ARITHMETIC,
        digest=DIGEST,
        report=ordered.report,
        checksum="",
    )
    shards = tuple((file.name, file.nbytes, digest_bytes(file.header)) for file in files.files)
    return SharedPlan(
        n_parts=n,
        provenance=provenance,
        ingredients=identities,
        shards=shards,
        side_files={name: getattr(options, name) for name in _BESIDE},
    )


def _in_place(target: str, parts: Parts, options: Options) -> Provenance | None:
    """Return the provenance of the output, if a commit that was killed later put it in place."""
    if parts.in_place():
        return read_provenance(target)
    if parts.root.names() or not os.path.isdir(target):
        return None
    if options.overwrite:
        where = printable(parts.root.path)
        raise OutputError(
            f"{where}: is empty: the output is in place, and a commit was killed in its very last "
            "step, or a part was killed in its very first; remove that folder, and if the output "
            "is an older one, run the parts again"
        )
    return read_provenance(target)
