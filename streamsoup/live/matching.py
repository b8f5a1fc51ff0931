"""Which tensors of a live model those of a plan stand for: by name, or as transformers loads them.

A model of transformers 5 is matched as ``from_pretrained`` would load it (`formats.released`): with
the names and forms of its family, with or without the prefix of its base model, and without the
parts that only one of the two has, such as a head. All others are matched by name, where what a
wrapper puts into names does not count.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn

from streamsoup.errors import printable, some
from streamsoup.formats.memory import plain_name, unwrapped
from streamsoup.formats.released import Part, family_of, is_pretrained, loading

__all__ = ["PLAIN", "Match", "match", "memory_of", "tensors_of"]

PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)
"""Types whose memory is what it seems; subclasses may be quantised, sharded or lazy."""


class Match(msgspec.Struct):
    """The tensors of a plan, and those of a model."""

    module: nn.Module
    """The model, or what it wraps."""
    tensors: dict[str, Tensor]
    """The parameters and persistent buffers of the module, by its own names."""
    parts: dict[str, tuple[Part, ...]]
    """Where the model has each tensor of the plan that it has."""
    missing: list[str]
    """Tensors of the model that the plan does not have, under no name."""
    strange: list[str]
    """Tensors of the plan that the model does not have."""
    family: str = ""
    """The family whose conversions were used; empty if names alone were compared."""
    problems: dict[str, list[str]] = {}
    """What keeps tensors of a family from being written in place, and which."""
    left_out: list[str] = []
    """Tensors of the plan for which the model has no part, as ``from_pretrained`` ignores them."""
    kept: list[str] = []
    """Tensors of the model that the plan has no part for: they stay as they are."""
    misshapen: dict[str, tuple[int, ...]] = {}
    """Tensors of the model, and the shapes that the plan has for them, where these differ."""
    note: str = ""
    """Why the conversions of a family were not used."""

    def words(self) -> list[str]:
        """Return what a user has to know about tensors that only one of the two has."""
        found = []
        if self.left_out:
            n = len(self.left_out)
            found.append(
                f"the model ({type(self.module).__name__}) has no place for {n} of the "
                f"ingredients' tensors, which are left out, as from_pretrained leaves them out: "
                f"{some(self.left_out)}"
            )
        if self.kept:
            n = len(self.kept)
            found.append(
                f"no ingredient has {n} tensors of the model ({type(self.module).__name__}), "
                f"which stay as they are, and scores depend on them: {some(self.kept)}"
            )
        return found


def match(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> Match:
    """Match tensors of a plan, by name and shape, with those of a model; change nothing."""
    inner = unwrapped(model)
    if not is_pretrained(inner):
        return _by_name(shapes, model)
    tensors = tensors_of(inner)
    if not all(type(tensor) in PLAIN for tensor in tensors.values()):
        return _by_name(shapes, model)
    try:
        found = loading(inner, tensors, shapes)
    except Exception as error:  # another version of transformers, or code of the family
        by_name = _by_name(shapes, model)
        by_name.note = (
            f"how transformers loads {family_of(inner)} could not be found out "
            f"({type(error).__name__}: {printable(str(error))})"
        )
        return by_name
    if found is None or not found.filled:
        return _by_name(shapes, model)
    memory = {name: memory_of(name, tensor) for name, tensor in tensors.items()}
    covered = {memory[name] for name in found.filled}
    absent = [name for name in tensors if memory[name] not in covered]
    return Match(
        inner,
        tensors,
        found.parts,
        [name for name in absent if name not in found.kept],
        found.strange,
        family_of(inner),
        found.problems,
        found.left_out,
        [name for name in absent if name in found.kept],
        found.misshapen,
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and persistent buffers, as `state_dict` would name them.

    Calls none of the model's code. What `torch.compile` puts into names is left out.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[plain_name(path + name)] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[plain_name(path + name)] = buffer
    return found


def memory_of(name: str, tensor: Tensor) -> object:
    """Return what is equal for two tensors if they are the same elements; else the name."""
    plain = type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.numel() == 0:  # a lazy one has no number of elements
        return name
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())


def _by_name(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> Match:
    """Match by name, without the prefix of a wrapper that the plan does not have."""
    module, tensors = model, tensors_of(model)
    if tensors.keys().isdisjoint(shapes):
        module = unwrapped(model)
        tensors = tensors_of(module)
    prefix = "module."
    wrapped = tensors and all(name.startswith(prefix) for name in tensors)
    if not wrapped or any(name.startswith(prefix) for name in shapes):
        prefix = ""
    called = {name.removeprefix(prefix): name for name in tensors}
    parts: dict[str, tuple[Part, ...]] = {
        plain: (Part(0, name, tensors[name]),) for plain, name in called.items() if plain in shapes
    }
    covered = {memory_of(part.live, part.tensor) for part, *_ in parts.values()}
    missing = [
        plain for plain, name in called.items() if memory_of(name, tensors[name]) not in covered
    ]
    strange = [name for name in shapes if name not in called]
    misshapen = {
        part.live: shapes[plain]
        for plain, (part, *_) in parts.items()
        if not nn.parameter.is_lazy(part.tensor) and tuple(part.tensor.shape) != shapes[plain]
    }
    return Match(module, tensors, parts, missing, strange, misshapen=misshapen)
