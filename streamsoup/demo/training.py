"""Pretraining, and the fine-tunings that become ingredients.

The ingredients differ as in the paper's random search: learning rate (log-uniform), number of
epochs, augmentation, label smoothing, and seed (order of the data).  All start from the same
pretrained weights, which is what makes their average meaningful.

Source: Wortsman et al., "Model soups" (2022), https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from streamsoup.demo.digits import Digits
from streamsoup.demo.network import Network


class Training(msgspec.Struct, frozen=True):
    """The settings of one training."""

    learning_rate: float
    """Peak: linear warm-up over the first tenth of the steps, then cosine decay to zero."""

    epochs: int

    augmentation: float
    """0: none; 1: rotation by up to 20 degrees, scaling and translation by up to a fifth."""

    label_smoothing: float

    seed: int
    """Of the order of the data and the augmentation."""

    batch_size: int = 20


def draw_trainings(n: int, max_epochs: int, seed: int) -> list[Training]:
    """Draw `n` fine-tunings at random; learning rates are log-uniform from 1e-4 to 5e-3.

    Up to 1e-2, some leave the basin of the others. The bound was chosen on seeds 5 to 9, which are
    not the demo's: on test, the uniform soup loses to the best model for none of them, and for two
    up to 1e-2; the greedy soup wins for two, and for none.
    """
    draw = random.Random(seed)
    return [
        Training(
            learning_rate=10 ** draw.uniform(-4, math.log10(5e-3)),
            epochs=draw.randint(max(1, max_epochs // 4), max_epochs),
            augmentation=draw.choice([0.0, draw.uniform(0, 1)]),
            label_smoothing=draw.choice([0.0, draw.uniform(0, 0.2)]),
            seed=i,
        )
        for i in range(n)
    ]


def train(start: Network, digits: Digits, how: Training) -> Network:
    """Return a copy of `start`, trained with AdamW on the cross-entropy."""
    network = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(how.seed)
    n_steps = how.epochs * math.ceil(len(digits) / how.batch_size)
    for step, batch in enumerate(_batches(digits, how, generator)):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * _schedule((step + 1) / n_steps)
        images = augment(batch.images, how.augmentation, generator)
        loss = functional.cross_entropy(
            network(images), batch.labels, label_smoothing=how.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Rotate, scale and translate each image at random; `strength` is between 0 (none) and 1."""
    if strength == 0:
        return images
    spread = strength * (2 * torch.rand(4, len(images), generator=generator) - 1)
    angle, scale = math.radians(20) * spread[0], 1 + 0.2 * spread[1]
    # grid_sample measures the image from -1 to 1: a fifth of its width is 0.4.
    right, down = 0.4 * spread[2], 0.4 * spread[3]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, right, sin, cos, down], dim=1).reshape(-1, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


@contextmanager
def reproducible() -> Iterator[None]:
    """Make torch deterministic inside the block, on one thread; restore its settings at the end.

    A second thread would not pay for networks and batches this small.
    """
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_num_threads(threads)


def _batches(digits: Digits, how: Training, generator: torch.Generator) -> Iterator[Digits]:
    for _ in range(how.epochs):
        order = torch.randperm(len(digits), generator=generator)
        for indices in order.split(how.batch_size):
            yield digits.pick(indices)


def _schedule(progress: float) -> float:
    """Return the share of the peak learning rate at `progress` in (0, 1]."""
    return min(progress / 0.1, (1 + math.cos(math.pi * progress)) / 2)
