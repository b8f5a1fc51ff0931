"""Right and wrong answers of networks on the splits that no training has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from streamsoup.demo import network
from streamsoup.demo.digits import Digits
from streamsoup.demo.network import Network
from streamsoup.study.measures.bootstrap import interval, resampled_means
from streamsoup.study.measures.rows import Gain

Answers = Mapping[str, NDArray[np.bool_]]
"""Per split, which images are classified correctly: `(image,) bool`."""


def answers_of(networks: Sequence[Network], judged: Mapping[str, Digits]) -> Answers:
    """Return the answers of the mean logits of `networks`: of one model, or of an ensemble.

    Costs a forward pass over every image for each network.
    """
    found = {}
    for split, digits in judged.items():
        logits = torch.stack([network.predict(each, digits.images) for each in networks]).mean(0)
        found[split] = (logits.argmax(1) == digits.labels).numpy()
    return found


def counts_of(answers: Answers) -> dict[str, int]:
    """Return the number of right answers per split."""
    return {split: int(right.sum()) for split, right in answers.items()}


def best_of(answers: Sequence[Answers]) -> int:
    """Return the index of the model with most right answers on ``val``; the first one of equals."""
    return max(range(len(answers)), key=lambda i: int(answers[i]["val"].sum()))


def gains_of(ours: Answers, theirs: Answers) -> dict[str, Gain]:
    """Return how much larger our share of right answers is, with a paired 95 % interval, per split.

    ``val`` is left out: the soups were searched on it.
    """
    gains = {}
    # The seeds of `streamsoup compare`, so that table and report show the same intervals.
    for seed, split in enumerate(ours):
        if split != "val":
            shares = np.stack([ours[split], theirs[split]]).astype(np.float64)
            means = resampled_means(shares, seed=seed)
            found = interval(means[0] - means[1])
            gains[split] = Gain(float(shares[0].mean() - shares[1].mean()), found.low, found.high)
    return gains
