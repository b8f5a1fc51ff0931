"""Compiled kernels as object files: found in a cache, loaded in a millisecond, or made once.

Importing numba and letting it load a cached kernel takes half a second, longer than a whole soup of
small models. So what numba compiled is kept as a plain object file, and put into memory by
`linking`, or, on processors that it does not know, by LLVM's loader. Numba itself is imported only
to compile.

The cache is ``$XDG_CACHE_HOME/streamsoup`` (``~/.cache/streamsoup``), and is used only if no other
user can have written there (`system.private`). Where there is none, each process compiles for
itself.
"""

# llvmlite has no types.
# mypy: disable-error-code="no-untyped-call,import-untyped"

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import xxhash

from streamsoup.kernels.fast import processor
from streamsoup.kernels.fast.linking import Kernel, address_of_symbol, link, needed
from streamsoup.system.folders import Folder
from streamsoup.system.private import open_private, read_private, write_private
from streamsoup.system.versions import llvmlite_version, numba_version

__all__ = ["find", "make", "object_file", "spend"]

_KERNELS = os.path.dirname(os.path.dirname(__file__))

_NO_MATTER = {"NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR"}
"""What numba may be told for each job anew, and compiles the same code."""


def object_file(compiled: Callable[[], Any]) -> tuple[str, bytes]:
    """Return the symbol of a function that `compiled` makes by `numba.cfunc`, and its object file.

    Raises `ImportError` or `AttributeError` where numba has no longer what this is read from: at
    once, before seconds go into compiling.
    """
    from numba.core.codegen import CPUCodeLibrary

    # What numba itself keeps in its cache; what is exported is a plain C function.
    serialize = CPUCodeLibrary.serialize_using_object_code
    function = compiled()
    _, _, (content, _) = serialize(function._library)
    return function.native_name, content


def find(label: str, rooms: Sequence[str]) -> Kernel | None:
    """Return the kernel of a label if it is in the cache, or None. Takes a millisecond.

    `rooms` are the files of `kernels` whose text it was compiled from.
    """
    folder = _cache_folder()
    if folder is None:
        return None
    try:
        with folder:
            content = read_private(folder, _cache_name(label, rooms))
        digest, kernel = content[:16], content[16:]
        name, _, code = kernel.partition(b"\0")
        # A file torn by a crash, or cut short by a full disk, is as good as none.
        if xxhash.xxh3_128_digest(kernel) != digest:
            return None
        return _load(name.decode(), code)
    except (OSError, ImportError):  # LLVM's, where it is needed
        return None


def make(label: str, rooms: Sequence[str], compiled: Callable[[], tuple[str, bytes]]) -> Kernel:
    """Keep, and load, what `compiled` makes: the symbol of a kernel, and its object file.

    Raises `ImportError` where it needs what is not there, `OSError` where memory may not become
    executable.
    """
    name, code = compiled()
    kernel = _load(name, code)
    folder = _cache_folder()
    if folder is not None:
        with folder:
            _store(folder, _cache_name(label, rooms), name.encode() + b"\0" + code)
    return kernel


def spend(label: str, rooms: Sequence[str], seconds: float) -> float:
    """Add to the seconds that runs of this user spent for want of a kernel; return their sum.

    Kept as a line of text beside the kernels, so that many small jobs are worth compiling it once,
    as a large one is; anew for another version of the kernel. Two runs at once may lose one's
    part. Without a cache it is `seconds` alone.
    """
    folder = _cache_folder()
    if folder is None:
        return seconds
    with folder:
        try:
            name = _cache_name(label, rooms).removesuffix(".o") + "-seconds.txt"
        except (OSError, ImportError):  # LLVM's: nothing can be compiled
            return seconds
        spent = 0.0
        with suppress(OSError, ValueError):  # the first time, or torn
            spent = float(read_private(folder, name)[:40])
        spent = seconds + (spent if 0 <= spent < 1e9 else 0.0)
        with suppress(OSError):
            write_private(folder, name, b"%.6f\n" % spent)
    return spent


def _load(name: str, code: bytes) -> Kernel:
    """Put an object file into memory."""
    return link(code, name) or _load_by_llvm(name, code)


def _load_by_llvm(name: str, code: bytes) -> Kernel:
    """Put an object file of any processor into memory."""
    import llvmlite.binding as llvm

    llvm.check_jit_execution()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for symbol in needed(code):
        if llvm.address_of_symbol(symbol) is None:
            try:
                llvm.add_symbol(symbol, address_of_symbol(symbol))
            except LookupError:
                # LLVM would leave every call of the kernel at address 0, and say nothing.
                raise ImportError(f"numba calls {symbol}, which is nowhere") from None
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Kernel(engine.get_function_address(name), engine)


def _cache_name(label: str, rooms: Sequence[str]) -> str:
    """Name the kernel after all it depends on: our code, numba, LLVM and the processor."""
    parts = [numba_version(), llvmlite_version(), processor.description()]
    # Most of them may change what is compiled, such as NUMBA_OPT and NUMBA_CPU_NAME.
    told = {key: value for key, value in os.environ.items() if key.startswith("NUMBA_")}
    parts += sorted(f"{key}={told[key]}" for key in told.keys() - _NO_MATTER)
    for room in rooms:
        with open(os.path.join(_KERNELS, room), encoding="utf-8") as file:
            parts.append(file.read())
    text = "\0".join(parts).encode("utf-8", "surrogateescape")  # whatever the locale
    key = xxhash.xxh3_128_hexdigest(text)
    return f"{label}-{key}.o".lower()


def _cache_folder() -> Folder | None:
    """Open the folder of the cache, made if need be, if only this user can have written there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    # No home is known, or the variable is to be ignored, as its specification says.
    return open_private(os.path.join(home, "streamsoup")) if os.path.isabs(home) else None


def _store(folder: Folder, name: str, kernel: bytes) -> None:
    """Keep a kernel for later processes; a cache that cannot be written does no harm."""
    with suppress(OSError):
        write_private(folder, name, xxhash.xxh3_128_digest(kernel) + kernel)
