"""Whether the processor had to round: what IEEE 754 calls the inexact exception.

An addition that is not exact leaves a flag behind, which stays until it is cleared. So one look
tells whether any of thousands of sums was rounded. LLVM knows nothing of it: what is judged must
be loaded after `forget`, and stored before `rounded`, across which no access to memory moves.
"""

# Numba's intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="untyped-decorator,import-untyped,no-untyped-call,call-arg,attr-defined"

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streamsoup.kernels.bits import pointer

__all__ = ["CAN_TELL", "forget", "is_believed", "rounded"]

CAN_TELL = platform.machine().lower() in ("x86_64", "amd64")
"""Whether it is known here how to ask. On other processors all goes without."""

_WORD = ir.IntType(32)
_STANDARD = 0x1F80
"""What `environment.standard_floats` sets, with no flag left behind."""
_INEXACT = 1 << 5

if CAN_TELL:
    llvm.initialize_native_asmparser()  # LLVM reads what is below when it compiles a kernel


def _assemble(builder: Any, address: Any, text: str) -> Any:
    """Have instructions work on the word at an address; no access to memory moves across."""
    place = builder.inttoptr(address, _WORD.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type])
    builder.asm(kind, text, "r,~{memory},~{flags}", [place], True)
    return place


@intrinsic
def forget(typing: Any, address: Any) -> Any:
    """Clear the flag, in a standard environment. `address` is of four bytes to work in."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # What is there need not be read first, which would take as long as some sums.
        _assemble(builder, args[0], f"movl $${_STANDARD}, ($0)\nldmxcsr ($0)")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def rounded(typing: Any, address: Any) -> Any:
    """Whether anything was rounded since. `address` is of four bytes to work in."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        state = builder.load(_assemble(builder, args[0], "stmxcsr ($0)"))
        return builder.icmp_unsigned("!=", builder.and_(state, _WORD(_INEXACT)), _WORD(0))

    return types.boolean(types.int64), generate


@numba.njit(forceinline=True)
def is_believed(address: int) -> bool:
    """Whether a sum that has to be rounded raises the flag: what emulates a processor may not.

    `address` is of 16 bytes to work in.
    """
    if not CAN_TELL:
        return True  # nobody asks
    numbers = numba.carray(pointer(address + 4, types.float32), (3,))
    numbers[0], numbers[1] = np.float32(1), np.float32(2.0**-24)
    forget(address)
    numbers[2] = numbers[0] + numbers[1]
    return rounded(address)
