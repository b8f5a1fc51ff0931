"""The choice of the reducer for a plan's rule: the one place that makes it."""

from __future__ import annotations

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import MixPlan
from streamsoup.engine.reduce import Engine, Mix, Reducer
from streamsoup.engine.rules.linear import Linear

__all__ = ["reducer_of"]


def reducer_of(plan: MixPlan, memory: MemoryPlan, engine: Engine | None = None) -> Reducer:
    """Return what makes the tensors of `plan` on the CPU, within blocks of `memory`.

    The linear rule has a fast form of its own, with the bytes of the plain one. `engine` holds its
    compiled kernels where a caller keeps them from one pass to the next.
    """
    engine = engine or Engine(plan, compiles=memory.compiles)
    if isinstance(plan.recipe.rule, Linear):
        return Mix(plan, memory, engine)
    from streamsoup.engine.apply import Apply

    return Apply(plan, memory, engine.merger)
