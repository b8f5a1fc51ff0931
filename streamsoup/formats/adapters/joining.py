"""How adapters become parts of one: the place of each factor, and the configuration of all."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from streamsoup.errors import (
    FormatError,
    MismatchError,
    RecipeError,
    count,
    option,
    printable,
)
from streamsoup.formats.adapters.adapter import PREFIX, Adapter, Pair, open_adapter
from streamsoup.formats.adapters.joined import Joined, Place, folder_of
from streamsoup.formats.adapters.source import check_same_base
from streamsoup.formats.adapters.truncated import Module, Modules, Truncated
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.source import Source, SourceTensor

__all__ = ["join", "open_alone"]

_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that choose modules of the base together: kept where all adapters agree on them."""


def join(
    sources: Sequence[Source],
    cache: HeaderCache,
    rank: int | None = None,
    factors: Sequence[float] = (),
) -> list[Source]:
    """Return adapters as parts of one adapter. A single one stays as it is.

    Args:
        sources: Adapters, see `are_adapters`. Those that are joined are joined anew.
        cache: Headers parsed so far.
        rank: The most ranks that a module of the adapter may have; None for all.
        factors: For a `rank`, the coefficients that the sum has; without them, ranks are added.

    Raises:
        FormatError: One is no plain LoRA (see `open_adapter`), or has factors of odd shapes.
        MismatchError: They name different bases, a module has another shape in one, or only some
            have a tensor that is stored whole (``modules_to_save``).
        RecipeError: `factors` are not as many as the adapters.

    Reads headers and configurations.
    """
    found = [source.of if isinstance(source, Joined) else source for source in sources]
    truncates = rank is not None and bool(factors)
    if len(found) == 1 and not truncates:
        return found
    if truncates and len(factors) != len(found):
        raise RecipeError(
            f"{option('rank_of')} has {count(len(factors), 'coefficient')} for "
            f"{count(len(found), 'adapter')}; leave it out"
        )
    adapters = [open_alone(source, cache) for source in found]
    for adapter in adapters[1:]:
        check_same_base(adapters[0], adapter)
        _check_same_names(adapters[0], adapter)
    tensors: dict[str, SourceTensor] = {}
    places: list[dict[str, Place]] = [{} for _ in adapters]
    ranks: dict[str, int] = {}
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.pairs)
    biased = any(pair.bias for adapter in adapters for pair in adapter.pairs.values())
    for module in modules:
        ranks[module] = _join_module(module, adapters, tensors, places, biased)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.whole):
        _join_whole(name, adapters, tensors, places)
    modules_of = _truncate(adapters, ranks, tensors, rank) if rank and truncates else {}
    config = _config(adapters, ranks, biased)
    if truncates:
        shared = Modules(adapters, modules_of, factors)
        return [
            Truncated(source, adapter, tensors, place, config, number, shared)
            for number, (source, adapter, place) in enumerate(
                zip(found, adapters, places, strict=True)
            )
        ]
    return [
        Joined(source, adapter, tensors, place, config)
        for source, adapter, place in zip(found, adapters, places, strict=True)
    ]


def open_alone(source: Source, cache: HeaderCache) -> Adapter:
    """Open the adapter that a source is, to know what it means. Raises as `open_adapter`."""
    return open_adapter(folder_of(source), cache)


def _check_same_names(one: Adapter, other: Adapter) -> None:
    """Raise `MismatchError` if all modules of one are those of the other behind a prefix.

    They were saved with another class of model, and PEFT could load one half of them alone.
    """
    for longer, shorter in ((one, other), (other, one)):
        module = next(iter(shorter.pairs), "")
        prefixes = [name[: -len(module)] for name in longer.pairs if name.endswith(f".{module}")]
        for prefix in prefixes[:8] if longer.pairs.keys().isdisjoint(shorter.pairs) else ():
            if all(prefix + name in longer.pairs for name in shorter.pairs):
                raise MismatchError(
                    f"{shorter.stored.where(shorter.pairs[module].a)}: {printable(longer.name)} "
                    f"has {printable(prefix)} before the names of all these modules; give the "
                    "adapters over their base, as BASE+ADAPTER"
                )


def _join_module(
    module: str,
    adapters: Sequence[Adapter],
    tensors: dict[str, SourceTensor],
    places: Sequence[dict[str, Place]],
    biased: bool,
) -> int:
    """Find the places of the factors of one module; return its rank in the adapter of all."""
    pairs = [adapter.pairs.get(module) for adapter in adapters]
    number, first = next((n, pair) for n, pair in enumerate(pairs) if pair is not None)
    shapes = [
        None if pair is None else _outer_shapes(pair, adapter)
        for pair, adapter in zip(pairs, adapters, strict=True)
    ]
    for shape, pair, adapter in zip(shapes, pairs, adapters, strict=True):
        if pair is None:
            continue
        _check_pair(pair, adapter)
        if pair.embedding != first.embedding:
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: its module is an embedding here or in "
                f"{printable(adapters[number].name)}, but not in both; these adapters belong to "
                "different bases"
            )
        if shape != shapes[number]:
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: its module has the shape {shape}, and "
                f"{shapes[number]} in {printable(adapters[number].name)}; these adapters belong to "
                "different bases"
            )
    a, b = (adapters[number].spec(name).shape for name in (first.a, first.b))
    rank = sum(pair.rank for pair in pairs if pair is not None)
    columns = max(math.prod(a[1:]), 1)  # of an empty tensor, nothing is ever read
    tensors[first.a] = SourceTensor("F32", (rank, *a[1:]), "F64")
    tensors[first.b] = SourceTensor("F32", (b[0], rank, *b[2:]), "F64")
    bias = f"{PREFIX}{module}.lora_B.bias" if biased and not first.embedding else None
    if bias is not None:
        tensors[bias] = SourceTensor("F32", (b[0],), "F64")
    at = 0
    for pair, own in zip(pairs, places, strict=True):
        if pair is None:
            own[first.a], own[first.b] = Place(None, rank * columns), Place(None, rank)
        else:
            own[first.a] = Place(pair.a, rank * columns, at * columns, pair.rank * columns)
            own[first.b] = Place(pair.b, rank, at, pair.rank, pair.scale)
            at += pair.rank
        if bias is not None:
            has = pair is not None and pair.bias is not None
            own[bias] = Place(pair.bias, b[0], 0, b[0], pair.scale) if has else Place(None, b[0])  # type: ignore[union-attr]
    return rank


def _truncate(
    adapters: Sequence[Adapter], ranks: dict[str, int], tensors: dict[str, SourceTensor], rank: int
) -> dict[str, Module]:
    """Limit the ranks of modules, in place, and return the modules that had more."""
    found: dict[str, Module] = {}
    for name in [name for name, own in ranks.items() if own > rank]:
        pairs = tuple(adapter.pairs.get(name) for adapter in adapters)
        first = next(pair for pair in pairs if pair is not None)
        a, b = tensors[first.a].shape, tensors[first.b].shape
        tensors[first.a] = SourceTensor("F32", (rank, *a[1:]), "F64")
        tensors[first.b] = SourceTensor("F32", (b[0], rank, *b[2:]), "F64")
        found[name] = Module(pairs, first.a, first.b, b[0], math.prod(a[1:]), rank)
        ranks[name] = rank
    return found


def _check_pair(pair: Pair, adapter: Adapter) -> None:
    """Raise `FormatError` for shapes that only a base would show to be wrong."""
    shape = adapter.spec(pair.b).shape
    if math.prod(shape[2:]) != 1:
        raise FormatError(
            f"{adapter.stored.where(pair.b)}: has the shape {list(shape)}, expected sizes of 1 "
            "after the rank; save the adapter again"
        )
    if pair.bias is not None and adapter.spec(pair.bias).shape != shape[:1]:
        raise FormatError(
            f"{adapter.stored.where(pair.bias)}: has the shape "
            f"{list(adapter.spec(pair.bias).shape)}, expected {list(shape[:1])}, as "
            f"{printable(pair.b)} has so many outputs; save the adapter again"
        )


def _outer_shapes(pair: Pair, adapter: Adapter) -> list[Any]:
    """Return the sizes of a pair of factors, but for the rank."""
    a, b = (adapter.spec(name).shape for name in (pair.a, pair.b))
    return [b[0], *b[2:], *a[1:]]


def _join_whole(
    name: str,
    adapters: Sequence[Adapter],
    tensors: dict[str, SourceTensor],
    places: Sequence[dict[str, Place]],
) -> None:
    """Find the place of a tensor that is stored whole: all adapters have to have it."""
    having = next(adapter for adapter in adapters if name in adapter.whole)
    target = having.whole[name]
    shape = having.spec(target).shape
    for adapter, own in zip(adapters, places, strict=True):
        if name not in adapter.whole:
            raise MismatchError(
                f"{having.stored.where(target)}: is stored whole, and {printable(adapter.name)} "
                "has none, so it is that of the base there; give the adapters over their base, "
                "as BASE+ADAPTER"
            )
        found = adapter.spec(adapter.whole[name]).shape
        if found != shape:
            raise MismatchError(
                f"{adapter.stored.where(adapter.whole[name])}: has the shape {list(found)}, and "
                f"{list(shape)} in {printable(having.name)}; only equal shapes can be averaged"
            )
        n = max(math.prod(shape), 1)
        own[target] = Place(adapter.whole[name], n, 0, n)
    tensors[target] = SourceTensor("F32", shape, "F64")


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], biased: bool) -> bytes:
    """Write the configuration of the adapter of all: that of the first, ranks, and a scale of 1."""
    made = dict(adapters[0].config.content)
    modules = ranks.keys()
    same = all(
        _choice(adapter.config.content) == _choice(made) and adapter.pairs.keys() == modules
        for adapter in adapters
    )
    if not same:
        made |= dict.fromkeys(_CHOICE) | {"target_modules": sorted(ranks)}
    common = Counter(ranks.values()).most_common(1)
    rank = common[0][0] if common else adapters[0].config.rank
    # Names in full, from their beginning: PEFT takes a pattern for the end of a name.
    others = {f"^{re.escape(name)}": n for name, n in ranks.items() if n != rank}
    made |= {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    made |= {"use_rslora": False, "lora_bias": biased, "init_lora_weights": True}
    return json.dumps(made, indent=2).encode() + b"\n"


def _choice(config: Mapping[str, Any]) -> list[Any]:
    """Return which modules a configuration chooses, lists in any order."""
    found = [config.get(key) or None for key in _CHOICE]
    return [sorted(map(str, each)) if isinstance(each, list) else each for each in found]
