"""The rooms of the package and who may import whom (DESIGN section 2): one way, no exceptions."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import streamsoup

ROOT = Path(streamsoup.__file__).parent

ROOMS = [
    # plain words and data
    *("version", "errors", "sizes", "tensors", "rule", "reading", "recipe", "options"),
    # what computes
    *("system", "kernels", "formats", "engine", "cluster", "output", "live"),
    # what chooses
    *("methods", "task", "search", "study", "training"),
    # what people call
    *("selftest", "demo", "cli"),
]
"""From the ground up: a room imports from those before it, never from one after it."""


def imports(path: Path) -> list[str]:
    """List the rooms that a file imports from; lazily, and for types alone, too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "streamsoup" and len(parts) > 1:
                found.append(parts[1])
    return found


def wrong_imports(root: Path) -> list[str]:
    """List imports that go up."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        room = where.parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in imports(path):
            if room not in ROOMS:
                wrong.append(f"{where}: {room} is not listed")
            elif other not in ROOMS:
                wrong.append(f"{where}: imports {other}, which is not listed")
            elif ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{where}: imports {other}, which stands above {room}")
    return wrong


def test_imports_go_one_way() -> None:
    """No room imports from one above it: not lazily, and not for types alone."""
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine/plan.py", "from streamsoup.output.make import make"),
        ("engine/plan.py", "def f():\n    import streamsoup.cli.common"),
        (
            "kernels/blocks.py",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from streamsoup.engine import read",
        ),
        ("mystery.py", "from streamsoup.errors import some"),
        ("cli/mystery.py", "from streamsoup import mystery"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, text: str) -> None:
    """Planted fault: an import upwards, lazy or for types, or of an unknown room is reported."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert len(wrong_imports(tmp_path)) == 1


def modules(root: Path) -> dict[str, set[str]]:
    """Map each module below `root` to the modules it imports, lazily and for types included."""
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    edges[name].add(whole if whole in names else node.module)
            elif isinstance(node, ast.Import):
                edges[name].update(alias.name for alias in node.names)
        edges[name] &= names.keys() - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """List the groups of modules that import each other in a circle."""
    reached: dict[str, set[str]] = {}
    for name in edges:
        seen: set[str] = set()
        todo = list(edges[name])
        while todo:
            each = todo.pop()
            if each not in seen:
                seen.add(each)
                todo.extend(edges[each])
        reached[name] = seen
    groups = {
        tuple(sorted(each for each in edges if each in reached[name] and name in reached[each]))
        for name in edges
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def test_no_modules_import_each_other_in_a_circle(tmp_path: Path) -> None:
    """Not even lazily, or for types alone; a planted circle of three is found."""
    assert circles(modules(ROOT)) == []
    planted = tmp_path / "streamsoup"
    planted.mkdir()
    for name, other in [("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]:
        (planted / f"{name}.py").write_text(f"def f():\n    import streamsoup.{other}\n")
    assert circles(modules(planted)) == [["streamsoup.a", "streamsoup.b", "streamsoup.c"]]


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
