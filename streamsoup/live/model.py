"""The live-model sink: a mix goes straight into the parameters and buffers of a model in memory.

Nothing is written to disk and no second copy of the model is made: each finished block is put
where it belongs, on whatever device that is. Modules are never called, moved or replaced, so hooks,
ties, optimisers and compiled code stay as they are.

Tensors of a plan and of the model are matched in `live.matching`: by name, or as transformers loads
a checkpoint, which calls and stores some in another way. A tensor of the plan is then a view of
live memory, or several.

What cannot be written in place is refused by name, before a weight is read: names and shapes that
do not fit, parameters that are not there (meta, offloaded), quantised, lazy or distributed ones,
and such that lie partly over one another. A tensor under several names is written once; where
ingredients hold it under several, these are read, and refused unless they are equal.

Code that mixes into a model tells torch by `ModelSink.mark_changed`, as raw bytes go past
autograd's version counters: torch then refuses to use a graph that was built before. Danger: a
module that keeps values derived from its weights (a quantised copy, inductor's ``freezing=True``)
keeps the old ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing

import msgspec
import torch
from torch import Tensor, nn

from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.errors import MismatchError, TaskError, printable, some
from streamsoup.formats.files import Access
from streamsoup.formats.memory import sharing
from streamsoup.formats.overlaps import is_apart, overlaps
from streamsoup.formats.released import Part
from streamsoup.live.causes import misfit
from streamsoup.live.components import match_components
from streamsoup.live.matching import PLAIN, Match, memory_of, tensors_of
from streamsoup.system.buffers import Bytes, address_of
from streamsoup.tensors import TORCH_NAMES

__all__ = ["TORCH_DTYPES", "ModelSink", "Target", "tensors_of"]

log = logging.getLogger("streamsoup")

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, spelling) for name, spelling in TORCH_NAMES.items()
}
"""The safetensors names of torch's dtypes."""

_PIECE = 1 << 20
"""Bytes compared at a time."""


class Target(msgspec.Struct, frozen=True):
    """Where one tensor of a plan goes."""

    parts: tuple[tuple[int, Tensor], ...]
    """Its elements, in order: the first of each part, and a live tensor that has them, detached."""
    raw: Bytes | None
    """The live memory as bytes, if a block of the planned dtype can be put there as it is."""
    flat: Tensor | None
    """Its elements in order, if they lie so in one live tensor."""

    @property
    def tensor(self) -> Tensor:
        """The live tensor, or the first of several."""
        return self.parts[0][1]


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
            raise MismatchError(
                f"{printable(repr(model), 60)} is not a torch.nn.Module to put a mix into"
            )
        self.model = model
        self.plan = plan
        self._apart = False
        """True if no ingredient is known to share the model's memory."""
        planned = {tensor.name: tensor for tensor in plan.tensors}
        shapes = {name: tensor.shape for name, tensor in planned.items()}
        self._match = found = match_components(shapes, model)
        self._memory = {name: memory_of(name, tensor) for name, tensor in found.tensors.items()}
        """Where the elements lie: a module that is converted keeps its parameters, not these."""
        self.live = found.parts
        """The live tensors that those of the plan stand for, by the names of the plan."""
        self.tied = _tied(self.live)
        """Names of the plan whose memory is that of another, and that one, which is written."""
        _check(planned, model, found)
        _check_ties(plan, model, self.tied)
        self.targets = {
            name: _target(tensor, self.live[name])
            for name, tensor in planned.items()
            if name in self.live and name not in self.tied
        }
        """Where each tensor of the plan goes; not those tied to another, nor those left out."""
        for words in found.words():
            log.warning("%s", words)

    def __getitem__(self, name: str) -> Tensor:
        """Return the live tensor that a name of the plan stands for, or the first of several."""
        return self.live[name][0].tensor

    def session(self) -> ModelSink:
        """Return self: threads may write blocks at different places at once."""
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return the memory of a parameter, unless an ingredient may share it."""
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
        begin = start * planned.unit_nbytes
        if target.raw is not None:
            place = target.raw[begin : begin + len(block)]
            if address_of(place) != address_of(block):  # made elsewhere
                place[:] = block
            return
        dtype = TORCH_DTYPES[planned.dtype.name]
        values = torch.frombuffer(block, dtype=torch.uint8).view(dtype)
        first = begin // dtype.itemsize
        with torch.inference_mode(target.tensor.is_inference()), torch.no_grad():
            for at, tensor in target.parts:
                low, high = max(at, first), min(at + tensor.numel(), first + len(values))
                if low < high:
                    _put(tensor, low - at, values[low - first : high - first])

    def close(self) -> None:
        """Do nothing: the sink holds nothing but the model."""

    def check_apart(self) -> None:
        """Raise `MismatchError` if an ingredient is this very model.

        For a search: the first candidate would overwrite it. A single mix may be made in place.
        Results are then made where they belong, rather than copied there.
        """
        own = [tensor for tensor in self._match.tensors.values() if type(tensor) in PLAIN]
        for ingredient in self.plan.ingredients:
            if sharing(ingredient.source.memory, own):
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
        own = {
            name: tensor for name, tensor in self._match.tensors.items() if type(tensor) in PLAIN
        }
        for ingredient in self.plan.ingredients:
            tensors = ingredient.source.memory
            for name in sharing(tensors, own.values()):
                if met := self._met(own, name, tensors[name]):
                    raise MismatchError(
                        f"{ingredient.name}: {printable(name)} lies in the memory of "
                        f"{printable(met)} of the model, which would overwrite it; give a copy"
                    )

    def _met(self, own: Mapping[str, Tensor], name: str, tensor: Tensor) -> str:
        """Name a tensor of the model that an ingredient's lies in, without being the same one."""
        places = self.live.get(name, ())
        if [memory_of(name, tensor)] == [memory_of(name, part.tensor) for part in places]:
            return ""
        theirs = ""  # as no tensor of a model is called
        for pair in overlaps({**own, theirs: tensor}):
            if theirs in pair:
                return max(pair)  # the other one
        return ""

    def mark_changed(self) -> None:
        """Mark all tensors as changed in place, which torch cannot see by itself.

        It then refuses to go backward through what was computed before.
        """
        for tensor in self._match.tensors.values():
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        # Autocast keeps narrow copies of parameters, and does not ask whether they still hold.
        torch.clear_autocast_cache()

    def versions(self) -> list[int] | None:
        """Return how often each tensor was changed in place; None where torch does not count.

        It does not count changes through ``.data`` or views of numpy's, nor those of BatchNorm's
        statistics, but of the number of batches beside them.
        """
        live = self._match.tensors.values()
        if any(tensor.is_inference() for tensor in live):
            return None
        return [tensor._version for tensor in live]

    def check(self) -> None:
        """Raise `TaskError` if the model's tensors are no longer the ones that were matched."""
        now = tensors_of(self._match.module)
        changed = [
            name
            for name, memory in self._memory.items()
            if name not in now or memory_of(name, now[name]) != memory
        ]
        if changed:
            raise TaskError(
                f"the task replaced, moved or resized parameters of its model: {some(changed)}; "
                "scoring may change their values at most"
            )

    def parameters(self) -> list[tuple[nn.Parameter, list[tuple[str, Part]]]]:
        """Return each parameter once, with the tensors of the plan that it holds, and where.

        Those that are tied to another are left out.
        """
        held: dict[object, list[tuple[str, Part]]] = {}
        for name in self.targets:
            for part in self.live[name]:
                held.setdefault(self._memory[part.live], []).append((name, part))
        found = {
            id(tensor): (tensor, held.get(self._memory[name], []))
            for name, tensor in self._match.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.is_leaf
        }
        return list(found.values())


def of_part(part: Part, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return what a gradient ``(as parameter)`` has for a part of it, in C order ``(as part)``."""
    if part.tensor.is_set_to(parameter):
        return gradient
    laid = gradient
    if laid.stride() != parameter.stride():
        laid = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
        ).copy_(gradient)
    view = part.tensor
    offset = laid.storage_offset() + view.storage_offset() - parameter.storage_offset()
    return laid.as_strided(view.shape, view.stride(), offset)


def _put(place: Tensor, begin: int, values: Tensor) -> None:
    """Copy values ``(n,)`` into elements `begin` to `begin` + n of a tensor, in C order."""
    if place.is_contiguous():
        flat = place.as_strided((place.numel(),), (1,))
        flat[begin : begin + len(values)].copy_(values)
        return
    if place.dim() == 1:
        place[begin : begin + len(values)].copy_(values)
        return
    row = place[0].numel()
    first, last = -(-begin // row), (begin + len(values)) // row  # the rows that are whole
    if first > last:  # all within one
        _put(place[last], begin - last * row, values)
        return
    head, end = first * row - begin, last * row - begin
    if head:
        _put(place[first - 1], row - head, values[:head])
    if first < last:
        place[first:last].copy_(values[head:end].view(last - first, *place.shape[1:]))
    if end < len(values):
        _put(place[last], 0, values[end:])


def _tied(live: Mapping[str, tuple[Part, ...]]) -> dict[str, str]:
    """Return the names whose memory is that of an earlier one, and that one."""
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name, parts in live.items():
        memory = tuple(memory_of(name, part.tensor) for part in parts)
        if first.setdefault(memory, name) != name:
            tied[name] = first[memory]
    return tied


def _check(planned: Mapping[str, PlannedTensor], model: nn.Module, found: Match) -> None:
    """Raise `MismatchError` with all that keeps the plan from being put into the model."""
    problems: list[str] = []
    if found.missing:
        n = len(found.missing)
        problems.append(f"the model has {n} that no ingredient has: {some(found.missing)}")
    if found.strange:
        n = len(found.strange)
        problems.append(f"the model lacks {n} of the ingredients: {some(found.strange)}")
    kinds = {problem: list(names) for problem, names in found.problems.items()}
    for name, shape in found.misshapen.items():
        ours = list(found.tensors[name].shape)
        problem = f"of shape {ours} where the ingredients have {list(shape)}"
        kinds.setdefault(problem, []).append(name)
    for name, parts in found.parts.items():
        if (why := _problem(planned[name], parts)) is not None:
            kinds.setdefault(why, []).append(name)
    live = found.tensors
    apart = {memory_of(name, tensor): (name, tensor) for name, tensor in live.items()}
    for name, other in overlaps(dict(each for memory, each in apart.items() if memory != each[0])):
        problem = f"in the memory of {printable(other)}, without being the same tensor"
        kinds.setdefault(problem, []).append(name)
    problems += [f"{problem}: {some(names)}" for problem, names in kinds.items()]
    if problems:
        raise misfit(problems, model, found)


def _check_ties(plan: MixPlan, model: nn.Module, tied: Mapping[str, str]) -> None:
    """Raise `MismatchError` if an ingredient holds two values for one tensor of the model."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    problems: list[str] = []
    for name, first in tied.items():
        for i, ingredient in enumerate(plan.ingredients):
            if not _are_equal(plan, i, planned[first], planned[name]):
                where = printable(ingredient.name)
                both = some([first, name])
                problems.append(f"one tensor in the model, and two that differ in {where}: {both}")
                break
    if problems:
        raise misfit(problems, model)


def _problem(planned: PlannedTensor, parts: tuple[Part, ...]) -> str | None:
    """Return why live tensors cannot take a planned one; None if they can."""
    for part in parts:
        tensor = part.tensor
        if tensor.is_meta:
            return "on the meta device (not loaded, or offloaded)"
        if nn.parameter.is_lazy(tensor):
            return "not yet initialised (lazy modules): run the model once in build()"
        if type(tensor) not in PLAIN:
            return f"of the type {type(tensor).__name__} (quantised or distributed)"
        if tensor.layout != torch.strided or tensor.is_quantized:
            return f"quantised or not dense ({tensor.dtype}, {tensor.layout})"
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            return "expanded: its elements share memory"
        if not is_apart(tensor):
            return "folded: its elements share memory"
        ours = TORCH_DTYPES.get(planned.dtype.name)
        if planned.is_reduced:
            if not tensor.is_floating_point():
                return f"of dtype {tensor.dtype}, which is not a float"
        elif tensor.dtype != ours:
            return f"of dtype {tensor.dtype} where the ingredients have {planned.dtype.name}"
    return None


def _are_equal(plan: MixPlan, i: int, first: PlannedTensor, second: PlannedTensor) -> bool:
    """Return True if ingredient `i` holds the same bytes for two tensors; read till they differ."""
    layout = plan.layout_of[i]
    if first.sources[layout].dtype != second.sources[layout].dtype:
        return False
    end = first.nbytes_in(layout)
    one, other = (memoryview(bytearray(min(_PIECE, end))) for _ in range(2))
    with (
        closing(Access(mapped=False)) as access,
        closing(plan.ingredients[i].source.cursor(access)) as cursor,
    ):
        for at in range(0, end, _PIECE):
            n = min(_PIECE, end - at)
            cursor.read(first.name, at, one[:n])
            cursor.read(second.name, at, other[:n])
            if one[:n] != other[:n]:
                return False
    return True


def _target(planned: PlannedTensor, parts: tuple[Part, ...]) -> Target:
    # Not `detach`: what we write is counted once, by `mark_changed`.
    places = tuple((part.begin, part.tensor.data) for part in parts)
    live = places[0][1]
    if len(places) > 1 or not live.is_contiguous():
        return Target(places, None, None)
    flat = live.as_strided((live.numel(),), (1,))  # a single element may have any stride
    same = live.dtype == TORCH_DTYPES[planned.dtype.name]
    if same and live.device.type == "cpu":
        raw = flat.view(torch.uint8).numpy().data
        return Target(places, raw, flat)
    return Target(places, None, flat)
