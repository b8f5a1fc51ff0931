"""The layers of a model, told by the names of its tensors: ``model.layers.3.mlp.up_proj.weight``.

A *stack* is a run of layers numbered from 0 without gaps under one prefix. A model has one, or an
encoder's and a decoder's; small numbered modules beside them (a head of two linear maps, the
experts within a layer) are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

__all__ = ["Layer", "layer_in", "renumbered", "stacks_in", "stands_before"]

_NUMBERED = re.compile(r"^((?:[^.]+\.)*?)([0-9]{1,6})\.(.+)$")
"""The first number in a name, between dots."""

_BEFORE = re.compile(r"embed|(^|[._])(wte|wpe|tok|emb)([._]|$)", re.IGNORECASE)
_HEAD = re.compile(r"(^|[._])(embed_out|lm_head|head|output)([._]|$)", re.IGNORECASE)


class Layer(msgspec.Struct, frozen=True):
    """Where a tensor stands in a stack."""

    prefix: str
    """What comes before the number: ``model.layers.``."""
    number: int


def layer_in(name: str) -> Layer | None:
    """Return the layer that a name has a number of; None for a name without one.

    >>> layer_in("model.layers.3.mlp.experts.7.w1.weight")
    Layer(prefix='model.layers.', number=3)
    """
    found = _NUMBERED.match(name)
    return None if found is None else Layer(found[1], int(found[2]))


def stacks_in(names: Iterable[str]) -> Mapping[str, int]:
    """Return the number of layers of each stack, by prefix, the largest stack first.

    >>> stacks_in(["h.0.w", "h.0.b", "h.1.w", "h.1.b", "head.0.w", "wte.w"])
    {'h.': 2}
    """
    numbers: dict[str, set[int]] = {}
    n_tensors: dict[str, int] = {}
    for name in names:
        layer = layer_in(name)
        if layer is not None:
            numbers.setdefault(layer.prefix, set()).add(layer.number)
            n_tensors[layer.prefix] = n_tensors.get(layer.prefix, 0) + 1
    whole = [prefix for prefix, found in numbers.items() if max(found) == len(found) - 1]
    whole.sort(key=lambda prefix: -n_tensors[prefix])
    # A decoder has cross-attention, and so more tensors than its encoder, but not twice as many.
    large = [prefix for prefix in whole if 2 * n_tensors[prefix] > n_tensors[whole[0]]]
    return {prefix: len(numbers[prefix]) for prefix in large}


def renumbered(name: str, number: int) -> str:
    """Return a name with another number of its layer.

    >>> renumbered("h.3.attn.weight", 12)
    'h.12.attn.weight'
    """
    return _NUMBERED.sub(lambda found: f"{found[1]}{number}.{found[3]}", name)


def stands_before(name: str) -> bool:
    """Return True for a tensor before the layers, an embedding; False for one behind them.

    >>> stands_before("model.embed_tokens.weight"), stands_before("transformer.wpe.weight")
    (True, True)
    >>> stands_before("lm_head.weight"), stands_before("embed_out.weight")
    (False, False)
    """
    return _BEFORE.search(name) is not None and _HEAD.search(name) is None
