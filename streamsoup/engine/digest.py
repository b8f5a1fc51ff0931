"""Digests of ingredients and soup, made of leaves that threads may finish in any order.

A leaf's digest is the xxh3-128 of its bytes; a tensor's, of its leaves' digests in order; an
ingredient's, of its tensors' names, dtypes, shapes and digests, sorted by name. So digests depend
neither on threads nor on how files are sharded. xxh3 detects accidents, not forgeries: it is not a
signature (https://github.com/Cyan4973/xxHash).
"""

from __future__ import annotations

import json

import xxhash

from streamsoup.engine.plan import MixPlan
from streamsoup.formats.side_files import pieces

__all__ = ["SIZE", "Digests", "digest_bytes", "digest_file"]

SIZE = 16
"""Bytes of a digest."""


def digest_bytes(content: bytes) -> str:
    """Return the hexadecimal digest of some bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_file(path: str) -> str:
    """Return the hexadecimal digest of a file, piece by piece. Raises `OSError`."""
    whole = xxhash.xxh3_128()
    for piece in pieces(path):
        whole.update(piece)
    return whole.hexdigest()


class Digests:
    """The digests of all leaves of a pass: those of the soup, and of each ingredient."""

    def __init__(self, plan: MixPlan) -> None:
        """Allocate 16 bytes per leaf for the soup and for each ingredient."""
        self._plan = plan
        self._row = SIZE * (1 + len(plan.ingredients))
        self._table = bytearray(self._row * plan.n_leaves)

    def put(self, leaf: int, digests: bytes) -> None:
        """Set a leaf's digests: the soup's first, then each ingredient's."""
        self._table[leaf * self._row : (leaf + 1) * self._row] = digests

    def get(self, leaf: int) -> bytes:
        """Return a leaf's digests as they were put."""
        return bytes(self._table[leaf * self._row : (leaf + 1) * self._row])

    def of_leaf(self, leaf: int, i: int) -> bytes:
        """Return the digest of a leaf in ingredient `i` ``(0 … k-1)``."""
        begin = leaf * self._row + (1 + i) * SIZE
        return bytes(self._table[begin : begin + SIZE])

    def of_soup(self) -> dict[str, str]:
        """Return the digest of each tensor of the soup, by name."""
        return {
            tensor.name: self._of_tensor(t, 0).hex() for t, tensor in enumerate(self._plan.tensors)
        }

    def of_ingredient(self, i: int) -> str:
        """Return the digest of ingredient `i` ``(0 … k-1)``."""
        whole = xxhash.xxh3_128()
        layout = self._plan.layout_of[i]
        order = sorted(range(len(self._plan.tensors)), key=lambda t: self._plan.tensors[t].name)
        for t in order:
            tensor = self._plan.tensors[t]
            label = [tensor.name, tensor.sources[layout].dtype.name, tensor.shape]
            whole.update(json.dumps(label).encode())
            whole.update(self._of_tensor(t, 1 + i))
        return whole.hexdigest()

    def of_tensor(self, t: int, i: int) -> str:
        """Return the digest of tensor `t` of the plan in ingredient `i` ``(0 … k-1)``."""
        return self._of_tensor(t, 1 + i).hex()

    def _of_tensor(self, t: int, column: int) -> bytes:
        tensor = self._plan.tensors[t]
        whole = xxhash.xxh3_128()
        for leaf in range(tensor.first_leaf, tensor.first_leaf + tensor.n_leaves):
            begin = leaf * self._row + column * SIZE
            whole.update(self._table[begin : begin + SIZE])
        return whole.digest()
