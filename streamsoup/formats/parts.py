"""Tensors that are only a part of a weight, and that no mean may be taken of by themselves.

Codes are weights only together with their scales, and an adapter's factors only together with each
other: the mean of the products is not the product of the means. Every library names them in its
own way, so codes are told by their dtype and by what stands beside them; factors, which are plain
floats, by their names.

* PEFT: ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_magnitude_vector`` (DoRA), and
  whatever else is in its ``adapter_model.safetensors``; torchtune, MLX: ``lora_a``, ``lora_b``.
* kohya and LyCORIS: ``lora_down``, ``lora_up``, ``lora_mid``, ``dora_scale``, ``hada_w1_a``,
  ``lokr_w1``, ``oft_blocks``; diffusers: ``to_q_lora.down``, ``lora_linear_layer.up``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamsoup.formats.shards import Ingredient
from streamsoup.tensors import DType, TensorSpec

__all__ = ["ADAPTER_FILE", "codes_in", "factors_in"]

_FACTOR = re.compile(
    r"(^|[._])("
    r"lora_(a|b|e|embedding_a|embedding_b|magnitude_vector|down|up|mid)|dora_scale"
    r"|lora(\d*|_linear_layer)\.(down|up)"
    r"|(hada|lokr)_[wt]\d(_[ab])?"
    r"|b?oft_(r|blocks|diag)|vera_lambda_[bd]"
    r")([._]|$)",
    re.IGNORECASE,
)
ADAPTER_FILE = "adapter_model.safetensors"
"""What PEFT calls the file of an adapter."""

_ASIDE = frozenset(
    {"input", "output", "act", "activation", "global", "inv", "factor", "dequant", "1", "2"}
)
"""Words that say which scale it is, but not of what."""

_WEIGHT = frozenset({"weight", "qweight", "w", "code", "data", "qdata", "packed", "qidx"})
"""Words of which a tensor has one, if a scale without a name of its own is meant for it."""


def factors_in(ingredient: Ingredient) -> str | None:
    """Say which tensors are an adapter's factors, or give None where there are none."""
    files = ingredient.file_names
    found = [
        name
        for name, (number, _) in ingredient.layout.places.items()
        if _FACTOR.search(name) or files[number] == ADAPTER_FILE
    ]
    if not found:
        return None
    return (
        f"{ingredient.where(found[0])}{_more(found)} belongs to an adapter, whose factors mean "
        "nothing apart: merge each adapter into its base first"
    )


def codes_in(ingredient: Ingredient) -> str | None:
    """Say which tensors are codes beside their scales, or give None where there are none.

    Codes are integers of at most 8 bits, or of at most 32 if they are called a weight (packed
    ones), and floats of 8 bits whose scale is of another kind. A checkpoint merely cast to 8 bits
    has none, whatever its parameters are called.
    """
    places = ingredient.layout.places
    found = _codes(places)
    if not found:
        return None
    return (
        f"{ingredient.where(found[0])}{_more(found)} is a code that a scale stands beside; "
        "averaging codes and scales apart makes no soup: dequantise the ingredients first"
    )


def _codes(places: Mapping[str, tuple[int, TensorSpec]]) -> list[str]:
    """List the codes among tensors."""
    # By module, then by each of its words: a module may have a hundred thousand of them.
    candidates: dict[str, dict[str, list[tuple[str, frozenset[str], DType]]]] = {}
    for name, (_, spec) in places.items():
        if spec.dtype.nbits > 32 or (spec.dtype.averaged and spec.dtype.nbits > 8):
            continue
        module, words = _words(name)
        packed = spec.dtype.nbits <= 8 or words & _WEIGHT
        if packed and spec.dtype.name != "BOOL" and not any(map(_is_scale, words)):
            # bitsandbytes puts ``weight.absmax`` below ``weight``; all others put it beside.
            for at in (module, name):
                by_word = candidates.setdefault(at, {})
                for word in words:
                    by_word.setdefault(word, []).append((name, words, spec.dtype))
    if not candidates:
        return []
    found: set[str] = set()
    for name, (_, scale) in places.items():
        module, words = _words(name)
        if module not in candidates or not any(map(_is_scale, words)):
            continue
        of = {word for word in words if not _is_scale(word)} - _ASIDE
        by_word = candidates[module]
        if of:
            near = min((by_word.get(word, []) for word in of), key=len)
        else:
            near = [code for word in _WEIGHT for code in by_word.get(word, ())]
        for code, its, dtype in near:
            plain = dtype.averaged and scale.dtype.averaged and scale.dtype.nbits <= dtype.nbits
            if of <= its and not plain:
                found.add(code)
    return [name for name in places if name in found]


def _words(name: str) -> tuple[str, frozenset[str]]:
    """Split a tensor's name into that of its module, and the words of its own, in the singular."""
    module, _, own = name.replace(":", ".").rpartition(".")
    return module, frozenset(word.rstrip("s") for word in own.lower().split("_") if word)


def _is_scale(word: str) -> bool:
    return word.endswith("scale") or word in ("scaling", "absmax", "scb")


def _more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
