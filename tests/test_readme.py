"""The README promises commands, rooms and targets: each of them exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from checkpoints import random_model, save

from streamsoup.cli import main
from streamsoup.output.verification import read_provenance
from streamsoup.task import load_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """List the streamsoup commands in code blocks, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("streamsoup ")]


def parse(command: str) -> None:
    """Read a command line as the program would, without running it."""
    name, *arguments = shlex.split(command)[1:]
    parent = click.Context(main, **main.context_settings)
    chosen = main.get_command(parent, name)
    if chosen is None:
        raise click.UsageError(f"no command {name}")
    chosen.make_context(name, arguments, parent=parent)


@pytest.mark.parametrize("command", commands(README))
def test_the_commands_of_the_readme_parse(command: str) -> None:
    """Every command in the README is one, with options it has."""
    parse(command)


def python_blocks(text: str) -> list[str]:
    """List the blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first block makes a soup, and its task file is a task."""
    soup, task = python_blocks(README)
    paths = [save(tmp_path / f"run{i}", random_model(i)) for i in (1, 2, 3)]
    monkeypatch.chdir(tmp_path)
    exec(soup, {})
    provenance = read_provenance("soup")
    assert capsys.readouterr().out.split()[-1] == provenance.ingredients[0].digest
    assert [record.path for record in provenance.ingredients] == [str(path) for path in paths]
    given = (
        "import torch\nMyModel = torch.nn.Identity\nDATA = {'val': 3}\n"
        "def accuracy(model, data): return data / 4\n"
    )
    (tmp_path / "task.py").write_text(given + task)
    loaded = load_task("task.py")
    assert loaded.score(loaded.build(), "val").value == 0.75


def test_a_planted_option_is_found() -> None:
    """A command with an option that does not exist is no command."""
    (planted,) = commands("```\nstreamsoup uniform a b --outptu x\n```\n")
    with pytest.raises(click.UsageError):
        parse(planted)


def test_the_rooms_that_the_documentation_shows_exist() -> None:
    """The table of rooms names all of them, and no other."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = page.split("| room | holds |")[1].split("\n\n")[0]
    named = {
        word
        for line in table.splitlines()[2:]
        for word in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    package = ROOT / "streamsoup"
    rooms = {
        path.stem
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named == rooms - {"__init__", "__main__"}


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link in the README and the documentation is a file that exists."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_targets_of_the_readme_exist() -> None:
    """Every `make` target in the README is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"and"}
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert wanted <= targets
