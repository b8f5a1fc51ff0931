"""What to do about weights that are quantised in one way or another: advice for that way alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamsoup.errors import FormatError, option, printable
from streamsoup.formats.quantised.layouts import find_weights
from streamsoup.formats.source import SourceTensor

__all__ = ["advice_for", "refused_method"]

_KNOWN = frozenset(
    {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "mxfp8", "nvfp4", "fp4"}
)
"""What configurations call the ways that may be read; which one it is, the tensors tell."""

_CALLED = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ"}

_ORIGINAL = "use the checkpoint that it was quantised from"
_BITSANDBYTES = (
    f"{_ORIGINAL}, or load it with transformers, call its dequantize(), and save it with "
    "save_pretrained"
)


def advice_for(tensors: Mapping[str, SourceTensor]) -> str:
    """Return what to do about a checkpoint with codes, by their dtypes and the names beside them.

    Costs a look at each tensor.
    """
    for name in tensors:
        if name.endswith((".absmax", ".SCB")) or ".quant_state." in name:
            return _BITSANDBYTES
        if name.endswith((".qweight", ".qzeros")):
            return _ORIGINAL
    try:
        known = find_weights(tensors, {}, str).by_name
    except FormatError:
        return _ORIGINAL
    return f"read it with {option('dequantize', True)}" if known else _ORIGINAL


def refused_method(says: Mapping[str, Any]) -> str | None:
    """Return why weights quantised so cannot be read, and what to do; None if they may be.

    `says` is what the configuration says of quantisation.
    """
    method = str(says.get("quant_method") or says.get("quant_type") or "")
    if method == "bitsandbytes":
        return f"says bitsandbytes, whose codes are not read here; {_BITSANDBYTES}"
    if method and method.lower() not in _KNOWN:
        called = _CALLED.get(method.lower(), printable(method, 40))
        return f"says {called}, whose codes are not read here; {_ORIGINAL}"
    for key in ("transform_config", "sparsity_config"):
        inner = says.get(key)
        dense = isinstance(inner, Mapping) and inner.get("format") in (None, "dense")
        if inner and not (key == "sparsity_config" and dense):
            return f"says {key}, which changes what codes mean; {_ORIGINAL}"
    return None
