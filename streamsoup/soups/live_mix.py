"""Mixes into a live model, made where the model lives.

On an accelerator, ingredients stream through its pinned ring and are summed there; the result goes
from the sums straight into the parameters, whose storage stays. The running sum of a greedy search
may stay there too, so that a trial moves one ingredient over the bus and nothing back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamsoup.device_mix import DeviceMix, OnDevice, RunningSum, find_device
from streamsoup.kernels.device import open_device, our_errors
from streamsoup.kernels.torch_blocks import torch_dtype
from streamsoup.live import ModelSink
from streamsoup.options import Options
from streamsoup.plan import MemoryPlan, MixPlan, PlannedTensor, parse_nbytes, plan_memory
from streamsoup.read import open_reader
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.reduce import Engine, Mix, Reduction
from streamsoup.soups.make import AnyIngredient, order
from streamsoup.soups.running import Candidates, Sums, SumsPlace, SumsPlan
from streamsoup.stream import run

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["beside", "device_of", "live_reduction", "mix_into"]

SUMS_SHARE = 2
"""A running sum may take one part in so many of the device's free memory; the task needs some."""


def device_of(sink: ModelSink, options: Options) -> str:
    """Name the device that mixes into `sink` are made on: as told, or ``auto``: the model's own.

    A model on several accelerators is served from the first; what is on the others is copied.
    """
    if options.device != "auto":
        return options.device
    for target in sink.targets.values():
        if target.tensor.device.type not in ("cpu", "mps", "meta"):
            return str(target.tensor.device)
    return "cpu"


def live_reduction(
    plan: MixPlan,
    sink: ModelSink,
    *,
    mapped: bool,
    options: Options,
    engine: Engine | None = None,
) -> tuple[Reduction, MemoryPlan]:
    """Give what `stream.run` needs to mix `plan` into `sink`, on the device of `device_of`.

    `plan` is that of the sink, or a part of it; `engine` is used where that is the CPU. Raises
    `DeviceError` and `BudgetError`. The same bytes, wherever they are made.
    """
    name = device_of(sink, options)
    if name == "cpu":
        budget = options.memory
        memory = plan_memory(
            plan,
            mapped=mapped,
            threads=options.n_threads,
            budget=parse_nbytes(budget) if isinstance(budget, str) else budget,
        )
        return Mix(plan, memory, engine or Engine(plan)), memory
    found = _find(plan, sink, name, options, mapped)
    return found.mix(plan, target=_targets(sink, found)), found.plan.memory


def mix_into(
    model: nn.Module,
    ingredients: Sequence[AnyIngredient],
    coefficients: Sequence[float] | Coefficients | None = None,
    *,
    normalize: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Recipe:
    """Put Σᵢ cᵢ·θᵢ into the parameters and buffers of `model`, in place; give the recipe.

    Without `coefficients`, the mean. Sums are made on the device of the model (`Options.device`
    ``auto``) or on the one that is named. Writes nothing to disk; holds blocks only. Each result
    is rounded once, to the dtype of the ingredients or `Options.dtype`, and has the bytes that
    `mix` would write. Raises what `mix` raises, and `MismatchError` where the model does not fit;
    after any other error, the model holds part of the mix.
    """
    if coefficients is None:
        coefficients = Coefficients.uniform(len(ingredients))
    elif not isinstance(coefficients, Coefficients):
        coefficients = Coefficients.given(coefficients, normalize=normalize)
    on_host = replace(options, device="cpu")
    ordered = order(ingredients, coefficients, method="mix", options=on_host)
    plan = ordered.plan
    sink = ModelSink(model, plan)
    reduction, memory = live_reduction(plan, sink, mapped=ordered.mapped, options=options)
    reader = open_reader(plan, memory, mapped=ordered.mapped)
    run(plan, memory, reader, reduction, sink, digest=False, on_progress=options.on_progress)
    return plan.recipe


def beside(candidates: Candidates, sink: ModelSink) -> Candidates:
    """Give candidates that are made where the model of `sink` lives, or where they are told."""
    name = device_of(sink, candidates.options)
    return candidates if name == "cpu" else _DeviceCandidates(candidates, sink, name)


class _DeviceCandidates(Candidates):
    """Candidates on an accelerator, with the running sum there too, if it fits."""

    def __init__(self, candidates: Candidates, sink: ModelSink, name: str) -> None:
        plan, mapped, options = candidates.plan, candidates.mapped, candidates.options
        self._on_device = _find(plan, sink, name, options, mapped)
        self._target = _targets(sink, self._on_device)
        nbytes = candidates.sums_plan.nbytes
        told = options.device_memory
        if told is None:
            room = self._on_device.device.free_nbytes() // SUMS_SHARE
        else:
            told = parse_nbytes(told) if isinstance(told, str) else told
            room = told - self._on_device.plan.device_nbytes
        sources = {source.dtype.name for tensor in plan.tensors for source in tensor.sources}
        # In memory, here: the device's. The rule that no sum can carry is that of `plan_sums`.
        place: SumsPlace = "memory" if nbytes <= room and "F64" not in sources else "reread"
        sums = SumsPlan(place, nbytes, candidates.sums_plan.memory)
        super().__init__(plan, sums, mapped=mapped, threads=candidates.threads, scratch=None)
        self._tensors: dict[str, torch.Tensor] = {}

    def memory_of(self, part: MixPlan) -> MemoryPlan:
        """Give the blocks of a lane: they do not depend on the part."""
        return self._on_device.plan.memory

    def reduction(
        self, part: MixPlan, memory: MemoryPlan, *, starts: bool = False, n_tail: int = 0
    ) -> Reduction:
        """Give the reduction of a part, which may start from the running sum, and carry it on."""
        running = None
        if starts or n_tail:
            running = RunningSum(self._tensors.__getitem__, starts, n_tail)
        return DeviceMix(
            part,
            self._on_device.plan,
            self._on_device.device,
            target=self._target,
            running=running,
        )

    def open_sums(self) -> Sums:
        """Make room for the running sum on the device."""
        import torch

        with our_errors("the running sum (--sums reread does without)"):
            for tensor in self.plan.tensors:
                if tensor.operation == "mix":
                    self._tensors[tensor.name] = self._on_device.device.device(
                        tensor.n_units, torch.float64
                    )
        return _DeviceSums(self._tensors)


class _DeviceSums:
    """The running sum on the device. Lanes read and write it themselves."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, tensor: str, start: int, into: Any) -> None:
        raise NotImplementedError

    def write(self, tensor: str, start: int, sums: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._tensors.clear()


def _find(plan: MixPlan, sink: ModelSink, name: str, options: Options, mapped: bool) -> OnDevice:
    targets: Mapping[str, Any] = sink.targets
    name = open_device(name).name
    on_it = all(
        tensor.operation != "mix"
        or (tensor.name in targets and _fits(targets[tensor.name], tensor, name))
        for tensor in plan.tensors
        if tensor.name not in sink.tied
    )
    told = replace(options, device=name)
    return find_device(plan, told, mapped=mapped, lands=not on_it or bool(sink.tied))


def _fits(target: Any, tensor: PlannedTensor, device: str) -> bool:
    """Whether results can go straight into a target: on the device, in order, of their dtype."""
    return (
        target.flat is not None
        and str(target.tensor.device) == device
        and tensor.dtype.nbits > 8
        and target.tensor.dtype == torch_dtype(tensor.dtype)
    )


def _targets(sink: ModelSink, found: OnDevice) -> Any:
    def target(tensor: PlannedTensor) -> torch.Tensor | None:
        place = sink.targets.get(tensor.name)
        if place is None or not _fits(place, tensor, found.device.name):
            return None
        return place.flat

    return target
