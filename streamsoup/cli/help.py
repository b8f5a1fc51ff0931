"""How ``--help`` is laid out: commands by what one wants, options by what they decide."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from streamsoup.cli.contents import COMMANDS, PAGES, SECTIONS

__all__ = ["Command", "Group", "command"]

HELP = ("-h", "--help")

_OPTIONS: Mapping[str, frozenset[str]] = {
    "Where it goes": frozenset({"output", "overwrite", "part", "commit"}),
    "What decides the bytes": frozenset(
        {"dtype", "shard_size", "non_float", "config", "non_finite", "card"}
    ),
    "How the work is done": frozenset({"device", "device_memory", "memory", "threads", "io"}),
    "What is shown": frozenset({"as_json", "quiet", "traceback", "print_recipe", "schema", "help"}),
}
"""The options that many commands share, by name. Others come first, as those of the command."""

_READING = "How checkpoints are read"
"""The group of the fields of `streamsoup.reading.Reading`, which come before all others."""


class Command(click.Command):
    """A command whose help has options in groups, an example, and a page to read on."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the names of the option, whatever context the command was first seen in."""
        return list(HELP)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of the command itself first."""
        from streamsoup.reading import Reading

        groups = {_READING: frozenset(Reading.__struct_fields__), **_OPTIONS}
        shared = {name: group for group, names in groups.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {"Options": [], **{name: [] for name in groups}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                name = "help" if "--help" in parameter.opts else parameter.name or ""
                rows[shared.get(name, "Options")].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write an example, and which page explains the command."""
        entry = COMMANDS.get(self.name or "")
        if entry is not None:
            formatter.write_paragraph()
            formatter.write(f"Example:  {entry.example}\nMore:     {PAGES}{entry.page}\n")


def command() -> Callable[[Callable[..., Any]], Command]:
    """Return the decorator of every command."""
    return click.command(cls=Command)


class Group(click.Group):
    """All commands, in sections."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the names of the option, whatever context the group was first seen in."""
        return list(HELP)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each command; none has to be imported."""
        width = max(map(len, COMMANDS))
        for section, entries in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl(
                    [(name.ljust(width), each.line) for name, each in entries.items()]
                )


class Commands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> click.Command:
        """Import a command."""
        room = importlib.import_module(f"streamsoup.cli.{COMMANDS[name].room}")
        found: click.Command = getattr(room, name)
        return found

    def __iter__(self) -> Iterator[str]:
        """List the names of all commands."""
        return iter(COMMANDS)

    def __len__(self) -> int:
        """Return the number of commands."""
        return len(COMMANDS)
