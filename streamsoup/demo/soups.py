"""The soups of the demo: uniform, and greedy and learned on validation.

Each takes the folders of the ingredients and replaces the soup of an earlier demo in `output`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor
from torch.nn import functional

import streamsoup
from streamsoup.demo import network, task
from streamsoup.demo.digits import Digits
from streamsoup.demo.network import Network
from streamsoup.search.greedy import GreedySoup
from streamsoup.search.learned import LearnedSoup


def uniform(ingredients: Sequence[Path], output: Path) -> Path:
    """Write the mean of all ingredients; return its folder."""
    soup = streamsoup.uniform(
        ingredients, output=output, options=streamsoup.Options(overwrite=True)
    )
    return Path(soup.path)


def greedy(ingredients: Sequence[Path], val: Digits, output: Path) -> GreedySoup:
    """Write the mean of the ingredients that raise the accuracy on `val`, added one by one."""

    def score(model: Network) -> float:
        return float((network.predict(model, val.images).argmax(1) == val.labels).double().mean())

    return streamsoup.greedy(
        ingredients,
        score,
        output=output,
        model=network.build(seed=0),
        settings=streamsoup.GreedySettings(restart=True),
        options=streamsoup.Options(overwrite=True),
    )


def learned(ingredients: Sequence[Path], val: Digits, output: Path) -> LearnedSoup:
    """Write the mixture with the lowest loss on `val`, with coefficients for each layer."""
    size = task.LEARN_BATCH

    def loss(model: Network, split: str) -> Iterator[tuple[Tensor, int]]:
        for images, labels in zip(val.images.split(size), val.labels.split(size), strict=True):
            yield functional.cross_entropy(model(images), labels), len(labels)

    return streamsoup.learned(
        ingredients,
        SimpleNamespace(score=lambda model: 0.0, loss=loss),
        output=output,
        model=network.build(seed=0),
        settings=streamsoup.LearnedSettings(granularity="layer", constraint="affine", restart=True),
        options=streamsoup.Options(overwrite=True),
    )
