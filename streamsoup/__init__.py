"""Average fine-tuned checkpoints that are too large to hold in memory.

>>> import streamsoup
>>> streamsoup.uniform(["run1", "run2", "run3"], output="soup")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Coefficients": "recipe",
    "CompareOptions": "comparison.table",
    "Geometry": "angles",
    "GreedySoup": "soups.greedy",
    "Ingredient": "formats.shards",
    "LearnedSoup": "soups.learned",
    "LearningOptions": "soups.learning",
    "Options": "options",
    "Provenance": "recipe",
    "Recipe": "recipe",
    "SearchOptions": "soups.greedy",
    "Soup": "soups.make",
    "StreamsoupError": "errors",
    "arithmetic": "soups.closed",
    "compare": "comparison.table",
    "ema": "soups.closed",
    "geometry": "angles",
    "greedy_soup": "soups.greedy",
    "interpolate": "soups.fixed",
    "landscape": "comparison.landscape",
    "lawa": "soups.closed",
    "learned_soup": "soups.learned",
    "mix": "soups.fixed",
    "mix_into": "soups.live_mix",
    "open_ingredients": "formats.shards",
    "recalibrate": "recalibration",
    "slerp": "soups.closed",
    "stock": "soups.closed",
    "sweep": "comparison.paths",
    "uniform": "soups.fixed",
    "verify": "verification",
    "write_report": "report.comparison",
    "wsm": "soups.closed",
}
"""Public names, and the rooms they live in: each is imported on first use."""

if TYPE_CHECKING:
    from streamsoup.angles import Geometry as Geometry
    from streamsoup.angles import geometry as geometry
    from streamsoup.comparison.landscape import landscape as landscape
    from streamsoup.comparison.paths import sweep as sweep
    from streamsoup.comparison.table import CompareOptions as CompareOptions
    from streamsoup.comparison.table import compare as compare
    from streamsoup.errors import StreamsoupError as StreamsoupError
    from streamsoup.formats.shards import Ingredient as Ingredient
    from streamsoup.formats.shards import open_ingredients as open_ingredients
    from streamsoup.options import Options as Options
    from streamsoup.recalibration import recalibrate as recalibrate
    from streamsoup.recipe import Coefficients as Coefficients
    from streamsoup.recipe import Provenance as Provenance
    from streamsoup.recipe import Recipe as Recipe
    from streamsoup.report.comparison import write_report as write_report
    from streamsoup.soups.closed import arithmetic as arithmetic
    from streamsoup.soups.closed import ema as ema
    from streamsoup.soups.closed import lawa as lawa
    from streamsoup.soups.closed import slerp as slerp
    from streamsoup.soups.closed import stock as stock
    from streamsoup.soups.closed import wsm as wsm
    from streamsoup.soups.fixed import interpolate as interpolate
    from streamsoup.soups.fixed import mix as mix
    from streamsoup.soups.fixed import uniform as uniform
    from streamsoup.soups.greedy import GreedySoup as GreedySoup
    from streamsoup.soups.greedy import SearchOptions as SearchOptions
    from streamsoup.soups.greedy import greedy_soup as greedy_soup
    from streamsoup.soups.learned import LearnedSoup as LearnedSoup
    from streamsoup.soups.learned import learned_soup as learned_soup
    from streamsoup.soups.learning import LearningOptions as LearningOptions
    from streamsoup.soups.live_mix import mix_into as mix_into
    from streamsoup.soups.make import Soup as Soup
    from streamsoup.verification import verify as verify


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
