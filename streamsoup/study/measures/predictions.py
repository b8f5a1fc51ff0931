"""What a task's `predictions` give: batches of logits and labels, checked and joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsoup.errors import TaskError
from streamsoup.study.measures.calibration import AnyFloats, Labels

__all__ = ["as_arrays", "joined"]

Batch = tuple[Any, Any]

_NO_CLASSES = "a task without classes has a score, and no predictions"


def as_arrays(batch: Batch) -> Batch:
    """Copy the logits and the labels of a batch into arrays of numpy."""
    logits, labels = batch
    return _as_array(logits), _as_array(labels)


def joined(batches: Sequence[Batch], where: str) -> tuple[AnyFloats, Labels]:
    """Check the batches of a split and join them.

    Args:
        batches: Logits of shape ``(example, class)`` and labels of shape ``(example,)``, a pair
            for each batch.
        where: The task and the split, for messages.

    Raises:
        TaskError: No examples, other shapes, or labels that are no classes.
    """
    if not batches:
        raise TaskError(f"{where}: there are none; yield a batch at least")
    first, _ = batches[0]
    for logits, labels in batches:
        if (
            logits.ndim != 2
            or labels.shape != logits.shape[:1]
            or logits.shape[1] != first.shape[1]
        ):
            what = f"{where}: logits and labels of a batch are to have the shapes"
            found = f"{list(logits.shape)} and {list(labels.shape)}"
            advice = _NO_CLASSES
            if logits.ndim == first.ndim == 2:
                advice = f"the first batch had {first.shape[1]} classes"
            raise TaskError(f"{what} (example, class) and (example,), not {found}; {advice}")
    answers = np.concatenate([logits for logits, _ in batches])
    truth = np.concatenate([labels for _, labels in batches])
    if not len(truth):
        raise TaskError(f"{where}: they have no examples; yield some")
    if not np.issubdtype(truth.dtype, np.integer):
        raise TaskError(f"{where}: labels are {truth.dtype}, not numbers of classes; {_NO_CLASSES}")
    if not 0 <= truth.min() <= truth.max() < answers.shape[1]:
        raise TaskError(
            f"{where}: labels go from {truth.min()} to {truth.max()}, "
            f"where there are {answers.shape[1]} classes"
        )
    return answers, truth.astype(np.int64)


def _as_array(tensor: Any) -> Any:
    """Copy a tensor as it is; what numpy has no dtype for, and half precision, as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()
        return tensor.numpy().copy()
    return np.asarray(tensor)
