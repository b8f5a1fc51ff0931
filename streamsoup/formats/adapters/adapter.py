"""An adapter of PEFT, opened by its headers: pairs of factors, and tensors stored whole."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import msgspec

from streamsoup.errors import FormatError, MissingFileError, UnsafePickleError, printable
from streamsoup.formats.adapters.config import AdapterConfig, read_adapter_config
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.stored import Stored, open_stored
from streamsoup.tensors import TensorSpec

__all__ = ["PREFIX", "WEIGHTS", "Adapter", "Pair", "open_adapter"]

WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model."""

_FACTOR = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight|\.bias|)")


class Pair(msgspec.Struct, frozen=True):
    """The factors of one module, by the names of their tensors in the adapter."""

    module: str
    """Its name, without `PREFIX`."""
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool
    bias: str | None = None
    """The tensor that is added to the bias, times the scale (``lora_bias``)."""


class Adapter(msgspec.Struct, frozen=True, eq=False):
    """An adapter that was opened: what it holds, but no weights."""

    name: str
    """The path as it was given."""
    folder: str
    config: AdapterConfig
    stored: Stored
    pairs: dict[str, Pair]
    """By module."""
    whole: dict[str, str]
    """Tensors stored whole (``modules_to_save``, biases): name in the model to their own."""

    def spec(self, tensor: str) -> TensorSpec:
        """Return the spec of one of its tensors, by its name in the adapter."""
        return self.stored.layout.places[tensor][1]


def open_adapter(path: str, cache: HeaderCache) -> Adapter:
    """Open an adapter: its folder, or the ``adapter_model.safetensors`` in it.

    Raises:
        MissingFileError: One of them is not there.
        FormatError: It is not a plain LoRA, a factor lacks its other, or a rank is not that of the
            configuration. Names the file, and the tensor.
    """
    folder, file = os.path.split(path)
    folder = (folder or os.curdir) if file == WEIGHTS else path
    config = read_adapter_config(folder)
    weights = os.path.join(folder, WEIGHTS)
    if not os.path.exists(weights):
        pickled = os.path.join(folder, "adapter_model.bin")
        if os.path.exists(pickled):
            raise UnsafePickleError(
                f"{printable(pickled)}: is a PyTorch pickle, which could run code when opened; "
                "load it with peft and save it again, which writes safetensors"
            )
        raise MissingFileError(
            f"{printable(weights)}: no such file; the adapter is not complete, so download or save "
            "it again"
        )
    stored = open_stored(weights, cache)
    pairs, whole = _sorted(stored, config)
    if not pairs and not whole:
        raise FormatError(f"{printable(weights)}: has no tensors; save the adapter again")
    return Adapter(path, folder, config, stored, pairs, whole)


def _sorted(stored: Stored, config: AdapterConfig) -> tuple[dict[str, Pair], dict[str, str]]:
    """Sort the tensors of an adapter into pairs and whole tensors."""
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name, (_, spec) in stored.layout.places.items():
        where = stored.where(name)
        if not name.startswith(PREFIX):
            raise FormatError(f"{where}: its name does not begin with {PREFIX}, as PEFT's do")
        if "lora_magnitude_vector" in name:
            raise FormatError(f"{where}: is a part of DoRA, which is not supported; merge it first")
        if not spec.dtype.averaged:
            raise FormatError(f"{where}: is {spec.dtype.name}, expected a float; dequantise it")
        match = _FACTOR.fullmatch(name[len(PREFIX) :])
        if match is not None:
            factors.setdefault(match[1], {})[match[2] + match[3].replace(".weight", "")] = name
        elif "lora_" in name or ".token_adapter." in name:
            raise FormatError(f"{where}: is no part of a plain LoRA; save the adapter again")
        else:
            whole[name[len(PREFIX) :]] = name
    return {
        module: _pair(module, found, stored, config) for module, found in factors.items()
    }, whole


def _pair(module: str, found: Mapping[str, str], stored: Stored, config: AdapterConfig) -> Pair:
    """Match the factors of a module, and check their ranks."""
    kind = "lora_embedding_" if any("embedding" in each for each in found) else "lora_"
    one, other = f"{kind}A", f"{kind}B"
    bias = found.get("lora_B.bias")
    wanted = {one, other} | ({"lora_B.bias"} if bias else set())
    if found.keys() != wanted:
        name = next(iter(found.values()))
        lacks = ", ".join(sorted(wanted - found.keys())) or "no other kind of factor beside it"
        raise FormatError(
            f"{stored.where(name)}: {printable(module)} needs {lacks}; the adapter is not "
            "complete, so save it again"
        )
    a, b = found[one], found[other]
    shapes = [stored.layout.places[each][1].shape for each in (a, b)]
    if any(len(shape) < 2 for shape in shapes):
        raise FormatError(f"{stored.where(a)}: has a shape of less than two sizes")
    if len(shapes[1]) > 2 and 0 < shapes[1][1] < shapes[0][0]:
        raise FormatError(
            f"{stored.where(b)}: has {shapes[1][1]} of {shapes[0][0]} ranks for each output, so it "
            "is of a grouped convolution, to whose weight no such product can be added; leave that "
            "module out (exclude_modules), or train it whole (modules_to_save)"
        )
    rank = config.rank_of(module)
    if shapes[0][0] != rank or shapes[1][1] != rank:
        raise FormatError(
            f"{stored.where(a)}: has the shape {list(shapes[0])}, and {printable(b)} "
            f"{list(shapes[1])}; expected rank {rank}, as {printable(config.path)} says (r or "
            "rank_pattern): restore the configuration it was saved with"
        )
    scale = config.scale_of(module, rank)
    return Pair(module, a, b, rank, scale, kind != "lora_", bias)
