"""What can fail: bits, order, memory, trouble, places.

Expected bits come from the specification (`kernels.reference`), element by element, or from the
kernels of the CPU; checkpoints are made here, of random bit patterns.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, FormatError, StreamsoupError
from streamsoup.formats.files import Access
from streamsoup.formats.header import make_header
from streamsoup.formats.ingredients import AnyIngredient
from streamsoup.formats.source import Cursor
from streamsoup.formats.stored import Stored, open_stored
from streamsoup.kernels import blocks
from streamsoup.kernels.accelerator.device import Accelerator, Device, HostDevice, our_errors
from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape
from streamsoup.options import Options
from streamsoup.output.make import Order, make, order
from streamsoup.recipe import Coefficients
from streamsoup.selftest.lanes import (
    COEFFICIENTS,
    FLOATS,
    random_ingredients,
    specified,
    through_lane,
)
from streamsoup.sizes import nbytes_text
from streamsoup.tensors import DTYPES, DType

if TYPE_CHECKING:
    import torch

__all__ = ["all_checks", "make_checkpoints", "order_on"]

Array = NDArray[np.uint8]
Outcome = tuple[bool, str]

BLOCK = 64


def all_checks(
    device: Accelerator | HostDevice, room: str
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Return the checks, in order of what they build on."""
    yield "bits of the numpy kernel", _bits_of_blocks
    yield "bits", partial(_bits, device)
    yield "sizes and slots", partial(_sizes, device)
    if isinstance(device, Accelerator):
        for n, name in enumerate(("copies in", "sums", "ends of blocks")):
            yield f"order with slow {name}", partial(_order, device, n)
    paths = make_checkpoints(os.path.join(room, "small"), 5, 300_000)
    yield "soups", partial(_soups, device, paths, room)
    yield "memory", partial(_memory, device, room)
    yield "trouble", partial(_trouble, device, paths, room)
    if isinstance(device, Accelerator):
        yield "a model in place", partial(_in_place, device, paths, room)


def make_checkpoints(folder: str, k: int, n: int) -> list[str]:
    """Make `k` checkpoints of about ``3.3 * n`` bytes, of every dtype that is averaged."""
    os.makedirs(folder, exist_ok=True)
    parts = {"BF16": n, "F16": n // 8, "F32": n // 8, "F64": n // 16, "F8_E4M3": 99, "F8_E5M2": 99}
    paths = []
    for i in range(k):
        rng = np.random.default_rng(i)
        tensors: list[tuple[str, str, tuple[int, ...], int]] = []
        data: list[bytes] = []
        for name, count in parts.items():
            dtype = DTYPES[name]
            values = rng.standard_normal(min(count, 1 << 16))
            raw = np.empty(len(values) * dtype.itemsize, np.uint8)
            blocks.narrow(values, dtype, raw)
            content = np.resize(raw, count * dtype.itemsize).tobytes()
            tensors.append((name.lower(), name, (count,), len(content)))
            data.append(content)
        tensors.append(("steps", "I64", (3,), 24))
        data.append(bytes(24))
        paths.append(os.path.join(folder, f"{i}.safetensors"))
        with open(paths[-1], "wb") as file:
            file.write(make_header(tensors))
            file.writelines(data)
    return paths


def order_on(
    device: Accelerator | HostDevice,
    paths: Sequence[AnyIngredient],
    options: Options,
    n_slots: int = 3,
) -> Order:
    """Plan a uniform soup that is made by the pipeline on `device`; with the CPU's, on the CPU."""
    from msgspec.structs import replace

    from streamsoup.engine.device import FREE_SHARE, OnDevice, plan_device

    coefficients = Coefficients.uniform(len(paths))
    on_cpu = replace(options, device="cpu")
    ordered = order(list(paths), Linear(coefficients), method="uniform", options=on_cpu)
    plan = plan_device(
        ordered.plan,
        device=device.name,
        budget=device.free_nbytes() // FREE_SHARE,
        mapped=ordered.mapped,
        threads=options.n_threads,
        memory=1 << 34,
        n_slots=n_slots,
    )
    return replace(ordered, memory=plan.memory, on_device=OnDevice(device, plan))


def _through(
    device: Device[Any, Any],
    data: Sequence[Array],
    source: DType,
    output: DType,
    coefficients: tuple[tuple[float, ...], float],
    n_slots: int,
) -> Array:
    soup, _ = through_lane(
        device, data, source, output, *coefficients, block=BLOCK, n_slots=n_slots
    )
    return soup


def _bits_of_blocks() -> Outcome:
    """Compare `kernels.blocks` with the specification; float64's rule of equal values is apart."""
    wrong: list[str] = []
    cases = list(itertools.product(FLOATS, FLOATS, COEFFICIENTS.items(), (False, True)))
    cases = [case for case in cases if case[0].name != "F64" or not case[2][0].startswith("mean")]
    for source, output, (what, (factors, divisor)), ties in cases:
        data = random_ingredients(source, len(factors), 101, ties=ties)
        sums = np.empty(101)
        blocks.accumulate(sums, data, [source] * len(factors), factors, fresh=True)
        soup = np.empty(101 * output.itemsize, np.uint8)
        blocks.finish(sums, divisor, output, soup)
        if not np.array_equal(soup, specified(data, source, output, factors, divisor)):
            wrong.append(f"{source.name} to {output.name}, {what}")
    return _tell(wrong, len(cases), "dtype pairs, coefficients and kinds of values")


def _bits(device: Accelerator | HostDevice) -> Outcome:
    """Compare the pipeline with the specification, dtype by dtype, special values included."""
    wrong: list[str] = []
    cases = list(itertools.product(FLOATS, FLOATS, COEFFICIENTS.items(), (False, True)))
    for source, output, (what, coefficients), ties in cases:
        data = random_ingredients(source, len(coefficients[0]), 101, ties=ties)
        soup = _through(device, data, source, output, coefficients, 2)
        if not np.array_equal(soup, specified(data, source, output, *coefficients)):
            wrong.append(f"{source.name} to {output.name}, {what}")
    return _tell(wrong, len(cases), "dtype pairs, coefficients and kinds of values")


def _sizes(device: Accelerator | HostDevice) -> Outcome:
    """Sizes 0, 1 and around the block, rings of several lengths."""
    wrong: list[str] = []
    numbers = itertools.product((0, 1, 63, 64, 65, 257), (1, 2, 3, 8))
    cases = list(itertools.product(numbers, ("BF16", "F32"), COEFFICIENTS.values()))
    for (n, n_slots), name, coefficients in cases:
        dtype = DTYPES[name]
        data = random_ingredients(dtype, len(coefficients[0]), n)
        soup = _through(device, data, dtype, dtype, coefficients, n_slots)
        if not np.array_equal(soup, specified(data, dtype, dtype, *coefficients)):
            wrong.append(f"{n} elements of {name}, {n_slots} slots")
    return _tell(wrong, len(cases), "sizes, slots and coefficients")


class _Delayed(Accelerator):
    """A device whose every third stream does some useless work before each piece of its own."""

    def __init__(self, device: Accelerator, which: int) -> None:
        import torch

        super().__init__(device.torch_device)
        self._which, self._n = which, 0
        self._slow: list[torch.Stream] = []
        self._busy = self.device(1 << 20, torch.float64)
        self._busy.zero_()

    def stream(self) -> torch.Stream:
        stream = super().stream()
        if self._n % 3 == self._which:
            self._slow.append(stream)
        self._n += 1
        return stream

    def launch(self, stream: torch.Stream, work: Callable[[], object]) -> None:
        if any(stream is slow for slow in self._slow):
            for _ in range(4):
                super().launch(stream, partial(self._busy.mul_, 1.0))
        super().launch(stream, work)


def _order(device: Accelerator, which: int) -> Outcome:
    """With one stream far behind the others, no byte changes."""
    wrong: list[str] = []
    dtype = DTYPES["BF16"]
    cases = list(itertools.product((1, 2, 3), ("mean of eight", "weighted")))
    for n_slots, what in cases:
        coefficients = COEFFICIENTS[what]
        data = random_ingredients(dtype, len(coefficients[0]), 1000, ties=True)
        soup = _through(_Delayed(device, which), data, dtype, dtype, coefficients, n_slots)
        if not np.array_equal(soup, specified(data, dtype, dtype, *coefficients)):
            wrong.append(f"{n_slots} slots, {what}")
    return _tell(wrong, len(cases), "runs")


def _soups(device: Accelerator | HostDevice, paths: Sequence[str], room: str) -> Outcome:
    """Whole soups by the pipeline and by the CPU's kernels: the same files."""
    from streamsoup.output.verification import verify

    wrong: list[str] = []
    kinds = list(itertools.product(("same", "f32", "bf16"), ("mmap", "read")))
    for n, (dtype, io) in enumerate(kinds):
        options = Options(dtype=dtype, io="mmap" if io == "mmap" else "read")
        by_cpu = order(
            list(paths), Linear(Coefficients.uniform(len(paths))), method="uniform", options=options
        )
        by_cpu.warnings.clear()  # of a dtype that narrows some tensors: on purpose
        one = make(by_cpu, output=os.path.join(room, f"cpu{n}"), options=options)
        by_device = order_on(device, paths, options)
        by_device.warnings.clear()
        other = make(by_device, output=os.path.join(room, f"device{n}"), options=options)
        same = one.provenance.tensors == other.provenance.tensors
        if not same or _content(one.path) != _content(other.path):
            wrong.append(f"dtype {dtype}, io {io}")
        verify(other.path)
    return _tell(wrong, len(kinds), "soups, each verified")


def _memory(device: Accelerator | HostDevice, room: str) -> Outcome:
    """Measured peaks are within the plan, and do not depend on the number of ingredients."""
    few, many = (make_checkpoints(os.path.join(room, str(k)), k, 2_000_000) for k in (2, 8))
    if isinstance(device, HostDevice):
        return _memory_of_cpu([few, many], room)
    import torch

    module = torch.get_device_module(device.torch_device)
    # What is newer than torch 2.7, or CUDA's alone.
    host_memory: Callable[[], dict[str, int]] = getattr(module, "host_memory_stats", dict)
    reset_host_peak = getattr(module, "reset_peak_host_memory_stats", lambda: None)
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", lambda: None)
    peaks: list[tuple[int, int]] = []
    left = 0
    for n, paths in enumerate((few, many)):
        device.settle()
        module.empty_cache()
        empty_host_cache()
        held, allocated = module.memory_reserved(), module.memory_allocated()
        module.reset_peak_memory_stats()
        reset_host_peak()
        pinned = host_memory().get("active_bytes.current", 0)
        # One thread: torch's cache depends on the order in which several ask.
        options = Options(threads=1)
        ordered = order_on(device, paths, options)
        assert ordered.on_device is not None
        plan = ordered.on_device.plan
        make(ordered, output=os.path.join(room, f"peak{n}"), options=options)
        device.settle()
        most = host_memory().get("active_bytes.peak", 0) - pinned
        peaks.append((module.max_memory_reserved() - held, most))
        left += module.memory_allocated() - allocated
    planned = plan.device_nbytes, plan.pinned_nbytes
    within = all(peak <= most for both in peaks for peak, most in zip(both, planned, strict=True))
    passed = within and peaks[0][0] == peaks[1][0] and left == 0
    said = nbytes_text if passed else str
    return passed, (
        f"{said(peaks[0][0])} on the device with 2 ingredients, {said(peaks[1][0])} with 8, "
        f"{said(planned[0])} planned; {said(peaks[0][1])} pinned, {said(peaks[1][1])} "
        f"with 8, {said(planned[1])} planned; {left} bytes not given back"
    )


def _memory_of_cpu(groups: Sequence[Sequence[str]], room: str) -> Outcome:
    """Run the command in a process of its own, as what this one holds is of no interest."""
    peaks, planned = [], []
    for n, paths in enumerate(groups):
        options = Options(device="cpu")
        coefficients = Coefficients.uniform(len(paths))
        ordered = order(list(paths), Linear(coefficients), method="uniform", options=options)
        planned.append(ordered.memory.peak_nbytes)
        output = os.path.join(room, f"peak{n}")
        command = [sys.executable, "-m", "streamsoup", "uniform", *paths, "-o", output, "--json"]
        done = subprocess.run(command, capture_output=True, check=True)
        peaks.append(int(json.loads(done.stdout)["peak_nbytes"]))
    passed = all(peak <= plan for peak, plan in zip(peaks, planned, strict=True))
    return passed, (
        f"{nbytes_text(peaks[0])} with 2 ingredients, {nbytes_text(peaks[1])} with 8, "
        f"{nbytes_text(planned[1])} planned"
    )


class _Failing(Stored):
    """A stored checkpoint whose seventh read fails."""

    def __init__(self, of: Stored) -> None:
        super().__init__(of.name, of.folder, of.shards, of.layout, of.index_name)
        self.calls = itertools.count(1)

    def cursor(self, access: Access) -> Cursor:
        return _FailingCursor(super().cursor(access), self.calls)


class _FailingCursor(Cursor):
    def __init__(self, whole: Cursor, calls: Iterator[int]) -> None:
        self._whole, self._calls = whole, calls

    def read(self, tensor: str, begin: int, block: memoryview) -> None:
        if next(self._calls) == 7:
            raise FormatError("a failing read, made up for this test")
        self._whole.read(tensor, begin, block)


def _trouble(device: Accelerator | HostDevice, paths: Sequence[str], room: str) -> Outcome:
    """Out of memory, a failing read and Ctrl-C leave no output, and everything usable."""
    options = Options(io="read")
    output = os.path.join(room, "trouble")
    wrong: list[str] = []

    def attempt(name: str, error: type[BaseException], work: Callable[[], object]) -> None:
        try:
            work()
            wrong.append(f"{name}: went unnoticed")
        except error:
            if os.path.lexists(output):
                wrong.append(f"{name}: left an output")

    def full() -> None:
        size = device.free_nbytes()
        with our_errors(nbytes_text(size)):
            Lane[Any, Any](device, LaneShape(size, 2, 2, 2, False))

    def unreadable() -> None:
        first, *others = map(open_stored, paths)
        make(order_on(device, [_Failing(first), *others], options), output=output, options=options)

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        stopped = Options(io="read", on_event=interrupt)
        make(order_on(device, paths, stopped), output=output, options=stopped)

    if isinstance(device, Accelerator):
        attempt("out of memory", BudgetError, full)
    attempt("a failing read", StreamsoupError, unreadable)
    attempt("Ctrl-C", KeyboardInterrupt, interrupted)
    make(order_on(device, paths, options), output=output, options=options)
    return _tell(wrong, 3 if isinstance(device, Accelerator) else 2, "kinds of trouble")


def _in_place(device: Accelerator, paths: Sequence[str], room: str) -> Outcome:
    """A model on the device gets a soup's bytes; its parameters stay where they are."""
    import torch
    from safetensors.torch import load_file

    from streamsoup.live.mix import mix_into

    model = torch.nn.Module()
    for name, tensor in load_file(paths[0]).items():
        model.register_buffer(name, tensor.to(device.torch_device))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    mix_into(model, paths)
    options = Options(device="cpu")
    ordered = order(list(paths), Linear(Coefficients.uniform(5)), method="uniform", options=options)
    soup = make(ordered, output=os.path.join(room, "live"), options=options)
    expected = load_file(os.path.join(soup.path, "model.safetensors"))
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.data_ptr() != places[name]
        or tensor.cpu().view(torch.uint8).numpy().tobytes()
        != expected[name].view(torch.uint8).numpy().tobytes()
    ]
    return _tell(wrong, len(places), "tensors")


def _content(folder: str) -> bytes:
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        return file.read()


def _tell(wrong: Sequence[str], count: int, what: str) -> Outcome:
    if wrong:
        return False, f"{len(wrong)} of {count} {what} are wrong, such as {wrong[0]}"
    return True, f"{count} {what}"
