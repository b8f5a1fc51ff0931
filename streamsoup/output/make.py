"""From a recipe to a finished checkpoint: the one function that writes every soup."""

from __future__ import annotations

import errno
import json
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import msgspec
import xxhash

from streamsoup.cluster.choice import asked_for, executing, is_spread
from streamsoup.cluster.units import refuse_whole_model
from streamsoup.engine.budget import MemoryPlan, memory_budget, plan_memory
from streamsoup.engine.digest import Digests, digest_bytes
from streamsoup.engine.plan import FilePlan, MixPlan, plan_files, plan_mix
from streamsoup.engine.read import open_reader, will_map
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.engine.statistics import check_variances, note_of
from streamsoup.engine.stream import Read, run
from streamsoup.errors import (
    FormatError,
    Message,
    OutputError,
    OutputExistsError,
    RecipeError,
    StreamsoupError,
    option,
    printable,
    some,
)
from streamsoup.formats.identity import identity_of
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, open_ingredients
from streamsoup.formats.layout import name_in_file
from streamsoup.formats.meaning import check_meaning, check_quantised
from streamsoup.formats.side_files import SideFile, gather_side_files, pieces
from streamsoup.options import Options, Planned, check_options
from streamsoup.output import doubts
from streamsoup.output.card import CARD_NAME, make_card
from streamsoup.output.destination import check_output
from streamsoup.output.staging import Staging
from streamsoup.output.verification import read_provenance
from streamsoup.output.write import FileLedger, FileSink, write_file
from streamsoup.recipe import (
    ARITHMETIC,
    DIGEST,
    PROVENANCE_LIMIT,
    PROVENANCE_NAME,
    FileRecord,
    IngredientRecord,
    Provenance,
    Recipe,
)
from streamsoup.rule import Rule
from streamsoup.sizes import parse_nbytes
from streamsoup.system.folders import Folder
from streamsoup.system.regular import read_file
from streamsoup.system.versions import versions
from streamsoup.tensors import float_dtype

if TYPE_CHECKING:
    from streamsoup.engine.device import OnDevice

__all__ = ["Order", "Soup", "check_spread", "make", "order", "plan_order", "warned", "write_beside"]

log = logging.getLogger("streamsoup")

_SPREAD = "cpu, of the processes of a cluster"


class Soup(msgspec.Struct, frozen=True):
    """A checkpoint that was made, and how."""

    path: str
    """The folder that holds it."""
    recipe: Recipe
    provenance: Provenance
    nbytes_read: int
    """Bytes of weights read for it in all passes, of what earlier runs made in one; 0 if it was
    finished before."""
    nbytes_written: int
    elapsed_s: float
    finished: bool = False
    """True if an earlier run had finished it, except for the last step."""
    summed_on: str = ""
    """The device that made its sums, and why; empty if an earlier run had made them."""
    warnings: tuple[str, ...] = ()
    """All warnings about it, a line each; logged, too."""
    n_passes: int = 1
    """Passes over the ingredients that `nbytes_read` and `elapsed_s` are of: those over the tensor
    that took most."""
    part: tuple[int, int] | None = None
    """The number of the part that was made, from 1 on, and the number of parts; None for all."""
    missing: tuple[int, ...] = ()
    """Parts that are not made yet: until all are, and committed, there is no output."""

    def __repr__(self) -> str:
        """Return a one-line summary: a provenance is too long for a notebook or the REPL."""
        n = len(self.recipe.ingredients)
        return f"<{type(self).__name__}: {self.recipe.method} of {n} in {self.path!r}>"


class Order(msgspec.Struct, frozen=True):
    """A soup planned to the last byte: all that can be known before a weight is read."""

    plan: MixPlan
    files: FilePlan
    memory: MemoryPlan
    mapped: bool
    """True if ingredients are mapped, False if they are read."""
    side_files: list[SideFile]
    warnings: list[str]
    report: Mapping[str, object] = {}
    """How a search found the coefficients; becomes part of the provenance."""
    card: bool = True
    """Write a model card, made of the plan and the report."""
    on_device: OnDevice | None = None
    """The accelerator that makes the sums, and what it will hold; None for the CPU."""
    summed_on: str = "cpu"
    """The device that makes the sums, and why."""


def order(
    ingredients: Iterable[AnyIngredient],
    rule: Rule,
    *,
    method: str,
    options: Options,
) -> Order:
    """Open the ingredients by their headers, and plan the soup. Reads no weight, writes nothing.

    Args:
        ingredients: Paths, state dicts, modules or open ingredients, in the order of the sum.
        rule: How the averaged tensors are made.
        method: Label of how the rule was chosen.
        options: The caller's options.

    Raises:
        StreamsoupError: Everything that headers show: `FormatError`, `MismatchError`,
            `RecipeError`, `BudgetError`, `DeviceError`.
    """
    check_options(options, Options)
    opened = open_ingredients(ingredients, options.reading)
    size = options.shard_size
    recipe = Recipe(
        ingredients=tuple(ingredient.name for ingredient in opened),
        rule=rule,
        method=method,
        dtype="same" if options.dtype == "same" else float_dtype(options.dtype).name,
        non_float=options.non_float,
        non_finite=options.non_finite,
        shard_size=None if size is None else parse_nbytes(size),
        reading=options.reading.recorded,
    )
    return plan_order(opened, recipe, options)


def plan_order(opened: Sequence[Ingredient], recipe: Recipe, options: Options) -> Order:
    """Plan a given recipe for open ingredients. See `order`."""
    plan = plan_mix(opened, recipe)
    mapped = will_map(opened, options.io)
    on_device = None
    why = "no device was asked for" if options.device == "auto" else "told"
    summed_on = f"cpu, as {why}"
    if options.device not in ("auto", "cpu"):
        from streamsoup.engine.device import find_device

        on_device = find_device(plan, options, mapped=mapped)
        memory = on_device.plan.memory
        summed_on = f"{on_device.device.name}, as told"
    else:
        memory = plan_memory(
            plan,
            mapped=mapped,
            threads=options.n_threads,
            budget=memory_budget(plan, options.memory),
        )
    dtype = None if recipe.dtype == "same" else float_dtype(recipe.dtype)
    check_quantised(opened, recipe.reading)
    check_meaning(opened, config=options.config, reading=recipe.reading)
    side_files, warnings = gather_side_files(opened, dtype, recipe.reading)
    warnings += doubts.before(plan)
    mixed = plan.reduced
    stored = [(t, [layout.places[t.name][1].dtype.nbits for layout in plan.layouts]) for t in mixed]
    narrowed = [tensor for tensor, nbits in stored if max(nbits) > tensor.dtype.nbits]
    if 0 < len(narrowed) < len(mixed):
        warnings.append(
            f"{option('dtype')} makes {some([t.name for t in narrowed])} narrower, and not the "
            f"others: where a model has them wider on purpose, leave {option('dtype')} out"
        )
    if note := note_of(plan):
        warnings.append(note)
    return Order(
        plan,
        plan_files(plan),
        memory,
        mapped,
        side_files,
        warnings,
        card=options.card,
        on_device=on_device,
        summed_on=summed_on,
    )


def make(
    ordered: Order,
    *,
    output: str | os.PathLike[str],
    options: Options,
    fingerprint: str | None = None,
    hand_over: Callable[[Staging], None] = lambda staging: None,
    announce: Callable[[str], None] = lambda digest: None,
) -> Soup:
    """Make a planned soup in the folder `output`.

    Until the last step, a rename, the output is the former one, or absent; after it, the output is
    complete and on disk. Unfinished work of an earlier run of the same plan is resumed.

    Args:
        ordered: The planned soup.
        output: The folder to make.
        options: The caller's options.
        fingerprint: What tells unfinished work from that of other soups; None for the paths,
            inodes, sizes and times of the ingredients, and the recipe.
        hand_over: Called before the work begins, to move finished work of others into it.
        announce: Called before the last step, with the digest of the provenance that it puts in
            place.

    Raises:
        OutputError: The output exists, is being written by another run, or cannot be written.
        NonFiniteError: A NaN or an Inf in the soup.
        MismatchError: Tensors that are copied differ.
        ChangedIngredientError: An ingredient changed during the pass.

    Reads each byte of each ingredient once for each pass of the rule.
    """
    if options.part is not None:
        raise RecipeError(
            f"{option('part')}: only soups made by a formula are made in parts; leave it out"
        )
    check_spread(ordered, options)
    with executing(options) as held:
        return _make(ordered, output, held, fingerprint, hand_over, announce)


def _make(
    ordered: Order,
    output: str | os.PathLike[str],
    options: Options,
    fingerprint: str | None,
    hand_over: Callable[[Staging], None],
    announce: Callable[[str], None],
) -> Soup:
    started = time.monotonic()
    given = os.fsdecode(output)
    plan = ordered.plan
    if options.on_event is not None:
        options.on_event(Planned(ordered))
    try:
        target = check_output(given, plan.ingredients, overwrite=options.overwrite, resumes=True)
        if options.executor is not None:
            options.executor.open()
        check_variances(plan, mapped=ordered.mapped, memory=options.memory)
        warned(ordered.warnings)
        with Staging(
            target,
            _fingerprint(ordered) if fingerprint is None else fingerprint,
            overwrite=options.overwrite,
            is_current=lambda folder: _has_current_side_files(ordered, folder),
        ) as staging:
            if staging.finished:
                staging.discard()
                return _finished(target, ordered, started)
            if staging.complete:
                staging.commit(staging.complete)
                return _finished(target, ordered, started)
            hand_over(staging)
            provenance, late, read = _fill(ordered, staging, options, announce)
    except OutputExistsError as error:
        # A run that was killed after its last step left nothing to resume: the output is finished,
        # and only the message can say so.
        if options.overwrite or not _made_before(given, plan):
            raise
        raise OutputExistsError(
            f"{error.text}. This very recipe made it; `streamsoup verify` tells whether it is "
            f"unchanged"
        ) from None
    except OSError as error:
        # An OSError without a number does not come from the system, but from a callback or handler.
        if isinstance(error, StreamsoupError) or error.errno is None:
            raise
        raise _not_written(given, error) from error
    elapsed_s = time.monotonic() - started
    return Soup(
        target,
        plan.recipe,
        provenance,
        read.nbytes,
        plan.nbytes_written,
        elapsed_s,
        summed_on=ordered.summed_on if options.executor is None else _SPREAD,
        warnings=(*map(Message, ordered.warnings), *warned(late)),
        n_passes=read.n_passes,
    )


def check_spread(ordered: Order, options: Options) -> None:
    """Raise `RecipeError` for a soup that processes of a cluster are to make, and cannot."""
    if not is_spread(options):
        return
    asked = asked_for(options)
    if options.part is not None:
        raise RecipeError(f"{option(asked)} and {option('part')} are two ways to share; take one")
    if ordered.on_device is not None:
        raise RecipeError(
            f"{option(asked)}: units are made on the CPU; leave out {option('device')}"
        )
    refuse_whole_model(ordered.plan, asked)
    for ingredient in ordered.plan.ingredients:
        identity_of(ingredient, asked)


def warned(warnings: Sequence[str]) -> Sequence[str]:
    """Log warnings, and return them with options rendered as Python arguments."""
    messages = [Message(warning) for warning in warnings]
    for message in messages:
        log.warning("%s", message)
    return messages


def _fill(
    ordered: Order, staging: Staging, options: Options, announce: Callable[[str], None]
) -> tuple[Provenance, list[str], Read]:
    """Make everything in the staging folder, and put it in place.

    Returns the provenance, late warnings, and what was read.
    """
    plan, files = ordered.plan, ordered.files
    digests = Digests(plan)
    sink = FileSink(plan, files, staging.soup)
    ledger = FileLedger(plan, sink, staging.journal, digests)
    with closing(sink):
        return _written(ordered, staging, sink, ledger, options, announce)


def _written(
    ordered: Order,
    staging: Staging,
    sink: FileSink,
    ledger: FileLedger,
    options: Options,
    announce: Callable[[str], None],
) -> tuple[Provenance, list[str], Read]:
    plan, files, digests = ordered.plan, ordered.files, ledger.digests
    sink.prepare(resumes=ledger.resumes)
    # Side files first: they can still fail, and weights may take hours.
    side_files = write_beside(ordered, staging.soup)
    if options.executor is None:
        reader = open_reader(plan, ordered.memory, mapped=ordered.mapped)
        on_device = ordered.on_device
        reducer = reducer_of(plan, ordered.memory) if on_device is None else on_device.mix(plan)
        read = run(
            plan,
            ordered.memory,
            reader,
            reducer,
            sink,
            ledger=ledger,
            on_event=options.on_event,
        )
    else:
        from streamsoup.output.units import make_in_units

        read = make_in_units(
            plan,
            files,
            sink,
            ledger,
            folder=staging.soup.path,
            mapped=ordered.mapped,
            executor=options.executor,
            options=options,
        )
    provenance = _provenance(ordered, digests, side_files).sealed()
    text = provenance.to_json()
    sink.sync()
    write_file(staging.soup, PROVENANCE_NAME, [text])
    staging.soup.sync_below()
    digest = digest_bytes(text)
    announce(digest)
    staging.commit(digest)
    return provenance, doubts.after(plan, provenance, digests), read


def _made_before(output: str, plan: MixPlan) -> bool:
    """Return True if the provenance at `output` has this very recipe and the same paths."""
    try:
        found = read_provenance(os.path.realpath(output))
    except StreamsoupError:
        return False
    paths = tuple(ingredient.path for ingredient in plan.ingredients)
    there = tuple(record.path for record in found.ingredients)
    recipe = msgspec.structs.replace(found.recipe, ingredients=plan.recipe.ingredients)
    return found.intact and there == paths and recipe == plan.recipe


def _not_written(output: str, error: OSError) -> OutputError:
    """Return the error for a failed write: why, whether work is kept, and what to do."""
    after = "nothing is left behind; fix that, or choose another folder"
    if os.path.lexists(os.path.realpath(output) + ".partial"):
        after = "finished work is kept beside it; fix that and run the same command to resume"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        after = "raise the limit of open files (ulimit -n), and run again"
    wrapped = OutputError(
        f"{printable(output)}: cannot be written: {error.strerror or error}; {after}"
    )
    wrapped.errno = error.errno
    return wrapped


def _finished(target: str, ordered: Order, started: float) -> Soup:
    """Return the soup that an earlier run had made, except for the last step."""
    elapsed_s = time.monotonic() - started
    provenance = read_provenance(target)
    late = warned(doubts.after(ordered.plan, provenance, None))
    warnings = (*map(Message, ordered.warnings), *late)
    recipe = ordered.plan.recipe
    return Soup(target, recipe, provenance, 0, 0, elapsed_s, finished=True, warnings=warnings)


def _fingerprint(ordered: Order) -> str:
    """Return a digest of everything that decides the output: recipe, ingredients, headers."""
    identities = [ingredient.fingerprint for ingredient in ordered.plan.ingredients]
    headers = [[file.name, digest_bytes(file.header)] for file in ordered.files.files]
    recipe = msgspec.json.encode(ordered.plan.recipe).decode()
    text = json.dumps([ARITHMETIC, DIGEST, recipe, identities, headers])
    return digest_bytes(text.encode())


def write_beside(ordered: Order, folder: Folder) -> list[FileRecord]:
    """Write the files beside the weights into `folder`: side files, model card, and indexes.

    None of them may exist yet. Returns their records. Raises `FormatError` for a side file that can
    no longer be read.
    """
    records = []
    for name, content in _beside(ordered):
        counted = _Counted(content)
        write_file(folder, name, counted)
        records.append(counted.record(name))
    return records


def _has_current_side_files(ordered: Order, folder: Folder) -> bool:
    """Return True if a finished soup has the side files that would be written now.

    Reads those files and compares them with its provenance: they may have changed since then.
    """
    try:
        text = read_file(folder, PROVENANCE_NAME, PROVENANCE_LIMIT)
        found = Provenance.from_json(text, BUILT_IN)
    except (OSError, StreamsoupError):
        return False
    now = []
    for name, content in _beside(ordered):
        counted = _Counted(content)
        for _ in counted:
            pass
        now.append(counted.record(name))
    return list(found.side_files) == now


def _beside(ordered: Order) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Yield the name and the content of each file beside the weights."""
    for file in ordered.side_files:
        yield file.name, _content(file)
    if ordered.card:
        yield CARD_NAME, [make_card(ordered.plan, ordered.report)]
    for name in ordered.files.index_names:
        yield name, [_index(ordered.plan, ordered.files, name)]


class _Counted:
    """Pieces of a file, counted and digested as they pass."""

    def __init__(self, content: Iterable[bytes]) -> None:
        self._content = content
        self._digest = xxhash.xxh3_128()
        self._nbytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._content:
            self._digest.update(piece)
            self._nbytes += len(piece)
            yield piece

    def record(self, name: str) -> FileRecord:
        return FileRecord(name, self._nbytes, self._digest.hexdigest())


def digest_beside(ordered: Order) -> str:
    """Digest the names and the contents of the side files. Raises `FormatError`."""
    digest = xxhash.xxh3_128()
    for file in ordered.side_files:
        content = xxhash.xxh3_128()
        for piece in _content(file):
            content.update(piece)
        digest.update(f"{file.name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def _content(file: SideFile) -> Iterator[bytes]:
    """Yield the content of a side file, a piece at a time."""
    try:
        yield from pieces(file.path, follows=False) if file.content is None else [file.content]
    except OSError as error:
        raise FormatError(
            f"{printable(file.path)}: cannot be copied: {error.strerror}; fix that and run again"
        ) from None


def _index(plan: MixPlan, files: FilePlan, name: str) -> bytes:
    """Write the index of a folder as transformers does: size and parameters, name to file."""
    weight_map: dict[str, str] = {}
    metadata = {"total_parameters": 0, "total_size": 0}
    for file in files.files:
        if posixpath.dirname(file.name) != posixpath.dirname(name):
            continue
        for tensor in (plan.tensors[t] for t in file.tensors):
            weight_map[name_in_file(tensor.name, file.name)] = posixpath.basename(file.name)
            metadata["total_parameters"] += tensor.spec.n_elements
            metadata["total_size"] += tensor.nbytes
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def _of_rank(plan: MixPlan) -> dict[str, object]:
    """Return the relative error of each module whose rank was reduced; nothing without a rank."""
    if plan.recipe.reading.rank is None:
        return {}
    from streamsoup.formats.adapters.truncated import errors_of

    return {"rank": plan.recipe.reading.rank, "rank_errors": errors_of(plan.ingredients[0].source)}


def _provenance(ordered: Order, digests: Digests, side_files: list[FileRecord]) -> Provenance:
    plan, files = ordered.plan, ordered.files
    records = tuple(
        IngredientRecord(ingredient.path, ingredient.nbytes, digests.of_ingredient(i))
        for i, ingredient in enumerate(plan.ingredients)
    )
    shards = tuple(
        FileRecord(file.name, file.nbytes, digest_bytes(file.header)) for file in files.files
    )
    return Provenance(
        recipe=plan.recipe,
        ingredients=records,
        shards=shards,
        side_files=tuple(side_files),
        tensors=digests.of_soup(),
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        arithmetic=ARITHMETIC,
        digest=DIGEST,
        report={**ordered.report, **_of_rank(plan)},
        checksum="",
    )
