"""A digest of the code that scores, so that scores of other code are not taken for its own.

Code in a file is known by the text of the file, and by the text of the files of its own project
that its import statements may name, and so on from there. Installed libraries are not read. Code
without a file, from a notebook or a prompt, is known by its compiled form, and by the functions,
classes and plain values that it names. Either way a function's own code counts, with its defaults
and what it encloses: a file may hold several functions, and a decorator from elsewhere hides the
file of what it wraps.

Too many files may count, never too few: a name in an import statement is looked up in every folder
of the project that was named so far. A score that cannot be told to be valid is measured again.
Data is not read.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["digest_code", "digest_model", "digest_scripts", "is_installed"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
"""Types whose `repr` is complete, and the same in every process."""

_COLLECTIONS = (tuple, list, dict, set)

_MOST_FILES = 500
"""Files of one project that are read, the nearest first."""

_MOST_ENTRIES = 1000
"""Largest collection that counts as a setting; larger ones are data."""

_IMPORT = re.compile(rb"\b(?:from|import)\b(?:[^\n;\\(]|\\\r?\n|\([^)]*\))*")
"""An import statement, on one line or continued by a backslash or parentheses."""

_NAME = re.compile(rb"[^\W\d]\w*|[\x80-\xff\w]+")


def digest_code(
    parts: Iterable[Any],
    *,
    version: str,
    settings: Mapping[str, Any] | None = None,
    files: Iterable[str] = (),
) -> str:
    """Digest functions, classes and modules with all that they are made of.

    Reads source files and runs nothing.

    Args:
        parts: Functions, classes, modules, and objects that are called.
        version: What else the scores depend on.
        settings: Attributes of a task object; those with plain public values count.
        files: Source files that count besides, with what they import.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    digest = _CodeDigest()
    digest.note(version)
    for name in sorted(settings or {}):
        value = (settings or {})[name]
        if not name.startswith("_") and isinstance(value, (*_PLAIN, tuple, dict)):
            digest.note(name)
            digest.add_value(value)
    for part in parts:
        digest.add(part)
    for path in files:
        digest.add_file(path)
    return digest.hexdigest()


def digest_model(model: Any) -> str:
    """Digest what a module computes, weights apart: its `repr`, and the code of its classes."""
    kinds = {type(module) for module in model.modules()}
    by_name = sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
    return digest_code(by_name, version=re.sub(r"\b0x[0-9a-f]+", "", repr(model)))


def digest_scripts(paths: Iterable[str], *, version: str) -> str:
    """Digest source files with what they import of their own projects. See `digest_code`."""
    return digest_code((), version=version, files=map(os.path.abspath, paths))


def is_installed(path: str) -> bool:
    """Return True for a source file of Python's own library or of an installed package."""
    folders = os.path.abspath(path).split(os.sep)[:-1]
    if "site-packages" in folders or "dist-packages" in folders:
        return True
    return os.path.abspath(path).startswith(sysconfig.get_path("stdlib") + os.sep)


class _CodeDigest:
    """A digest in the making; each file, function and class is added once."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: set[Any] = set()
        self._within: set[int] = set()
        """Collections that are being added: one may hold itself."""

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def note(self, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        self._hash.update(b"%d:" % len(content) + content)

    def add_file(self, path: str) -> None:
        """Add a source file, and those of its own project that it may import."""
        for name in _project_files(path):
            if name not in self._seen:
                self._seen.add(name)
                self.note(os.path.relpath(name, path))
                self._hash.update(_read(name))

    def add(self, part: Any) -> None:
        """Add code of any kind; of other objects, their class."""
        if isinstance(part, _PLAIN):
            self.note(repr(part))
        elif isinstance(part, tuple):
            self.note(f"tuple of {len(part)}")
            for each in part:
                self.add(each)
        elif isinstance(part, frozenset):
            self.note(repr(sorted(map(repr, part))))  # its order differs between processes
        elif isinstance(part, CodeType):
            self._hash.update(part.co_code)
            self.add((part.co_names, part.co_varnames, part.co_freevars, part.co_consts))
        elif isinstance(part, ModuleType):
            if not self._add_file_of(part):
                self.note(part.__name__)
        elif isinstance(part, functools.partial):
            self.add(part.func)
            self.add_value((part.args, part.keywords))
        elif isinstance(part, MethodType):
            self.add((part.__func__, type(part.__self__)))
        elif isinstance(part, (FunctionType, type)):
            self._add_definition(part)
        elif isinstance(part, BuiltinFunctionType):
            self.note(part.__qualname__)
        else:
            self.add(type(part))
            self.add(getattr(part, "__dict__", {}).get("__wrapped__"))  # as functools.cache wraps

    def add_value(self, part: Any) -> None:
        """Add a default or a setting: small collections, too."""
        if id(part) in self._within:
            self.note("a collection that it is in")
        elif isinstance(part, _COLLECTIONS) and len(part) <= _MOST_ENTRIES:
            self._within.add(id(part))
            entries = part.items() if isinstance(part, dict) else part
            self.note(f"{type(part).__name__} of {len(part)}")
            for entry in sorted(entries, key=repr) if isinstance(part, (dict, set)) else entries:
                self.add_value(entry)
            self._within.discard(id(part))
        else:
            self.add(part)

    def _add_definition(self, part: FunctionType | type) -> None:
        self.note(part.__qualname__)
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        has_file = self._add_file_of(part)
        if not has_file:
            self.note(part.__module__)
        if isinstance(part, type):
            self._add_class(part, has_file)
        else:
            self._add_function(part, has_file)

    def _add_file_of(self, part: Any) -> bool:
        """Add the source file of a part, and return True if it has one."""
        try:
            path = inspect.getsourcefile(part)
        except (TypeError, OSError):
            return False
        if path is None or not os.path.isfile(path) or _is_typed_in(part, path):
            return False
        self.add_file(os.path.abspath(path))
        return True

    def _add_function(self, function: FunctionType, has_file: bool) -> None:
        self.add(function.__code__)
        self.add_value((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self.note("an empty cell")
        if not has_file:
            known = function.__globals__
            for name in sorted(_names_in(function.__code__) & known.keys()):
                self.note(name)
                self.add_value(_or_name(known[name]))

    def _add_class(self, part: type, has_file: bool) -> None:
        for base in part.__bases__:
            if base is not object:
                self.add(base)
        for name in sorted(vars(part)):
            found = vars(part)[name]
            if isinstance(found, property):
                found = found.fget
            elif isinstance(found, functools.cached_property):
                found = found.func
            elif not isinstance(found, type):
                found = getattr(found, "__wrapped__", found)  # static methods, cached ones
            is_code = isinstance(found, (FunctionType, functools.partial))
            is_own = not has_file and not name.startswith("__")
            if is_code or (is_own and isinstance(found, (type, *_PLAIN, *_COLLECTIONS))):
                self.note(name)
                self.add_value(found)


def _project_files(path: str) -> list[str]:
    """List a source file and those of its project that its import statements may name.

    A project is the file's own folder and the one that its package lies in. Each name of an import
    statement is looked up in these, and in every folder of theirs that was named before.
    """
    packages: list[str] = []
    top = os.path.dirname(path)
    while os.path.isfile(init := os.path.join(top, "__init__.py")):
        packages.append(init)
        top = os.path.dirname(top)
    if is_installed(path):
        return [path]
    folders = list(dict.fromkeys([os.path.dirname(path), top]))
    files = dict.fromkeys([path, *packages])
    names: dict[str, None] = {}
    todo = list(files)
    for file in todo:  # it grows meanwhile
        fresh = [name for name in _imported_names(_read(file)) if name not in names]
        names |= dict.fromkeys(fresh)
        pairs = [(folder, name) for name in fresh for folder in folders]
        for folder, name in pairs:
            place = os.path.join(folder, name)
            if os.path.isdir(place) and place not in folders:
                folders.append(place)
                pairs += [(place, each) for each in names]
            found = [
                p
                for p in (f"{place}.py", os.path.join(place, "__init__.py"))
                if p not in files and os.path.isfile(p)
            ]
            files |= dict.fromkeys(found)
            todo += found if len(todo) <= _MOST_FILES else []
    return list(files)


def _imported_names(content: bytes) -> list[str]:
    """List the names in all import statements of a source file, and in what looks like one."""
    found = (_NAME.findall(statement) for statement in _IMPORT.findall(content))
    return [name.decode("utf-8", "replace") for names in found for name in names]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it cannot be imported either
        return b""


def _is_typed_in(part: Any, path: str) -> bool:
    """Return True for a class of `__main__` that was typed in after its file ran (`python -i`)."""
    if not isinstance(part, type) or part.__module__ != "__main__":
        return False
    methods = [found for found in vars(part).values() if isinstance(found, FunctionType)]
    return path not in [method.__code__.co_filename for method in methods]


def _names_in(code: CodeType) -> set[str]:
    """Return the names that some code, or code in it, may look up."""
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _or_name(part: Any) -> Any:
    """Return the name of a library's module, and anything else as it is."""
    if not isinstance(part, ModuleType):
        return part
    file = vars(part).get("__file__") or ""
    return part if file.endswith(".py") and not is_installed(file) else part.__name__
