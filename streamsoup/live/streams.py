"""Soups that no folder is written for: as an iterator of tensors, or into any sink.

Both run the same pass as a soup on disk, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from streamsoup.cluster.choice import refuse_spread
from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import Leaf, MixPlan
from streamsoup.engine.read import Kept, open_reader
from streamsoup.engine.reduce import Engine
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.statistics import check_variances
from streamsoup.engine.stream import Ledger, Sink, run
from streamsoup.errors import RecipeError
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.options import Options, check_options
from streamsoup.output.coefficients import AnyRule, find_rule
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import TORCH_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["mix_to", "stream_mix"]

BATCH_NBYTES = 64_000_000
"""Bytes of small tensors that are made in one pass: below, starting it costs more than its work."""


def stream_mix(
    ingredients: Iterable[AnyIngredient],
    rule: AnyRule | None = None,
    *,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a soup one by one, as ``(name, tensor)`` in the order of the first file.

    Args:
        ingredients: Checkpoints, state dicts or modules.
        rule: Coefficients, a soup that has some, or any rule; None for the mean.
        options: As for every verb; `device` and `shard_size` are not used.

    Yields:
        The name and a CPU tensor of the planned dtype, contiguous and the caller's own.
        ``dict(stream_mix(...))`` is a state dict.

    Raises:
        RecipeError: The rule needs statistics of the whole model before it makes any tensor.
        StreamsoupError: Whatever `uniform` raises; what headers can tell at the first step.

    Holds the largest tensor, or 64 MB of small ones, beside what is held for any soup. Reads each
    ingredient once for each pass of the rule.
    """
    check_options(options, Options)
    refuse_spread(options, "a stream of tensors")
    plan, mapped, memory = _planned(ingredients, rule, options)
    if plan.recipe.rule.spans_model:
        raise RecipeError(
            "this rule needs statistics of the whole model before it makes any tensor; write the "
            "soup to a folder instead"
        )
    kept = Kept()
    # Of the whole soup, as a batch alone may be too small to be worth compiling for.
    engine = Engine(plan, compiles=memory.compiles)
    for names in _batches(plan):
        part = plan.only(names)
        sink = _Tensors(part)
        reader = open_reader(part, memory, mapped=mapped, kept=kept)
        reducer = reducer_of(part, memory, engine)
        run(part, memory, reader, reducer, sink, on_event=options.on_event)
        yield from sink.tensors()


def mix_to(
    sink: Callable[[MixPlan], Sink],
    ingredients: Iterable[AnyIngredient],
    rule: AnyRule | None = None,
    *,
    ledger: Callable[[MixPlan], Ledger] | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Recipe:
    """Send a soup to a sink, block by block, as the blocks are made.

    Args:
        sink: Called with the plan; returns where blocks go. A class that takes the plan will do.
        ingredients: Checkpoints, state dicts or modules.
        rule: Coefficients, a soup that has some, or any rule; None for the mean.
        ledger: Called with the plan; returns what notes finished leaves, and knows those of earlier
            runs. With one, all bytes are digested.
        options: As for every verb; `device` is not used.

    Returns:
        The recipe of what the sink was sent.

    Raises:
        StreamsoupError: Whatever `uniform` raises; the sink then holds a part.

    Reads each ingredient once for each pass of the rule; holds blocks only.
    """
    check_options(options, Options)
    refuse_spread(options, "a stream of tensors")
    plan, mapped, memory = _planned(ingredients, rule, options)
    reader = open_reader(plan, memory, mapped=mapped)
    run(
        plan,
        memory,
        reader,
        reducer_of(plan, memory),
        sink(plan),
        ledger=None if ledger is None else ledger(plan),
        on_event=options.on_event,
    )
    return plan.recipe


def _planned(
    ingredients: Iterable[AnyIngredient], rule: AnyRule | None, options: Options
) -> tuple[MixPlan, bool, MemoryPlan]:
    """Plan the pass on the CPU, and refuse what a soup on disk is refused for."""
    opened = open_ingredients(ingredients, options.reading)
    chosen = find_rule(Coefficients.uniform(len(opened)) if rule is None else rule)
    on_host = replace(options, device="cpu")
    ordered = order(opened, chosen, method="mix", options=on_host)
    check_variances(ordered.plan, mapped=ordered.mapped, memory=options.memory)
    return ordered.plan, ordered.mapped, ordered.memory


def _batches(plan: MixPlan) -> Iterator[list[str]]:
    """Yield the names of tensors that are made together, in order."""
    names: list[str] = []
    nbytes = 0
    for tensor in plan.tensors:
        if names and nbytes + tensor.nbytes > BATCH_NBYTES:
            yield names
            names, nbytes = [], 0
        names.append(tensor.name)
        nbytes += tensor.nbytes
    if names:
        yield names


class _Tensors:
    """Memory for some tensors; a sink, and its own session."""

    def __init__(self, plan: MixPlan) -> None:
        self._plan = plan
        self._memory = [buffer(tensor.nbytes) for tensor in plan.tensors]

    def session(self) -> _Tensors:
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        begin = start * self._plan.tensors[leaf.tensor].unit_nbytes
        return self._memory[leaf.tensor][begin : begin + nbytes]

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        room = self.room(leaf, start, len(block))
        assert room is not None
        room[:] = block  # copies from where it lies, if it was made there

    def close(self) -> None:
        pass

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was made, as tensors that own their memory."""
        import torch

        for tensor, memory in zip(self._plan.tensors, self._memory, strict=True):
            name = TORCH_NAMES.get(tensor.dtype.name)
            if name is None:
                raise RecipeError(
                    f"{tensor.name}: torch has no dtype for {tensor.dtype.name}; write the soup to "
                    "a folder instead"
                )
            dtype = getattr(torch, name)
            if not tensor.nbytes:
                yield tensor.name, torch.empty(tensor.shape, dtype=dtype)
                continue
            flat = torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
            yield tensor.name, flat.reshape(tensor.shape)
