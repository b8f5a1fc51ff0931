"""State dicts and live modules as ingredients: the bytes of their tensors, as if in one file.

Nothing is copied but the block that is asked for, whatever device it comes from, or the rows that
hold it where a tensor's elements do not lie one after the other. What the tensors
hold when they are opened is digested, so that work can be resumed with the same values only; a
tensor that is changed in place afterwards is noticed as a changed file would be.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import xxhash

from streamsoup.errors import ChangedIngredientError, FormatError, printable, some
from streamsoup.formats.header import SURROGATE, make_header
from streamsoup.formats.released import is_pretrained, released, side_files_of
from streamsoup.formats.shards import Identity, Ingredient, Pantry, Shard
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import TORCH_NAMES

__all__ = ["MemoryShard", "open_state", "plain_name", "unwrapped"]

_PIECE = 1 << 20
"""Bytes digested at a time."""


class Memory:
    """Tensors one after the other, to be sliced like the bytes of a file."""

    def __init__(self, tensors: Mapping[str, Any], begins: list[int]) -> None:
        """Take tensors by name, and the offsets of their first bytes, in order."""
        self._names, self._tensors = list(tensors), list(tensors.values())
        self._begins = begins
        self._versions = [_version(tensor) for tensor in self._tensors]

    def __getitem__(self, place: slice) -> Bytes:
        """Give bytes that lie in one tensor."""
        import torch

        begin, end = int(place.start), int(place.stop)
        if end == begin:
            return buffer(0)
        i = bisect.bisect_right(self._begins, begin) - 1
        tensor = self._tensors[i].detach()
        size = tensor.element_size()
        first, last = begin - self._begins[i], end - self._begins[i]
        elements = _elements(tensor, first // size, -(-last // size))
        elements = elements.cpu().resolve_conj().resolve_neg()
        elements = elements.contiguous()
        elements = elements.as_strided(elements.shape, (1,))  # a single one may have any stride
        raw: Bytes = elements.view(torch.uint8).numpy().data
        skip = first % size
        return raw[skip : skip + last - first]

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors by name."""
        return dict(zip(self._names, self._tensors, strict=True))

    def is_unchanged(self, begin: int | None = None) -> bool:
        """Whether no tensor was changed in place, or not that at `begin`, as far as torch knows."""
        if begin is not None:
            i = bisect.bisect_right(self._begins, begin) - 1
            return self._versions[i] == _version(self._tensors[i])
        return self._versions == [_version(tensor) for tensor in self._tensors]

    def sharing(self, others: Iterable[Any]) -> list[str]:
        """Name the tensors whose storage and one of `others` have a byte in common."""
        begins: list[int] = []
        ends: list[int] = []
        for begin, nbytes in sorted({_storage(tensor) for tensor in others if tensor.numel()}):
            if ends and begin < ends[-1]:
                ends[-1] = max(ends[-1], begin + nbytes)
            else:
                begins.append(begin)
                ends.append(begin + nbytes)
        found: list[str] = []
        for name, tensor in zip(self._names, self._tensors, strict=True):
            begin, nbytes = _storage(tensor)
            i = bisect.bisect_left(begins, begin + nbytes) - 1
            if tensor.numel() and i >= 0 and begin < ends[i]:
                found.append(name)
        return found


class MemoryShard(Shard, frozen=True):
    """The tensors of a state dict, in place of a file."""

    in_memory: ClassVar[bool] = True
    memory: Memory
    side_files: tuple[tuple[str, bytes], ...] = ()
    """Names and contents of what belongs beside the tensors: a model's configuration."""

    def check_unchanged(self, begin: int | None = None) -> None:
        """Raise `ChangedIngredientError` if a tensor was changed in place since it was opened."""
        if not self.memory.is_unchanged(begin):
            raise ChangedIngredientError(
                f"{self.path}: its tensors were changed while they were being read; give copies"
            )


def _elements(tensor: Any, first: int, last: int) -> Any:
    """Give elements `first` to `last` ``(last - first,)``, in C order; copies those rows at most.

    Flattening a tensor that is not contiguous would copy it whole, again for each block.
    """
    while tensor.dim() > 1 and not tensor.is_contiguous():
        row = tensor[0].numel()
        begin, end = first // row, -(-last // row)
        first, last = first - begin * row, last - begin * row
        tensor = tensor[begin] if end == begin + 1 else tensor[begin:end].contiguous()
    return tensor.reshape(-1)[first:last]


def _storage(tensor: Any) -> tuple[int, int]:
    """Give the address of a tensor's storage, and its bytes. Two may lie over one another."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def open_state(given: Any, pantry: Pantry) -> Ingredient:
    """Open a state dict, or the one of a module, as an ingredient.

    What wraps a module puts prefixes into its names: those are left out; not those of a state dict.
    A model of transformers has the names, and the forms, of its checkpoints, and its configuration.
    Raises `FormatError` for entries that are no plain dense tensors. Reads all of it once, for
    its digest; copies nothing but what `released` has to.
    """
    import torch

    state = given if isinstance(given, Mapping) else _state_of(given)
    names = {getattr(torch, spelling): name for name, spelling in TORCH_NAMES.items()}
    strange = [
        name
        for name, tensor in state.items()
        if not isinstance(name, str)
        or name == "__metadata__"
        or SURROGATE.search(name)
        # Subclasses are sharded, quantised, fake or not there yet.
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", None))
        or tensor.dtype not in names
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_nested
    ]
    if strange or not state:
        raise FormatError(
            f"a state dict holds {some(strange) or 'nothing'}, where plain dense tensors were "
            "expected; leave out what is no weight"
        )
    tensors = dict(state)
    text = make_header(
        [
            (name, names[t.dtype], tuple(t.shape), t.numel() * t.element_size())
            for name, t in tensors.items()
        ]
    )
    nbytes = len(text) + sum(t.numel() * t.element_size() for t in tensors.values())
    header = pantry.header(text[8:], nbytes)
    order = sorted(header.tensors, key=lambda name: header.tensors[name].begin)
    memory = Memory({n: tensors[n] for n in order}, [header.tensors[n].begin for n in order])
    digest = xxhash.xxh3_128(text)
    for name in order:
        spec = header.tensors[name]
        for begin in range(spec.begin, spec.begin + spec.nbytes, _PIECE):
            digest.update(memory[begin : min(begin + _PIECE, spec.begin + spec.nbytes)])
    label = f"state dict {digest.hexdigest()}"
    identity = Identity(-1, int(digest.hexdigest()[:15], 16), nbytes, 0)
    beside = () if isinstance(given, Mapping) else _side_files(given)
    shard = MemoryShard(printable(label), identity, header, 0, 0, 0, memory, beside)
    return Ingredient(label, None, (shard,), pantry.layout((shard,), label), None)


def unwrapped(module: Any) -> Any:
    """Give a module without what it is wrapped in for training or speed."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    wrappers = (DataParallel, DistributedDataParallel, AveragedModel)
    while isinstance(module, wrappers) or _COMPILED in getattr(module, "_modules", ()):
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    return module


def plain_name(name: str) -> str:
    """Give the name of a tensor without what `torch.compile` puts into it, at whatever depth.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED)


_COMPILED = "_orig_mod"


def _state_of(module: Any) -> Mapping[str, Any]:
    """Give the state dict of a module, without its wrappers."""
    import torch

    inner = unwrapped(module)
    state: Mapping[str, Any] = {} if isinstance(inner, type) else inner.state_dict()
    if not isinstance(state, Mapping):
        raise FormatError(f"state_dict() of {printable(repr(module))} gave no mapping of tensors")
    if not isinstance(inner, torch.nn.Module):
        return state
    tied = _tied_names(inner, state)
    state = {plain_name(name): state[name] for name in state if name not in tied}
    return released(inner, state) if is_pretrained(inner) else state


def _side_files(module: Any) -> tuple[tuple[str, bytes], ...]:
    """Return what belongs beside the tensors of a module."""
    inner = unwrapped(module)
    return side_files_of(inner) if is_pretrained(inner) else ()


def _tied_names(module: Any, state: Mapping[str, Any]) -> set[str]:
    """Name the tensors that transformers leaves out when it saves: another has their memory."""
    found: set[str] = set()
    kept = [name for name in state if hasattr(state[name], "data_ptr")]
    for path, each in module.named_modules():
        for pattern in getattr(each, "_tied_weights_keys", None) or ():
            whole = re.compile(f"{re.escape(path)}\\.{pattern}" if path else pattern)
            for name in kept:
                twins = (n for n in kept if n != name and n not in found)
                if whole.fullmatch(name) and any(_same(state[name], state[n]) for n in twins):
                    found.add(name)
    return found


def _same(one: Any, other: Any) -> bool:
    return bool(one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)
