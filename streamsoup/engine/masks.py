"""Buffers such as a −inf attention mask: not finite, and the same in every ingredient.

Where all ingredients agree no mean or merge is needed, so such a tensor does not stop the run. The
condition is one on the whole tensor, so it does not depend on how a pass is cut into blocks: its
bytes are the same in all ingredients. Its non-finite elements are then those of the ingredients,
also where the arithmetic would make NaN of them (−inf · 0), and the finite ones are summed as
always. A NaN is written in the one form that stands for every NaN (`tensors.DType.nan`).

A merge of equal tensors is that tensor, as every task vector is zero: its statistics are taken of
zeros, and whatever is not finite in its result is that of the ingredients.
"""

from __future__ import annotations

import math

from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.engine.read import Session
from streamsoup.engine.rules.elementwise import NearSwap, Ram
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.rules.row_slerp import RowSlerp
from streamsoup.engine.rules.sce import Sce
from streamsoup.engine.rules.task_vectors import TaskVectors
from streamsoup.system.buffers import Bytes

_MERGES = (TaskVectors, Sce, Ram, NearSwap, RowSlerp)
"""Rules that leave a tensor as it is where all ingredients, the base among them, hold the same."""

__all__ = ["is_kept", "restore"]


def is_kept(plan: MixPlan, tensor: PlannedTensor, block: int, reading: Session) -> bool:
    """Return True if all ingredients hold the same bytes for `tensor`, and the soup keeps them.

    False where coefficients do not sum to 1: the soup of equal tensors then differs from them. A
    pass of coefficients 1 whose sum is at most its divisor is a part of a mean. Of one ingredient
    alone, only −inf is kept, as a mask; NaN and +inf are more likely a fault. Reads the tensor from
    all ingredients, `block` units at a time, until they differ.
    """
    from streamsoup.kernels.blocks import array_of, widen

    if not _leaves_equal(plan, tensor):
        return False
    dtypes = [tensor.sources[layout].dtype for layout in plan.layout_of]
    if any(dtype is not dtypes[0] for dtype in dtypes):
        return False
    k = len(plan.ingredients)
    for start in range(0, tensor.n_units, block):
        n_units = min(block, tensor.n_units - start)
        (first,) = (bytes(each) for each in reading.block(tensor, 0, 1, start, n_units))
        if k == 1:
            values = widen(array_of(memoryview(first)), dtypes[0])
            if not (values < math.inf).all():
                return False
        for i in range(1, k):
            (other,) = reading.block(tensor, i, i + 1, start, n_units)
            if other != first:
                return False
    return True


def _leaves_equal(plan: MixPlan, tensor: PlannedTensor) -> bool:
    """Return True if the rule makes of equal tensors that tensor, or a part of their mean."""
    rule = plan.recipe.rule
    if not isinstance(rule, Linear):
        return isinstance(rule, _MERGES)
    factors, divisor = rule.coefficients.of(tensor.name)
    part_of_mean = set(factors) == {1.0} and len(factors) <= divisor
    return part_of_mean or rule.coefficients.is_affine(tensor.name)


def restore(plan: MixPlan, tensor: PlannedTensor, given: Bytes, result: Bytes) -> bool | None:
    """Put the non-finite elements of `given` into `result`, a soup's block.

    `given` is the block of any ingredient, all being the same. Return True if that changed bytes,
    False if not, and None where the result cannot be kept: an element is not finite though that of
    the ingredients is, or it went straight to a device, which holds another value.
    """
    import numpy as np

    from streamsoup.kernels.blocks import array_of, narrow, widen

    dtype = tensor.sources[plan.layout_of[0]].dtype
    with np.errstate(invalid="ignore"):
        values = widen(array_of(given), dtype).astype(np.float64)
    bad = ~np.isfinite(values)
    if not len(result):  # on a device: right where every product is the infinity itself
        assert isinstance(plan.recipe.rule, Linear)
        factors, _ = plan.recipe.rule.coefficients.of(tensor.name)
        infinite = all(factor > 0 for factor in factors) and not np.isnan(values).any()
        return False if infinite else None
    made = np.asarray(array_of(result))
    elements = made.reshape(-1, tensor.dtype.itemsize)
    with np.errstate(invalid="ignore"):
        floats = widen(made, tensor.dtype)
    if not isinstance(plan.recipe.rule, Linear):
        bad |= ~np.isfinite(floats)
    if not np.isfinite(floats[~bad]).all():
        return None
    wanted = np.empty_like(elements)
    values[~bad] = 0.0
    narrow(values, tensor.dtype, wanted.reshape(-1))
    if np.array_equal(elements[bad], wanted[bad]):
        return False
    elements[bad] = wanted[bad]
    return True
