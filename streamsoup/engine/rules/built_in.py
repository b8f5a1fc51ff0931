"""The rules that come with the package: a provenance may name them without their classes given."""

from __future__ import annotations

from streamsoup.engine.rules.by_tensor import ByTensor
from streamsoup.engine.rules.elementwise import NearSwap, Ram
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.rules.row_slerp import RowSlerp
from streamsoup.engine.rules.sce import Sce
from streamsoup.engine.rules.task_vectors import TaskVectors
from streamsoup.rule import Rule

__all__ = ["BUILT_IN"]

BUILT_IN: tuple[type[Rule], ...] = (*(Linear, TaskVectors, Sce, Ram, NearSwap, RowSlerp, ByTensor),)
