"""How ``--help`` is laid out: commands by what one wants, options by what they decide."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from streamsoup.cli.contents import COMMANDS, PAGES, SECTIONS
from streamsoup.cli.layout import Context, Layout

__all__ = ["Command", "Group", "command"]

HELP = ("-h", "--help")

_SCORING = (
    *("task", "command", "lm_eval", "limit", "batch_size", "metric", "split", "recalibrate"),
    *("jobs", "timeout", "servers", "server_kind", "scratch", "reload_timeout"),
)
_CHOOSING = ("by", "best", "metric", "direction", "every", "last")
_GROUPS: Mapping[str, Iterable[str]] = {
    "How candidates are scored": _SCORING,
    "Which checkpoints of a run": _CHOOSING,
    "How checkpoints are read": (),
    "Where it goes": ("output", "overwrite", "report", "plot", "part", "commit"),
    "What decides the bytes": (
        *("rank", "dtype", "shard_size", "non_float", "config", "non_finite", "card"),
    ),
    "How the work is done": (
        *("device", "device_memory", "memory", "threads", "io", "ray", "sums", "restart"),
    ),
    "What is shown": (
        *("as_json", "quiet", "traceback", "print_recipe", "schema", "tensors", "help"),
    ),
}
"""The options of commands, by name. Others come first, as those of the command."""


def _group_of(names: frozenset[str]) -> dict[str, str]:
    """Return the group of each option of a command that has options of these names."""
    from streamsoup.reading import Reading

    read = [name for name in Reading.__struct_fields__ if name != "rank"]
    groups = dict(_GROUPS) | {"How checkpoints are read": read}
    # The metric of a run chooses its checkpoints, that of a task scores candidates.
    if "task" not in names:
        del groups["How candidates are scored"]
    if "by" not in names:
        del groups["Which checkpoints of a run"]
    return {name: group for group, names in groups.items() for name in names}


PATHS = ("CKPT", "OUT", "DIR", "PATH", "PNG", "TASK", "FILE|MODULE:OBJECT", "S,S,…|FILE")
"""What options call a file or a folder in their help; arguments all are one."""


class FilePath(click.types.StringParamType):
    """A text that a shell completes as a path; other texts it does not complete at all."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type="file")]


class Command(click.Command):
    """A command whose help has options in groups, an example, and a page to read on."""

    context_class = Context

    def __init__(self, *args: Any, **more: Any) -> None:
        """Set a type that a shell completes for arguments and options that are paths."""
        super().__init__(*args, **more)
        for parameter in self.params:
            is_path = isinstance(parameter, click.Argument) or parameter.metavar in PATHS
            if is_path and parameter.type in (click.STRING, click.UNPROCESSED):
                parameter.type = FilePath()

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the names of the option, whatever context the command was first seen in."""
        return list(HELP)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of the command itself first."""
        rows: dict[str, list[tuple[str, str]]] = {"Options": [], **{name: [] for name in _GROUPS}}
        parameters = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        group_of = _group_of(frozenset(p.name or "" for p in parameters))
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is not None:
                name = "help" if "--help" in parameter.opts else parameter.name or ""
                rows[group_of.get(name, "Options")].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write an example, and which page explains the command."""
        entry = COMMANDS.get(self.name or "")
        if entry is not None:
            formatter.write_paragraph()
            assert isinstance(formatter, Layout)
            formatter.write_named("Example", entry.example, command=True)
            formatter.write_named("More", f"{PAGES}{entry.page}")


def command() -> Callable[[Callable[..., Any]], Command]:
    """Return the decorator of every command."""
    return click.command(cls=Command)


class Group(click.Group):
    """All commands, in sections."""

    context_class = Context

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
