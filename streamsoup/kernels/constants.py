"""Sizes that kernels and their callers share, and the few words for them.

leaf
    The unit of work of a pass, of its journal and of its digests (`engine.plan`).
block
    What a thread hands to a kernel at once: elements of one leaf (`engine.budget`).
tile
    The elements of a block that a kernel works on at once, so that they stay in a core's cache.
vector
    The elements whose sums a kernel holds in registers at once (`fast`).
grain
    The elements whose products are added up before anything else is: part of the law of `inner`.
lane
    One of the sums that a grain's products are first added to: part of that law as well.
stripe, scramble
    What xxh3 takes at once, and what it takes between two scrambles: words of its specification.

Compiled kernels are named after the text of this file: a change here compiles them all anew.
"""

from __future__ import annotations

__all__ = [
    "GRAIN",
    "KINDS",
    "LANES",
    "LEAST_NBYTES",
    "MEAN_TILE",
    "MEAN_VECTOR",
    "NUMPY_TILE",
    "PRODUCT_PAIRS",
    "PRODUCT_ROWS",
    "PRODUCT_TILE",
    "ROW_PITCH",
    "SCRAMBLE_NBYTES",
    "SCRATCH",
    "SECRET_NBYTES",
    "STATE_NBYTES",
    "STREAMS",
    "STRIPE_NBYTES",
    "TILE",
]

KINDS = ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3")
"""The dtypes that are averaged, by the number that compiled code knows them by."""

TILE = 256
"""Elements that are summed at once. Small: every ingredient's stream moves on often enough for the
processor to prefetch it, and what many ingredients hold at the same place of a page still fits the
first cache."""

STREAMS = 8
"""Ingredients that are summed at once: processors prefetch no more streams than this. Their sums
wait in the first cache for the next ingredients, which are prefetched a tile ahead."""

SCRATCH = 3 * TILE
"""Numbers of float64 that a kernel may use as scratch. After them lies xxh3's secret."""

MEAN_VECTOR = 128
"""Elements whose means are taken in registers. Their float32 sums fill eight registers of 64 bytes;
each ingredient moves on by two cache lines (8 bits) or four (16 bits)."""

MEAN_TILE = 4 * MEAN_VECTOR
"""Elements of `STREAMS` ingredients before the next ones are added. After each tile it is decided
anew whether means in float32 pay."""

NUMPY_TILE = 1 << 14
"""Elements that numpy works on at once: their sums fill 128 KiB, and stay in the second cache."""

GRAIN = 1 << 12
"""Elements whose products are added up before anything else is: `budget.SMALLEST_BLOCK`, so that
every block holds whole grains, but for the last of a tensor, which is filled up with zeros."""

LANES = 32
"""Sums of products that are kept at once: enough to hide the latency of an addition."""

PRODUCT_TILE = 16 * LANES
"""Elements of a grain that are widened before they are multiplied: those of a few rows fit a first
cache, and those of 64 rows a second one. Whole grains are slower by a tenth."""

ROW_PITCH = PRODUCT_TILE + 16
"""Distance of widened rows, in elements: a power of two would have them compete for few lines."""

PRODUCT_ROWS = 4
"""Rows that are multiplied at once, at most, with as many others."""

PRODUCT_PAIRS = 1 << 12
"""Pairs of rows whose lanes are held at once: 1 MiB of them, as many as 90 rows have. Or of
`PRODUCT_ROWS` with all rows, if that is more."""

SCRAMBLE_NBYTES = 1024
"""Bytes that xxh3 takes between two scrambles. All blocks but a leaf's last hold whole ones."""

STRIPE_NBYTES = 64
"""Bytes that xxh3 takes at once. A leaf's last block holds as many, or more."""

STATE_NBYTES = 64
"""Bytes of the state of one digest: eight sums, and in the end the digest."""

SECRET_NBYTES = 192
"""Bytes of what xxh3 mixes into its input (`leaf_digests.SECRET`)."""

LEAST_NBYTES = 241
"""Leaves of fewer bytes are digested in other ways, which are left to xxhash's library."""
