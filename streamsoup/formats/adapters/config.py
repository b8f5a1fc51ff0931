"""The configuration of an adapter, ``adapter_config.json``: what the factors of a module mean."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from streamsoup.errors import FormatError, MissingFileError, printable
from streamsoup.formats.configs import read_config

__all__ = ["CONFIG", "AdapterConfig", "read_adapter_config"]

CONFIG = "adapter_config.json"

_REFUSED = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "layer_replication": "replicated layers",
    "target_parameters": "target_parameters (factors of fused experts)",
    "trainable_token_indices": "trainable_token_indices (rows of an embedding)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}
"""Keys that, when set, make of an adapter something other than W + s·B·A; and their names."""

_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that change the base too: its file is not the one the factors belong to."""

_ADVICE = "merge it with peft's merge_and_unload, and give what that makes, or leave it out"

_QUANTIFIER = re.compile(r"(?<!\\)(?:[*+]|\{\d*,?\d*\})")
_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+{])")


class AdapterConfig(msgspec.Struct, frozen=True):
    """The parts of a configuration that decide what an adapter adds to its base."""

    path: str
    base: str
    """The name or path of the model it was trained on; empty if it says none."""
    rank: int
    alpha: float
    rslora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    content: dict[str, Any]
    """All of it, as it was read."""

    def rank_of(self, module: str) -> int:
        """Return the rank that a module should have."""
        found: int = _first(self.rank_pattern, module, self.rank)
        return found

    def scale_of(self, module: str, rank: int) -> float:
        """Return the factor s of a module: alpha / r, or alpha / √r with rank stabilisation."""
        alpha: float = _first(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: str) -> AdapterConfig:
    """Read and check the configuration of the adapter in a folder.

    Raises:
        MissingFileError: The folder has none.
        FormatError: It is not valid, or the adapter is of a kind that is not W + s·B·A: names it.
    """
    path = os.path.join(folder, CONFIG)
    where = printable(path)
    if not os.path.exists(path):
        raise MissingFileError(
            f"{where}: no such file; after BASE+ comes a folder with an adapter of PEFT, its "
            f"{CONFIG} and adapter_model.safetensors"
        )
    content = read_config(path)
    if content is None:
        raise FormatError(f"{where}: is not a JSON object, or too large or deep; save it again")
    try:
        return _checked(path, content)
    except FormatError as error:
        raise FormatError(f"{where}: {error.text}") from None


def _checked(path: str, content: dict[str, Any]) -> AdapterConfig:
    kind = content.get("peft_type")
    if kind != "LORA":
        raise FormatError(
            f"is of peft_type {printable(repr(kind), 60)}, expected 'LORA'; {_ADVICE}"
        )
    for key, name in _REFUSED.items():
        if content.get(key):
            raise FormatError(f"has {key} set: {name} is not supported; {_ADVICE}")
    for key, value in content.items():
        if key.startswith("use_") and key != "use_rslora" and value:
            raise FormatError(f"has {printable(key, 60)} set, which is not supported; {_ADVICE}")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise FormatError(
            f"was initialised by {printable(start, 60)!r}, which changes the base as well; save it "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    base = content.get("base_model_name_or_path")
    saved = content.get("modules_to_save") or ()
    if not isinstance(saved, (list, tuple)) or not all(isinstance(each, str) for each in saved):
        raise FormatError("has modules_to_save that are not a list of names; save it again")
    return AdapterConfig(
        path,
        base if isinstance(base, str) else "",
        _rank("r", content.get("r", 8)),
        _number("lora_alpha", content.get("lora_alpha", 8)),
        _flag(content, "use_rslora"),
        _flag(content, "fan_in_fan_out"),
        {key: _rank("rank_pattern", n) for key, n in _patterns(content, "rank_pattern").items()},
        {
            key: _number("alpha_pattern", n)
            for key, n in _patterns(content, "alpha_pattern").items()
        },
        tuple(saved),
        content,
    )


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise FormatError(f"has {key} {printable(repr(value), 60)}, not a rank; save it again")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise FormatError(f"has {key} {printable(repr(value), 60)}, not a number; save it again")
    return float(value)


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    if value not in (None, False, True):
        raise FormatError(f"has {key} {printable(repr(value), 60)}, not true or false")
    return bool(value)


def _patterns(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return patterns by regular expression, each of which takes no time to match."""
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise FormatError(f"has a {key} that is not an object; save it again")
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise FormatError(f"has the {key} {printable(pattern, 80)!r}, no expression") from None
        # Nested repetition, or much of it, takes for ever to match: a file may mean to.
        slow = _REPEATED_GROUP.search(pattern) or len(_QUANTIFIER.findall(pattern)) > 4
        if slow or len(pattern) > 1000:
            raise FormatError(
                f"has the {key} {printable(pattern, 80)!r}, which may take very long to match; "
                "write the names of its modules out"
            )
    return found


def _first(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that fits the end of a name, as PEFT has it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
