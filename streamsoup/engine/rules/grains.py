"""Sums of floats in one order, whatever the threads, blocks or processor.

The elements of a tensor are taken in grains of 4096. Element e of a grain belongs to lane e mod 64;
each lane is added up in order, then the lanes in order, then the grains in order. What is missing
from the last grain counts as zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamsoup.rule import GRAIN

__all__ = ["LANES", "GrainTotals", "grain_sums"]

Floats = NDArray[np.float64]

LANES = 64


def grain_sums(values: Floats) -> Floats:
    """Return the sum of each grain ``(grain,)`` of `values` ``(element,)``, which begin one.

    Adds row to row: numpy's own sums of neighbours depend on the processor.
    """
    n_grains = -(-len(values) // GRAIN)
    if len(values) < n_grains * GRAIN:
        padded = np.zeros(n_grains * GRAIN)
        padded[: len(values)] = values
        values = padded
    rows = values.reshape(n_grains, GRAIN // LANES, LANES)
    lanes = rows[:, 0].copy()
    for row in range(1, GRAIN // LANES):
        lanes += rows[:, row]
    sums = lanes[:, 0].copy()
    for lane in range(1, LANES):
        sums += lanes[:, lane]
    return sums


class GrainTotals:
    """Sums over one tensor for each ingredient, from its grains in order."""

    def __init__(self, n_ingredients: int) -> None:
        """Begin at zero."""
        self.totals = [0.0] * n_ingredients

    def add(self, ingredient: int, sums: Floats) -> None:
        """Add the sums of the next grains."""
        total = self.totals[ingredient]
        for each in sums.tolist():
            total += each
        self.totals[ingredient] = total
