"""A digest of the code that scores, so that scores of other code are not taken for its own.

What has a source file is known by the whole file, and by the files beside it that it imports, and
those that they import; libraries are not looked at. Code without a file, of a notebook or a
prompt, is known by what Python compiled it to, and by the functions, classes and plain values that
it names. Either way a function's own code counts, with its default arguments and what it encloses:
a file may hold several, and one that is wrapped by another's decorator is not in the file of its
wrapper.

Data is not looked at.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["digest_code", "digest_model", "digest_scripts"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
"""Values whose `repr` says all, and the same in each process."""

_COLLECTIONS = (tuple, list, dict, set)

_INSTALLED = ("site-packages", "dist-packages")
"""Folders of libraries."""

_MOST = 500
"""Files that are looked at for imports, the nearest first: libraries may lie beside a project."""

_SMALL = 1000
"""Entries up to which a collection is a setting, and not data."""

_PARSING = threading.Lock()
"""Two threads that parse confuse Python 3.11 (a `SystemError`, python/cpython#106905), and leave
each other's filters of warnings behind."""

# A child forked meanwhile would wait for a thread that it does not have.
os.register_at_fork(
    before=_PARSING.acquire,
    after_in_parent=_PARSING.release,
    after_in_child=_PARSING.release,
)


def digest_code(
    parts: Iterable[Any], *, version: str, settings: Mapping[str, Any] | None = None
) -> str:
    """Digest functions, classes and modules with all that they are made of.

    `version` is digested too: what else the scores depend on; and `settings`, as far as they are
    plain values. Reads source files; runs nothing.
    """
    code = _Code()
    code.note(version)
    code.add_settings(settings or {})
    for part in parts:
        code.add(part)
    return code.digest.hexdigest()


def digest_model(model: Any) -> str:
    """Digest what a module computes, weights apart: how it prints itself, and its classes."""
    kinds = {type(module) for module in model.modules()}
    by_name = sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
    return digest_code(by_name, version=re.sub(r"\b0x[0-9a-f]+", "", repr(model)))


def digest_scripts(paths: Iterable[str], *, version: str) -> str:
    """Digest source files with what they import of their own projects. See `digest_code`."""
    code = _Code()
    code.note(version)
    for path in paths:
        code.add_file(os.path.abspath(path))
    return code.digest.hexdigest()


class _Code:
    """A digest in the making; each file, function and class is taken in once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: set[Any] = set()
        self._within: set[int] = set()
        """Collections that are being taken in: one may hold itself."""
        self._n_files = 0

    def note(self, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        self.digest.update(b"%d:" % len(content) + content)

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Take in values by name: those that a user would set, and that do not change by use."""
        for name in sorted(settings):
            if not name.startswith("_") and isinstance(settings[name], (*_PLAIN, tuple, dict)):
                self.note(name)
                self._add_value(settings[name])

    def add(self, part: Any) -> None:
        """Take in a part, of whatever kind."""
        if isinstance(part, _PLAIN):
            self.note(repr(part))
        elif isinstance(part, tuple):
            self.note(f"tuple of {len(part)}")
            for each in part:
                self.add(each)
        elif isinstance(part, frozenset):
            self.note(repr(sorted(map(repr, part))))  # its order is another in each process
        elif isinstance(part, CodeType):
            self._add_code(part)
        elif isinstance(part, ModuleType):
            self.note(part.__name__)
            self._add_file(part)
        elif isinstance(part, functools.partial):
            self.add(part.func)
            self._add_value((part.args, part.keywords))
        elif isinstance(part, MethodType):
            self.add((part.__func__, type(part.__self__)))
        elif isinstance(part, (FunctionType, type)):
            self.note(f"{part.__module__}:{part.__qualname__}")
            if id(part) not in self._seen:
                self._seen.add(id(part))
                has_file = self._add_file(part)
                if isinstance(part, type):
                    self._add_class(part, has_file)
                else:
                    self._add_function(part, has_file)
        elif isinstance(part, BuiltinFunctionType):
            self.note(part.__qualname__)
        else:
            self.add(type(part))
            # As `functools.cache` wraps.
            self.add(getattr(part, "__dict__", {}).get("__wrapped__"))

    def _add_named(self, parts: Mapping[str, Any]) -> None:
        for name in sorted(parts):
            self.note(name)
            self._add_value(parts[name])

    def _add_file(self, part: Any) -> bool:
        """Take in the file that a part is in, and say whether it has one."""
        try:
            path = inspect.getsourcefile(part)
        except (TypeError, OSError):
            return False
        if path is None or not os.path.isfile(path) or _is_typed_in(part, path):
            return False
        self.add_file(os.path.abspath(path))
        return True

    def add_file(self, path: str) -> None:
        """Take in a source file, and what it imports of its own project."""
        roots = _roots_of(path)
        todo = [path, *(_packages_of(path) if roots else [])]
        for name in todo:
            if name not in self._seen:
                self._seen.add(name)
                content = _read(name)
                self.note(os.path.relpath(name, path))
                self.digest.update(content)
                self._n_files += 1
                if self._n_files <= _MOST:
                    todo += _imports(name, content, roots)

    def _add_function(self, function: FunctionType, has_file: bool) -> None:
        self._add_code(function.__code__)
        self._add_value((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self.note("nothing yet")
        if not has_file:
            known = function.__globals__
            names = [name for name in _names_in(function.__code__) if name in known]
            self._add_named({name: _or_name(known[name]) for name in names})

    def _add_code(self, code: CodeType) -> None:
        self.digest.update(code.co_code)
        self.add((code.co_names, code.co_varnames, code.co_freevars, code.co_consts))

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
                self._add_value(found)

    def _add_value(self, part: Any) -> None:
        """Take in a default or a setting: small collections, too."""
        if id(part) in self._within:
            self.note("what it is in")
        elif isinstance(part, _COLLECTIONS) and len(part) <= _SMALL:
            self._within.add(id(part))
            entries = part.items() if isinstance(part, dict) else part
            self.note(f"{type(part).__name__} of {len(part)}")
            for entry in sorted(entries, key=repr) if isinstance(part, (dict, set)) else entries:
                self._add_value(entry)
            self._within.discard(id(part))
        else:
            self.add(part)


def _packages_of(path: str) -> list[str]:
    """List what runs before a module of a package does."""
    found: list[str] = []
    while os.path.isfile(init := os.path.join(os.path.dirname(path), "__init__.py")):
        found.append(init)
        path = os.path.dirname(path)
    return found


def _roots_of(path: str) -> list[str]:
    """List the folders that a source file's own project is imported from; none if installed.

    Beside a script, and beside the package that it is in, if any.
    """
    packages = _packages_of(path)
    root = os.path.dirname(os.path.dirname(packages[-1]) if packages else path)
    if os.path.basename(root) in _INSTALLED or root == sysconfig.get_path("stdlib"):
        return []
    return list(dict.fromkeys([os.path.dirname(path), root]))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # nor can it be imported
        return b""


def _imports(path: str, content: bytes, roots: Sequence[str]) -> Iterator[str]:
    """Give the files of a project that a source file has import statements for, wherever."""
    try:
        with _PARSING, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield from _files_of(roots, each.name)
        elif isinstance(node, ast.ImportFrom):
            above = os.path.normpath(os.path.join(path, *[os.pardir] * node.level))
            for each in node.names:
                module = f"{node.module or ''}.{each.name}".lstrip(".")
                yield from _files_of([above] if node.level and roots else roots, module)


def _files_of(folders: Sequence[str], module: str) -> Iterator[str]:
    """Give the source files in some folders that a dotted name may mean, its packages' too."""
    for folder in folders:
        for part in module.split("."):
            folder = os.path.join(folder, part)
            for path in (f"{folder}.py", os.path.join(folder, "__init__.py")):
                if os.path.isfile(path):
                    yield path


def _is_typed_in(part: Any, path: str) -> bool:
    """Whether a class of `__main__` is not of its file: typed in after it (`python -i`), say."""
    if not isinstance(part, type) or part.__module__ != "__main__":
        return False
    methods = [found for found in vars(part).values() if isinstance(found, FunctionType)]
    return path not in [method.__code__.co_filename for method in methods]


def _names_in(code: CodeType) -> set[str]:
    """Give the names that some code, or code in it, may look up."""
    names = set(code.co_names)
    for each in code.co_consts:
        if isinstance(each, CodeType):
            names |= _names_in(each)
    return names


def _or_name(part: Any) -> Any:
    """Give the name of a module that is a library's, and anything else as it is."""
    if not isinstance(part, ModuleType):
        return part
    file = vars(part).get("__file__") or ""
    is_own = file.endswith(".py") and _roots_of(os.path.abspath(file))
    return part if is_own else part.__name__
