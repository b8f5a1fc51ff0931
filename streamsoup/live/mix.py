"""Mixes into a live model, made where the model lives.

On an accelerator, ingredients stream through its pinned ring and are summed there; the result goes
from the sums straight into the parameters, whose storage stays. The running sum of a greedy search
stays there too, if it fits, so that a trial moves one ingredient over the bus and nothing back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from streamsoup.cluster.choice import refuse_spread
from streamsoup.engine.budget import MemoryPlan, memory_budget, plan_memory
from streamsoup.engine.device import OnDevice, RunningSum, find_device
from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.engine.read import Kept, open_reader
from streamsoup.engine.reduce import Engine, Reducer
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.statistics import may_be_negative
from streamsoup.engine.stream import run
from streamsoup.errors import BudgetError, RecipeError, option, some
from streamsoup.formats.ingredients import AnyIngredient, listed
from streamsoup.kernels.accelerator.device import open_device, our_errors
from streamsoup.kernels.accelerator.pipeline import Lane, taken_nbytes
from streamsoup.kernels.accelerator.torch_blocks import torch_dtype
from streamsoup.live.candidates import Candidates
from streamsoup.live.model import ModelSink
from streamsoup.live.recalibration import negative_variances
from streamsoup.live.running import Sums, SumsPlace, SumsPlan, can_carry
from streamsoup.options import Options, check_options, take
from streamsoup.output.coefficients import AnyRule, find_rule
from streamsoup.output.make import Soup, order
from streamsoup.reading import Reading
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.sizes import nbytes_text

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("streamsoup")

__all__ = ["DeviceCandidates", "LiveMix", "device_of", "device_text", "mix_into"]


def device_of(sink: ModelSink, options: Options) -> str:
    """Name the device that mixes into `sink` are made on: as told, or ``auto``: the model's own.

    A model on several accelerators is served from the first; what is on the others is copied.
    """
    if options.device != "auto":
        return str(options.device)
    for target in sink.targets.values():
        if target.tensor.device.type not in ("cpu", "mps", "meta"):
            return str(target.tensor.device)
    return "cpu"


def device_text(sink: ModelSink, options: Options) -> str:
    """Return the device that mixes into `sink` are made on, with the reason, for a message."""
    name = device_of(sink, options)
    if options.device != "auto":
        return f"{name}, as told"
    if any(target.tensor.device.type == "mps" for target in sink.targets.values()):
        return f"{name}, as mps has no float64"
    return f"{name}, where the model lives"


class LiveMix:
    """Mixes into one live model, again and again, on the device of `device_of`.

    The same bytes, wherever they are made.
    """

    def __init__(
        self,
        plan: MixPlan,
        sink: ModelSink,
        *,
        mapped: bool,
        options: Options,
        engine: Engine | None = None,
    ) -> None:
        """Find the device, and plan what any part of `plan` will hold there.

        `plan` is that of the sink; `engine` is used where sums are made on the CPU. Raises
        `DeviceError` and `BudgetError`.
        """
        self._mapped, self._options, self._engine = mapped, options, engine
        self.kept = Kept()
        """What stays mapped, for the readers of its runs."""
        self._found: OnDevice | None = None
        self._lanes: list[Lane[Any, Any]] = []
        if device_of(sink, options) != "cpu":
            self._found = _find(plan, sink, options, mapped)
            self._target = _targets(sink, self._found)

    def reducer(self, part: MixPlan) -> tuple[Reducer, MemoryPlan]:
        """Return the reducer and memory plan for a part of the plan. Raises `BudgetError`."""
        if self._found is not None and isinstance(part.recipe.rule, Linear):
            mix = self._found.mix(part, target=self._target, lanes=self._lanes)
            return mix, self._found.plan.memory
        memory = plan_memory(
            part,
            mapped=self._mapped,
            threads=self._options.n_threads,
            budget=memory_budget(part, self._options.memory),
        )
        return reducer_of(part, memory, self._engine), memory


def mix_into(
    model: nn.Module,
    ingredients: Iterable[AnyIngredient],
    coefficients: AnyRule | None = None,
    *,
    normalize: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Recipe:
    """Put Σᵢ cᵢ·θᵢ into the parameters and buffers of `model`, in place; return the recipe.

    Each result is rounded once, to the dtype of the ingredients or `Options.dtype`, and has the
    bytes that `mix` would write. The model may be an ingredient itself.

    Args:
        model: The module to change, on any device.
        ingredients: As for `uniform`.
        coefficients: As for `mix`, or any rule, which is applied on the CPU; None for the mean.
        normalize: Divide the coefficients by their sum.
        options: Sums are made on the model's device (`Options.device` ``auto``) or a named one.

    Returns:
        The recipe of the mix.

    Raises:
        MismatchError: The model does not fit, or an ingredient shares its memory in another
            layout; the model is unchanged.
        StreamsoupError: As for `mix`. After an error during the pass, the model holds part of the
            mix.

    Reads each ingredient once for each pass of the rule; holds blocks only, and writes nothing to
    disk.
    """
    check_options(options, Options)
    refuse_spread(options, "mix_into")
    if coefficients is None:
        ingredients = listed(ingredients)
        coefficients = Linear(Coefficients.uniform(len(ingredients)))
    else:
        told = take("bool", "normalize", normalize)
        coefficients = find_rule(coefficients, normalize=told)
    on_host = replace(options, device="cpu")
    ordered = order(ingredients, coefficients, method="mix", options=on_host)
    plan = ordered.plan
    sink = ModelSink(model, plan)
    sink.check_in_place()
    mix = LiveMix(plan, sink, mapped=ordered.mapped, options=options)
    reducer, memory = mix.reducer(plan)
    reader = open_reader(plan, memory, mapped=ordered.mapped)
    try:
        run(plan, memory, reader, reducer, sink, on_event=options.on_event)
    finally:
        sink.mark_changed()
    if negative := negative_variances(sink.model) if may_be_negative(plan) else []:
        log.warning(
            "%s: BatchNorm variances below zero, with which every output is a NaN; measure them "
            "anew before the model is used, with streamsoup.recalibrate(model, batches)",
            some(negative, 3),
        )
    return plan.recipe


class DeviceCandidates(Candidates):
    """Candidates in a model on an accelerator, with the running sum there too, if it fits."""

    joins = False  # lanes put results straight into the parameters, each of its own

    def __init__(
        self,
        plan: MixPlan,
        sink: ModelSink,
        *,
        mapped: bool,
        place: SumsPlace | None,
        options: Options,
    ) -> None:
        """Plan what is held on the device of `device_of`, for candidates put into `sink`.

        `place` overrides where the running sum is kept. Raises `DeviceError`, `BudgetError`, and
        `RecipeError` for a place where it cannot be.
        """
        self._on_device, sums = _find_with_sums(plan, sink, options, mapped, place)
        self._target = _targets(sink, self._on_device)
        self._lanes: list[Lane[Any, Any]] = []
        kept = f"the running sum is there too ({nbytes_text(sums.nbytes)})"
        if sums.place == "reread":
            kept = f"no running sum ({nbytes_text(sums.nbytes)}), what was kept is read again"
        where = f"{device_text(sink, options)}; {kept}"
        super().__init__(
            plan, sums, mapped=mapped, threads=options.n_threads, scratch=None, where=where
        )

    def memory_of(self, part: MixPlan) -> MemoryPlan:
        """Return the blocks of a lane: they do not depend on the part."""
        return self._on_device.plan.memory

    def reducer(
        self, part: MixPlan, memory: MemoryPlan, *, starts: bool = False, n_tail: int = 0
    ) -> Reducer:
        """Return the reduction of a part, which may start from the running sum and update it."""
        running = None
        if starts or n_tail:
            assert isinstance(self._sums, _DeviceSums)
            running = RunningSum(self._sums.of, starts, n_tail)
        return self._on_device.mix(part, target=self._target, running=running, lanes=self._lanes)

    def forget(self) -> None:
        """Free the running sum and the lanes."""
        super().forget()
        self._lanes.clear()

    def open_sums(self) -> Sums:
        """Make room for the running sum on the device."""
        return _DeviceSums(self.plan, self._on_device)


class _DeviceSums:
    """The running sum on the device, in one allocation. Lanes read and write it themselves."""

    def __init__(self, plan: MixPlan, found: OnDevice) -> None:
        import torch

        self._places: dict[str, slice] = {}
        n = 0
        for tensor in plan.tensors:
            if tensor.is_reduced:
                self._places[tensor.name] = slice(n, n + tensor.n_units)
                n += tensor.n_units
        asked = f"a running sum of {nbytes_text(8 * n)} ({option('sums', 'reread')} does without)"
        with our_errors(asked):
            self._sums = found.device.device(n, torch.float64)

    def of(self, tensor: str) -> torch.Tensor:
        """Return the sums of a tensor, by name."""
        return self._sums[self._places[tensor]]

    def close(self) -> None:
        del self._sums


def _find_with_sums(
    plan: MixPlan, sink: ModelSink, options: Options, mapped: bool, place: SumsPlace | None
) -> tuple[OnDevice, SumsPlan]:
    """Find the device, and choose whether the running sum is kept there: `running.plan_sums`."""
    name = device_of(sink, options)
    if place == "file":
        raise RecipeError(
            f"{option('sums', 'file')} is for candidates that are made on the cpu; on {name}, the "
            "running sum "
            "is kept there (memory) or not at all (reread)"
        )
    nbytes = plan.nbytes_summed
    if place != "reread" and can_carry(plan):
        try:
            found = _find(plan, sink, options, mapped, beside=taken_nbytes([nbytes]))
            return found, SumsPlan("memory", nbytes, found.plan.memory.peak_nbytes)
        except BudgetError:
            if place == "memory":
                raise
    found = _find(plan, sink, options, mapped)
    return found, SumsPlan("reread", nbytes, found.plan.memory.peak_nbytes)


def _find(
    plan: MixPlan, sink: ModelSink, options: Options, mapped: bool, *, beside: int = 0
) -> OnDevice:
    """Find the device of `device_of`; where all results stay there, nothing is pinned for them."""
    targets: Mapping[str, Any] = sink.targets
    name = open_device(device_of(sink, options)).name
    on_it = all(
        not tensor.is_reduced
        or (tensor.name in targets and _fits(targets[tensor.name], tensor, name))
        for tensor in plan.tensors
        if tensor.name not in sink.tied
    )
    told = replace(options, device=name)
    lands = not on_it or bool(sink.tied)
    return find_device(plan, told, mapped=mapped, lands=lands, beside=beside)


def _fits(target: Any, tensor: PlannedTensor, device: str) -> bool:
    """Return True if results can go straight into a target: same device and dtype, contiguous."""
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


def put_into(model: nn.Module, soup: Soup, options: Options) -> None:
    """Put a finished soup into a live model, to the bit; costs a read of it."""
    as_it_is = {name: getattr(Reading(), name) for name in Reading.__struct_fields__}
    quietly = replace(options, dtype="same", on_event=None, **as_it_is)
    mix_into(model, [soup.path], options=quietly)
