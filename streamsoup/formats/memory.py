"""State dicts and live modules as sources: the bytes of their tensors, where they are.

Nothing is copied but the block that is asked for, whatever device it comes from, or the rows that
hold it where a tensor's elements do not lie one after the other. What the tensors
hold when they are opened is digested, so that work can be resumed with the same values only; a
tensor that is changed in place afterwards is noticed as a changed file would be.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import xxhash

from streamsoup.errors import ChangedIngredientError, FormatError, printable, some
from streamsoup.formats.files import Access
from streamsoup.formats.header import SURROGATE, make_header
from streamsoup.formats.released import is_pretrained, released, side_files_of
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import TORCH_NAMES

__all__ = ["StateDict", "open_state", "open_tensors", "plain_name", "sharing", "unwrapped"]

_PIECE = 1 << 20
"""Bytes digested at a time."""


class StateDict(Source):
    """The tensors of a state dict, or of a module, read where they are."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        dtypes: Mapping[str, str],
        side_files: Mapping[str, bytes],
    ) -> None:
        """Read all tensors once, for their digest.

        Args:
            tensors: The tensors by name.
            dtypes: Their dtypes as safetensors calls them.
            side_files: What belongs beside them: a model's configuration.
        """
        self._side_files = side_files
        self._tensors = dict(tensors)
        self._specs = {
            name: SourceTensor(dtypes[name], tuple(t.shape)) for name, t in tensors.items()
        }
        self._versions = {name: _version(tensor) for name, tensor in tensors.items()}
        self._in_place = {name for name, tensor in tensors.items() if _lies_in_order(tensor)}
        self._name = f"state dict {self._digest()}"

    def _digest(self) -> str:
        """Digest the header that a file of these tensors would have, and the tensors."""
        rows = [
            (name, self._specs[name].dtype, tuple(t.shape), t.numel() * t.element_size())
            for name, t in self._tensors.items()
        ]
        digest = xxhash.xxh3_128(make_header(rows))
        for name, _, _, nbytes in rows:
            for begin in range(0, nbytes, _PIECE):
                digest.update(_bytes_of(self._tensors[name], begin, min(begin + _PIECE, nbytes)))
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """Its digest, in words."""
        return self._name

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors, in the order given."""
        return self._specs

    @property
    def fingerprint(self) -> str:
        """Its digest."""
        return self._name

    @property
    def memory(self) -> Mapping[str, Any]:
        """The tensors themselves."""
        return self._tensors

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The configuration of a live model."""
        return self._side_files

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that views tensors where they are, and copies from other devices."""
        return _Tensors(self._tensors, self._in_place)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Raise `ChangedIngredientError` if torch knows that a tensor was changed in place."""
        for name in self._tensors if tensor is None else (tensor,):
            if _version(self._tensors[name]) != self._versions[name]:
                raise ChangedIngredientError(
                    f"{self._name}: its tensors were changed while they were being read; give "
                    "copies"
                )

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Nothing, unless a tensor lies elsewhere or out of order: then copies of what is asked."""
        copied = [t for name, t in self._tensors.items() if name not in self._in_place]
        # As it is gathered, and as it comes from a device; a row more at either end.
        widest = max((2 * tensor.element_size() for tensor in copied), default=0)
        return ReadingCost(views=not copied, unit_nbytes=widest)


class _Tensors(Cursor):
    def __init__(self, tensors: Mapping[str, Any], in_place: Set[str]) -> None:
        self._tensors, self._in_place = tensors, in_place

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        if tensor not in self._in_place:
            return None
        return _bytes_of(self._tensors[tensor], begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        block[:] = _bytes_of(self._tensors[tensor], begin, begin + len(block))


def _lies_in_order(tensor: Any) -> bool:
    """Return True if the bytes of a tensor can be had without a copy."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous()
    return bool(plain and not tensor.is_conj() and not tensor.is_neg())


def _bytes_of(tensor: Any, begin: int, end: int) -> Bytes:
    """Return bytes of a tensor in C order, copied only where they do not lie so."""
    import torch

    if end == begin:
        return buffer(0)
    size = tensor.element_size()
    elements = _elements(tensor.detach(), begin // size, -(-end // size))
    elements = elements.cpu().resolve_conj().resolve_neg()
    elements = elements.contiguous()
    elements = elements.as_strided(elements.shape, (1,))  # a single one may have any stride
    raw: Bytes = elements.view(torch.uint8).numpy().data
    skip = begin % size
    return raw[skip : skip + end - begin]


def sharing(tensors: Mapping[str, Any], others: Iterable[Any]) -> list[str]:
    """Return the names of tensors whose storage has a byte in common with one of `others`."""
    begins: list[int] = []
    ends: list[int] = []
    for begin, nbytes in sorted({_storage(tensor) for tensor in others if tensor.numel()}):
        if ends and begin < ends[-1]:
            ends[-1] = max(ends[-1], begin + nbytes)
        else:
            begins.append(begin)
            ends.append(begin + nbytes)
    found: list[str] = []
    for name, tensor in tensors.items():
        begin, nbytes = _storage(tensor)
        i = bisect.bisect_left(begins, begin + nbytes) - 1
        if tensor.numel() and i >= 0 and begin < ends[i]:
            found.append(name)
    return found


def _elements(tensor: Any, first: int, last: int) -> Any:
    """Return elements `first` to `last` ``(last - first,)``, in C order; copies those rows at most.

    Flattening a tensor that is not contiguous would copy it whole, again for each block.
    """
    while tensor.dim() > 1 and not tensor.is_contiguous():
        row = tensor[0].numel()
        begin, end = first // row, -(-last // row)
        first, last = first - begin * row, last - begin * row
        tensor = tensor[begin] if end == begin + 1 else tensor[begin:end].contiguous()
    return tensor.reshape(-1)[first:last]


def _storage(tensor: Any) -> tuple[int, int]:
    """Return the address of a tensor's storage, and its bytes. Two may lie over one another."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def open_state(given: Any) -> StateDict:
    """Open a state dict, or the one of a module, as a source.

    What wraps a module puts prefixes into its names: those are left out; not those of a state dict.
    A model of transformers has the names, and the forms, of its checkpoints, and its configuration.
    Raise `FormatError` for entries that are not plain dense tensors. Reads all of it once, for
    its digest; copies nothing but what `released` has to.
    """
    if isinstance(given, Mapping):
        return _opened(given, {})
    return _opened(_state_of(given), _side_files(given))


def open_tensors(state: Mapping[str, Any], module: Any) -> StateDict:
    """Open tensors that a module could have as the checkpoint of it that would be saved.

    Args:
        state: By the names of the module without its wrappers. Tied names share their memory.
        module: Whose names and configuration a checkpoint has, if it is one of transformers; None
            for the tensors as they are.

    Raises and costs as `open_state`.
    """
    if module is None:
        return _opened(state, {})
    return _opened(_as_saved(unwrapped(module), state), _side_files(module))


def _opened(state: Mapping[Any, Any], side_files: Mapping[str, bytes]) -> StateDict:
    import torch

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
            "expected; leave out entries that are not weights"
        )
    dtypes = {name: names[tensor.dtype] for name, tensor in state.items()}
    return StateDict(state, dtypes, side_files)


def unwrapped(module: Any) -> Any:
    """Return a module without what it is wrapped in for training or speed."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    wrappers = (DataParallel, DistributedDataParallel, AveragedModel)
    while isinstance(module, wrappers) or _COMPILED in getattr(module, "_modules", ()):
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    return module


def plain_name(name: str) -> str:
    """Return the name of a tensor without what `torch.compile` puts into it, at whatever depth.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED)


_COMPILED = "_orig_mod"


def _state_of(module: Any) -> Mapping[str, Any]:
    """Return the state dict of a module, without its wrappers."""
    import torch

    inner = unwrapped(module)
    state: Mapping[str, Any] = {} if isinstance(inner, type) else inner.state_dict()
    if not isinstance(state, Mapping):
        raise FormatError(f"state_dict() of {printable(repr(module))} gave no mapping of tensors")
    return _as_saved(inner, state) if isinstance(inner, torch.nn.Module) else state


def _as_saved(inner: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tensors of a module without tied copies, as transformers would store its own."""
    tied = _tied_names(inner, state)
    state = {plain_name(name): state[name] for name in state if name not in tied}
    return released(inner, state) if is_pretrained(inner) else state


def _side_files(module: Any) -> Mapping[str, bytes]:
    """Return what belongs beside the tensors of a module."""
    inner = unwrapped(module)
    return dict(side_files_of(inner)) if is_pretrained(inner) else {}


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
