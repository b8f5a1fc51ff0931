"""The tensors of a model in training, or of a state dict: which are averaged, and which are kept.

Names are those of the model without what wraps it (``module.`` of DDP, ``_orig_mod.`` of
`torch.compile`), so that the average of a wrapped model loads into a plain one. Tensors under
several names are one. Of a DTensor (FSDP2, tensor parallelism) the part that lies in this process
is taken: a mean is made element by element, so each process averages its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from streamsoup.errors import MismatchError, printable, some
from streamsoup.formats.memory import unwrapped
from streamsoup.live.matching import PLAIN, memory_of, tensors_of
from streamsoup.tensors import DTYPES, TORCH_NAMES, DType

__all__ = [
    "Layout",
    "Live",
    "Spec",
    "as_sharded",
    "check_same",
    "check_targets",
    "dtype_of",
    "is_mask",
    "read_live",
    "same_bits",
    "torch_dtype",
    "version_of",
]

_NAMES = {getattr(torch, spelling): name for name, spelling in TORCH_NAMES.items()}


class Spec(msgspec.Struct, frozen=True):
    """The dtype and shape of a tensor, or of the part of it that lies in this process."""

    dtype: str
    """The safetensors name, such as ``BF16``."""
    shape: tuple[int, ...]


class Layout(msgspec.Struct, frozen=True):
    """What must stay the same from one update to the next."""

    averaged: dict[str, Spec]
    """Floating parameters and buffers that are averaged, each once."""
    frozen: dict[str, Spec]
    """Parameters that do not ask for gradients: kept as they are."""
    newest: dict[str, Spec]
    """Integer buffers and the like: those of the newest update count."""
    names: dict[str, str]
    """All names of the state dict, in order, and the name that has the same memory."""


class Live(msgspec.Struct, frozen=True):
    """The tensors of a model, where they are."""

    layout: Layout
    tensors: dict[str, Tensor]
    """By the names of the layout, each once; detached, and of a DTensor the local part."""
    sharded: dict[str, Any]
    """The DTensors among them."""
    module: nn.Module | None
    """The model without its wrappers; None for a state dict."""


def read_live(given: nn.Module | Mapping[str, Any], *, keep_frozen: bool) -> Live:
    """Read the tensors of a model or state dict, and copy nothing.

    Args:
        given: A module, wrapped or not, or a mapping of names to tensors.
        keep_frozen: Keep parameters that do not ask for gradients, rather than average them; of
            a state dict, which does not tell, all are averaged.

    Raises:
        MismatchError: It holds what cannot be averaged or kept: names the tensors.
    """
    if isinstance(given, nn.Module):
        module: nn.Module | None = unwrapped(given)
        assert module is not None
        _check_not_flat(module)
        tensors: Mapping[str, Any] = tensors_of(module)
        parameters = {id(parameter) for parameter in module.parameters()}
    elif isinstance(given, Mapping):
        module, tensors, parameters = None, given, set()
    else:
        raise MismatchError(
            f"{printable(repr(given))}: is neither a torch.nn.Module nor a state dict"
        )
    _check_gathered(tensors)
    sharded: dict[str, Any] = {}
    local: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and type(tensor).__name__ == "DTensor":
            sharded[name] = tensor
            tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        local[name] = tensor
    _check_plain(local)
    first: dict[object, str] = {}
    names = {name: first.setdefault(memory_of(name, local[name]), name) for name in local}
    layout = Layout({}, {}, {}, names)
    for name in dict.fromkeys(names.values()):
        tensor = local[name]
        spec = Spec(_NAMES[tensor.dtype], tuple(tensor.shape))
        is_frozen = id(tensors[name]) in parameters and not tensors[name].requires_grad
        if keep_frozen and is_frozen:
            layout.frozen[name] = spec
        elif DTYPES[spec.dtype].averaged:
            layout.averaged[name] = spec
        else:
            layout.newest[name] = spec
    kept = {name: local[name].detach() for name in dict.fromkeys(names.values())}
    return Live(layout, kept, {n: t for n, t in sharded.items() if n in kept}, module)


def torch_dtype(spec: Spec) -> torch.dtype:
    """Return torch's dtype of a tensor."""
    return getattr(torch, TORCH_NAMES[spec.dtype])  # type: ignore[no-any-return]


def dtype_of(spec: Spec) -> DType:
    """Return the row of the table of dtypes for a tensor."""
    return DTYPES[spec.dtype]


def check_same(layout: Layout, other: Layout, what: str) -> None:
    """Raise `MismatchError` unless a model has the layout that the average began with."""
    if layout == other:
        return
    thawed = [name for name in layout.frozen if name in other.averaged]
    if thawed:
        raise MismatchError(
            f"{some(thawed)}: frozen when the average began, and trained now; begin a new Average, "
            "or give frozen='average' from the start"
        )
    missing = [name for name in layout.names if name not in other.names]
    strange = [name for name in other.names if name not in layout.names]
    if missing or strange:
        raise MismatchError(
            f"{what}: has other tensors than the average; missing: {some(missing) or 'none'}; "
            f"unexpected: {some(strange) or 'none'}"
        )
    for group, theirs in (
        (layout.averaged, other.averaged),
        (layout.newest, other.newest),
        (layout.frozen, other.frozen),
    ):
        for name, spec in group.items():
            found = theirs.get(name)
            if found is not None and found != spec:
                raise MismatchError(
                    f"{what}: {printable(name)}: expected {spec.dtype} of shape "
                    f"{list(spec.shape)}, found {found.dtype} of shape {list(found.shape)}"
                )
    changed = [name for name in layout.names if layout.names[name] != other.names[name]]
    raise MismatchError(
        f"{what}: {some(changed or layout.names)}: tied, frozen or trained otherwise than in the "
        "average; begin a new Average"
    )


def check_targets(layout: Layout, other: Layout) -> None:
    """Raise `MismatchError` unless a model has room for the average, whatever it trains."""
    mine = {**layout.averaged, **layout.frozen, **layout.newest}
    theirs = {**other.averaged, **other.frozen, **other.newest}
    flat = Layout(mine, {}, {}, {**layout.names})
    names = {name: layout.names.get(owner, owner) for name, owner in other.names.items()}
    found = {layout.names.get(name, name): spec for name, spec in theirs.items()}
    check_same(flat, Layout(found, {}, {}, names), "the model")


def as_sharded(local: Tensor, whole: Any) -> Tensor:
    """Return a local part as a DTensor that lies as `whole` does."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        local.to(whole.to_local().device),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def _check_not_flat(module: nn.Module) -> None:
    """Raise `MismatchError` for FSDP1, whose parameters are joined into flat ones."""
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in module.modules()):
        raise MismatchError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are joined "
            "into one; use torch.distributed.fsdp.fully_shard (FSDP2), or give a full state dict"
        )


def _check_gathered(tensors: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for parameters that DeepSpeed took apart, which hold no elements."""
    apart = [name for name, tensor in tensors.items() if hasattr(tensor, "ds_id")]
    if apart:
        raise MismatchError(
            f"{some(apart)}: partitioned by DeepSpeed ZeRO-3; update with a state dict that is "
            "gathered first"
        )


def _check_plain(tensors: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for what is not a plain dense tensor of a known dtype."""
    strange = [
        name
        for name, tensor in tensors.items()
        if type(tensor) not in PLAIN
        or nn.parameter.is_lazy(tensor)
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.dtype not in _NAMES
        or tensor.is_complex()
    ]
    if strange or not tensors:
        raise MismatchError(
            f"{some(strange) or 'no tensor at all'}: cannot be averaged; expected plain dense "
            "tensors of real numbers (not quantised, lazy, complex or on the meta device)"
        )


def is_mask(tensor: Tensor) -> bool:
    """Return True for a tensor with −inf in it, and neither NaN nor +inf."""
    if not tensor.numel():
        return False
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    # A finite sum tells at once of nearly all tensors that every element is finite.
    if bool(torch.isfinite(wide.sum(dtype=torch.float64))):
        return False
    return bool((wide < torch.inf).all() and torch.isneginf(wide).any())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same bits."""
    other = other.to(one.device)
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def version_of(tensor: Tensor) -> int:
    """Return what torch counts up whenever a tensor is changed in place."""
    return 0 if tensor.is_inference() else int(tensor._version)
