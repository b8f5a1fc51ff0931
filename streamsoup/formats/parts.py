"""Tensors that are only a part of a weight, and that no mean may be taken of by themselves.

Codes are weights only together with their scales, and an adapter's factors only together with each
other: the mean of the products is not the product of the means. Every library names them in its
own way, so codes are told by their dtype and by what stands beside them; factors, which are plain
floats, by their names.

Codes, their scales and all else that belongs to them (zero points, codebooks, shapes) are copied
where they are the same in all ingredients, bit for bit, and refused otherwise, whatever is told of
other integers.

* PEFT: ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_magnitude_vector`` (DoRA), and
  whatever else is in its ``adapter_model.safetensors``; torchtune, MLX: ``lora_a``, ``lora_b``.
* kohya and LyCORIS: ``lora_down``, ``lora_up``, ``lora_mid``, ``dora_scale``, ``hada_w1_a``,
  ``lokr_w1``, ``oft_blocks``; diffusers: ``to_q_lora.down``, ``lora_linear_layer.up``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from streamsoup.errors import MismatchError, printable
from streamsoup.formats.disagreements import in_words
from streamsoup.formats.ingredients import ADAPTER_FILE, Ingredient
from streamsoup.formats.quantised.causes import advice_for
from streamsoup.recipe import Coefficients
from streamsoup.tensors import DType, TensorSpec

__all__ = ["coded_in", "factors_in", "parts_of", "refuse_codes"]

_FACTOR = re.compile(
    r"(^|[._])("
    r"lora_(a|b|e|embedding_a|embedding_b|magnitude_vector|down|up|mid)|dora_scale"
    r"|lora(\d*|_linear_layer)\.(down|up)"
    r"|(hada|lokr)_[wt]\d(_[ab])?"
    r"|b?oft_(r|blocks|diag)|vera_lambda_[bd]"
    r")([._]|$)",
    re.IGNORECASE,
)
_ASIDE = frozenset(
    {"input", "output", "act", "activation", "global", "inv", "factor", "dequant", "1", "2"}
)
"""Words that say which scale it is, but not of what."""

_WEIGHT = frozenset(
    {"weight", "qweight", "w", "code", "data", "qdata", "packed", "qidx", "block", "quant", "mant"}
)
"""Words of which a tensor has one, if a scale without a name of its own is meant for it."""

_BIAS = "bia"
"""The word of a bias, in the singular that `_words` makes: a parameter of its own beside codes.
(Plural ``biases``, as of MLX, are zero points.)"""


def factors_in(ingredient: Ingredient) -> str | None:
    """Return a message that names the tensors that are an adapter's factors; None without any."""
    files = ingredient.file_names
    found = [
        name
        for name, (number, _) in ingredient.layout.places.items()
        if _FACTOR.search(name) or files[number] == ADAPTER_FILE
    ]
    if not found:
        return None
    folder = printable(ingredient.folder or os.path.dirname(ingredient.path))
    if ADAPTER_FILE in files:
        return (
            f"{ingredient.where(found[0])}{_more(found)} belongs to an adapter, whose factors mean "
            f"nothing apart: give it over the base it was trained on, as BASE+{folder}"
        )
    return (
        f"{ingredient.where(found[0])}{_more(found)} belongs to an adapter, whose factors mean "
        'nothing apart: merge each adapter into its base first, as by python -c "from peft import '
        "AutoPeftModelForCausalLM as M; "
        f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\""
    )


def parts_of(
    owners: Sequence[Ingredient],
    coefficients: Coefficients | None,
    *,
    disagree: bool,
    takes: Callable[[str], bool],
) -> tuple[frozenset[str], list[str]]:
    """Return the tensors that are parts of quantised weights, and why they cannot be copied.

    `owners` has an ingredient of each layout. `coefficients` are those of the soup, None where
    another rule makes it, which leaves equal weights as they are. `disagree` says that they do not
    fit together for other reasons, of which codes are the likely one. `takes` returns False for
    tensors that are not averaged whatever they are. Costs a look at each tensor.
    """
    coded: set[str] = set()
    problems: list[str] = []
    for owner in owners:
        found = frozenset(filter(takes, coded_in(owner.layout.places)))
        coded |= found
        keeps = coefficients is None or all(map(coefficients.is_affine, found))
        if found and (disagree or not keeps):
            problems.append(_refusal(owner))
    for name in sorted(coded) if len(owners) > 1 and not problems else ():
        dtypes = {owner.layout.places[name][1].dtype.name for owner in owners}
        if len(dtypes) > 1:
            problems.append(
                f"{owners[0].where(name)} is a part of a quantised weight, and is stored as "
                f"{' and '.join(sorted(dtypes))}; {advice_for(owners[0].source.tensors)}"
            )
            break
    return frozenset(coded), problems


def refuse_codes(ingredients: Iterable[Ingredient]) -> None:
    """Raise `MismatchError` for an ingredient with codes: nothing is measured of those."""
    for ingredient in ingredients:
        if _codes(ingredient.layout.places):
            raise MismatchError(in_words([_refusal(ingredient)], []))


def _refusal(owner: Ingredient) -> str:
    codes = _codes(owner.layout.places)
    return (
        f"{owner.where(codes[0])}{_more(codes)} is a code that a scale stands beside; "
        f"averaging codes and scales apart makes no soup; {advice_for(owner.source.tensors)}"
    )


def coded_in(places: Mapping[str, tuple[int, TensorSpec]]) -> frozenset[str]:
    """Return the names of all codes, their scales, and what else is stored of their weights.

    Codes are integers of at most 8 bits, or of any width if they are called a weight (packed
    ones), and floats of 8 bits whose scale is of another kind. A checkpoint merely cast to 8 bits
    has none, whatever its parameters are called. All else in the module of a code belongs to it,
    but biases; where nothing is in a module, all that shares a word with it.
    """
    codes = _codes(places)
    if not codes:
        return frozenset()
    modules: set[str] = set()
    words_at_top: set[str] = set()
    for code in codes:
        module, words = _words(code)
        modules |= {module, code} - {""}
        words_at_top |= words if not module else set()
    coded = set(codes)
    for name in places:
        module, words = _words(name)
        if (module in modules and _BIAS not in words) or (not module and words & words_at_top):
            coded.add(name)
    return frozenset(coded)


def _codes(places: Mapping[str, tuple[int, TensorSpec]]) -> list[str]:
    """List the codes among tensors."""
    # By module, then by each of its words: a module may have a hundred thousand of them.
    candidates: dict[str, dict[str, list[tuple[str, frozenset[str], DType]]]] = {}
    for name, (_, spec) in places.items():
        if spec.dtype.averaged and spec.dtype.nbits > 8:
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


def _more(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
