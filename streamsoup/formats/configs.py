"""What a model's configuration says about its weights, and where those of two models differ.

Weights mean something only under their configuration: eight heads of 64 and four of 128 have the
same shapes. So any key that differs between ingredients is refused, but for three kinds:
bookkeeping, which says where a file came from; the dtype, which the headers say better; and what
acts in training or at run time only (dropout, caches, sampling), which is worth a warning.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from streamsoup.errors import FormatError, printable
from streamsoup.formats.source import Source
from streamsoup.system.regular import reading

__all__ = [
    "CONFIG_LIMIT",
    "INPUTS",
    "OF_WORDS",
    "OUTPUTS",
    "QUANTISED_KEYS",
    "Change",
    "Quantisation",
    "changes",
    "config_folder",
    "is_config",
    "is_of_quantisation",
    "quantisation",
    "read_config",
    "says_tied",
    "tied_in",
    "with_vocabulary",
    "without_quantisation",
]

CONFIG_LIMIT = 4_000_000
"""Bytes of a ``config.json`` that are read, and may take 25 times as much memory; models' have some
thousands, or two millions with the names of 21,000 classes."""

Kind = Literal["bookkeeping", "running", "meaning"]

_CONFIGS = ("config.json", "params.json", "open_clip_config.json", "preprocessor_config.json")
"""Files whose keys say what weights mean; for what the last says, its own inputs were scaled."""

_BOOKKEEPING = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("_diffusers_version", "__version__", "torch_dtype", "dtype", "model_name", "_attn"),
        *("unsloth_version", "unsloth_fixed", "peft_version", "processor_class", "tokenizer_class"),
    }
)
"""Keys that say where a model came from, or what its headers say."""

_RUNNING = re.compile(
    r"dropout|pdrop|dropblock|droppath|drop_(path|rate|prob)|layerdrop|drop_out"
    r"|^(use_cache|use_return_dict|return_dict|torchscript|gradient_checkpointing|auto_map)$"
    r"|^(output_(attentions|hidden_states|scores|router_logits|past)|return_dict_in_generate)$"
    r"|^_?(attn|experts)_implementation(_autoset|_internal)?$|^use_flash_attn|^_flash_attn|^fused"
    r"|^(do_sample|temperature|top_[kp]|typical_p|min_p|num_beams|num_beam_groups|early_stopping)$"
    r"|^(max|min)(_new)?_length$|^(repetition|length|diversity|encoder_repetition)_penalty$"
    r"|^(encoder_)?no_repeat_ngram_size$|^(bad_words_ids|suppress_tokens|begin_suppress_tokens)$"
    r"|^(num_return_sequences|remove_invalid_values|exponential_decay_length_penalty)$"
    r"|^(task_specific_params|use_bfloat16|tf_legacy_loss|chunk_size_feed_forward)$"
)
"""Keys of training or run time alone: dropout rates, caches, sampling, and which code runs."""

QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTISED_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
    "quant_model_description.json": "msmodelslim",
}
"""Where libraries say that a model is quantised, and which, where the file itself does not."""


INPUTS = (
    *("embed_tokens.weight", "word_embeddings.weight", "shared.weight", "wte.weight"),
    *("tok_embeddings.weight", "embed_in.weight"),
)
"""How the names of input embeddings end."""

OUTPUTS = (
    *("lm_head.weight", "embed_out.weight", "proj_out.weight", "output.weight"),
    *("cls.predictions.decoder.weight", "lm_head.decoder.weight"),
)
"""How the names of output embeddings end, in the order in which they are looked for."""

OF_WORDS = (*INPUTS, *OUTPUTS, "lm_head.bias", "decoder.bias", "predictions.bias")
"""How the names of tensors end that have a row for each word of a vocabulary."""


class Change(msgspec.Struct, frozen=True):
    """A key that two configurations do not agree on."""

    key: str
    """Dotted, from the outermost: ``text_config.hidden_act``."""
    kind: Kind
    first: str
    """The value in the first, as JSON; ``nothing`` where it has no such key."""
    other: str

    @property
    def is_of_vocabulary(self) -> bool:
        """True for the length of a vocabulary, and for padding that only one has a token for."""
        name = self.key.rpartition(".")[2]
        unset = {"nothing", "null"}
        return name == "vocab_size" or (
            name == "pad_token_id" and not unset.isdisjoint((self.first, self.other))
        )

    def __str__(self) -> str:
        """Return the key with both values, the other's first, as in messages."""
        return f"{self.key} {self.other} and {self.first}"


class Quantisation(msgspec.Struct, frozen=True):
    """What a folder says of how its weights are quantised."""

    where: str
    """The file that says so, and its key if it has one, for a message."""
    says: Mapping[str, Any]
    """All that it says, such as ``quant_method`` and ``weight_block_size``."""


def is_config(name: str) -> bool:
    """Return True for a side file whose keys say what weights mean, by its relative name."""
    return os.path.basename(name) in _CONFIGS


def read_config(path: str) -> dict[str, Any] | None:
    """Return what a file of JSON holds; None for what is absent, too large, or no object.

    Raises `FormatError` for a file that is there and cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > CONFIG_LIMIT:
            return None
        with reading(path) as (descriptor, _):
            config = json.loads(b"".join(_pieces(descriptor)))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise FormatError(
            f"{printable(path)}: cannot be read: {error.strerror}; fix that, and run again"
        ) from None
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _pieces(descriptor: int) -> Iterator[bytes]:
    while piece := os.read(descriptor, 1 << 20):
        yield piece


def changes(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[Change]:
    """Return the keys that two configurations do not agree on, in those within them too.

    A key that is null in one may be lacking in the other. The position embeddings of transformers
    4 and 5, which are written in two ways, are compared as in the later one.
    """
    found: list[Change] = []
    pending = [("", _modern(first), _modern(other))]
    for at, one, two in pending:
        for key in dict.fromkeys([*one, *two]):
            a, b = one.get(key), two.get(key)
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                inside = f"{at}{key}."
                rotary = "rope_" in inside  # where they are already
                pending.append((inside, *((a, b) if rotary else (_modern(a), _modern(b)))))
            elif not _same(a, b):
                texts = (_text(one, key), _text(two, key))
                found.append(Change(printable(f"{at}{key}"), _kind(str(key), texts), *texts))
    return found


def _same(a: Any, b: Any) -> bool:
    """Return True for equal values; 1 and 1.0 are, but not 1 and true."""
    try:
        return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
    except RecursionError:  # lists in lists, deeper than Python compares
        return False


def _text(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "nothing"
    try:
        return printable(json.dumps(config[key], ensure_ascii=False), 40)
    except RecursionError:
        return "…"


def _kind(key: str, texts: Sequence[str]) -> Kind:
    if key in _BOOKKEEPING:
        return "bookkeeping"
    # transformers writes which loss it takes once a model was trained; a base has none yet.
    if key == "problem_type" and not {"nothing", "null"}.isdisjoint(texts):
        return "running"
    return "running" if _RUNNING.search(key) else "meaning"


def _modern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with its rotary embeddings where transformers 5 has them."""
    if "rope_theta" not in config and "rope_scaling" not in config:
        return config
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    old = config.get("rope_scaling") or {}
    new = config.get("rope_parameters") or {}
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return config
    rope = {"rope_type": old.get("type", "default")} | dict(old) | dict(new)
    rope.pop("type", None)
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rest | {"rope_parameters": rope}


def config_folder(source: Source) -> str | None:
    """Return the folder in which a source's configuration lies; None if it has none.

    Of a lone file, that of the file, though its side files are not taken along.
    """
    lone = source.path if len(source.files) == 1 else None
    return source.folder or (None if lone is None else os.path.dirname(lone))


def quantisation(folder: str | None) -> Quantisation | None:
    """Return what the files of a folder say of quantisation; None if they say nothing.

    Any configuration in a file may say so, such as that of one part of a model.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, method in _QUANTISED_FILES.items() if folder is not None else ():
        path = os.path.join(folder or "", name)
        if os.path.isfile(path):
            says = read_config(path) or {}
            inner = says.get("quantization")
            says = inner if isinstance(inner, dict) else says
            found.append((f"{printable(path)}: is there", {"quant_method": method} | says))
    for name in ("config.json", "params.json") if folder is not None else ():
        path = os.path.join(folder or "", name)
        pending: list[tuple[str, Any]] = [("", read_config(path) or {})]
        for at, config in pending:
            for key, value in config.items():
                if key in QUANTISED_KEYS and value:
                    what = f"{printable(path)}: has {printable(at + key)}"
                    found.append((what, value if isinstance(value, Mapping) else {}))
                elif isinstance(value, Mapping):
                    pending.append((f"{at}{key}.", value))
    if not found:
        return None
    merged = {key: value for _, says in reversed(found) for key, value in says.items()}
    return Quantisation(found[0][0], merged)


def is_of_quantisation(name: str) -> bool:
    """Return True for a side file that is about quantisation alone."""
    return os.path.basename(name) in _QUANTISED_FILES


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of quantisation, nor do those within it."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTISED_KEYS
    }


def with_vocabulary(config: Mapping[str, Any], longest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the length of another's vocabulary, and its padding."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        other = longest.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found[key] = with_vocabulary(value, other)
        else:
            found[key] = other if key in ("vocab_size", "pad_token_id") and other else value
    if "pad_token_id" in longest and "vocab_size" in found:
        found.setdefault("pad_token_id", longest["pad_token_id"])
    return found


def says_tied(folder: str) -> bool:
    """Return True if the model's configuration ties its output to its input embeddings."""
    return tied_in(read_config(os.path.join(folder, "config.json")) or {}) is True


def tied_in(config: Mapping[str, Any]) -> bool | None:
    """Return what a configuration says of tied embeddings; None if nothing."""
    whole = config.get("tie_word_embeddings")
    if isinstance(whole, bool):
        return whole
    parts = [value for value in config.values() if isinstance(value, Mapping)]
    told = [part.get("tie_word_embeddings") for part in parts]
    return True if True in told else False if False in told else None
