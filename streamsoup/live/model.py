"""The live-model sink: a mix goes straight into the parameters and buffers of a model in memory.

Nothing is written to disk and no second copy of the model is made: each finished block is put
where it belongs, on whatever device that is. Modules are never called, moved or replaced, so hooks,
ties, optimisers and compiled code stay as they are.

What cannot be written in place is refused by name, before a weight is read: names and shapes that
do not fit, parameters that are not there (meta, offloaded), quantised, lazy or distributed ones,
and such that lie partly over one another. A tensor under several names is written once; where
ingredients hold it under several, these are read, and refused unless they are equal.

Whoever mixes into a model tells torch by `ModelSink.mark_changed`, as raw bytes go past autograd's
version counters: it then refuses to use a graph that was built before. Danger: a module that keeps
values derived from its weights (a quantised copy, inductor's ``freezing=True``) keeps the old ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import closing

import msgspec
import torch
from torch import Tensor, nn

from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.errors import MismatchError, TaskError, printable, some
from streamsoup.formats.files import Descriptors, read_bytes
from streamsoup.formats.memory import MemoryShard, plain_name, unwrapped
from streamsoup.formats.overlaps import is_apart, overlaps
from streamsoup.system.buffers import Bytes, address_of
from streamsoup.tensors import TORCH_NAMES

__all__ = ["TORCH_DTYPES", "ModelSink", "Target", "tensors_of"]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, spelling) for name, spelling in TORCH_NAMES.items()
}
"""The safetensors names of torch's dtypes."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)
"""Types whose memory is what it seems; subclasses may be quantised, sharded or lazy."""

_PIECE = 1 << 20
"""Bytes compared at a time."""


class Target(msgspec.Struct):
    """Where one tensor of a plan goes."""

    tensor: Tensor
    """The live parameter or buffer, detached: it shares the memory."""
    raw: Bytes | None
    """Its memory as bytes, if a block of the planned dtype can be put there as it is."""
    flat: Tensor | None
    """Its elements in order, if they lie so; None for a tensor that is gathered first."""
    lock: threading.Lock = msgspec.field(default_factory=threading.Lock)
    gathered: Tensor | None = None
    """What has come so far of a tensor whose elements lie out of order."""
    n_units: int = 0


class ModelSink:
    """The parameters and persistent buffers of a live model, as a place for a mix."""

    def __init__(self, model: nn.Module, plan: MixPlan) -> None:
        """Match the tensors of `plan` with those of `model`, by name; change nothing yet.

        A mix is rounded once, to the dtype of the plan, and then stored as `Tensor.copy_` would
        store it: exactly, unless the parameter's dtype is narrower. Tied parameters are written
        once, under the first of their names in the model. Raises `MismatchError` with everything
        that does not fit. Costs a read of tensors that are tied but held apart, and of none else.
        """
        if not isinstance(model, nn.Module):
            raise MismatchError(f"{printable(repr(model))} is no torch.nn.Module to put a mix into")
        self.model = model
        self.plan = plan
        self._apart = False
        """Whether no ingredient is known to share the model's memory."""
        self.live = _named_as(plan, model)
        """All persistent tensors of the model, by the names of the plan."""
        self._memory = {name: _memory_of(name, tensor) for name, tensor in self.live.items()}
        """Where the elements lie: a module that is converted keeps its parameters, not these."""
        self.tied: dict[str, str] = {}
        """Names that share memory with another, and that one: the first that the plan has."""
        planned = {tensor.name: tensor for tensor in plan.tensors}
        groups: dict[object, list[str]] = {}
        for name, memory in self._memory.items():
            groups.setdefault(memory, []).append(name)
        for names in groups.values():
            first = next((name for name in names if name in planned), names[0])
            self.tied |= {name: first for name in names if name != first}
        _check(planned, self.live, self.tied)
        _check_ties(plan, self.tied)
        self.targets = {
            name: _target(tensor, self.live[name])
            for name, tensor in planned.items()
            if name not in self.tied
        }
        """Where each tensor of the plan goes; names that are tied to another are left out."""

    def __getitem__(self, name: str) -> Tensor:
        """Give the live tensor that a name of the plan stands for, as the model has it."""
        return self.live[name]

    def session(self) -> ModelSink:
        """Give itself: blocks of different places may come from several threads."""
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Give the memory of a parameter, unless an ingredient may share it."""
        planned = self.plan.tensors[leaf.tensor]
        target = self.targets.get(planned.name)
        if not self._apart or target is None or target.raw is None:
            return None
        begin = start * planned.unit_nbytes
        return target.raw[begin : begin + nbytes]

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Put a finished block of the leaf's tensor in place, from unit `start` on."""
        planned = self.plan.tensors[leaf.tensor]
        target = self.targets.get(planned.name)
        if target is None or not len(block):  # tied to another, or already put there
            return
        if target.raw is not None:
            begin = start * planned.unit_nbytes
            place = target.raw[begin : begin + len(block)]
            if address_of(place) != address_of(block):  # made elsewhere
                place[:] = block
            return
        dtype = TORCH_DTYPES[planned.dtype.name]
        with torch.inference_mode(target.tensor.is_inference()), torch.no_grad():
            if target.flat is not None:
                item = dtype.itemsize
                values = torch.frombuffer(block, dtype=torch.uint8).view(dtype)
                begin = start * planned.unit_nbytes // item
                target.flat[begin : begin + len(values)].copy_(values)
            else:
                self._gather(target, planned, start, block)

    def close(self) -> None:
        """Do nothing: the sink holds nothing but the model."""

    def check_apart(self) -> None:
        """Raise `MismatchError` if an ingredient is this very model.

        For a search: the first candidate would overwrite it. A single mix may be made in place.
        Results are then made where they belong, rather than copied there.
        """
        own = [tensor for tensor in self.live.values() if type(tensor) in _PLAIN]
        for ingredient in self.plan.ingredients:
            for shard in ingredient.shards:
                if isinstance(shard, MemoryShard) and shard.memory.sharing(own):
                    raise MismatchError(
                        f"{ingredient.name}: shares memory with the model that candidates are put "
                        "into, which would overwrite it; give a copy, or another model"
                    )
        self._apart = True

    def check_in_place(self) -> None:
        """Raise `MismatchError` if an ingredient lies in the model's memory in another way.

        A model may be mixed into itself: each element is read before it is written. Of a tensor
        that lies in that of another name, or in another order, some would be read after.
        """
        own = {name: tensor for name, tensor in self.live.items() if type(tensor) in _PLAIN}
        for ingredient in self.plan.ingredients:
            for shard in ingredient.shards:
                if not isinstance(shard, MemoryShard):
                    continue
                tensors = shard.memory.tensors
                for name in shard.memory.sharing(own.values()):
                    if met := self._met(own, name, tensors[name]):
                        raise MismatchError(
                            f"{ingredient.name}: {printable(name)} lies in the memory of "
                            f"{printable(met)} of the model, which would overwrite it; give a copy"
                        )

    def _met(self, own: Mapping[str, Tensor], name: str, tensor: Tensor) -> str:
        """Name a tensor of the model that an ingredient's lies in, without being the same one."""
        if name in own and _memory_of(name, tensor) == self._memory[name]:
            return ""
        theirs = ""  # as no tensor of a model is called
        for pair in overlaps({**own, theirs: tensor}):
            if theirs in pair:
                return max(pair)  # the other one
        return ""

    def mark_changed(self) -> None:
        """Have torch know that all tensors were changed: ours are not among its own operations.

        It then refuses to go backward through what was computed before.
        """
        for tensor in self.live.values():
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        # Autocast keeps narrow copies of parameters, and does not ask whether they still hold.
        torch.clear_autocast_cache()

    def versions(self) -> list[int] | None:
        """Say how often each tensor was changed in place; None where torch does not count.

        It does not count changes through ``.data`` or views of numpy's, nor those of BatchNorm's
        statistics, but of the number of batches beside them.
        """
        live = self.live.values()
        if any(tensor.is_inference() for tensor in live):
            return None
        return [tensor._version for tensor in live]

    def check(self) -> None:
        """Raise `TaskError` if the model's tensors are no longer the ones that were matched."""
        now = _named_as(self.plan, self.model)
        changed = [
            name
            for name, memory in self._memory.items()
            if name not in now or _memory_of(name, now[name]) != memory
        ]
        if changed:
            raise TaskError(
                f"the task replaced, moved or resized parameters of its model: {some(changed)}; "
                "scoring may change their values at most"
            )

    def _gather(self, target: Target, planned: PlannedTensor, start: int, block: Bytes) -> None:
        """Collect a tensor whose elements lie out of order, and store it when it is whole."""
        with target.lock:
            if target.gathered is None:
                target.gathered = torch.empty(planned.nbytes, dtype=torch.uint8, device="cpu")
                target.n_units = 0
            begin = start * planned.unit_nbytes
            target.gathered[begin : begin + len(block)] = torch.frombuffer(block, dtype=torch.uint8)
            target.n_units += len(block) // planned.unit_nbytes
            if target.n_units == planned.n_units:
                values = target.gathered.view(TORCH_DTYPES[planned.dtype.name])
                target.tensor.copy_(values.view(planned.shape))
                target.gathered = None


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Give a model's parameters and persistent buffers, as `state_dict` would name them.

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


def _named_as(plan: MixPlan, model: nn.Module) -> dict[str, Tensor]:
    """Give a model's tensors by name, without the prefix of a wrapper that the plan has not."""
    planned = {tensor.name for tensor in plan.tensors}
    live = tensors_of(model)
    if planned.isdisjoint(live):
        live = tensors_of(unwrapped(model))
    wrapped = live and all(name.startswith("module.") for name in live)
    if wrapped and not any(name.startswith("module.") for name in planned):
        return {name.removeprefix("module."): tensor for name, tensor in live.items()}
    return live


def _memory_of(name: str, tensor: Tensor) -> object:
    """Tell whether two names stand for the same elements."""
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.numel() == 0:  # a lazy one has no number of elements
        return name
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())


def _check(
    planned: Mapping[str, PlannedTensor],
    live: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> None:
    """Raise `MismatchError` with all that keeps the plan from being put into the model."""
    problems: list[str] = []
    missing = [name for name in live if name not in planned and tied.get(name) not in planned]
    strange = [name for name in planned if name not in live]
    if missing:
        problems.append(f"the model has {len(missing)} that no ingredient has: {some(missing)}")
    if strange:
        problems.append(f"the model lacks {len(strange)} of the ingredients: {some(strange)}")
    kinds: dict[str, list[str]] = {}
    for name, tensor in planned.items():
        if name in live and (problem := _problem(tensor, live[name])):
            kinds.setdefault(problem, []).append(name)
    apart = {_memory_of(name, tensor): (name, tensor) for name, tensor in live.items()}
    for name, other in overlaps(dict(each for memory, each in apart.items() if memory != each[0])):
        problem = f"in the memory of {printable(other)}, without being the same tensor"
        kinds.setdefault(problem, []).append(name)
    problems += [f"{problem}: {some(names)}" for problem, names in kinds.items()]
    if problems:
        raise _misfit(problems)


def _check_ties(plan: MixPlan, tied: Mapping[str, str]) -> None:
    """Raise `MismatchError` if an ingredient holds two values for one tensor of the model."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    problems: list[str] = []
    for name, first in tied.items():
        for i, ingredient in enumerate(plan.ingredients if name in planned else ()):
            if not _are_equal(plan, i, planned[first], planned[name]):
                where = printable(ingredient.name)
                both = some([first, name])
                problems.append(f"one tensor in the model, and two that differ in {where}: {both}")
                break
    if problems:
        raise _misfit(problems)


def _misfit(problems: Iterable[str]) -> MismatchError:
    lines = "\n".join(f"  {line}" for line in problems)
    return MismatchError(
        f"the ingredients cannot be put into the model:\n{lines}\n"
        "  where a model names or stores its weights in another way than its checkpoint, "
        "score files instead (streamsoup greedy --command)"
    )


def _problem(planned: PlannedTensor, tensor: Tensor) -> str | None:
    """Say why a live tensor cannot take a planned one."""
    if tensor.is_meta:
        return "on the meta device (not loaded, or offloaded)"
    if nn.parameter.is_lazy(tensor):
        return "not yet initialised (lazy modules): run the model once in build()"
    if type(tensor) not in _PLAIN:
        return f"of the type {type(tensor).__name__} (quantised or distributed)"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"quantised or not dense ({tensor.dtype}, {tensor.layout})"
    if tuple(tensor.shape) != planned.shape:
        return f"of shape {list(tensor.shape)} where the ingredients have {list(planned.shape)}"
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        return "expanded: its elements share memory"
    if not is_apart(tensor):
        return "folded: its elements share memory"
    ours = TORCH_DTYPES.get(planned.dtype.name)
    if planned.is_reduced:
        return None if tensor.is_floating_point() else f"of dtype {tensor.dtype}, which is no float"
    if tensor.dtype != ours:
        return f"of dtype {tensor.dtype} where the ingredients have {planned.dtype.name}"
    return None


def _are_equal(plan: MixPlan, i: int, first: PlannedTensor, second: PlannedTensor) -> bool:
    """Whether ingredient `i` holds the same bytes for two tensors; reads until they differ."""
    layout = plan.layout_of[i]
    sources = first.sources[layout], second.sources[layout]
    if sources[0].dtype != sources[1].dtype:
        return False
    shards = [plan.ingredients[i].shards[source.shard] for source in sources]
    begins = [s.data_begin + source.offset for s, source in zip(shards, sources, strict=True)]
    end = first.nbytes_in(layout)
    with closing(Descriptors(2)) as files:
        for at in range(0, end, _PIECE):
            n = min(_PIECE, end - at)
            one, other = (
                bytes(shard.memory[begin + at : begin + at + n])
                if isinstance(shard, MemoryShard)
                else read_bytes(files.reading(shard), begin + at, n)
                for shard, begin in zip(shards, begins, strict=True)
            )
            if one != other:
                return False
    return True


def _target(planned: PlannedTensor, tensor: Tensor) -> Target:
    live = tensor.data  # not `detach`: what we write is counted once, by `mark_changed`
    if not live.is_contiguous():
        return Target(live, None, None)
    flat = live.as_strided((live.numel(),), (1,))  # a single element may have any stride
    same = live.dtype == TORCH_DTYPES[planned.dtype.name]
    if same and live.device.type == "cpu":
        raw = flat.view(torch.uint8).numpy().data
        return Target(live, raw, flat)
    return Target(live, None, flat)
