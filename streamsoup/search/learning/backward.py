"""The model while a task computes losses: what takes its gradients, a tensor at a time.

A gradient is multiplied with its tensor in all ingredients, and freed, as soon as the last backward
pass has finished it, while that pass goes on: so there is one gradient at most, and mostly less.
Those of 16-bit models are added up in float32: in bfloat16, a sum over 1,000 batches takes on
little more (measured: slopes off by 13 %, over 4,000 by 40 %, and by 0.5 % this way).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.inner import Vector
from streamsoup.errors import TaskError, printable
from streamsoup.search.learning.parametrisation import Parametrisation
from streamsoup.tensors import DTYPES

if TYPE_CHECKING:
    import torch

    from streamsoup.live.model import ModelSink

__all__ = ["Gradients", "Multiplier"]

Floats = NDArray[np.float64]

BUNDLE = 1 << 22
"""Elements of gradients that wait for each other, as a pass of its own costs a millisecond."""


class Multiplier(Protocol):
    """The ingredients, to multiply gradients with; and which batches only watch."""

    @property
    def n_batches(self) -> int | None:
        """Batches of the split, once they have been counted."""

    def watches(self, index: int) -> bool:
        """Return True if a batch of the split is held out to validate."""

    def products(self, vectors: dict[str, Vector]) -> Iterator[tuple[str, Floats]]:
        """Yield ⟨g, θᵢ⟩ of every gradient."""


class Gradients:
    """The model while the task computes losses: what requires gradients, and what takes them."""

    def __init__(
        self,
        slopes: Multiplier,
        sink: ModelSink,
        parametrisation: Parametrisation,
        learned: list[str],
        backward: bool,
    ) -> None:
        import torch

        self._slopes, self._parametrisation, self._backward = slopes, parametrisation, backward
        self._by_name: dict[str, Floats] = {}
        self._pending: dict[str, Vector] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._n_pending = 0
        self._last = True
        self._scale = 1.0
        self._beta = torch.ones((), dtype=torch.float64, device="cpu", requires_grad=backward)
        model = sink.model
        self._training = [(module, module.training) for module in model.modules()]
        model.eval()
        self._wanted = wanted = set(learned) if backward else set()
        self._parameters = {
            id(tensor): (tensor, [each for each in held if each[0] in wanted])
            for tensor, held in sink.parameters()
        }
        """Each parameter, and the tensors of the plan that it holds and that are learned."""
        self._before = [
            (tensor, tensor.requires_grad, tensor.grad) for tensor, _ in self._parameters.values()
        ]
        self._n_elements = {tensor.name: tensor.n_units for tensor in sink.plan.tensors}
        self._scattered: dict[str, dict[int, torch.Tensor]] = {}
        """Gradients of tensors that several parameters hold, until those of all have come."""
        self._hooks: list[Any] = []
        for tensor, held in self._parameters.values():
            if not tensor.is_floating_point():
                continue
            tensor.grad = None
            tensor.requires_grad_(bool(held))
            if held:
                self._hooks.append(tensor.register_post_accumulate_grad_hook(self._hook))
        if parametrisation.temperature:
            self._hooks.append(model.register_forward_hook(self._heat))

    def begin(self, raw: Floats) -> None:
        """Begin an evaluation of the mixture of these raw numbers."""
        self._by_name.clear()
        self._beta.data.fill_(self._parametrisation.beta(raw))
        self._beta.grad = None
        self._scale = 1.0

    def learn(self, loss: Any) -> float:
        """Add one batch that is learned from. Raises `TaskError` if its loss is not one."""
        value = _value(loss)
        if not math.isfinite(value):
            raise TaskError(f"the loss of a batch is {value}; a lower learning rate may help")
        self._descend(loss)
        return value

    def sweep(self, batches: Iterator[tuple[Any, float]]) -> tuple[float, float, int]:
        """Add all batches; return the mean loss, that of those held out, and their number.

        A loss that is not finite has no gradient worth the time: from there on none is taken.
        """
        slopes = self._slopes
        sums = [0.0, 0.0]
        weights = [0.0, 0.0]
        first = 0.0
        index = -1
        last = max((i for i in range(slopes.n_batches or 0) if not slopes.watches(i)), default=-1)
        for index, (loss, n_examples) in enumerate(batches):
            if not n_examples:
                continue  # the mean over none is a NaN
            watches = slopes.watches(index)
            sums[watches] += n_examples * _value(loss)
            weights[watches] += n_examples
            if watches or not self._backward or not math.isfinite(sums[False]):
                continue
            # Relative to the first batch, so that no gradient outgrows a narrow dtype.
            first = first or n_examples
            self._last = index == last
            self._descend(loss * (n_examples / first))
        self._last = True
        if not weights[False] > 0:
            raise TaskError("loss gave no batch to learn from")
        self._scale = first / weights[False]
        guard = sums[True] / weights[True] if weights[True] > 0 else math.nan
        return sums[False] / weights[False], guard, index + 1

    def watch(self, batches: Iterator[tuple[Any, float]]) -> float:
        """Return the mean loss over batches of another split."""
        import torch

        total = weight = 0.0
        with torch.no_grad():
            for loss, n_examples in batches:
                total += n_examples * _value(loss)
                weight += n_examples
        return total / weight if weight > 0 else math.nan

    def take(self) -> tuple[Floats, float]:
        """Return the slopes ``(group, ingredient)`` and that of β, and forget the gradients.

        Raises `TaskError` where no parameter has got any.
        """
        for tensor, _ in self._parameters.values():
            self._take(tensor)
        for name in list(self._scattered):
            self._pend(name, self._joined(name))
        self._flush()
        if self._wanted and not self._by_name:
            raise TaskError(
                "the loss depends on no parameter of the model; compute it from the `model` that "
                "loss(model, split) is given"
            )
        parametrisation = self._parametrisation
        slopes = np.zeros((len(parametrisation.groups), parametrisation.n_ingredients))
        for name, group in parametrisation.group_of.items():  # in one order, whatever autograd's is
            if name in self._by_name:
                slopes[group] += self._by_name[name]
        beta_slope = 0.0
        if parametrisation.temperature:
            if self._beta.grad is None:
                raise TaskError(
                    "the loss does not depend on the model's output, so its logits have no "
                    "temperature; compute the loss from model(x) outside of the model"
                )
            beta_slope = float(self._beta.grad)
        return slopes * self._scale, beta_slope * self._scale

    def close(self) -> None:
        """Put the model back as it was, but for its weights."""
        for hook in self._hooks:
            hook.remove()
        for tensor, requires_grad, gradient in self._before:
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient
        for module, training in self._training:
            module.training = training

    def _descend(self, loss: Any) -> None:
        """Go backward, unless nothing that differs between ingredients could be reached."""
        if not self._wanted and not self._parametrisation.temperature:
            return
        if not loss.requires_grad:
            raise TaskError(
                "loss gave a tensor without a gradient; compute it from the `model` it is given, "
                "without detach(), item() or no_grad()"
            )
        loss.backward()

    def _hook(self, tensor: torch.Tensor) -> None:
        """Add a complete gradient to earlier ones in float32, and free it."""
        if tensor.grad is not None and tensor.dtype.itemsize < 4:
            gradient = tensor.grad.float()
            tensor.grad = None
            earlier = self._sums.get(id(tensor))
            self._sums[id(tensor)] = gradient if earlier is None else earlier.add_(gradient)
        if self._last:
            self._take(tensor)

    def _take(self, tensor: torch.Tensor) -> None:
        import torch

        from streamsoup.live.model import of_part

        gradient = self._sums.pop(id(tensor), tensor.grad)
        if gradient is None:
            return
        tensor.grad = None
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        for name, part in self._parameters[id(tensor)][1]:
            ours = of_part(part, tensor, gradient.detach())
            if ours.numel() == self._n_elements[name]:
                self._pend(name, ours)
                continue
            pieces = self._scattered.setdefault(name, {})
            earlier = pieces.get(part.begin)
            pieces[part.begin] = ours if earlier is None else earlier + ours
            if sum(piece.numel() for piece in pieces.values()) == self._n_elements[name]:
                self._pend(name, self._joined(name))

    def _joined(self, name: str) -> torch.Tensor:
        """Put together the gradient of a tensor that several parameters hold; zeros where none."""
        import torch

        pieces = self._scattered.pop(name)
        dtype = next(iter(pieces.values())).dtype
        whole = torch.zeros(self._n_elements[name], dtype=dtype, device="cpu")
        for begin, piece in pieces.items():
            whole[begin : begin + piece.numel()] = piece.reshape(-1)
        return whole

    def _pend(self, name: str, gradient: torch.Tensor) -> None:
        """Have a gradient wait to be multiplied."""
        if name in self._pending:
            self._flush()
        self._pending[name] = _vector(gradient, name)
        self._n_pending += gradient.numel()
        if self._n_pending >= BUNDLE:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._n_pending = self._pending, {}, 0
        for name, slopes in self._slopes.products(pending):
            self._by_name[name] = self._by_name.get(name, 0.0) + slopes

    def _heat(self, model: Any, inputs: Any, output: Any) -> Any:
        """Multiply logits, wherever a model puts them, by β."""
        if hasattr(output, "_replace"):  # a named tuple
            name = "logits" if hasattr(output, "logits") else output._fields[0]
            return output._replace(**{name: self._heated(getattr(output, name))})
        if hasattr(output, "logits"):
            logits = self._heated(output.logits)
            try:
                output.logits = logits
            except AttributeError:  # frozen
                return dataclasses.replace(output, logits=logits)
            return output
        if isinstance(output, dict) and "logits" in output:
            return {**output, "logits": self._heated(output["logits"])}
        if isinstance(output, (tuple, list)):
            return type(output)([self._heated(output[0]), *output[1:]])
        return self._heated(output)

    def _heated(self, logits: Any) -> Any:
        return logits * self._beta.to(logits)


def _value(loss: Any) -> float:
    """Read a loss. Raises `TaskError` for what is none."""
    import torch

    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = printable(type(loss).__name__)
        shape = f" of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
        raise TaskError(f"loss gave a {what}{shape} where it has to yield a scalar tensor")
    return float(loss.detach())


def _vector(gradient: torch.Tensor, name: str) -> Vector:
    """Return a gradient's elements in order, as raw bytes in CPU memory.

    From a device, one gradient comes over the bus, where all ingredients would have to go.
    """
    import torch

    from streamsoup.live.model import TORCH_DTYPES

    gradient = gradient.to("cpu")
    flat = gradient.contiguous().view(-1)
    # The largest magnitude, NaN if there is one: in one pass, and without room for as many flags.
    if len(flat) and not math.isfinite(torch.linalg.vector_norm(flat, math.inf).item()):
        raise TaskError(f"the gradient of {printable(name)} holds a NaN or an Inf")
    (dtype,) = [key for key, value in TORCH_DTYPES.items() if value == flat.dtype]
    return Vector(flat.view(torch.uint8).numpy(), DTYPES[dtype])
