"""Commands that look, and change nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, planning, results
from streamsoup.cli.help import Command, command
from streamsoup.errors import StreamsoupError, count, in_options, printable
from streamsoup.sizes import nbytes_text

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options
    from streamsoup.output.make import Order
    from streamsoup.output.records import CheckpointRecord, PlanRecord


class _Plan(Command):
    """``plan CKPT…``, or ``plan VERB …`` with all that the verb itself takes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave what follows a verb to that verb."""
        if args and args[0] in planning.VERBS:
            ctx.obj = [*args]
            return []
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb until its soup is planned, or plan a mean."""
        if ctx.obj is None:
            return super().invoke(ctx)
        return planning.plan_verb(
            ctx,
            ctx.obj,
            lambda found, told: _tell_plan(found.order, found.n_before, as_json=told["as_json"]),
        )


@click.command(cls=_Plan)
@arguments.INGREDIENTS
@arguments.COEFFICIENTS
@arguments.NORMALIZE
@arguments.MAKING
@arguments.RUNNING
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    ingredients: tuple[str, ...],
    coefficients: Any,
    normalize: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Show what a soup would take: layout, bytes, passes, peak memory. Reads no weights.

    Of checkpoints, that is their mean; after the name of a command that makes a soup, that soup:
    streamsoup plan ties A B --base BASE --density .5. A checkpoint of such a name is ./ties.
    """
    from msgspec.structs import replace

    from streamsoup.engine.rules.linear import Linear
    from streamsoup.output.coefficients import doubtful_sums, find_coefficients, for_adapters
    from streamsoup.output.make import order
    from streamsoup.recipe import Coefficients

    if normalize and coefficients is None:
        raise click.UsageError("--normalize goes with --coefficients")
    given = Coefficients.uniform(len(ingredients))
    arguments.Factors.check(coefficients)
    if isinstance(coefficients, dict) or (
        isinstance(coefficients, list) and any(isinstance(each, list) for each in coefficients)
    ):
        raise click.UsageError(
            "patterns and gradients cost what plain coefficients cost; plan with those"
        )
    if coefficients is not None:
        given = find_coefficients(coefficients, normalize=normalize)
    method = "uniform" if coefficients is None else "mix"
    opened, used, options = for_adapters(ingredients, given, common.make_options(settings))
    ordered = order(opened, Linear(used), method=method, options=options)
    if coefficients is not None and used is given:
        ordered = replace(ordered, warnings=[*ordered.warnings, *doubtful_sums(given)])
    _tell_plan(ordered, 0, as_json=as_json)
    return 0


def _tell_plan(ordered: Order, n_before: int, *, as_json: bool) -> None:
    """Print a plan; there are `n_before` passes before those of its rule."""
    from msgspec.structs import replace

    from streamsoup.output.records import record_of

    record = record_of(ordered, n_before)
    record = replace(record, warnings=tuple(map(in_options, ordered.warnings)))
    results.tell([_json(record)]) if as_json else results.print_description(_of_plan(record))


@command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@arguments.READING
def inspect(checkpoint: str, tensors: bool, as_json: bool, **settings: Any) -> int:
    """Show what a checkpoint holds, from its headers alone."""
    from streamsoup.output.records import inspect

    record = inspect(checkpoint, tensors=tensors, options=common.make_options(settings))
    results.tell([_json(record)]) if as_json else results.print_description(_of_checkpoint(record))
    return 0


@command()
@click.argument("soup", metavar="SOUP")
@click.option("--quick", is_flag=True, help="Digest the soup only; do not derive it again.")
@click.option(
    "--ingredient",
    "-i",
    "ingredients",
    multiple=True,
    metavar="CKPT",
    help="Where an ingredient is now; give all, in order.",
)
@arguments.DOWNLOAD
@arguments.RUNNING
@arguments.REPORTING
def verify(soup: str, quick: bool, ingredients: tuple[str, ...], **settings: Any) -> int:
    """Compare a soup with its provenance: digests, and every byte derived again."""

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        import time

        from streamsoup.cli.terminal import summary
        from streamsoup.output.verification import verify

        started = time.monotonic()
        result = verify(soup, quick=quick, ingredients=ingredients or None, options=options)
        watcher.close()
        if as_json:
            fields = ("path", "n_tensors", "n_files", "rederived", "nbytes_read")
            results.tell([json.dumps({name: getattr(result, name) for name in fields})])
            return
        how = "derived again, and equal" if result.rederived else "with equal digests"
        what = f"{printable(soup)} is as it was made ({count(result.n_tensors, 'tensor')} {how})"
        elapsed_s = time.monotonic() - started
        results.tell([summary(what, result.nbytes_read, 0, elapsed_s, watcher.peak_nbytes)])

    def paths() -> list[str]:
        from streamsoup.output.verification import read_provenance

        with suppress(StreamsoupError):
            found = ingredients or [each.path for each in read_provenance(soup).ingredients]
            return [soup, *found]
        return [soup]

    if quick and ingredients:
        raise click.UsageError("--quick looks at the soup alone; leave out --ingredient")
    return common.supervise(work, "verify", paths, settings)


def _json(record: CheckpointRecord | PlanRecord) -> str:
    import msgspec

    return msgspec.json.encode(record).decode()


def _of_checkpoint(record: CheckpointRecord) -> dict[str, Any]:
    """Return what a checkpoint holds in words, line by line."""
    described: dict[str, Any] = {
        "checkpoint": printable(record.checkpoint),
        "files": [printable(name) for name in record.files],
        "tensors": record.n_tensors,
        "parameters": record.n_parameters,
        "dtypes": ", ".join(f"{name} {n}" for name, n in record.dtypes.items()),
        "size": _bytes(record.nbytes),
    }
    if record.notes:
        described["notes"] = [in_options(note) for note in record.notes]
    if record.tensors:
        described["tensor_list"] = [
            f"{printable(name)}  {each.dtype}  {list(each.shape)}  {printable(each.file)}"
            for name, each in record.tensors.items()
        ]
    return described


_OPERATIONS = {
    "mix": "averaged",
    "same": "copied if equal",
    "first": "copied from the first",
    "code": "copied if equal, as parts of quantised weights",
}


def _of_plan(record: PlanRecord) -> dict[str, Any]:
    """Return what a planned soup would take in words, line by line."""
    tensors = (f"{n} {_OPERATIONS[name]}" for name, n in record.operations.items())
    mapped = "nothing: files are read into buffers, which the peak counts"
    if record.mapped_nbytes:
        mapped = (
            f"{_bytes(record.mapped_nbytes, 'bytes of files at most')} besides, which the system "
            "can take back; for a job limit that counts them: --io read"
        )
    device = record.summed_on
    if record.device_nbytes:
        device += (
            f": {_bytes(record.device_nbytes, 'bytes at most')}, {record.pinned_nbytes} pinned on "
            "the host; torch and the driver hold their own beside that"
        )
    return {
        "ingredients": [printable(name) for name in record.ingredients],
        "tensors": ", ".join(tensors),
        "reads": f"{_bytes(record.nbytes_read)}{_passes(record)}",
        "writes": _bytes(record.nbytes_written),
        "files": [f"{printable(name)}  {nbytes_text(n)}" for name, n in record.files.items()],
        "side_files": [printable(name) for name in record.side_files] or "none",
        "peak_memory": f"{_bytes(record.peak_nbytes, 'bytes at most')}, of anonymous memory",
        "mapped": mapped,
        "running_sum": f"{nbytes_text(record.running_sum_nbytes)} more, where a search keeps one",
        "threads": record.threads,
        "device": device,
        "input": "mapped" if record.io == "mmap" else "read",
        "free_here": nbytes_text(record.free_nbytes),
        "warnings": list(record.warnings) or "none",
    }


def _passes(record: PlanRecord) -> str:
    """Return how often the ingredients are read, where it is not once."""
    usual, most = record.usual_passes, record.n_passes
    if most == 1:
        return ""
    usually = nbytes_text(record.nbytes_read * usual)
    if usual == most:
        return f" in each of {most} passes, {usually} in all"
    return f" in each of usually {usual}, at most {most} passes, {usually} usually"


def _bytes(nbytes: int, words: str = "bytes") -> str:
    return f"{nbytes} {words} ({nbytes_text(nbytes)})"
