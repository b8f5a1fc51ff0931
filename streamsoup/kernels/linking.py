"""Object files put into memory without LLVM, whose library takes 25 ms to load: x86-64 alone.

Numba compiles for the large code model, in which code has each address written out in 64 bits. So
an object file is put in place by laying its sections one after the other and adding some numbers
up. Whatever needs more than that is left to LLVM.

The format is ELF-64: chapter 4 of the System V ABI, and its supplement for x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

from streamsoup.buffers import Bytes, address_of, buffer

__all__ = ["NEVER_CALLED", "Placed", "address_of_symbol", "place"]

NEVER_CALLED = frozenset(
    (
        *("NRT_MemInfo_call_dtor", "NRT_Free", "numba_gil_ensure", "numba_gil_release"),
        *("numba_do_raise", "numba_unpickle", "numba_runtime_build_excinfo_struct"),
    )
)
"""What numba's wrapper would call on an exception, and no library has: kernels raise none."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_ADDRESS = struct.Struct("<Q")

_ELF_64 = b"\x7fELF\x02\x01"
_RELOCATABLE, _X86_64 = 1, 62  # e_type, e_machine
_PROGBITS, _SYMTAB, _RELA = 1, 2, 4  # sh_type
_WRITE, _ALLOC = 1, 2  # sh_flags
_ABSOLUTE = 1  # R_X86_64_64

_LIBC = ctypes.CDLL(None)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Placed(NamedTuple):
    """A function in memory."""

    address: int
    memory: Bytes
    """Where it lies. It is gone with this."""


class _Section(NamedTuple):
    kind: int
    flags: int
    content: bytes
    link: int
    info: int
    alignment: int


class _OtherError(Exception):
    """More than is done here."""


def place(code: bytes, name: str) -> Placed | None:
    """Put an object file into memory, and give its function `name`. Takes a millisecond.

    None where it is of another kind of processor, needs what is not done here, or memory may not
    become executable.
    """
    try:
        return _place(code, name)
    except (_OtherError, LookupError, struct.error, OSError, ValueError):
        return None


def _place(code: bytes, name: str) -> Placed:
    sections = list(_sections(code))
    begins: dict[int, int] = {}
    nbytes = 0
    for number, section in enumerate(sections):
        if section.kind == _PROGBITS and section.flags & _ALLOC:
            if section.flags & _WRITE or section.alignment > mmap.PAGESIZE:
                raise _OtherError
            begins[number] = -(-nbytes // section.alignment) * section.alignment
            nbytes = begins[number] + len(section.content)
    memory = buffer(nbytes)
    base = address_of(memory)
    for number, begin in begins.items():
        content = sections[number].content
        memory[begin : begin + len(content)] = content
    (table,) = (section for section in sections if section.kind == _SYMTAB)
    names = sections[table.link].content
    symbols = []
    functions = {}
    for at, _, _, number, value, _ in _SYMBOL.iter_unpack(table.content):
        text = names[at : names.index(b"\0", at)].decode()
        # Those of sections that are not in memory are not referred to.
        within = base + begins[number] + value if number in begins else None
        symbols.append((text, number, within))
        if within is not None:
            functions[text] = within
    for section in sections:
        if section.kind != _RELA or section.info not in begins:
            continue  # the latter are of how to unwind the stack, which nobody does
        for offset, what, addend in _RELOCATION.iter_unpack(section.content):
            symbol, kind = what >> 32, what & 0xFFFFFFFF
            text, number, value = symbols[symbol]
            if number == 0:
                value = address_of_symbol(text)
            if kind != _ABSOLUTE or value is None:
                raise _OtherError
            _ADDRESS.pack_into(memory, begins[section.info] + offset, value + addend)
    if _LIBC.mprotect(base, nbytes, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise _OtherError
    return Placed(functions[name], memory)


def address_of_symbol(name: str) -> int:
    """Give the address of something in this process; of `abort` for what is never called.

    Raises `LookupError` if there is none.
    """
    library = ctypes.CDLL(None)
    try:
        found = getattr(library, "abort" if name in NEVER_CALLED else name)
    except AttributeError:
        raise LookupError(name) from None
    address = ctypes.cast(found, ctypes.c_void_p).value
    assert address is not None
    return address


def _sections(code: bytes) -> Iterator[_Section]:
    """Give the sections of an object file, the empty first one too."""
    magic, kind, machine, _, _, _, table, _, _, _, _, size, n, _ = _HEADER.unpack_from(code)
    if (magic[:6], kind, machine, size) != (_ELF_64, _RELOCATABLE, _X86_64, _SECTION.size):
        raise _OtherError
    for i in range(n):
        _, kind, flags, _, offset, nbytes, link, info, alignment, _ = _SECTION.unpack_from(
            code, table + i * size
        )
        content = code[offset : offset + nbytes]
        yield _Section(kind, flags, content, link, info, max(1, alignment))
