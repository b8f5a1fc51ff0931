"""BatchNorm statistics measured anew: those of an average belong to none of its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamsoup.errors import TaskError

__all__ = ["negative_variances", "recalibrate", "statistics_of"]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Measure the running statistics of BatchNorm anew, as the mean over `batches`.

    Averaged statistics belong to none of the averaged weights (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407, section 3.2). Only BatchNorm is put into training mode
    meanwhile. As `torch.optim.swa_utils.update_bn`, for the running mean and variance.

    Args:
        model: The module whose running means and variances are replaced.
        batches: Inputs of the model: tensors, tuples of arguments or dictionaries of keyword
            arguments; each is moved to the model's device.

    Returns:
        The number of layers measured; 0 for a model without BatchNorm.

    Raises:
        TaskError: There is no batch. After any error the statistics are restored.

    Costs a forward pass over the batches; holds a copy of the statistics.
    """
    layers = statistics_of(model)
    if not layers:
        return 0
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise TaskError(
            "there is no batch to measure BatchNorm statistics on; give some, and make them anew "
            "each time: a generator that was used up has no more"
        )
    training = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    counted = [None if n is None else n.clone() for _, _, n in momenta]
    statistics = [(each, each.clone()) for layer in layers for each in _statistics(layer)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the cumulative mean
            layer.train()
        for batch in itertools.chain(first, batches):
            _forward(model, batch, device)
    except BaseException:
        for statistic, before in statistics:
            statistic.copy_(before)
        raise
    finally:
        for (layer, momentum, _), n_batches in zip(momenta, counted, strict=True):
            layer.momentum = momentum
            if n_batches is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(n_batches)
        for module, was_training in training:
            module.training = was_training
    return len(layers)


def statistics_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the layers of BatchNorm that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]


def negative_variances(model: nn.Module) -> list[str]:
    """Return the names of running variances with an element below zero, of which NaN would come.

    Costs a look at each variance.
    """
    return [
        name
        for name, tensor in model.named_buffers()
        if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any())
    ]


def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    """Return the running statistics that a layer has."""
    return [each for each in (layer.running_mean, layer.running_var) if each is not None]


def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        model(*map(move, batch))
    else:
        model(move(batch))
