"""Imports go down the floors (DESIGN section 2); rooms on one floor do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import streamsoup

ROOT = Path(streamsoup.__file__).parent

FLOORS = {
    "errors": 0,
    "buffers": 0,
    "sizes": 0,
    "tensors": 0,
    "recipe": 0,
    "journal": 0,
    "folders": 0,
    "supervise": 0,
    "options": 0,
    "versions": 0,
    "formats": 1,
    "kernels": 1,
    "plan": 2,
    "budget": 2,
    "digest": 2,
    "read": 2,
    "destination": 2,
    "staging": 2,
    "reduce": 2,
    "write": 2,
    "live": 2,
    "recalibration": 2,
    "inner": 2,
    "device_mix": 2,
    "stream": 3,
    "inspection": 3,
    "soups": 4,
    "task": 4,
    "angles": 4,
    "comparison": 4,
    "verification": 4,
    "selftest": 5,
    "terminal": 5,
    "cli": 5,
    "demo": 5,
    "plot": 5,
    "report": 5,
}
"""Each room's floor. A new room is entered here, on the floor that the README shows."""

WITHIN_A_FLOOR = {
    # The plan is what its neighbours carry out; digests and staging are what the sink is made of.
    ("digest", "plan"),
    ("read", "plan"),
    ("reduce", "plan"),
    ("inner", "plan"),
    ("device_mix", "plan"),
    ("live", "plan"),
    ("write", "plan"),
    ("write", "digest"),
    ("write", "staging"),
    ("budget", "plan"),
    ("read", "budget"),
    ("reduce", "budget"),
    ("inner", "budget"),
    ("device_mix", "budget"),
    ("staging", "digest"),
    ("staging", "destination"),
    ("recipe", "errors"),
    ("sizes", "errors"),
    ("tensors", "errors"),
    ("journal", "errors"),
    ("options", "errors"),
    # Faces use the terminal; searches ask tasks.
    ("cli", "terminal"),
    ("cli", "selftest"),
    ("cli", "demo"),
    ("cli", "plot"),
    ("cli", "report"),
    ("demo", "report"),
    ("soups", "task"),
    ("soups", "angles"),
    ("soups", "verification"),
    ("comparison", "soups"),
    ("comparison", "task"),
    ("comparison", "angles"),
    ("inner", "reduce"),
    ("device_mix", "reduce"),
}
"""Pairs that may import each other's names on one floor, in this direction."""


def imports(path: Path, root: Path) -> list[tuple[str, str]]:
    """List the rooms that a file imports from, with its own; only those needed to run it."""
    room = path.relative_to(root).parts[0].removesuffix(".py")
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "streamsoup" and len(parts) > 1:
                found.append((room, parts[1]))
    return found


def wrong_imports(root: Path) -> list[str]:
    """List imports that go up, or sideways without leave."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if where.parts[0] in ("__init__.py", "__main__.py"):
            continue
        for room, other in imports(path, root):
            if room == other or other.startswith("__"):
                continue
            if room not in FLOORS or other not in FLOORS:
                wrong.append(f"{where}: {room if room not in FLOORS else other} has no floor")
            elif FLOORS[other] > FLOORS[room]:
                wrong.append(f"{where}: imports {other}, from a floor above")
            elif FLOORS[other] == FLOORS[room] and (room, other) not in WITHIN_A_FLOOR:
                wrong.append(f"{where}: imports its neighbour {other}")
    return wrong


def test_imports_go_down_the_floors() -> None:
    """No room imports from a floor above it, or from a neighbour not named here."""
    assert wrong_imports(ROOT) == []
    made = {pair for path in ROOT.rglob("*.py") for pair in imports(path, ROOT)}
    assert made >= WITHIN_A_FLOOR, "leave that nobody takes"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.py", "from streamsoup.stream import run"),
        ("plan.py", "def f():\n    import streamsoup.cli.common"),
        ("kernels/blocks.py", "from streamsoup.formats import files"),
        ("mystery.py", "from streamsoup.errors import some"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, text: str) -> None:
    """Planted fault: an import upwards, sideways or of an unknown room is reported."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert len(wrong_imports(tmp_path)) == 1


def test_every_room_says_what_it_is() -> None:
    """Each file opens with a docstring, and none is named like a drawer for odds and ends."""
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
        assert path.stem not in ("utils", "core", "base", "helpers", "common_utils"), path


def test_no_public_name_is_a_room() -> None:
    """Importing a room sets its name on the package, and would hide a function of that name."""
    for name in dir(streamsoup):
        if not name.startswith("__"):
            assert not (ROOT / name).exists(), name
            assert not (ROOT / f"{name}.py").exists(), name
            assert not isinstance(getattr(streamsoup, name), ModuleType), name
