"""Calls of the C library that Python does not wrap: one function each, and nowhere else.

Failures raise `OSError`. A system may lack those that only Linux has: what a call would have made
faster or safer is then left out, and its function says so by returning False.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
from contextlib import suppress

__all__ = [
    "EXCHANGE",
    "NO_REPLACE",
    "address_of_symbol",
    "begin_writing",
    "file_system",
    "forget_cached",
    "is_same_memory",
    "kill_with_parent",
    "make_executable",
    "map_file",
    "rename",
    "reserve",
    "set_float_environment",
    "standard_float_environment",
    "sync",
    "unmap",
]

NO_REPLACE, EXCHANGE = 1, 2
"""Ways to rename, as renameat2(2) has them."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_HAS_FALLOCATE = hasattr(_LIBC, "fallocate")
if _HAS_FALLOCATE:
    _LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_HAS_SYNC_FILE_RANGE = hasattr(_LIBC, "sync_file_range")
if _HAS_SYNC_FILE_RANGE:
    _LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_AT_FDCWD = -100
_FAILED = ctypes.c_void_p(-1).value
_PR_SET_PDEATHSIG = 1
_SYNC_FILE_RANGE_WRITE = 2

_FENV_NBYTES = 256
"""More than a ``fenv_t`` takes anywhere: 32 bytes on x86-64, 8 on ARM."""


def _default_float_environment() -> ctypes.c_void_p:
    """Return ``FE_DFL_ENV``: half to even, subnormals kept, no traps.

    It is -1 in the C libraries of Linux, and the address of a variable in that of macOS.
    """
    try:
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(_LIBC, "_FE_DFL_ENV")))
    except ValueError:
        return ctypes.c_void_p(-1)


_FE_DFL_ENV = _default_float_environment()


def rename(
    source: str,
    target: str,
    flag: int,
    *,
    source_folder: int = _AT_FDCWD,
    target_folder: int = _AT_FDCWD,
) -> bool:
    """Rename with a flag of Linux's renameat2; return False if unsupported.

    Relative names start at the folders with these descriptors. Raises `FileExistsError` if
    something is at `target` that may not be replaced.
    """
    if not hasattr(_LIBC, "renameat2"):
        return False
    names = os.fsencode(source), os.fsencode(target)
    while _LIBC.renameat2(source_folder, names[0], target_folder, names[1], flag) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
            return False  # EPERM: some containers forbid calls that they do not know
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), target)
    return True


def reserve(descriptor: int, nbytes: int) -> bool:
    """Allocate at least `nbytes` for a file on the disk; return False if unsupported.

    Not `os.posix_fallocate`: where the file system has no such call, the C library would write to
    every block instead, which takes hours on a network.
    """
    if not _HAS_FALLOCATE:
        return False
    while _LIBC.fallocate(descriptor, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def begin_writing(descriptor: int, offset: int, nbytes: int) -> bool:
    """Start writing bytes of a file to the disk without waiting; return False if unsupported."""
    if not _HAS_SYNC_FILE_RANGE:
        return False
    while _LIBC.sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ESPIPE):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))  # the next sync may not report it again
    return True


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on the disk, not only in the cache of the drive."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves it in that cache
        with suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def forget_cached(descriptor: int) -> bool:
    """Drop what the system has cached of a file; return False if unsupported."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def map_file(descriptor: int, offset: int, nbytes: int) -> int:
    """Map bytes of a file, read-only and shared; return their address.

    Python's own `mmap` keeps a descriptor for each mapping.
    """
    protection = mmap.PROT_READ, mmap.MAP_SHARED
    address: int | None = _LIBC.mmap(None, nbytes, *protection, descriptor, offset)
    if address is None or address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def unmap(address: int, nbytes: int) -> None:
    """Undo `map_file`."""
    _LIBC.munmap(address, nbytes)


def make_executable(address: int, nbytes: int) -> None:
    """Make memory executable and read-only. Raises `OSError` if that is forbidden."""
    if _LIBC.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError("memory may not become executable here")


def is_same_memory(one: int, other: int, nbytes: int) -> bool:
    """Return True if the bytes at two addresses are the same."""
    return not _LIBC.memcmp(one, other, nbytes)


def file_system(path: str) -> int | None:
    """Return the number by which statfs(2) names the kind of a file system, or None."""
    found = ctypes.create_string_buffer(4096)  # more than a ``struct statfs`` takes anywhere
    if _LIBC.statfs(os.fsencode(path), found) != 0:
        return None
    return ctypes.c_long.from_buffer(found).value


def kill_with_parent() -> None:
    """Ask the system to kill this process when the one that started it dies, if it can."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def standard_float_environment() -> ctypes.Array[ctypes.c_char] | None:
    """Set this thread's floating-point mode to IEEE 754; return the former one, None if unknown."""
    if not hasattr(_LIBC, "fesetenv"):
        return None
    before = ctypes.create_string_buffer(_FENV_NBYTES)
    _LIBC.fegetenv(before)
    _LIBC.fesetenv(_FE_DFL_ENV)
    return before


def set_float_environment(before: ctypes.Array[ctypes.c_char]) -> None:
    """Restore the mode that `standard_float_environment` returned."""
    _LIBC.fesetenv(before)


def address_of_symbol(name: str) -> int:
    """Return the address of a function or variable of this process. Raises `LookupError`."""
    try:
        found = getattr(_LIBC, name)
    except AttributeError:
        raise LookupError(name) from None
    address = ctypes.cast(found, ctypes.c_void_p).value
    assert address is not None
    return address
