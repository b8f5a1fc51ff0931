"""The command that puts a soup in place of which all parts are made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common
from streamsoup.cli.help import command
from streamsoup.errors import StreamsoupError

if TYPE_CHECKING:
    from streamsoup.options import Options
    from streamsoup.output.make import Soup


@command()
@click.argument("output", metavar="OUT")
@click.option(
    "--ingredient",
    "-i",
    "ingredients",
    multiple=True,
    metavar="CKPT",
    help="Where an ingredient is now; give all, in order.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, in the last step.")
@arguments.RUNNING
@arguments.REPORTING
def commit(output: str, ingredients: tuple[str, ...], **settings: Any) -> int:
    """Check all parts of OUT, which were made with --part, and put it in place."""

    def make(options: Options) -> Soup:
        from streamsoup.output.jobs import commit

        return commit(output, ingredients=ingredients or None, options=options)

    def paths() -> Sequence[str]:
        from streamsoup.output.jobs import paths_of_parts

        with suppress(StreamsoupError, OSError):
            return ingredients or paths_of_parts(output)
        return ingredients

    return common.make_soup(make, paths, settings)
