"""Finding the user's code: a task file, a module, or an object in one of them.

A task file is loaded as a script is run: what lies beside it can be imported by it, and by no other
task file, and is imported anew when it has changed. What the calling program has imported itself
stays as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from streamsoup.errors import TaskError, printable

__all__ = ["guarded", "imported_beside", "load", "place_of", "put_back"]


def load(text: str) -> Any:
    """Import a task file, a module, or an object in one of them. Raises `TaskError`."""
    path, _, attribute = text.rpartition(":")
    if text.endswith(".py"):
        path, attribute = text, ""
    elif not path.endswith(".py"):
        path, _, attribute = text.partition(":")
    module = _load_file(path) if path.endswith(".py") else _load_module(path, text)
    found: Any = module
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            raise TaskError(f"{printable(path)}: has no {printable(attribute)!r}; check the name")
        found = getattr(found, part)
    return found


def imported_beside(module: ModuleType) -> list[ModuleType]:
    """List the modules that a task file imported from its own folder, by whatever way."""
    folder = os.path.dirname(module.__file__ or "")
    names = sorted(_beside[folder].stamps) if folder in _beside else []
    return [sys.modules[name] for name in names if name in sys.modules]


def place_of(name: str) -> str:
    """Give the name of a task that does not hang on where we are: its file's real path."""
    file, separator, attribute = name.rpartition(":")
    for path, rest in ((name, ""), (file, separator + attribute)):
        if os.path.isfile(path):
            return os.path.realpath(path) + rest
    return name


def guarded(where: str, run: Callable[[], Any]) -> Any:
    """Run the user's code, and name it where it fails."""
    try:
        with put_back():
            return run()
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise TaskError(f"{where}: cannot be loaded: {kind}: {printable(error, 500)}") from error


@contextmanager
def put_back() -> Iterator[None]:
    """Put back what the user's code may change and ours goes by: folder, and numpy's errors."""
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)  # which has no name any more if it was removed
    try:
        with np.errstate():
            yield
    finally:
        os.fchdir(folder)
        os.close(folder)


class _Beside(msgspec.Struct):
    """What is known of a task file's folder since it was put on the path."""

    before: set[str]
    """The modules that were there by then."""
    stamps: dict[str, tuple[int, int] | None] = {}
    """Of the modules that were imported from there as the task was loaded."""


_beside: dict[str, _Beside] = {}


def _load_file(path: str) -> ModuleType:
    where = printable(path)
    if not os.path.isfile(path):
        raise TaskError(f"{where}: no such task file; check the path")
    folder, file = os.path.split(os.path.abspath(path))
    module_name = f"streamsoup_task_{os.path.splitext(file)[0]}"
    spec = importlib.util.spec_from_file_location(module_name, os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for known in list(_beside):
        if known != folder or _stamps(folder) != _beside[folder].stamps:
            _forget(known)
    if folder not in sys.path:
        sys.path.insert(0, folder)
        _beside[folder] = _Beside(set(sys.modules))
    sys.modules[module_name] = module  # dataclasses and pickles look modules up by name
    guarded(where, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    if folder in _beside:
        _beside[folder].stamps = _stamps(folder)
    return module


def _forget(folder: str) -> None:
    """Take a folder off the path, and what was imported from it: names such as utils are common."""
    for name in _stamps(folder):
        del sys.modules[name]
    del _beside[folder]
    with suppress(ValueError):
        sys.path.remove(folder)


def _stamps(folder: str) -> dict[str, tuple[int, int] | None]:
    """Give the modules imported from a folder, and when their files were written, and their sizes.

    None for packages without a file.
    """
    importlib.invalidate_caches()
    found: dict[str, tuple[int, int] | None] = {}
    for name, module in list(sys.modules.items()):
        known = getattr(module, "__dict__", {})  # some modules make up what they are asked for
        file = known.get("__file__") or ""
        top = os.path.join(folder, name.partition(".")[0])
        places = [file, *(f"{path}{os.sep}" for path in known.get("__path__") or ())]
        ours = any(place.startswith((f"{top}.", f"{top}{os.sep}")) for place in places)
        if ours and name not in _beside[folder].before:
            status = os.stat(file) if os.path.isfile(file) else None
            found[name] = None if status is None else (status.st_mtime_ns, status.st_size)
    return found


def _load_module(name: str, text: str) -> ModuleType:
    if os.path.exists(name) or os.sep in name or not name:
        raise TaskError(f"{printable(text)}: is no task; give a file task.py, or module:object")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return guarded(printable(name), lambda: importlib.import_module(name))  # type: ignore[no-any-return]
    except TaskError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name == name.partition(".")[0]:
            raise TaskError(
                f"{printable(text)}: there is no module {printable(name)!r}; "
                "give a file task.py, or module:object that Python can import"
            ) from None
        raise
