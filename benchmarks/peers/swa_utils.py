"""torch's own `swa_utils.AveragedModel`, over a module that holds nothing but the tensors."""

from __future__ import annotations

import torch
from files import arguments, load, save
from torch.optim.swa_utils import AveragedModel


class Holder(torch.nn.Module):
    """A model without a forward pass: the average does not need one."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        """Register every tensor as a parameter, under a name without dots."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(
                name.replace(".", "/"), torch.nn.Parameter(tensor, requires_grad=False)
            )


output, ingredients = arguments()
average = None
for folder in ingredients:
    model = Holder(load(folder))
    average = average or AveragedModel(model)
    average.update_parameters(model)
assert average is not None
named = average.module.named_parameters()
save({name.replace("/", "."): parameter.data for name, parameter in named}, output)
