"""Parts of the reference that are made from the package itself, when the pages are built.

A line ``<!-- generated: NAME -->`` of a page is replaced by what the function NAME here returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import click

import streamsoup
from streamsoup import errors
from streamsoup.cli import main


def command_line() -> str:
    """Return a section for each command: what it does, its arguments and options."""
    context = click.Context(main, info_name="streamsoup")
    return "\n\n".join(_section(name, main.commands[name], context) for name in main.commands)


def _section(name: str, command: click.Command, parent: click.Context) -> str:
    own = click.Context(command, info_name=name, parent=parent)
    usage = command.get_usage(own).removeprefix("Usage: ")
    lines = [f"## {name}", "", str(command.help), "", "```text", usage, "```", ""]
    options = [each for each in command.params if isinstance(each, click.Option)]
    if options:
        lines += ["| option | | default |", "| --- | --- | --- |"]
        lines += [_row(each, own) for each in options if not each.hidden]
    return "\n".join(lines)


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{each}`" for each in [*option.opts, *option.secondary_opts])
    takes = "" if option.is_flag else f" `{option.make_metavar(context)}`"
    shown = option.show_default and option.default not in (None, False, ())
    default = f"`{option.default}`" if shown else ("required" if option.required else "")
    return f"| {names}{_cell(takes)} | {_cell(option.help or '')} | {_cell(default)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def library() -> str:
    """Return a directive of autodoc for every public name: functions, then classes."""
    functions: list[str] = []
    classes: list[str] = []
    for name in dir(streamsoup):
        value: Any = getattr(streamsoup, name)
        if inspect.isfunction(value):
            functions.append(_directive("autofunction", name))
        elif inspect.isclass(value) and not issubclass(value, Exception):
            classes.append(_directive("autoclass", name, ":members:"))
    return "\n\n".join(["## Functions", *functions, "## Classes", *classes])


def _directive(kind: str, name: str, *options: str) -> str:
    lines = [f".. {kind}:: streamsoup.{name}", *(f"   {each}" for each in options)]
    return "\n".join([f"### {name}", "", "```{eval-rst}", *lines, "```"])


def error_classes() -> str:
    """Return a table of the public error classes: what each means, and what it is derived from."""
    rows = ["| error | raised when | is a |", "| --- | --- | --- |"]
    for name in errors.__all__:
        value = getattr(errors, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            text = (inspect.getdoc(value) or "").split("\n\n")
            bases = ", ".join(f"`{base.__name__}`" for base in value.__bases__)
            rows.append(f"| `{name}` | {_cell(' '.join(text))} | {bases} |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "library": library,
    "errors": error_classes,
}

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def fill_in(page: str) -> str:
    """Return a page with its generated parts filled in."""
    return _MARK.sub(lambda found: GENERATED[found[1]](), page)
