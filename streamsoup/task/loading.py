"""Finding the user's code: a task file, a module, or an object in one of them.

A task file imports what lies beside it as a script does. What it so imports is its own: it is
neither among the calling program's modules nor among those of another task, and every loading of
the file executes all of it anew, from the text as it is then.

So each loading is a package with a name of its own, whose folder is that of the task file:
``helper.py`` is ``streamsoup_task_….helper`` in `sys.modules`. Its modules are executed with a
built-in `__import__` of their own, which looks into the folder first and leaves everything else to
Python's. Functions keep the built-ins of their module, so it also serves imports that run later,
in any thread, while nothing else notices.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import uuid
import weakref
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import msgspec

from streamsoup.errors import TaskError, printable
from streamsoup.system.schemes import check_local
from streamsoup.task.running import loaded

__all__ = ["Loaded", "load", "place_of"]


class _Hold:
    """Its end is the end of a loading."""


class Loaded(msgspec.Struct, frozen=True):
    """The code of a task."""

    source: Any
    """The module or object."""
    files: tuple[str, ...] = ()
    """What a task file imported from its own folder while it was loaded, itself included."""
    hold: object = None
    """Keep this as long as the code may import: a task file's modules are forgotten with it."""


def load(text: str) -> Loaded:
    """Import a task file, a module, or an object in one of them.

    Raises:
        TaskError: If there is no such thing, or its code fails.
    """
    check_local(text, TaskError)
    path, attribute = _parts_of(text)
    found = _load_file(path) if path.endswith(".py") else Loaded(_load_module(path, text))
    source = found.source
    for part in attribute.split(".") if attribute else ():
        if not hasattr(source, part):
            raise TaskError(f"{printable(path)}: has no {printable(attribute)!r}; check the name")
        source = getattr(source, part)
    return Loaded(source, found.files, found.hold)


def place_of(name: str) -> str:
    """Return the name of a task with the real path of its file, wherever we are."""
    file, separator, attribute = name.rpartition(":")
    for path, rest in ((name, ""), (file, separator + attribute)):
        if os.path.isfile(path):
            return os.path.realpath(path) + rest
    return name


def _parts_of(text: str) -> tuple[str, str]:
    """Split what names a task into its file or module, and what is meant in it."""
    path, _, attribute = text.rpartition(":")
    if text.endswith(".py"):
        return text, ""
    if not path.endswith(".py"):
        path, _, attribute = text.partition(":")
    return path, attribute


def _load_file(path: str) -> Loaded:
    where = printable(path)
    if not os.path.isfile(path):
        raise TaskError(f"{where}: no such task file; check the path")
    package, hold = _Package(os.path.abspath(path)), _Hold()
    forget = weakref.finalize(hold, package.forget)
    try:
        return Loaded(loaded(where, package.load), package.files, hold)
    except BaseException:
        forget()
        raise


def _load_module(name: str, text: str) -> ModuleType:
    if os.path.exists(name) or os.sep in name or not name:
        raise TaskError(f"{printable(text)}: is not a task; give a file task.py, or module:object")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return loaded(printable(name), lambda: importlib.import_module(name))  # type: ignore[no-any-return]
    except TaskError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name == name.partition(".")[0]:
            raise TaskError(
                f"{printable(text)}: there is no module {printable(name)!r}; "
                "give a file task.py, or module:object that Python can import"
            ) from None
        raise


class _Package:
    """One loading of a task file, and the finder of its modules."""

    def __init__(self, path: str) -> None:
        self._path, self._folder = path, os.path.dirname(path)
        self._name = f"streamsoup_task_{uuid.uuid4().hex[:12]}"
        stem = os.path.splitext(os.path.basename(path))[0]
        self._main = f"{self._name}.{stem.replace('.', '_')}"
        self._builtins = vars(builtins) | {"__import__": self._import}

    def load(self) -> ModuleType:
        """Execute the task file."""
        root = sys.modules[self._name] = ModuleType(self._name)
        root.__path__, root.__file__ = [self._folder], None
        importlib.invalidate_caches()
        sys.meta_path.insert(0, self)
        return importlib.import_module(self._main)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of all modules that were imported so far."""
        modules = (sys.modules[name] for name in sorted(sys.modules) if self._owns(name))
        return tuple(module.__file__ for module in modules if module.__file__ is not None)

    def forget(self) -> None:
        """Remove the modules from `sys.modules`."""
        sys.meta_path.remove(self)
        for name in list(filter(self._owns, sys.modules)):
            del sys.modules[name]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of this package, for `importlib`."""
        if not self._owns(name):
            return None
        is_main = name == self._main
        spec = (
            importlib.util.spec_from_file_location(name, self._path)
            if is_main
            else PathFinder.find_spec(name, path)
        )
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _TextLoader(name, spec.loader.path, self._builtins)
        return spec

    def _owns(self, name: str) -> bool:
        return name.partition(".")[0] == self._name

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """Import what lies beside the task file; the rest as Python does. See `__import__`."""
        if level or not self._has(name):
            found = builtins.__import__(name, globals, locals, fromlist or (), level)
            return self._own_importlib() if found is importlib else found
        whole = f"{self._name}.{name}"
        try:
            found = builtins.__import__(whole, globals, locals, fromlist or ("__name__",))
        except ModuleNotFoundError as error:
            error.msg = error.msg.replace(f"{self._name}.", "")
            error.name = (error.name or "").removeprefix(f"{self._name}.")
            raise
        return found if fromlist else sys.modules[f"{self._name}.{name.partition('.')[0]}"]

    def _own_importlib(self) -> ModuleType:
        """Return `importlib` as the task sees it: `import_module` looks into its folder, too."""

        def import_module(name: str, package: str | None = None) -> ModuleType:
            name = importlib.util.resolve_name(name, package)
            return importlib.import_module(f"{self._name}.{name}" if self._has(name) else name)

        own = ModuleType("importlib")
        vars(own).update(vars(importlib) | {"import_module": import_module})
        return own

    def _has(self, name: str) -> bool:
        """Return True if a name is one of the folder: as for scripts, a plain folder comes last."""
        top = name.partition(".")[0]
        if top in sys.builtin_module_names:
            return False
        spec = PathFinder.find_spec(f"{self._name}.{top}", [self._folder])
        if spec is None or spec.origin is not None:
            return spec is not None
        try:
            return importlib.util.find_spec(top) is None
        except ValueError:  # a module without a spec is there
            return False


class _TextLoader(SourceFileLoader):
    """Compiles the text as it is; compiled files are told apart by size and second alone."""

    def __init__(self, name: str, path: str, own: Mapping[str, Any]) -> None:
        super().__init__(name, path)
        self._own = own

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._own
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)
