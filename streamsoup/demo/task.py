"""The demo's task, as a user would write one: plain functions in a file.

``--task streamsoup.demo.task`` scores any network of the demo: greedy and learned soups search on
validation alone; MNIST and corrupted digits are the shifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn
from torch.nn import functional

from streamsoup.demo import digits, network
from streamsoup.demo.digits import Digits

splits = ["val", "test", "MNIST", "corrupted"]
shifts = ["MNIST", "corrupted"]

LEARNED = 60
"""Images of a batch to learn from: ten batches of validation, of which two watch."""

JUDGED = 1000
"""Images of a batch to judge."""


def build() -> nn.Module:
    """Build the model; its weights do not matter."""
    return network.build(seed=0)


def score(model: nn.Module, split: str) -> float:
    """Give the share of right answers."""
    n_right = sum(int((z.argmax(1) == y).sum()) for z, y in predictions(model, split))
    return n_right / len(_judged()[split])


def loss(model: nn.Module, split: str) -> Iterator[tuple[Tensor, int]]:
    """Give the cross-entropy of each batch, and its number of images."""
    for images, labels in _batches(split, LEARNED):
        yield functional.cross_entropy(model(images), labels), len(labels)


def predictions(model: nn.Module, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Give logits and labels, batch by batch."""
    for images, labels in _batches(split, JUDGED):
        yield model(images), labels


def _batches(split: str, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    judged = _judged()[split]
    yield from zip(judged.images.split(n), judged.labels.split(n), strict=True)


@cache
def _judged() -> dict[str, Digits]:
    return digits.prepare(digits.Sizes(), seed=0).judged
