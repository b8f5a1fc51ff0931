"""Messages name options as the caller has them, and ingredients by their place."""

from __future__ import annotations

import ast
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import command, save, tensor

import streamsoup
from streamsoup.errors import (
    BudgetError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    StreamsoupError,
    in_options,
    option,
    printable,
)

ROOT = Path(streamsoup.__file__).parent
SPOKEN = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMANDS = {
    *("demo/comparison.py", "selftest/checks.py", "formats/conversions.py", "output/card.py"),
}
"""Files that hold whole commands for a shell."""


def spoken(text: str) -> list[str]:
    """List the options in the texts of a program, but for its docstrings."""
    tree = ast.parse(text)
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        found
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        for found in SPOKEN.findall(node.value)
    ]


def test_no_room_but_cli_speaks_of_options() -> None:
    """Options of the command line are named by `option`, which knows both languages."""
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sorted(ROOT.rglob("*.py"))
        if (found := spoken(path.read_text(encoding="utf-8")))
        and path.relative_to(ROOT).parts[0] != "cli"
        and str(path.relative_to(ROOT)) not in COMMANDS
    }
    assert wrong == {}
    # Planted fault: a message, also one with a value in it; not a docstring.
    assert spoken('raise E(f"{x}: exists; --overwrite replaces it")') == ["--overwrite"]
    assert spoken('def f():\n    """With --overwrite."""') == []


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two checkpoints whose integers differ."""
    return [
        str(save(tmp_path / f"run{n}", {"w": tensor(np.ones(3)), "n": tensor(np.full(2, n))}))
        for n in (1, 2)
    ]


def test_each_caller_hears_their_own_language(pair: list[str], tmp_path: Path) -> None:
    """The library says ``non_float='first'``, the command line ``--non-float first``."""
    with pytest.raises(MismatchError, match=r"non_float='first' takes it from the first"):
        streamsoup.uniform(pair, output=tmp_path / "soup")
    made = command("uniform", *pair, "-o", tmp_path / "soup")
    assert "--non-float first takes it from the first ingredient" in made.stderr
    options = streamsoup.Options(non_float="first")
    streamsoup.uniform(pair, output=tmp_path / "soup", options=options)
    with pytest.raises(OutputExistsError, match=r"exists already; overwrite=True replaces it"):
        streamsoup.uniform(pair, output=tmp_path / "soup", options=options)
    made = command("uniform", *pair, "--non-float", "first", "-o", tmp_path / "soup")
    # Through the message that is put around it, too.
    assert "exists already; --overwrite replaces it. This very recipe made it" in made.stderr
    small = streamsoup.Options(memory=1000, non_float="first")
    with pytest.raises(BudgetError, match="raise memory above that"):
        streamsoup.uniform(pair, output=tmp_path / "other", options=small)
    made = command("uniform", *pair, "--memory", "1000", "-o", tmp_path / "other")
    assert "raise --memory above that" in made.stderr
    assert not re.search("[\x02\x03]", made.stderr)


def test_warnings_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log as Python has it; on the command line and in the plan as a shell has it."""
    wide = {"w": tensor(np.ones(3)), "v": tensor(np.ones(3, np.float32))}
    path = str(save(tmp_path / "wide", wide))
    with caplog.at_level(logging.WARNING, "streamsoup"):
        options = streamsoup.Options(dtype="f32")
        streamsoup.uniform([path, path], output=tmp_path / "soup", options=options)
    assert any("leave dtype out" in each.getMessage() for each in caplog.records)
    made = command("uniform", path, path, "--dtype", "f32", "-o", tmp_path / "other")
    assert "leave --dtype out" in made.stderr
    made = command("plan", path, path, "--dtype", "f32", "--json")
    assert "leave --dtype out" in made.stdout


def test_an_error_keeps_its_marks_on_the_way() -> None:
    """Through a pickle, as between processes, and through another message."""
    error = OutputExistsError(f"soup: {option('overwrite', True)} replaces it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == f"{again}" == "soup: overwrite=True replaces it"
    assert in_options(again.text) == "soup: --overwrite replaces it"
    assert str(BudgetError(f"{again.text}; or not")) == "soup: overwrite=True replaces it; or not"


def test_no_name_is_taken_for_an_option() -> None:
    """What comes out of a file is printed as it is, whatever bytes it holds."""
    name = printable(option("overwrite", True))
    error = StreamsoupError(f"{name}: no such tensor")
    assert in_options(error.text) == str(error) == f"{name}: no such tensor"
    assert "--overwrite" not in in_options(error.text)


def test_ingredients_are_named_by_their_place(tmp_path: Path) -> None:
    """State dicts have no names but digests."""
    states = [{"w": torch.ones(3)} for _ in range(3)]
    states[1]["w"][2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"holds nan at \[2\].*this ingredient \(2 of 3\) out"):
        streamsoup.uniform(states, output=tmp_path / "soup")
    numbers = [{"n": torch.tensor([n])} for n in (1, 1, 2)]
    with pytest.raises(
        MismatchError, match=r"^ingredient 3: .* differs from that of ingredient 1 \(state dict"
    ):
        streamsoup.uniform(numbers, output=tmp_path / "soup")
