"""The task of the demo: plain functions in a file, to copy and adapt.

``--task streamsoup.demo.task`` scores any network of the demo.  Searches see the first split only;
the second is the test split; shifts are other data that a model should not fail on.
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

LEARN_BATCH = 50
"""Images per batch of the learned soup: ten batches of validation, two of them held out."""

JUDGE_BATCH = 1000
"""Images per batch of predictions."""


def build() -> nn.Module:
    """Return a model to load weights into; its own do not matter."""
    return network.build(seed=0)


def score(model: nn.Module, split: str) -> float:
    """Return the share of right answers: larger is better."""
    n_right = sum(
        int((logits.argmax(1) == labels).sum()) for logits, labels in predictions(model, split)
    )
    return n_right / len(_judged()[split])


def loss(model: nn.Module, split: str) -> Iterator[tuple[Tensor, int]]:
    """Yield the mean cross-entropy of each batch, with gradients, and its number of images."""
    for images, labels in _batches(split, LEARN_BATCH):
        yield functional.cross_entropy(model(images), labels), len(labels)


def predictions(model: nn.Module, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits `(image, class)` and labels `(image,)` of each batch."""
    for images, labels in _batches(split, JUDGE_BATCH):
        yield model(images), labels


def _batches(split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    judged = _judged()[split]
    yield from zip(judged.images.split(size), judged.labels.split(size), strict=True)


@cache
def _judged() -> dict[str, Digits]:
    return digits.prepare(digits.Sizes(), seed=0).judged
