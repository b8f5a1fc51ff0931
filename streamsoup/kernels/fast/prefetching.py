"""What a processor is asked to have ready, and what it prefetches by itself."""

# Numba's intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="misc,no-untyped-call,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["FORESEEN", "IS_ZEN", "prefetch"]

IS_ZEN = llvm.get_host_cpu_name().startswith("znver")

FORESEEN = 8 if IS_ZEN else 0
"""Ingredients whose next lines the processor prefetches by itself. AMD's is slower if asked for up
to 8, Intel's (Emerald Rapids) 24 to 30 % faster with 4 and with 8; no others were measured."""


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Request the cache line at an address, which need not exist, for the second cache.

    Not for the first: blocks of a tensor lie at the same place of a page in every ingredient, so
    that all of them compete for the same few lines there, and push each other out.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, second, data = (ir.Constant(number, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), read, second, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate
