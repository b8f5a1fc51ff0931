"""Recipes of our own format: the commands' own arguments and options, written as YAML.

There is no second list of keys. A recipe names a command under ``method``, and every other key is
an argument or an option of that command, checked by the type the command line checks it with; the
JSON schema is made from the same. So a new option is a new key, and a recipe does what the command
does, as it becomes that command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from streamsoup.cli.values import ByName, Factors, Integer, Number, Numbers, Size
from streamsoup.errors import RecipeError, printable
from streamsoup.formats.documents import Items, Node, Table, Text

__all__ = ["Key", "arguments_of", "is_recipe_command", "keys_of", "recipe_text", "schema"]

NOT_IN_RECIPES = ("print_recipe", "as_json", "quiet", "traceback")
"""Options about what a command prints, which say nothing about a soup."""


class Key(msgspec.Struct, frozen=True):
    """A key of a recipe: an argument or an option of its command."""

    name: str
    param: click.Parameter

    @property
    def is_argument(self) -> bool:
        """True for what has no name on the command line: ingredients."""
        return isinstance(self.param, click.Argument)

    @property
    def is_switch(self) -> bool:
        """True for what is on or off."""
        return isinstance(self.param, click.Option) and self.param.is_flag

    @property
    def is_list(self) -> bool:
        """True for a list of texts: ingredients, or an option that may be given several times."""
        return self.param.nargs == -1 or (self.param.multiple and not self.is_by_name)

    @property
    def is_by_name(self) -> bool:
        """True for numbers that may be given by patterns of tensor names."""
        return isinstance(self.param.type, ByName)

    @property
    def is_required(self) -> bool:
        """True if each recipe has it; not for the output, which `run` may be given instead."""
        return self.param.required and self.param.name != "output"

    @property
    def option(self) -> str:
        """Its longest name on the command line."""
        return max(self.param.opts, key=len)


def is_recipe_command(command: click.Command) -> bool:
    """Return True if recipes may name the command: it makes something, and can print its recipe."""
    return any(param.name == "print_recipe" for param in command.params)


def keys_of(command: click.Command) -> dict[str, Key]:
    """Return the keys that a recipe for `command` may have, by name."""
    found = {}
    for param in command.params:
        name = str(param.name)
        if isinstance(param, click.Option):
            name = max(param.opts, key=len).lstrip("-").replace("-", "_")
            # --no-x beside --x V is another way to say one of its values.
            if param.name in NOT_IN_RECIPES or name.startswith("no_"):
                continue
        found[name] = Key(name, param)
    return found


def arguments_of(command: click.Command, recipe: Table) -> list[str]:
    """Return the command line that a recipe stands for, without the name of the command.

    Args:
        command: The command that the recipe names.
        recipe: The recipe.

    Raises:
        RecipeError: A key is unknown or missing, or its value is none that the command takes; the
            message names the file, the line and the key.
    """
    keys = keys_of(command)
    options: list[str] = []
    arguments: list[str] = []
    for name, node in recipe.entries.items():
        if name == "method":
            continue
        if name not in keys:
            raise RecipeError(
                f"{recipe.at(name)}: {command.name} has no such key; {_nearest(name, keys)}"
            )
        if node.is_nothing:
            continue
        words = _words(keys[name], node, recipe.at(name))
        if keys[name].is_argument:
            arguments += words
        else:
            options += words
    missing = [
        name
        for name, key in keys.items()
        if key.is_required and (name not in recipe.entries or recipe.entries[name].is_nothing)
    ]
    if missing:
        raise RecipeError(f"{recipe.where}: {command.name} needs {' and '.join(missing)}")
    return [*options, "--", *arguments]


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the advice for an unknown word."""
    close = get_close_matches(name.replace("-", "_"), list(known), 1)
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"


def _words(key: Key, node: Node, at: str) -> list[str]:
    """Return a key with its value as words of the command line."""
    if key.is_switch:
        return _switch(key, node, at)
    if key.is_list:
        if not isinstance(node, Items) or not node.items:
            raise RecipeError(f"{at}: expected a list, got {node.kind}")
        texts = [_checked(key, each, each.where) for each in node.items]
        return [word for text in texts for word in _word(key, text)]
    if isinstance(node, Table) and key.is_by_name:
        return [
            word
            for pattern, value in node.entries.items()
            for word in _word(key, f"{pattern}={_numbers(key, value, node.at(pattern))}")
        ]
    if isinstance(key.param.type, Numbers):
        return _word(key, _numbers(key, node, at))
    return _word(key, _checked(key, node, at))


def _word(key: Key, text: str) -> list[str]:
    if key.is_argument:
        return [text]
    return [f"{key.option}={text}"] if key.option.startswith("--") else [key.option, text]


def _switch(key: Key, node: Node, at: str) -> list[str]:
    if not isinstance(node, Text) or node.quoted or node.text not in ("true", "false"):
        raise RecipeError(f"{at}: expected true or false, got {node.kind}")
    off = max(key.param.secondary_opts, key=len, default=None)
    if node.text == "true":
        return [key.option]
    return [] if off is None else [off]


def _numbers(key: Key, node: Node, at: str) -> str:
    """Return numbers as the command line has them: commas between, and ~ within a gradient."""
    kind = key.param.type
    if not isinstance(node, Items) or not isinstance(kind, Numbers) or not node.items:
        return _checked(key, node, at)
    texts = []
    for each in node.items:
        if isinstance(each, Items) and key.is_by_name and each.items:
            texts.append("~".join(_number(kind, inner) for inner in each.items))
        else:
            texts.append(_number(kind, each))
    return ",".join(texts)


def _number(kind: Numbers, node: Node) -> str:
    """Return a number of a list as it was written."""
    if isinstance(node, Text) and not node.quoted and "," not in node.text:
        try:
            kind.each.convert(node.text, None, None)
            return node.text
        except click.BadParameter as error:
            raise RecipeError(f"{node.where}: {error.message}") from None
    raise RecipeError(f"{node.where}: expected a number, got {node.kind}")


def _checked(key: Key, node: Node, at: str) -> str:
    """Return a text if the command takes it as the value of `key`."""
    if not isinstance(node, Text):
        raise RecipeError(f"{at}: expected one value, got {node.kind}")
    if isinstance(key.param.type, Integer | Number) and node.quoted:
        raise RecipeError(f"{at}: {node.kind} is text, not a number; leave out the quotes")
    try:
        value = key.param.type.convert(node.text, key.param, None)
        if isinstance(key.param.type, Factors):
            key.param.type.check(value)
    except click.UsageError as error:
        raise RecipeError(f"{at}: {error.message}") from None
    return node.text


def recipe_text(context: click.Context) -> str:
    """Return the recipe of a command line, as YAML.

    Args:
        context: Its context. Options of the command itself are written with their defaults, so that
            later versions with other ones make the same soup; those that every command has, where
            they were given.
    """
    import yaml

    from streamsoup.options import Options

    recipe: dict[str, Any] = {"method": context.command.name}
    for name, key in keys_of(context.command).items():
        off = context.params.get(f"no_{name}", False)  # --no-x means that --x is none
        value = "none" if off else context.params[str(key.param.name)]
        given = context.get_parameter_source(str(key.param.name))
        shared = key.param.name in Options.__struct_fields__
        if value is None or value == () or (shared and given is ParameterSource.DEFAULT):
            continue
        if value is False and not key.param.secondary_opts:
            continue
        recipe[name] = _plain(value)
    text: str = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _plain(value: Any) -> Any:
    """Return a value as a recipe has it."""
    if isinstance(value, dict):
        return {pattern: _plain(numbers) for pattern, numbers in value.items()}
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        return _plain(value[0])
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def schema(commands: Mapping[str, click.Command]) -> dict[str, Any]:
    """Return the JSON schema of recipes: one object for each command that they may name."""
    named = {name: command for name, command in commands.items() if is_recipe_command(command)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streamsoup recipe",
        "type": "object",
        "required": ["method"],
        "properties": {"method": {"enum": list(named)}},
        "oneOf": [_object(name, command) for name, command in named.items()],
    }


def _object(name: str, command: click.Command) -> dict[str, Any]:
    keys = keys_of(command)
    about = {"description": (command.help or "").split("\n\n")[0]}
    return {
        "title": name,
        **about,
        "properties": {"method": {"const": name}} | {n: _described(k) for n, k in keys.items()},
        "required": ["method", *(n for n, k in keys.items() if k.is_required)],
        "additionalProperties": False,
    }


def _described(key: Key) -> dict[str, Any]:
    """Return the schema of one key."""
    found = _typed(key)
    text = getattr(key.param, "help", None)
    return found if text is None else {**found, "description": text}


def _typed(key: Key) -> dict[str, Any]:
    kind = key.param.type
    if key.is_switch:
        return {"type": "boolean"}
    if key.is_list:
        return {"type": "array", "items": {"type": "string"}, "minItems": 1}
    if isinstance(kind, Numbers):
        number: dict[str, Any] = {"type": "number"}
        lists = {"type": "array", "items": number, "minItems": 1}
        one = {"type": ["number", "string"]}
        if not key.is_by_name:
            return {"anyOf": [one, lists]}
        each = {"type": "array", "items": {"anyOf": [number, lists]}, "minItems": 1}
        by_pattern = {"type": "object", "additionalProperties": {"anyOf": [one, each]}}
        return {"anyOf": [one, each, by_pattern]}
    if isinstance(kind, click.Choice):
        return {"enum": list(kind.choices)}
    if isinstance(kind, Integer | Number):
        limits = {"minimum": kind.min, "maximum": kind.max}
        found: dict[str, Any] = {"type": "integer" if isinstance(kind, Integer) else "number"}
        return found | {name: limit for name, limit in limits.items() if limit is not None}
    # A size has a unit, a batch size may be a number: text that need not be quoted.
    return {"type": ["string", "integer"] if isinstance(kind, Size) else ["string", "number"]}


def find_command(commands: Mapping[str, click.Command], recipe: Table) -> click.Command:
    """Return the command that a recipe names. Raise `RecipeError` at its line otherwise."""
    node = recipe.entries.get("method")
    if node is None:
        raise RecipeError(
            f"{recipe.where}: names no method; add one, such as method: uniform, or merge_method: "
            "for a recipe of mergekit"
        )
    name = node.text if isinstance(node, Text) else ""
    if name in commands and is_recipe_command(commands[name]):
        return commands[name]
    known = [name for name, command in commands.items() if is_recipe_command(command)]
    raise RecipeError(
        f"{recipe.at('method')}: {printable(node.kind)} is no method; {_nearest(name, known)}"
    )
