"""The compiled kernels: found in a cache, loaded in milliseconds, or compiled once per machine.

Importing numba and letting it load a cached kernel takes half a second, as long as a whole soup of
small models. So what numba compiled (`loops`) is kept as a plain object file, and LLVM's loader,
which numba brings along, puts it into memory; numba itself is imported only to compile.

The cache is ``$XDG_CACHE_HOME/streamsoup`` (``~/.cache/streamsoup``), and is believed only if
nobody else may write there. Where there is none, each process compiles for itself.
"""

# llvmlite has no types.
# mypy: disable-error-code="no-untyped-call,import-untyped"

from __future__ import annotations

import ctypes
import os
import platform
import stat
import tempfile
import threading
from importlib.metadata import version
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import xxhash
from numpy.typing import NDArray

from streamsoup.tensors import DType

__all__ = ["BLOCK", "Mixer", "find_mixer", "has_kernel", "mixer"]

BLOCK = 256
"""Elements at a time. Small: every ingredient's stream moves on often enough for the processor to
see it coming, and what many of them hold at the same place of a page still fits the first cache."""

_NEVER_CALLED = ("NRT_MemInfo_call_dtor", "numba_gil_ensure", "numba_gil_release")
"""What numba's wrapper would call on an exception; kernels raise none."""


class Mixer:
    """A compiled kernel, to be called by many threads at once. It runs without the GIL."""

    def __init__(self, address: int, keep: object) -> None:
        """Wrap the function at `address`, which lives as long as `keep`."""
        parameters = [ctypes.c_int64] * 6 + [ctypes.c_double] + [ctypes.c_int64] * 2
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, *parameters)(address)
        self._keep = keep
        self._own = threading.local()

    def __call__(
        self,
        sums: NDArray[np.float64],
        addresses: NDArray[np.int64],
        factors: NDArray[np.float64],
        fresh: bool,
        divisor: float,
        output: int,
        n: int,
    ) -> bool:
        """Mix blocks of `n` elements, and say whether a result is not finite.

        `sums` is ``(n,)``, or ``(0,)`` to keep sums within the call, which then has to be both
        fresh and finished. `addresses` ``(ingredient,)`` are of the blocks, `factors`
        ``(ingredient,)`` theirs. With `fresh` the sums start anew. `output` is the address of
        the result, or 0 to leave the sums unfinished for a later call. Reads and writes raw
        memory: the caller keeps the blocks alive, and of the size it says.
        """
        if not hasattr(self._own, "scratch"):
            self._own.scratch = np.empty(3 * BLOCK, np.float64)
        spoiled = self._call(
            sums.ctypes.data if len(sums) else 0,
            addresses.ctypes.data,
            factors.ctypes.data,
            self._own.scratch.ctypes.data,
            len(addresses),
            fresh,
            divisor,
            output,
            n,
        )
        return bool(spoiled)


def has_kernel(source: DType) -> bool:
    """Whether this processor can do it: small floats are widened by an instruction of 2012."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    small = source.name in ("F16", "F8_E4M3", "F8_E5M2")
    return not (x86 and small) or bool(llvm.get_host_cpu_features().get("f16c"))


def find_mixer(source: DType, output: DType) -> Mixer | None:
    """Give the kernel for these dtypes if it is in the cache, or None. Takes milliseconds."""
    folder = _cache_folder()
    if folder is None:
        return None
    try:
        with open(os.path.join(folder, _cache_name(source, output)), "rb") as file:
            content = file.read()
    except OSError:
        return None
    digest, kernel = content[:16], content[16:]
    name, _, code = kernel.partition(b"\0")
    # A file torn by a crash, or cut short by a full disk, is as good as none.
    if xxhash.xxh3_128_digest(kernel) != digest:
        return None
    return _load(name.decode(), code)


def mixer(source: DType, output: DType) -> Mixer:
    """Give the kernel for these dtypes, compiled if it must be: a second or two, once."""
    found = find_mixer(source, output)
    if found is not None:
        return found
    from streamsoup.kernels.loops import compile_mix

    name, code = compile_mix(source, output)
    folder = _cache_folder()
    if folder is not None:
        _store(folder, _cache_name(source, output), name.encode() + b"\0" + code)
    return _load(name, code)


def _load(name: str, code: bytes) -> Mixer:
    """Put an object file into memory."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    unreachable = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for symbol in _NEVER_CALLED:
        if llvm.address_of_symbol(symbol) is None:
            llvm.add_symbol(symbol, unreachable)
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Mixer(engine.get_function_address(name), engine)


def _cache_name(source: DType, output: DType) -> str:
    """Name the kernel after all it depends on: our code, numba, LLVM and this processor."""
    features: Any = llvm.get_host_cpu_features()
    parts = [version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), features.flatten()]
    parts += [llvm.get_default_triple(), str(os.environ.get("NUMBA_CPU_NAME"))]
    for room in ("bits.py", "cpu.py", "loops.py", "means.py", "vectors.py"):
        with open(os.path.join(os.path.dirname(__file__), room), encoding="utf-8") as file:
            parts.append(file.read())
    key = xxhash.xxh3_128_hexdigest("\0".join(parts).encode())
    return f"mix-{source.name}-{output.name}-{key}.o".lower()


def _cache_folder() -> str | None:
    """Give the folder of the cache, made if need be, if only this user may write to it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(home):
        return None  # no home is known, or the variable is to be ignored, as its specification says
    folder = os.path.join(home, "streamsoup")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
    except OSError:
        return None
    private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private else None


def _store(folder: str, name: str, kernel: bytes) -> None:
    """Keep a kernel for later processes; a cache that cannot be written does no harm."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=folder)
        with open(descriptor, "wb") as file:
            file.write(xxhash.xxh3_128_digest(kernel) + kernel)
        os.replace(temporary, os.path.join(folder, name))
    except OSError:
        pass
