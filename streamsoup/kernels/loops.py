"""The arithmetic in numba: all ingredients of a block in one pass over memory.

Sums are made in registers, in float64 (`sums`), or for means of 16- and 8-bit floats in float32
wherever that is exact (`means`). Those of a few hundred elements stay in a core's first cache, and
leave it once, rounded, by loops without a branch or a call, which LLVM turns into vectors. Where
all is to be digested, that is done in between (`xxh3`).

Compiled per pair of input and output dtype, to an object file that `cpu` keeps and loads.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.bits import (
    WORDS,
    as_float64,
    bits64,
    narrow,
    numbers,
    pointer,
    widen,
)
from streamsoup.kernels.cpu import BLOCK, SCRATCH
from streamsoup.kernels.flags import is_believed
from streamsoup.kernels.leaf_digests import STATE_NBYTES, STRIDE
from streamsoup.kernels.means import GROUP, MOST, NO_MEANS, STRETCH, means_of
from streamsoup.kernels.sums import WIDTH, sums_of
from streamsoup.kernels.xxh3 import end, take
from streamsoup.tensors import DType

__all__ = ["compile_mix"]

_SIGNATURE = types.int64(*[types.int64] * 6, types.float64, *[types.int64] * 4)

_PATIENCE = 16
"""Stretches that are not tried in float32 after one where it was not worth it; and how many times
in a row asking the processor is put off for longer and longer, as long as the answer is no."""


def compile_mix(source: DType, output: DType) -> tuple[str, bytes]:
    """Compile the kernel that mixes ingredients of dtype `source` into `output`.

    Gives its symbol and its object file; `cpu.Mixer` says how it is called. Takes seconds.
    """
    kernel = _compile(numbers(source), numbers(output), sums_of(source))
    # What numba itself keeps in its cache; the wrapper is a plain C function.
    _, _, (content, _) = kernel._library.serialize_using_object_code()
    return kernel._wrapper_name, content


def _compile(source: tuple[int, ...], output: tuple[int, ...], add: Any) -> Any:
    """Compile one kernel around `sums.add`. What else it closes over is constant to LLVM."""
    way, nbits, _, _, _, _, nan = source
    to_way, to_nbits, to_fraction, to_bias, to_largest, to_overflow, to_nan = output
    word, to_word = WORDS[nbits], WORDS[to_nbits]
    size, to_size = nbits // 8, to_nbits // 8
    reach = types.uint32 if to_nbits == 32 else types.uint64
    batch = STRIDE // min(size, to_size)
    small = source == output and nbits <= 16
    unrounded_mean, mean = means_of(source) if small else NO_MEANS

    # Never ``fastmath``: it reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch. A kernel must not allocate or raise: it is loaded without numba.
    @numba.cfunc(_SIGNATURE, error_model="numpy")
    def mix(
        sums_at: Any,
        addresses_at: Any,
        factors_at: Any,
        scratch_at: Any,
        k: int,
        fresh: int,
        divisor: float,
        output: int,
        n: int,
        digests_at: int,
        leaf: int,
    ) -> int:
        addresses = numba.carray(pointer(addresses_at, types.int64), (k,))
        # After the ingredients' addresses comes that of the result, which is digested as they are.
        digested = numba.carray(pointer(addresses_at, types.int64), (k + 1,))
        n_digests = k if output == 0 else k + 1
        secret_at = scratch_at + 8 * SCRATCH
        factors = numba.carray(pointer(factors_at, types.float64), (k,))
        first = numba.carray(pointer(scratch_at + 8 * BLOCK, types.uint64), (BLOCK,))
        equal = numba.carray(pointer(scratch_at + 16 * BLOCK, types.uint64), (BLOCK,))
        plain = True
        for i in range(k):
            plain = plain and factors[i] == 1.0
        uniform = plain and divisor == k and fresh != 0 and output != 0
        # For float64 alone the sum of equal values may be inexact: see `reference`.
        identical = nbits == 64 and uniform
        # Multiplying by a power of two's reciprocal is the same correctly rounded quotient.
        reciprocal = 1.0 / divisor
        mantissa = bits64(divisor) & np.uint64((1 << 52) - 1)
        exact = mantissa == np.uint64(0) and abs(divisor) >= 1.0 and abs(divisor) <= 2.0**100
        in_float32 = small and uniform and k <= MOST
        worst = np.uint64(0)
        next_try, next_question, n_refused = 0, 0, 0
        if in_float32 and not is_believed(scratch_at):
            next_question = n
        # A first block that is short, so that those after it begin with a cache line: as headers
        # are alike, all ingredients lie at the same place of a line.
        lead = (-addresses[0] & 63) // size
        stop = 0
        n_digested = 0
        while stop < n:
            start = stop
            # What is summed, and what came of it, is digested while it lies in a cache.
            upto = start // batch * batch
            if digests_at != 0 and upto > n_digested:
                for i in range(n_digests):
                    unit = size if i < k else to_size
                    begin_at, end_at = digested[i] + n_digested * unit, digested[i] + upto * unit
                    take(begin_at, end_at, digests_at + i * STATE_NBYTES, secret_at)
                n_digested = upto
            stretch = min(STRETCH, n - start) // GROUP * GROUP
            can = in_float32 and start >= lead and stretch > 0
            if can and start >= next_question:
                if unrounded_mean(
                    addresses, start * size, stretch, scratch_at, output + start * size
                ):
                    stop, n_refused = start + stretch, 0
                    continue
                n_refused = min(n_refused + 1, _PATIENCE)
                next_question = start + n_refused * STRETCH
            if can and start >= next_try:
                done, magnitude = mean(
                    addresses, start * size, stretch, scratch_at, output + start * size
                )
                worst = max(worst, magnitude)
                if done:
                    stop = start + stretch
                    continue
                next_try = start + _PATIENCE * STRETCH
            stop = min(lead if start < lead else start + BLOCK, n)
            m = stop - start
            acc_at = sums_at + 8 * start if sums_at != 0 else scratch_at
            acc = numba.carray(pointer(acc_at, types.float64), (m,))
            whole = m // WIDTH * WIDTH
            add(addresses, factors, plain, fresh != 0, start, whole, acc_at)
            for j in range(whole, m):
                total = acc[j] if fresh == 0 else -0.0
                for i in range(k):
                    x = numba.carray(pointer(addresses[i] + (start + j) * size, word), (1,))
                    total += factors[i] * widen(x[0], way, nan)
                acc[j] = total
            if output == 0:
                continue
            if divisor != 1.0:
                if exact:
                    for j in range(m):
                        acc[j] *= reciprocal
                else:
                    for j in range(m):
                        acc[j] /= divisor
            if identical:
                x0 = numba.carray(pointer(addresses[0] + start * size, word), (m,))
                for j in range(m):
                    first[j] = x0[j]
                    equal[j] = 0
                for i in range(1, k):
                    x0 = numba.carray(pointer(addresses[i] + start * size, word), (m,))
                    for j in range(m):
                        equal[j] |= np.uint64(x0[j]) ^ first[j]
                for j in range(m):
                    acc[j] = as_float64(first[j]) if equal[j] == 0 else acc[j]
            y = numba.carray(pointer(output + start * to_size, to_word), (m,))
            reached = reach(0)
            for j in range(m):
                bits, magnitude = narrow(
                    acc[j], to_way, to_nbits, to_fraction, to_bias, to_overflow, to_nan
                )
                y[j] = to_word(bits)
                reached = max(reached, magnitude)
            worst = max(worst, np.uint64(reached))
        if digests_at != 0:
            for i in range(n_digests):
                unit, state_at = size if i < k else to_size, digests_at + i * STATE_NBYTES
                begin_at, end_at = digested[i] + n_digested * unit, digested[i] + n * unit
                end(begin_at, end_at, leaf * unit, state_at, secret_at)
        return 1 if worst > np.uint64(to_largest) else 0

    return mix
