"""The documentation: each page can be reached, each command exists, each reference is complete."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import pytest
from test_readme import parse

import streamsoup
from streamsoup import errors
from streamsoup.cli import main
from streamsoup.cli.contents import COMMANDS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

sys.path.insert(0, str(DOCS))
import generated  # noqa: E402 - it lies beside the pages


def blocks(text: str, *languages: str) -> list[str]:
    """List the code blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(text: str) -> list[str]:
    """List the streamsoup commands in code blocks, without their comments."""
    lines = [
        line.split("  #")[0].strip()
        for block in blocks(text, "", "bash", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines = [line.removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"streamsoup \w", line)]


ALL = [
    (page.relative_to(DOCS).as_posix(), line)
    for page in PAGES
    for line in commands(page.read_text())
]


@pytest.mark.parametrize(("page", "command"), ALL)
def test_the_commands_of_a_page_parse(page: str, command: str) -> None:
    """Every command in the documentation is one, with options it has."""
    parse(command)


def test_a_planted_option_is_found() -> None:
    """A command with an option that does not exist is no command."""
    (planted,) = commands("```bash\nstreamsoup uniform a b \\\n  --outptu x\n```\n")
    with pytest.raises(click.UsageError):
        parse(planted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_is_python(page: Path) -> None:
    """Every block of Python compiles."""
    for block in blocks(page.read_text(), "python"):
        compile(block, str(page), "exec")


def test_each_page_is_in_the_contents() -> None:
    """The contents name every page, and no other."""
    index = (DOCS / "index.md").read_text()
    listed = [
        line
        for toc in re.findall(r"```\{toctree\}.*?\n\n(.*?)```", index, re.DOTALL)
        for line in toc.split()
    ]
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"}
    assert set(listed) == there
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example_and_a_page(name: str) -> None:
    """The example of each command parses and is of that command; its page exists; its line fits."""
    entry = COMMANDS[name]
    parse(entry.example)
    assert entry.example.split()[1] == name
    assert (DOCS / entry.page).exists()
    assert len(entry.line) <= 62
    assert main.commands[name].name == name


def test_the_reference_is_complete() -> None:
    """Every command, every public name and every error class is in the reference."""
    assert set(re.findall(r"^## ([\w-]+)$", generated.command_line(), re.MULTILINE)) == set(
        main.commands
    )
    library, table = generated.library(), generated.error_classes()
    for name in dir(streamsoup):
        value = getattr(streamsoup, name)
        if callable(value) and not name.startswith("_"):
            is_error = isinstance(value, type) and issubclass(value, Exception)
            assert (
                (f"| `{name}` |" in table) if is_error else (f"streamsoup.{name}\n" in library)
            ), name
    assert "`StreamsoupError`" in table
    assert "<!-- generated" not in generated.fill_in((DOCS / "reference" / "errors.md").read_text())
    assert errors.StreamsoupError.__doc__
