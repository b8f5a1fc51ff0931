"""Average fine-tuned checkpoints that are too large to hold in memory.

>>> import streamsoup
>>> streamsoup.uniform(["run1", "run2", "run3"], output="soup")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamsoup.version import __version__ as __version__

_HOMES = {
    "Access": "formats.files",
    "Average": "training.average",
    "Block": "rule",
    "Candidate": "search.scoring.scorer",
    "CheckpointRecord": "output.records",
    "Coefficients": "recipe",
    "CompareSettings": "study.comparison.table",
    "Cursor": "formats.source",
    "Executor": "cluster.executor",
    "Geometry": "methods.angles",
    "GreedySettings": "search.trials",
    "GreedySoup": "search.greedy",
    "Ingredient": "formats.ingredients",
    "Leaf": "engine.plan",
    "LandscapeSettings": "study.landscape.landscape",
    "LearnedSettings": "search.learning.settings",
    "LearnedSoup": "search.learned",
    "Ledger": "engine.stream",
    "Linear": "engine.rules.linear",
    "MixPlan": "engine.plan",
    "Note": "options",
    "Options": "options",
    "PlanRecord": "output.records",
    "Planned": "options",
    "Progress": "options",
    "Provenance": "recipe",
    "ReadingCost": "formats.source",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Reduction": "rule",
    "Rule": "rule",
    "RuleMemory": "rule",
    "Scorer": "search.scoring.scorer",
    "Sink": "engine.stream",
    "SinkSession": "engine.stream",
    "Soup": "output.make",
    "Source": "formats.source",
    "SourceTensor": "formats.source",
    "Step": "options",
    "StreamsoupError": "errors",
    "Suspects": "formats.source",
    "SweepSettings": "search.sweep",
    "SweepSoup": "search.sweep",
    "TensorSpec": "tensors",
    "Trial": "search.trials",
    "Unit": "cluster.units",
    "apply": "methods.fixed",
    "arithmetic": "methods.closed",
    "breadcrumbs": "methods.merges",
    "compare": "study.comparison.table",
    "dare": "methods.merges",
    "della": "methods.merges",
    "ema": "methods.averages",
    "geometry": "methods.angles",
    "greedy": "search.greedy",
    "commit": "output.jobs",
    "inspect": "output.records",
    "interpolate": "methods.fixed",
    "karcher": "methods.spheres",
    "landscape": "study.landscape.landscape",
    "lawa": "methods.averages",
    "learned": "search.learned",
    "mix": "methods.fixed",
    "mix_into": "live.mix",
    "mix_to": "live.streams",
    "multislerp": "methods.spheres",
    "nearswap": "methods.merges",
    "nuslerp": "methods.spheres",
    "open_ingredients": "formats.ingredients",
    "plan": "output.records",
    "ram": "methods.merges",
    "recalibrate": "live.recalibration",
    "sce": "methods.merges",
    "slerp": "methods.closed",
    "stock": "methods.closed",
    "stream_mix": "live.streams",
    "sweep": "search.sweep",
    "sweep_windows": "search.windows",
    "ties": "methods.merges",
    "uniform": "methods.fixed",
    "verify": "output.verification",
    "watch": "training.watch",
    "wise_ft": "study.landscape.paths",
    "write_report": "study.report.write",
    "wsm": "methods.averages",
}
"""Public names, and the rooms they live in: each is imported on first use."""

if TYPE_CHECKING:
    from streamsoup.cluster.executor import Executor as Executor
    from streamsoup.cluster.units import Unit as Unit
    from streamsoup.engine.plan import Leaf as Leaf
    from streamsoup.engine.plan import MixPlan as MixPlan
    from streamsoup.engine.rules.linear import Linear as Linear
    from streamsoup.engine.stream import Ledger as Ledger
    from streamsoup.engine.stream import Sink as Sink
    from streamsoup.engine.stream import SinkSession as SinkSession
    from streamsoup.errors import RecipeError as RecipeError
    from streamsoup.errors import StreamsoupError as StreamsoupError
    from streamsoup.formats.files import Access as Access
    from streamsoup.formats.ingredients import Ingredient as Ingredient
    from streamsoup.formats.ingredients import open_ingredients as open_ingredients
    from streamsoup.formats.source import Cursor as Cursor
    from streamsoup.formats.source import ReadingCost as ReadingCost
    from streamsoup.formats.source import Source as Source
    from streamsoup.formats.source import SourceTensor as SourceTensor
    from streamsoup.formats.source import Suspects as Suspects
    from streamsoup.live.mix import mix_into as mix_into
    from streamsoup.live.recalibration import recalibrate as recalibrate
    from streamsoup.live.streams import mix_to as mix_to
    from streamsoup.live.streams import stream_mix as stream_mix
    from streamsoup.methods.angles import Geometry as Geometry
    from streamsoup.methods.angles import geometry as geometry
    from streamsoup.methods.averages import ema as ema
    from streamsoup.methods.averages import lawa as lawa
    from streamsoup.methods.averages import wsm as wsm
    from streamsoup.methods.closed import arithmetic as arithmetic
    from streamsoup.methods.closed import slerp as slerp
    from streamsoup.methods.closed import stock as stock
    from streamsoup.methods.fixed import apply as apply
    from streamsoup.methods.fixed import interpolate as interpolate
    from streamsoup.methods.fixed import mix as mix
    from streamsoup.methods.fixed import uniform as uniform
    from streamsoup.methods.merges import breadcrumbs as breadcrumbs
    from streamsoup.methods.merges import dare as dare
    from streamsoup.methods.merges import della as della
    from streamsoup.methods.merges import nearswap as nearswap
    from streamsoup.methods.merges import ram as ram
    from streamsoup.methods.merges import sce as sce
    from streamsoup.methods.merges import ties as ties
    from streamsoup.methods.spheres import karcher as karcher
    from streamsoup.methods.spheres import multislerp as multislerp
    from streamsoup.methods.spheres import nuslerp as nuslerp
    from streamsoup.options import Note as Note
    from streamsoup.options import Options as Options
    from streamsoup.options import Planned as Planned
    from streamsoup.options import Progress as Progress
    from streamsoup.options import Step as Step
    from streamsoup.output.jobs import commit as commit
    from streamsoup.output.make import Soup as Soup
    from streamsoup.output.records import CheckpointRecord as CheckpointRecord
    from streamsoup.output.records import PlanRecord as PlanRecord
    from streamsoup.output.records import inspect as inspect
    from streamsoup.output.records import plan as plan
    from streamsoup.output.verification import verify as verify
    from streamsoup.recipe import Coefficients as Coefficients
    from streamsoup.recipe import Provenance as Provenance
    from streamsoup.recipe import Recipe as Recipe
    from streamsoup.rule import Block as Block
    from streamsoup.rule import Reduction as Reduction
    from streamsoup.rule import Rule as Rule
    from streamsoup.rule import RuleMemory as RuleMemory
    from streamsoup.search.greedy import GreedySoup as GreedySoup
    from streamsoup.search.greedy import greedy as greedy
    from streamsoup.search.learned import LearnedSoup as LearnedSoup
    from streamsoup.search.learned import learned as learned
    from streamsoup.search.learning.settings import LearnedSettings as LearnedSettings
    from streamsoup.search.scoring.scorer import Candidate as Candidate
    from streamsoup.search.scoring.scorer import Scorer as Scorer
    from streamsoup.search.sweep import SweepSettings as SweepSettings
    from streamsoup.search.sweep import SweepSoup as SweepSoup
    from streamsoup.search.sweep import sweep as sweep
    from streamsoup.search.trials import GreedySettings as GreedySettings
    from streamsoup.search.trials import Trial as Trial
    from streamsoup.search.windows import sweep_windows as sweep_windows
    from streamsoup.study.comparison.table import CompareSettings as CompareSettings
    from streamsoup.study.comparison.table import compare as compare
    from streamsoup.study.landscape.landscape import LandscapeSettings as LandscapeSettings
    from streamsoup.study.landscape.landscape import landscape as landscape
    from streamsoup.study.landscape.paths import wise_ft as wise_ft
    from streamsoup.study.report.write import write_report as write_report
    from streamsoup.tensors import TensorSpec as TensorSpec
    from streamsoup.training.average import Average as Average
    from streamsoup.training.watch import watch as watch


__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first asked for."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'streamsoup' has no attribute {name!r}")
    return getattr(import_module(f"streamsoup.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*_HOMES, "__version__"])
