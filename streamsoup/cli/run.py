"""The command that runs a recipe from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamsoup.cli import arguments, common, results
from streamsoup.cli.help import command
from streamsoup.errors import RecipeError, printable
from streamsoup.recipe import PROVENANCE_NAME

if TYPE_CHECKING:
    from streamsoup.formats.documents import Table
    from streamsoup.options import Options
    from streamsoup.output.make import Soup


def _print_schema(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the JSON schema of recipes, and end."""
    if not value or ctx.resilient_parsing:
        return
    from streamsoup.cli.recipes import schema

    results.tell([json.dumps(schema(_commands(ctx)), indent=1, ensure_ascii=False)])
    ctx.exit()


def _commands(ctx: click.Context) -> Mapping[str, click.Command]:
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    return group.commands


@command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--output", "-o", metavar="OUT", help="Folder to make, if RECIPE names none.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, in the last step.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of recipes, and do nothing else.",
)
@arguments.MAKING
@arguments.RUNNING
@arguments.SHARING
@arguments.REPORTING
@click.pass_context
def run(context: click.Context, /, recipe: str, **settings: Any) -> Any:
    """Make what a RECIPE says: a YAML file of our own, one of mergekit, or a soup to make again.

    Options that are given count more than what the file says. Paths in it are those of the current
    folder.
    """
    if os.path.isdir(recipe) or os.path.basename(recipe) == PROVENANCE_NAME:
        return _run_again(context, recipe, settings)
    from streamsoup.formats.documents import read_document
    from streamsoup.methods.mergekit.configuration import is_mergekit

    table = read_document(recipe)
    return _run_theirs(table, settings) if is_mergekit(table) else _run_ours(context, table)


def _run_again(context: click.Context, path: str, settings: dict[str, Any]) -> int:
    """Make the soup of a provenance again."""
    from streamsoup.reading import Reading

    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    output = settings.pop("output")
    if output is None:
        raise click.UsageError("a soup that is made again needs another folder: give -o OUT")
    decided = ("dtype", "shard_size", "non_float", "non_finite", *Reading.__struct_fields__)
    for name in decided:
        if name in _given(context):
            raise click.UsageError(f"{_given(context)[name][0]}: a soup is made again as it was")

    def make(options: Options) -> Soup:
        from streamsoup.output.again import make_again

        return make_again(folder, output=output, options=options)

    def paths() -> list[str]:
        from streamsoup.output.verification import read_provenance

        return [each.path for each in read_provenance(folder).ingredients]

    return common.make_soup(make, paths, settings)


def _run_theirs(table: Table, settings: dict[str, Any]) -> int:
    """Make the soup of a recipe of mergekit."""
    output = settings.pop("output")
    if output is None:
        raise RecipeError(
            f"{table.where}: a recipe of mergekit names no output; give -o OUT on the command line"
        )

    def make(options: Options) -> Soup:
        from streamsoup.methods.mergekit.merging import merge

        return merge(table, output=output, options=options)

    def paths() -> list[str]:
        from streamsoup.methods.mergekit.merging import ingredients_of

        return ingredients_of(table)

    return common.make_soup(make, paths, settings)


def _run_ours(context: click.Context, table: Table) -> Any:
    """Run the command that a recipe of our own format stands for."""
    from streamsoup.cli.recipes import arguments_of, find_command, keys_of

    named = find_command(_commands(context), table)
    arguments = arguments_of(named, table)
    given = _given(context)
    known = {key.param.name for key in keys_of(named).values()} | {"as_json", "quiet"}
    for name, words in given.items():
        if name not in known:
            raise click.UsageError(f"{named.name} has no option {words[0].partition('=')[0]}")
        arguments = (
            [*words, *arguments] if name in ("as_json", "quiet") else _after(arguments, words)
        )
    if "output" not in table.entries and "output" not in given:
        raise RecipeError(
            f"{table.where}: names no output; add one, or give -o OUT on the command line"
        )
    try:
        with named.make_context(named.name, arguments, parent=context.parent) as inner:
            return named.invoke(inner)
    except click.UsageError as error:
        raise RecipeError(f"{printable(table.file)}: {error.format_message()}") from None


def _after(arguments: list[str], words: list[str]) -> list[str]:
    """Return arguments with further options instead of those that they have."""
    end = arguments.index("--")
    options = {f"{word.partition('=')[0]}=" for word in words if "=" in word}
    kept = [word for word in arguments[:end] if not word.startswith(tuple(options))]
    return [*kept, *words, *arguments[end:]]


def _given(context: click.Context) -> dict[str, list[str]]:
    """Return the options that were given to `run` itself, as words, by name."""
    found = {}
    for param in context.command.params:
        name = str(param.name)
        source = context.get_parameter_source(name)
        if not isinstance(param, click.Option) or source is not ParameterSource.COMMANDLINE:
            continue
        option = max(param.opts, key=len)
        value = context.params[name]
        if param.is_flag:
            found[name] = [option] if value else []
        elif param.multiple:
            found[name] = [f"{option}={each}" for each in value]
        else:
            text = ",".join(value) if isinstance(value, tuple) else value
            found[name] = [f"{option}={text}"]
    return found
