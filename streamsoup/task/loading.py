"""Finding the user's code, and letting it run: a task file, a module, or an object in one of them.

A task file is loaded, and what is in it called, as a script is run: what lies beside it can be
imported by it, and by nobody else, and is imported anew when it has changed. What the calling
program has imported itself stays as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from streamsoup.errors import TaskError, printable
from streamsoup.system.schemes import check_local

__all__ = ["alone", "folder_of", "guarded", "imported_beside", "load", "place_of"]

_TASK = "streamsoup_task_"
"""What the names of task files begin with as modules."""

_ALONE = threading.RLock()
"""Held while the user's code runs: what it may change, and is put back, is the whole process's."""


def _renew() -> None:
    """Have a lock that nobody holds: in a forked child, the thread that held it is not there."""
    global _ALONE
    _ALONE = threading.RLock()


os.register_at_fork(after_in_child=_renew)


class _Beside(msgspec.Struct):
    """What was imported from a task file's folder; it is among the modules while its code runs."""

    modules: dict[str, ModuleType] = {}
    stamps: dict[str, tuple[int, int] | None] = {}
    """Of the modules that were imported as the task was loaded: when their files were written, and
    their sizes. None for packages without a file."""


_beside: dict[str, _Beside] = {}


@contextmanager
def alone(folder: str) -> Iterator[None]:
    """Let the user's code run, one thread at a time, and put back what is ours.

    That is the working folder, numpy's handling of errors, and where modules are imported from:
    `folder`, that of a task file, is looked in first; empty for other tasks.
    """
    with _ALONE, _at_the_folder_we_are_in(), np.errstate(), _importing_from(folder):
        yield


@contextmanager
def _at_the_folder_we_are_in() -> Iterator[None]:
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)  # which has no name any more if it was removed
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    if not folder or folder in sys.path:  # the calling program imports from there, too
        yield
        return
    beside = _beside.setdefault(folder, _Beside())
    others = {name: sys.modules[name] for name in beside.modules if name in sys.modules}
    before = set(sys.modules).difference(others)
    sys.modules.update(beside.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # it may have done so itself
            sys.path.remove(folder)
        for name in set(sys.modules).difference(before):
            if _lies_in(folder, name, sys.modules[name]):
                beside.modules[name] = sys.modules.pop(name)
        sys.modules.update(others)


def _lies_in(folder: str, name: str, module: ModuleType) -> bool:
    """Whether a module was imported from a folder, or is a task file in it."""
    known = getattr(module, "__dict__", {})  # some modules make up what they are asked for
    file = known.get("__file__") or ""
    if name.startswith(_TASK):
        return os.path.dirname(file) == folder
    top = os.path.join(folder, name.partition(".")[0])
    places = [file, *(f"{path}{os.sep}" for path in known.get("__path__") or ())]
    return any(place.startswith((f"{top}.", f"{top}{os.sep}")) for place in places)


def load(text: str) -> Any:
    """Import a task file, a module, or an object in one of them. Raises `TaskError`."""
    check_local(text, TaskError)
    path, attribute = _parts_of(text)
    module = _load_file(path) if path.endswith(".py") else _load_module(path, text)
    found: Any = module
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            raise TaskError(f"{printable(path)}: has no {printable(attribute)!r}; check the name")
        found = getattr(found, part)
    return found


def _parts_of(text: str) -> tuple[str, str]:
    """Split what names a task into its file or module, and what is meant in it."""
    path, _, attribute = text.rpartition(":")
    if text.endswith(".py"):
        return text, ""
    if not path.endswith(".py"):
        path, _, attribute = text.partition(":")
    return path, attribute


def folder_of(text: str) -> str:
    """Give the folder that a task file, named so, imports from; nothing for what is none."""
    path, _ = _parts_of(text)
    return os.path.dirname(os.path.abspath(path)) if path.endswith(".py") else ""


def imported_beside(module: ModuleType) -> list[ModuleType]:
    """List the modules that a task file imported from its own folder, by whatever way."""
    beside = _beside.get(os.path.dirname(module.__file__ or ""), _Beside())
    return [beside.modules[name] for name in sorted(beside.stamps)]


def place_of(name: str) -> str:
    """Give the name of a task that does not hang on where we are: its file's real path."""
    file, separator, attribute = name.rpartition(":")
    for path, rest in ((name, ""), (file, separator + attribute)):
        if os.path.isfile(path):
            return os.path.realpath(path) + rest
    return name


def guarded(where: str, folder: str, run: Callable[[], Any]) -> Any:
    """Run the user's code, as `alone` does, and name it where it fails."""
    try:
        with alone(folder):
            return run()
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise TaskError(f"{where}: cannot be loaded: {kind}: {printable(error, 500)}") from error


def _load_file(path: str) -> ModuleType:
    where = printable(path)
    if not os.path.isfile(path):
        raise TaskError(f"{where}: no such task file; check the path")
    folder, file = os.path.split(os.path.abspath(path))
    module_name = f"{_TASK}{os.path.splitext(file)[0]}"
    spec = importlib.util.spec_from_file_location(module_name, os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    def execute() -> None:
        sys.modules[module_name] = module  # dataclasses and pickles look modules up by name
        spec.loader.exec_module(module)  # type: ignore[union-attr]

    with _ALONE:
        beside = _beside.get(folder)
        if beside is not None and _stamps(beside.modules) != beside.stamps:
            del _beside[folder]  # they are imported anew
        importlib.invalidate_caches()
        guarded(where, folder, execute)
        if folder in _beside:
            _beside[folder].stamps = _stamps(_beside[folder].modules)
    return module


def _stamps(modules: dict[str, ModuleType]) -> dict[str, tuple[int, int] | None]:
    """Say when the files of modules were written, and their sizes; not those of task files."""
    found: dict[str, tuple[int, int] | None] = {}
    for name, module in modules.items():
        if not name.startswith(_TASK):
            file = getattr(module, "__file__", None) or ""
            status = os.stat(file) if os.path.isfile(file) else None
            found[name] = None if status is None else (status.st_mtime_ns, status.st_size)
    return found


def _load_module(name: str, text: str) -> ModuleType:
    if os.path.exists(name) or os.sep in name or not name:
        raise TaskError(f"{printable(text)}: is no task; give a file task.py, or module:object")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return guarded(printable(name), "", lambda: importlib.import_module(name))  # type: ignore[no-any-return]
    except TaskError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name == name.partition(".")[0]:
            raise TaskError(
                f"{printable(text)}: there is no module {printable(name)!r}; "
                "give a file task.py, or module:object that Python can import"
            ) from None
        raise
