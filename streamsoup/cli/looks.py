"""Commands that look, and change nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import common
from streamsoup.errors import StreamsoupError, count, printable

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options


@click.command()
@common.INGREDIENTS
@common.COEFFICIENTS
@common.NORMALIZE
@common.MAKING
@common.RUNNING
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    ingredients: tuple[str, ...],
    coefficients: str | None,
    normalize: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Show what a soup would take: layout, bytes, peak memory. Reads no weights."""
    from msgspec.structs import replace

    from streamsoup.engine.rules.linear import Linear
    from streamsoup.output.coefficients import doubtful_sums, find_coefficients
    from streamsoup.output.make import order
    from streamsoup.recipe import Coefficients
    from streamsoup.study.inspection import describe_order, record_order

    if normalize and coefficients is None:
        raise click.UsageError("--normalize goes with --coefficients")
    given = Coefficients.uniform(len(ingredients))
    if coefficients is not None:
        given = find_coefficients(common.factors(coefficients), normalize=normalize)
    method = "uniform" if coefficients is None else "mix"
    ordered = order(
        ingredients, Linear(given), method=method, options=common.make_options(settings)
    )
    if coefficients is not None:
        ordered = replace(ordered, warnings=[*ordered.warnings, *doubtful_sums(given)])
    if as_json:
        common.tell([json.dumps(record_order(ordered))])
    else:
        common.print_description(describe_order(ordered))
    return 0


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(checkpoint: str, tensors: bool, as_json: bool) -> int:
    """Show what a checkpoint holds, from its headers alone."""
    from streamsoup.formats.ingredients import open_ingredients
    from streamsoup.study.inspection import describe_ingredient, record_ingredient

    (ingredient,) = open_ingredients([checkpoint])
    if as_json:
        common.tell([json.dumps(record_ingredient(ingredient, tensors=tensors))])
    else:
        common.print_description(describe_ingredient(ingredient, tensors=tensors))
    return 0


@click.command()
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
@common.RUNNING
@common.REPORTING
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
            common.tell([json.dumps({name: getattr(result, name) for name in fields})])
            return
        how = "derived again, and equal" if result.rederived else "with equal digests"
        what = f"{printable(soup)} is as it was made ({count(result.n_tensors, 'tensor')} {how})"
        elapsed_s = time.monotonic() - started
        common.tell([summary(what, result.nbytes_read, 0, elapsed_s, watcher.peak_nbytes)])

    def paths() -> list[str]:
        from streamsoup.output.verification import read_provenance

        with suppress(StreamsoupError):
            found = ingredients or [each.path for each in read_provenance(soup).ingredients]
            return [soup, *found]
        return [soup]

    if quick and ingredients:
        raise click.UsageError("--quick looks at the soup alone; leave out --ingredient")
    return common.supervise(work, "verify", paths, settings)
