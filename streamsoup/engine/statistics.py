"""The running statistics of BatchNorm in a plan: which are averaged, and which fall below zero.

A running mean and variance are measured for one set of weights. Their average belongs to none
(Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2); and with a negative
coefficient a variance may fall below zero, whose root, and every output of the model, is a NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from streamsoup.engine.budget import memory_budget, plan_memory
from streamsoup.engine.plan import Leaf, MixPlan
from streamsoup.engine.read import open_reader
from streamsoup.engine.reduce import Engine
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import Nowhere, run
from streamsoup.errors import RecipeError, printable, some
from streamsoup.system.buffers import Bytes

__all__ = ["MEASURE_ANEW", "averaged_variances", "check_variances", "may_be_negative", "note_of"]

MEASURE_ANEW = "streamsoup.recalibrate(model, batches) measures them anew once the model is loaded"


def averaged_variances(plan: MixPlan) -> list[str]:
    """Return the names of the running variances that a plan averages, in its order.

    These are tensors named ``running_var``, with a ``running_mean`` beside them.
    """
    names = {tensor.name for tensor in plan.tensors if tensor.operation == "mix"}
    return [
        tensor.name
        for tensor in plan.tensors
        if tensor.name in names
        and tensor.name.rpartition(".")[2] == "running_var"
        and f"{tensor.name.removesuffix('var')}mean" in names
    ]


def note_of(plan: MixPlan) -> str:
    """Return a note on averaged running statistics, or nothing if there are none."""
    names = averaged_variances(plan)
    if not names or len(plan.ingredients) < 2:
        return ""
    layers = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    return (
        f"the running statistics of {layers} of BatchNorm ({printable(names[0])}, …) are averaged, "
        f"and belong to none of the averaged weights; {MEASURE_ANEW}"
    )


def may_be_negative(plan: MixPlan) -> list[str]:
    """Return the running variances that the rule of a plan may bring below zero.

    For the linear rule, those with a negative coefficient; for any other, all that are averaged.
    """
    names, rule = averaged_variances(plan), plan.recipe.rule
    if not isinstance(rule, Linear):
        return names
    return [name for name in names if _subtracts(*rule.coefficients.of(name))]


def _subtracts(factors: Sequence[float], divisor: float) -> bool:
    return any(factor * divisor < 0 for factor in factors)


def check_variances(plan: MixPlan, *, mapped: bool, memory: int | str | None) -> None:
    """Raise `RecipeError` if a running variance of the soup is below zero somewhere.

    Costs nothing unless a coefficient of one is negative; then those small tensors are made here,
    on the CPU, before the pass that makes the soup. Left unchecked where they depend on all other
    tensors (`Rule.spans_model`), as that would cost all passes.
    """
    part = plan.only(may_be_negative(plan))
    if not part.tensors or plan.recipe.rule.spans_model:
        return
    budget = memory_budget(part, memory)
    held = plan_memory(part, mapped=mapped, threads=1, budget=budget)
    signs = _Signs(part)
    reader = open_reader(part, held, mapped=mapped)
    reducer = reducer_of(part, held, Engine(part, compiles=False))
    run(part, held, reader, reducer, signs)
    if signs.negative:
        names = [tensor.name for tensor in part.tensors if tensor.name in signs.negative]
        raise RecipeError(
            f"{some(names, 3)}: BatchNorm variances below zero, with which every output would be "
            "a NaN, as the rule subtracts; choose smaller coefficients or none below 0, or put the "
            "mix into a live model (streamsoup.mix_into), measure its statistics anew "
            "(streamsoup.recalibrate), and save that"
        )


class _Signs(Nowhere):
    """A sink that records the names of tensors with an element below zero."""

    def __init__(self, plan: MixPlan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self.negative: set[str] = set()

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        import numpy as np

        tensor = self._plan.tensors[leaf.tensor]
        # Of any float: the highest bit is the sign, and all the others are 0 for a zero.
        elements = np.frombuffer(block, np.uint8).reshape(-1, tensor.dtype.itemsize).copy()
        has_sign = elements[:, -1] >= 0x80
        elements[:, -1] &= 0x7F
        if (has_sign & elements.any(axis=1)).any():
            with self._lock:
                self.negative.add(tensor.name)
