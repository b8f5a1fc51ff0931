"""Which of the mappings in a pickle are the weights.

Trainers save a mapping of mappings: ``{"state_dict": {...}, "epoch": 3, "optimizer": {...}}``. A
mapping *holds weights* if a value of it is a tensor of floats with at least one dimension.
Where exactly one does, at the top or up to two keys below, those are the weights. What an optimizer
keeps is not looked into: it is known by its ``param_groups``, or by its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, count, option, printable, some
from streamsoup.formats.pickled.descriptions import Items, Tensor
from streamsoup.tensors import DTYPES

__all__ = ["TOP", "Weights", "find_weights"]

TOP = "."
"""What the mapping at the top is called, in ``--key``."""

_DEPTH = 2
"""Keys below the top at which weights are looked for; a key with dots goes further."""

_NO_WEIGHTS = (
    *("optim", "sched", "lr_sched", "scaler", "grad_scaler", "amp", "callbacks", "loops"),
    *("rng", "random", "cuda_rng", "hyper_parameters", "hparams", "args", "config"),
)
"""How keys begin under which trainers keep something else."""


class Weights(msgspec.Struct, frozen=True):
    """The tensors that were found, and what was not taken."""

    key: str
    """Where they were: keys with dots between them, or `TOP`."""
    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    """Keys beside them, and above them, that hold something else."""


def find_weights(root: Any, key: str | None) -> Weights:
    """Find the weights in the description of a pickle.

    Args:
        root: What `opcodes.interpret` returned.
        key: Where they are, if that is known; `TOP` for the mapping at the top.

    Raises:
        FormatError: There are none, or several and no key; the caller knows in which file.
    """
    if not isinstance(root, Items):
        raise FormatError(f"holds {_kind(root)}, not a mapping of names to tensors")
    if key is not None:
        found = _at(root, key)
        if not isinstance(found, Items):
            raise FormatError(
                f"has no mapping of tensors at the key {printable(key)!r}; it has {_has(root)}"
            )
        return _weights(root, key, found)
    candidates = [(path, items) for path, items in _mappings(root) if _holds_weights(items)]
    if len(candidates) == 1:
        path, items = candidates[0]
        return _weights(root, ".".join(path) or TOP, items)
    if not candidates:
        raise FormatError(
            f"holds no weights, as far as can be seen: it has {_has(root)}; if they lie deeper, "
            f"name where with {option('key')}, such as {option('key', 'trainer.model')}"
        )
    names = [".".join(path) or TOP for path, _ in candidates]
    each = [
        f"{printable(name)!r} ({count(_n_tensors(items), 'tensor')})"
        for name, (_, items) in zip(names, candidates, strict=True)
    ]
    raise FormatError(
        f"holds several sets of weights: {some(each, 6)}; say which with "
        f"{option('key', printable(names[0]))}"
    )


def _mappings(root: Items) -> Iterator[tuple[tuple[str, ...], Items]]:
    """Yield the mappings that may be weights, each once, with the keys that lead to them."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], Items]] = [((), root)]
    for depth in range(_DEPTH + 1):
        below: list[tuple[tuple[str, ...], Items]] = []
        for path, items in level:
            if id(items) in seen or any(key == "param_groups" for key, _ in items.pairs):
                continue
            seen.add(id(items))
            yield path, items
            if depth < _DEPTH:
                below += [
                    ((*path, key), value)
                    for key, value in items.pairs
                    if isinstance(value, Items)
                    and isinstance(key, str)
                    and not key.lower().startswith(_NO_WEIGHTS)
                ]
        level = below


def _holds_weights(items: Items) -> bool:
    return any(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.shape
        and (value.dtype not in DTYPES or DTYPES[value.dtype].averaged)
        for key, value in items.pairs
    )


def _n_tensors(items: Items) -> int:
    return sum(isinstance(value, Tensor) for _, value in items.pairs)


def _at(root: Items, key: str) -> Any:
    """Return what lies at a key; its dots lead from mapping to mapping, or are part of one key."""
    if key == TOP:
        return root
    places: list[tuple[Any, str]] = [(root, key)]
    for at, left in places:
        for one, value in at.pairs if isinstance(at, Items) else ():
            if one == left:
                return value
            if isinstance(one, str) and one and left.startswith(f"{one}.") and len(places) < 1000:
                places.append((value, left[len(one) + 1 :]))
    return None


def _weights(root: Items, key: str, items: Items) -> Weights:
    """Return the tensors of a mapping, with the names of all else in it, which is not read."""
    tensors: dict[str, Tensor] = {}
    left: list[str] = []
    for name, value in items.pairs:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            left.append(name if isinstance(name, str) else "an entry without a name")
        elif name in tensors:
            raise CorruptFileError(f"has the key {printable(name)!r} twice")
        else:
            tensors[name] = value
    if not tensors:
        raise FormatError(f"holds no tensors at the key {printable(key)!r}; it has {_has(root)}")
    if items is not root:
        first = key.split(".")[0]
        left = [
            *(name for name, value in root.pairs if isinstance(name, str) and name != first),
            *(f"{key}.{name}" for name in left),
        ]
    return Weights(key, tensors, tuple(left))


def _has(items: Items) -> str:
    """Return what a mapping has, for a message."""
    if not items.pairs:
        return "nothing"
    names = [
        f"{printable(key if isinstance(key, str) else _kind(key))!r} ({_kind(value)})"
        for key, value in items.pairs[:9]
    ]
    return some([*names, *[""] * (len(items.pairs) - len(names))], 8)


def _kind(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, Items):
        n = _n_tensors(value)
        return f"a mapping with {count(n, 'tensor')}" if n else "a mapping"
    if isinstance(value, Tensor):
        return "a tensor"
    kind = getattr(value, "kind", None)
    return kind if isinstance(kind, str) else type(value).__name__
