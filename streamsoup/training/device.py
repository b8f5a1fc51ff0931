"""Sums on the device of the model: in float64, or in pairs of float32 where that is faster.

A pair holds a sum and what its rounding left out (T. J. Dekker 1971,
https://doi.org/10.1007/BF01397083): some 48 bits of it, at the 8 bytes that float64 takes. It is
for devices on which float64 is slow or missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamsoup.training.arithmetic import Arithmetic, blocks
from streamsoup.training.copies import Arrived
from streamsoup.training.host import bytes_of
from streamsoup.training.live import Spec, dtype_of, torch_dtype
from streamsoup.training.running import Step

__all__ = ["DeviceSums"]

ROOM = 1 << 22
"""Elements that are added at once: temporary tensors have no more."""

_SPLITTER = 4097.0
"""2¹² + 1 cuts a float32 into two halves whose products are exact (Veltkamp 1968)."""


class DeviceSums:
    """Running sums of named tensors, each on the device where it was first seen."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, Spec],
        arithmetic: Arithmetic,
        *,
        paired: bool,
    ) -> None:
        """Reserve the sums; in pairs of float32 if they are to be `paired`."""
        self._specs, self._arithmetic, self._paired = dict(specs), arithmetic, paired
        kind = torch.float32 if paired else torch.float64
        self._sums = {
            name: torch.zeros(tensors[name].numel(), dtype=kind, device=tensors[name].device)
            for name in specs
        }
        self._rest = {name: torch.zeros_like(sums) for name, sums in self._sums.items() if paired}

    def add(self, tensors: Mapping[str, Tensor], step: Step) -> None:
        """Add the tensors where they are; nothing waits for the device."""
        for name, tensor in tensors.items():
            flat = tensor.contiguous().reshape(-1).to(self._sums[name].device)
            self.add_arrived([Arrived(name, 0, len(flat), flat)], step)

    def add_arrived(self, arrived: Sequence[Arrived], step: Step) -> None:
        """Add elements of tensors that lie where the sums do."""
        for name, first, last, values in arrived:
            for begin in range(first, last, ROOM):
                cut = slice(begin, min(begin + ROOM, last))
                part = values[cut.start - first : cut.stop - first]
                if self._paired:
                    _add_pair(self._sums[name][cut], self._rest[name][cut], part, step)
                else:
                    _add(self._sums[name][cut], part, step)

    def finish(self, name: str, divisor: float) -> tuple[Tensor, bool]:
        """Return the average of a tensor on its device, and True if an element is not finite.

        Blocks of the sums are rounded on the CPU: torch rounds float64 to 16 bits twice.
        """
        spec = self._specs[name]
        dtype = dtype_of(spec)
        made = torch.empty(spec.shape, dtype=torch_dtype(spec))
        raw, spoiled = bytes_of(made), False
        for begin, end in blocks(made.numel()):
            sums = self._sums[name][begin:end].cpu().double()
            if self._paired:
                sums += self._rest[name][begin:end].cpu().double()
            output = raw[begin * dtype.itemsize : end * dtype.itemsize]
            spoiled |= self._arithmetic.finish(bytes_of(sums), divisor, dtype, output)
        return made.to(self._sums[name].device), spoiled

    def merge(self, other: DeviceSums) -> None:
        """Add the sums of another average of the same tensors."""
        once = Step(1.0, False, 0)
        for name, sums in self._sums.items():
            theirs = other._sums[name].to(sums.device)
            if self._paired:
                _add_pair(sums, self._rest[name], theirs, once)
                _add_pair(sums, self._rest[name], other._rest[name].to(sums.device), once)
            else:
                sums.add_(theirs)

    def state(self) -> dict[str, Tensor]:
        """Return the sums as they are; none is copied."""
        return {**self._sums, **{f"{name}\0rest": rest for name, rest in self._rest.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy sums that `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _add(sums: Tensor, values: Tensor, step: Step) -> None:
    """Add to float64 sums; each product is rounded and then added."""
    if step.shift:
        sums.mul_(2.0**-step.shift)
    wide = values.double()
    if step.factor != 1.0:
        wide = wide * step.factor
    if step.fresh:
        sums.copy_(wide)
    else:
        sums.add_(wide)


def _add_pair(sums: Tensor, rest: Tensor, values: Tensor, step: Step) -> None:
    """Add to a pair of float32: the sum, and what roundings left out of it."""
    if step.shift:
        sums.mul_(2.0**-step.shift)
        rest.mul_(2.0**-step.shift)
    single = values.float()
    below = (values - single).float() if values.dtype == torch.float64 else None
    product, error = single, None
    if step.factor != 1.0:
        high = float(torch.tensor(step.factor, dtype=torch.float32))
        product = single * high
        error = _error_of_product(single, high, product) + single * (step.factor - high)
        if below is not None:
            below = below * high
    if step.fresh:
        sums.copy_(product)
        rest.zero_()
    else:
        # The error of a sum, exactly (D. E. Knuth, The Art of Computer Programming 2, 4.2.2).
        total = sums + product
        added = total - sums
        rest.add_((sums - (total - added)) + (product - added))
        sums.copy_(total)
    for more in (error, below):
        if more is not None:
            rest.add_(more)


def _error_of_product(x: Tensor, y: float, product: Tensor) -> Tensor:
    """Return x·y − `product`, exactly while nothing overflows: halves have exact products."""
    scaled = x * _SPLITTER
    x_high = scaled - (scaled - x)
    x_low = x - x_high
    y_single = torch.tensor(y, dtype=torch.float32)
    y_scaled = y_single * _SPLITTER
    y_high = float(y_scaled - (y_scaled - y_single))
    y_low = float(y_single) - y_high
    return ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
