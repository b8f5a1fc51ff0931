"""Random numbers without a state: the n-th number of a stream is a function of its key and n.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405, as in Random123, cuRAND and torch. A stream belongs to one
tensor of one ingredient under one seed. Element i of the tensor has word i mod 4 of the counter
(i // 4 mod 2³², i // 2³⁴, 0, 0), so masks depend on neither order, threads, blocks nor devices.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Key", "key_of", "philox", "words"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Constants of the paper: what the rounds multiply by, and what is added to the key after each."""

ROUNDS = 10
MASK = 0xFFFFFFFF
PART = 1 << 14
"""Counters at a time: arrays of 128 KiB stay in a core's cache."""


class Key(NamedTuple):
    """Which stream: two words of 32 bits."""

    low: int
    high: int


def key_of(seed: int, ingredient: int, tensor: str) -> Key:
    """Return the key of a tensor's mask.

    Args:
        seed: Any whole number.
        ingredient: Position in the recipe, from 0; the base is not counted.
        tensor: Name of the tensor.

    Returns:
        The first 8 bytes of BLAKE2b over ``seed:ingredient:name`` in UTF-8, little-endian.

    >>> key_of(0, 0, "a")
    Key(low=2162592155, high=3537073436)
    """
    text = f"{seed}:{ingredient}:{tensor}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return Key(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def philox(counter: tuple[int, int, int, int], key: Key) -> tuple[int, int, int, int]:
    """Return the four words of one counter: the specification, in whole numbers of Python.

    >>> [hex(word) for word in philox((0, 0, 0, 0), Key(0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = second >> 32 ^ b ^ low, second & MASK, first >> 32 ^ d ^ high, first & MASK
        low, high = low + WEYL[0] & MASK, high + WEYL[1] & MASK
    return a, b, c, d


def words(key: Key, start: int, n: int) -> NDArray[np.uint32]:
    """Return words `start` to ``start + n`` of a stream ``(n,) uint32``; `philox` in numpy."""
    first = start // 4
    made = np.empty((-(-(start + n) // 4) - first, 4), np.uint32)
    for begin in range(0, len(made), PART):
        part = made[begin : begin + PART]
        _fill(key, first + begin, part)
    return made.reshape(-1)[start - 4 * first :][:n]


def _fill(key: Key, first: int, out: NDArray[np.uint32]) -> None:
    """Fill ``out (counter, 4)`` from the counter `first` on."""
    index = np.arange(len(out), dtype=np.uint64) + np.uint64(first)
    mask, half = np.uint64(MASK), np.uint64(32)
    a, b = index & mask, index >> half
    c, d = np.zeros_like(a), np.zeros_like(a)
    low, high = key
    for _ in range(ROUNDS):
        first_, second = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b = second >> half ^ b ^ np.uint64(low), second & mask
        c, d = first_ >> half ^ d ^ np.uint64(high), first_ & mask
        low, high = low + WEYL[0] & MASK, high + WEYL[1] & MASK
    for place, word in enumerate((a, b, c, d)):
        out[:, place] = word
