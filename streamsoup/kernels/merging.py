"""Sums of sparse task vectors in compiled loops: the specification is `merges_reference`.

Four kernels look at all ingredients of a block, a tile at a time, so that each byte comes from
memory once: `count` counts magnitudes by digits, `collect` finds those of an interval, `total`
sums magnitudes over grains, and `merge` makes the elements of the soup, rounded once.

A *key* is the bits of |dᵢ| in float64, which order as the magnitudes do. What a kernel has to know
of an ingredient is a row of integers, `ROW`; `merger` fills it and says what each word means.

The loops are plain, and LLVM finds the vectors in them: what cannot be done in vectors (counting
digits, ties at a threshold) stands in loops of its own.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,import-untyped,no-untyped-def"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.constants import KINDS
from streamsoup.kernels.fast.objects import object_file
from streamsoup.kernels.merge_rows import (
    DIGITS,
    DRAWN,
    LANES,
    MASKED,
    N_WORDS,
    RANKED,
    ROW,
    TILE,
)
from streamsoup.kernels.plain import WORDS, numbers, pointer, rounder, widen
from streamsoup.tensors import DTYPES, DType

__all__ = ["compile_object", "compile_plain"]

ABSOLUTE = MOST_KEY = 0x7FFFFFFFFFFFFFFF
NAN = 0x7FF8000000000000
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
PER_GRAIN = 4096 // TILE


@numba.njit(inline="always")
def _key(d):
    """Return the bits of a magnitude; all NaN, which a difference made quiet, have the same."""
    return min(np.float64(d).view(np.int64) & ABSOLUTE, NAN)


@numba.njit(inline="always")
def _task(value, base):
    """Return dᵢ: 0 where both are the same, infinite ones too."""
    return 0.0 if value == base else value - base


@numba.njit(inline="always")
def _digit(key, low, high, shift, below):
    """Return the digit of a key: see `selection`."""
    digit = ((key - low) >> shift) * 2 + 2 + (1 if key & below != 0 else 0)
    digit = digit if key >= low else (1 if key != 0 else 0)
    return digit if key < high else DIGITS - 1


def loader(dtype: DType, *, subtracts: bool) -> Any:
    """Return the loop that widens the elements of a dtype, or makes dᵢ of them."""
    row, word = numbers(dtype), WORDS[dtype.nbits]

    @numba.njit(inline="always")
    def load(x_at: int, base: Any, out: Any) -> bool:
        x = numba.carray(pointer(x_at, word), out.shape)
        bad = False
        for j in range(len(out)):
            value = widen(x[j], row)
            bad |= not abs(value) < np.inf
            out[j] = _task(value, base[j]) if subtracts else value
        return bad

    return load


_from_f64, _from_f32, _from_bf16, _from_f16, _from_e5m2, _from_e4m3 = (
    loader(DTYPES[name], subtracts=False) for name in KINDS
)
_less_f64, _less_f32, _less_bf16, _less_f16, _less_e5m2, _less_e4m3 = (
    loader(DTYPES[name], subtracts=True) for name in KINDS
)
_to_f64, _to_f32, _to_bf16, _to_f16, _to_e5m2, _to_e4m3 = (rounder(DTYPES[name]) for name in KINDS)


@numba.njit(inline="always")
def _load_base(row, start, out):
    """Widen the base's elements from `start` on; return True if one is not finite."""
    kind, x_at = row[ROW.kind], row[ROW.address]
    if kind == 0:
        return _from_f64(x_at + 8 * start, out, out)
    if kind == 1:
        return _from_f32(x_at + 4 * start, out, out)
    if kind == 2:
        return _from_bf16(x_at + 2 * start, out, out)
    if kind == 3:
        return _from_f16(x_at + 2 * start, out, out)
    if kind == 4:
        return _from_e5m2(x_at + start, out, out)
    return _from_e4m3(x_at + start, out, out)


@numba.njit(inline="always")
def _load_task(row, start, base, out):
    """Make dᵢ of an ingredient's elements from `start` on; return True if one is not finite."""
    kind, x_at = row[ROW.kind], row[ROW.address]
    if kind == 0:
        return _less_f64(x_at + 8 * start, base, out)
    if kind == 1:
        return _less_f32(x_at + 4 * start, base, out)
    if kind == 2:
        return _less_bf16(x_at + 2 * start, base, out)
    if kind == 3:
        return _less_f16(x_at + 2 * start, base, out)
    if kind == 4:
        return _less_e5m2(x_at + start, base, out)
    return _less_e4m3(x_at + start, base, out)


@numba.njit(inline="always")
def _round(kind, values, y_at, start):
    """Round values into the elements from `start` on; return True if one is not finite."""
    if kind == 0:
        return _to_f64(values, y_at + 8 * start)
    if kind == 1:
        return _to_f32(values, y_at + 4 * start)
    if kind == 2:
        return _to_bf16(values, y_at + 2 * start)
    if kind == 3:
        return _to_f16(values, y_at + 2 * start)
    if kind == 4:
        return _to_e5m2(values, y_at + start)
    return _to_e4m3(values, y_at + start)


@numba.njit(inline="always")
def _draw(low, high, first, words):
    """Fill ``words (4·counter,) uint32`` by Philox4x32-10, from a counter on."""
    for j in range(len(words) // 4):
        index = np.uint64(first) + np.uint64(j)
        a, b = index & WORD, index >> HALF
        c, d = np.uint64(0), np.uint64(0)
        k, m = np.uint64(low), np.uint64(high)
        for _ in range(10):
            p = a * np.uint64(0xD2511F53)
            q = c * np.uint64(0xCD9E8D57)
            a, b = (q >> HALF) ^ b ^ k, q & WORD
            c, d = (p >> HALF) ^ d ^ m, p & WORD
            k = (k + np.uint64(0x9E3779B9)) & WORD
            m = (m + np.uint64(0xBB67AE85)) & WORD
        words[4 * j] = np.uint32(a)
        words[4 * j + 1] = np.uint32(b)
        words[4 * j + 2] = np.uint32(c)
        words[4 * j + 3] = np.uint32(d)


@numba.njit(inline="always")
def _take_ties(task, row, lowest, left):
    """Return the key from which a tile reaches a threshold: that in word `lowest`, or its ties.

    Of the ties, which lie just below, the first ones count, as many as word `left` says, which is
    counted down. Where that ends within the tile, it returns -1 and counts nothing.
    """
    key = row[lowest]
    if row[left] > 0:
        n_tied = 0
        for j in range(len(task)):
            n_tied += _key(task[j]) == key - 1
        if n_tied > row[left]:
            return -1
        row[left] -= n_tied
        key -= 1
    return key


@numba.njit(inline="always")
def _keep_first_ties(task, row, least, dropped):
    """Make dᵢ into S(dᵢ) in the tile in which one of two thresholds stops taking ties."""
    for j in range(len(task)):
        key = _key(task[j])
        kept, drops = key >= least, key >= dropped
        if least < 0:
            kept = key >= row[ROW.lowest]
            if key == row[ROW.lowest] - 1 and row[ROW.left] > 0:
                kept = True
                row[ROW.left] -= 1
        if dropped < 0:
            drops = key >= row[ROW.dropped]
            if key == row[ROW.dropped] - 1 and row[ROW.dropped_left] > 0:
                drops = True
                row[ROW.dropped_left] -= 1
        if drops or not kept:
            task[j] = 0.0


@numba.njit(inline="always")
def _multiply(task, row, start, words, factor, coefficient):
    """Make dᵢ into wᵢ·S(dᵢ), in place."""
    n, how = len(task), row[ROW.how]
    if how == RANKED:
        least = _take_ties(task, row, ROW.lowest, ROW.left)
        dropped = _take_ties(task, row, ROW.dropped, ROW.dropped_left)
        if least < 0 or dropped < 0:
            _keep_first_ties(task, row, least, dropped)
            least, dropped = 0, MOST_KEY
        for j in range(n):
            key = _key(task[j])
            kept = task[j] if (key >= least) & (key < dropped) else 0.0
            task[j] = kept * factor * coefficient
    elif how == DRAWN:
        first = (row[ROW.first] + start) // 4
        _draw(row[ROW.key_low], row[ROW.key_high], first, words[: (n + 3) // 4 * 4])
        limit = np.uint64(row[ROW.limit])
        for j in range(n):
            kept = task[j] if np.uint64(words[j]) < limit else 0.0
            task[j] = kept * factor * coefficient
    elif how == MASKED:
        mask = numba.carray(pointer(row[ROW.mask] + start, types.uint8), (n,))
        for j in range(n):
            kept = task[j] if mask[j] != 0 else 0.0
            task[j] = kept * factor * coefficient
    else:
        for j in range(n):
            task[j] *= coefficient


def count(table_at, k, n, scratch_at):
    """Count the digits of the magnitudes of `k` ingredients; return True if one is not finite.

    The first row of the table is the base. `scratch` holds three tiles of float64.
    """
    table = numba.carray(pointer(table_at, types.int64), (k + 1, N_WORDS))
    scratch = numba.carray(pointer(scratch_at, types.float64), (2, TILE))
    digits_at = scratch_at + 16 * TILE
    bad = False
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        base, task = scratch[0, :m], scratch[1, :m]
        digits = numba.carray(pointer(digits_at, types.uint16), (m,))
        bad |= _load_base(table[0], start, base)
        for i in range(1, k + 1):
            row = table[i]
            if row[ROW.counts] == 0:
                continue
            bad |= _load_task(row, start, base, task)
            counts = numba.carray(pointer(row[ROW.counts], types.int32), (DIGITS,))
            if row[ROW.shift] < 0:
                tied, key = 0, row[ROW.low]
                for j in range(m):
                    tied += _key(task[j]) == key
                counts[0] += tied
            else:
                low, high, shift = row[ROW.low], row[ROW.high], row[ROW.shift]
                below = (1 << shift) - 1
                for j in range(m):
                    digits[j] = _digit(_key(task[j]), low, high, shift, below)
                for j in range(m):
                    counts[digits[j]] += 1
    return bad


def collect(table_at, i, n, keys_at, places_at, room, scratch_at):
    """Find the magnitudes of ingredient `i` above LOW and below HIGH, and where they are.

    Fills ``keys`` and ``places (room,) int64``; returns how many there are, at most `room`, and
    below zero, less one, if an element is not finite. `scratch` holds two tiles.
    """
    table = numba.carray(pointer(table_at, types.int64), (i + 1, N_WORDS))
    scratch = numba.carray(pointer(scratch_at, types.float64), (2, TILE))
    keys = numba.carray(pointer(keys_at, types.int64), (room,))
    places = numba.carray(pointer(places_at, types.int64), (room,))
    low, high = table[i, ROW.low], table[i, ROW.high]
    found, bad = 0, False
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        base, task = scratch[0, :m], scratch[1, :m]
        bad |= _load_base(table[0], start, base)
        bad |= _load_task(table[i], start, base, task)
        inside = 0
        for j in range(m):
            key = _key(task[j])
            inside += (key > low) & (key < high)
        if inside > 0:
            for j in range(m):
                key = _key(task[j])
                if key > low and key < high and found < room:
                    keys[found], places[found] = key, start + j
                    found += 1
    return -found - 1 if bad else found


@numba.njit(inline="always")
def _add_to_lanes(task, lanes):
    """Add magnitudes to the sums of a grain; what lies beyond the end of a tensor adds nothing."""
    whole = len(task) // LANES * LANES
    for begin in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += abs(task[begin + j])
    for j in range(whole, len(task)):
        lanes[j - whole] += abs(task[j])


def total(table_at, k, n, scratch_at):
    """Sum |d| and |S(d)| over the grains of `k` ingredients; return True if one is not finite.

    Each grain is added up as `grains` says. `scratch` holds four tiles, and two rows of lanes for
    each ingredient.
    """
    table = numba.carray(pointer(table_at, types.int64), (k + 1, N_WORDS))
    scratch = numba.carray(pointer(scratch_at, types.float64), (2, TILE))
    words = numba.carray(pointer(scratch_at + 16 * TILE, types.uint32), (TILE,))
    lanes_at = scratch_at + 24 * TILE
    lanes = numba.carray(pointer(lanes_at, types.float64), (k + 1, 2, LANES))
    bad = False
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        base, task = scratch[0, :m], scratch[1, :m]
        tile = start // TILE
        bad |= _load_base(table[0], start, base)
        for i in range(1, k + 1):
            row = table[i]
            if row[ROW.sums] == 0:
                continue
            bad |= _load_task(row, start, base, task)
            if tile % PER_GRAIN == 0:
                lanes[i] = 0.0
            _add_to_lanes(task, lanes[i, 0])
            _multiply(task, row, start, words, 1.0, 1.0)
            _add_to_lanes(task, lanes[i, 1])
            if tile % PER_GRAIN == PER_GRAIN - 1 or start + m == n:
                sums = numba.carray(pointer(row[ROW.sums], types.float64), (2, row[ROW.n_grains]))
                for which in range(2):
                    added = 0.0
                    for j in range(LANES):
                        added += lanes[i, which, j]
                    sums[which, tile // PER_GRAIN] = added
    return bad


def merge(table_at, numbers_at, k, n, scratch_at, y_at, kind, flags, whole, scale):
    """Make `n` elements of the soup at `y_at`; return 1 if an input, 2 if a result is not finite.

    ``numbers (ingredient, 2)`` are factors and coefficients. Bit 0 of `flags` asks for a consensus,
    bit 1 to normalize: by `whole`, or with a consensus by what agrees. Bit 2 asks for the mean of
    what is not zero. `scratch` holds six tiles, and one for each ingredient.
    """
    table = numba.carray(pointer(table_at, types.int64), (k + 1, N_WORDS))
    numbers = numba.carray(pointer(numbers_at, types.float64), (k + 1, 2))
    scratch = numba.carray(pointer(scratch_at, types.float64), (k + 5, TILE))
    extra_at = scratch_at + 8 * (k + 5) * TILE
    words = numba.carray(pointer(extra_at, types.uint32), (TILE,))
    bad, spoiled = False, False
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        base, moved = scratch[0, :m], scratch[1, :m]
        agreed, divisor = scratch[2, :m], scratch[3, :m]
        bad |= _load_base(table[0], start, base)
        moved[:] = 0.0
        for i in range(1, k + 1):
            row, task = table[i], scratch[4 + i, :m]
            factor, coefficient = numbers[i, 0], numbers[i, 1]
            bad |= _load_task(row, start, base, task)
            _multiply(task, row, start, words, factor, coefficient)
            for j in range(m):
                moved[j] += task[j]
        if flags & 1:
            agreed[:] = 0.0
            divisor[:] = 0.0
            for i in range(1, k + 1):
                task, coefficient = scratch[4 + i, :m], numbers[i, 1]
                for j in range(m):
                    agrees = (task[j] if moved[j] >= 0.0 else -task[j]) > 0.0
                    agreed[j] += task[j] if agrees else 0.0
                    divisor[j] += coefficient if agrees else 0.0
            if flags & 2:
                for j in range(m):
                    agreed[j] /= 1.0 if divisor[j] == 0.0 else divisor[j]
            for j in range(m):
                moved[j] = agreed[j] if moved[j] == moved[j] else np.nan
        elif flags & 4:
            divisor[:] = 0.0
            for i in range(1, k + 1):
                task = scratch[4 + i, :m]
                for j in range(m):
                    divisor[j] += 1.0 if task[j] != 0.0 else 0.0
            for j in range(m):
                moved[j] /= max(divisor[j], 1.0)
        elif flags & 2:
            for j in range(m):
                moved[j] /= whole
        if scale != 1.0:
            for j in range(m):
                moved[j] *= scale
        for j in range(m):
            moved[j] = base[j] if moved[j] == 0.0 else base[j] + moved[j]
        spoiled |= _round(kind, moved, y_at, start)
    return (1 if bad else 0) | (2 if spoiled else 0)


@numba.njit(inline="always")
def _sort(keys, places, other_keys, other_places, counts):
    """Sort keys, and their places with them, by digits of 8 bits; equal keys stay in order.

    ``(element,)`` each, and ``counts (256,)``. What is sorted ends where it began.
    """
    n = len(keys)
    for byte in range(8):
        shift = 8 * byte
        counts[:] = 0
        for j in range(n):
            counts[(keys[j] >> shift) & 0xFF] += 1
        if counts[(keys[0] >> shift) & 0xFF] == n:
            continue  # the same digit everywhere
        begin = 0
        for digit in range(256):
            here = counts[digit]
            counts[digit] = begin
            begin += here
        for j in range(n):
            digit = (keys[j] >> shift) & 0xFF
            at = counts[digit]
            counts[digit] += 1
            other_keys[at] = keys[j]
            other_places[at] = places[j]
        for j in range(n):
            keys[j] = other_keys[j]
            places[j] = other_places[j]


def rank(tasks_at, n_rows, n, key_low, key_high, first, mask_at, scratch_at, least, spread):
    """Fill the mask ``(row, element) uint8`` of `n_rows` rows of `n` elements of a task vector.

    Kept is what is drawn with probability ``least + spread·(rank / (n − 1))``, where ranks are from
    the smallest magnitude of a row up, and of equal ones the last comes first. `first` is the flat
    index of the first element. `scratch` holds five rows of 8 bytes an element, and 256 more.
    """
    tasks = numba.carray(pointer(tasks_at, types.float64), (n_rows, n))
    mask = numba.carray(pointer(mask_at, types.uint8), (n_rows, n))
    scratch = numba.carray(pointer(scratch_at, types.int64), (4, n))
    counts = numba.carray(pointer(scratch_at + 40 * n + 64, types.int64), (256,))
    words_at = scratch_at + 32 * n
    keys, places = scratch[0], scratch[1]
    for r in range(n_rows):
        for j in range(n):
            keys[j] = _key(tasks[r, n - 1 - j])
            places[j] = n - 1 - j
        _sort(keys, places, scratch[2], scratch[3], counts)
        index = first + r * n
        lead = index % 4
        words = numba.carray(pointer(words_at, types.uint32), ((lead + n + 3) // 4 * 4,))
        _draw(key_low, key_high, index // 4, words)
        for j in range(n):
            chance = least + spread * (j / (n - 1))
            place = places[j]
            mask[r, place] = words[lead + place] * 2.0**-32 < chance
    return 0


_KERNELS = {
    "count": (count, types.int64(*[types.int64] * 4)),
    "collect": (collect, types.int64(*[types.int64] * 7)),
    "total": (total, types.int64(*[types.int64] * 4)),
    "rank": (rank, types.int64(*[types.int64] * 8, types.float64, types.float64)),
    "merge": (merge, types.int64(*[types.int64] * 8, types.float64, types.float64)),
}


def compile_plain(name: str) -> Any:
    """Compile a kernel; return numba's function, with its `address`. Takes seconds."""
    function, signature = _KERNELS[name]
    # Never ``fastmath``, which reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch. A kernel must not allocate or raise: it is loaded without numba.
    return numba.cfunc(signature, error_model="numpy")(function)


def compile_object(name: str) -> tuple[str, bytes]:
    """Compile a kernel; return its symbol and its object file. Takes seconds."""
    return object_file(lambda: compile_plain(name))
