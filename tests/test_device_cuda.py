"""The pipeline on whatever CUDA device is present: a card, or a simulated runtime.

Run by `make test-cuda`. On a simulated runtime that brings them, each test is checked for races as
well, failures are injected at every step, and peaks of memory are compared exactly.
"""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from simulated import KINDS
from torch import nn

import streamsoup
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, DeviceError, NonFiniteError
from streamsoup.formats import on_disk
from streamsoup.kernels.accelerator.device import Accelerator, open_device, our_errors
from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape, held_nbytes
from streamsoup.live.mix import DeviceCandidates
from streamsoup.live.model import ModelSink
from streamsoup.options import Options
from streamsoup.output.make import make, order
from streamsoup.recipe import Coefficients
from streamsoup.search.learning.backward import _vector
from streamsoup.search.learning.parametrisation import parametrise
from streamsoup.search.learning.slopes import Slopes
from streamsoup.selftest.lanes import (
    COEFFICIENTS,
    FLOATS,
    random_ingredients,
    specified,
    through_lane,
)
from streamsoup.sizes import nbytes_text, parse_nbytes
from streamsoup.task import load_task
from streamsoup.tensors import DTYPES, DType

try:
    import simcuda

    SIMULATED = bool(simcuda.is_active())
except ImportError:
    SIMULATED = False

pytestmark = pytest.mark.cuda
simulated_only = pytest.mark.skipif(not SIMULATED, reason="needs the simulated runtime")

CUDA = Options(device="cuda", memory="2GB")


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Check each test for races, where that is possible."""
    try:
        import hsan
    except ImportError:  # a real device
        yield
        return
    with hsan.check():
        yield


@pytest.fixture(scope="module")
def device() -> Accelerator:
    """Open the device."""
    opened = open_device("cuda")
    assert isinstance(opened, Accelerator)
    return opened


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make five checkpoints with every dtype, around a block and an empty one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = []
    for i in range(5):
        g = torch.Generator().manual_seed(i)

        def values(*shape: int, g: torch.Generator = g) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        tensors = {
            "bf16": values(100_003).bfloat16(),
            "f16": values(301, 7).half(),
            "f32": values(8192),
            "f64": values(5000).double(),
            "e4m3": values(999).to(torch.float8_e4m3fn),
            "e5m2": values(999).to(torch.float8_e5m2),
            "steps": torch.arange(7),
            "none": torch.empty(0),
            "scalar": values(1)[0],
        }
        tensors["f64"][:1000] = torch.arange(1000).double() / 3  # the same in all
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def weights(soup: streamsoup.Soup) -> bytes:
    """Return the bytes of a soup's only shard."""
    return (Path(soup.path) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS.keys())
@pytest.mark.parametrize("source", FLOATS, ids=lambda dtype: dtype.name)
def test_bits_are_those_of_the_specification(
    device: Accelerator, source: DType, coefficients: tuple[tuple[float, ...], float]
) -> None:
    """Every dtype into every other, over random patterns and over ties."""
    factors, divisor = coefficients
    for output in FLOATS:
        for ties in (False, True):
            ingredients = random_ingredients(source, len(factors), 201, ties=ties)
            expected = specified(ingredients, source, output, factors, divisor)
            soup, _ = through_lane(device, ingredients, source, output, factors, divisor, block=64)
            assert soup.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n_slots", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 12289])
def test_neither_blocks_nor_slots_change_bits(device: Accelerator, n: int, n_slots: int) -> None:
    """Sizes around the block, and rings of several lengths."""
    source = DTYPES["F32"]
    factors = (0.5, 0.3, 0.1, 0.1, -0.1)
    ingredients = random_ingredients(source, 5, n)
    expected = specified(ingredients, source, source, factors, 1.0)
    soup, _ = through_lane(
        device, ingredients, source, source, factors, 1.0, block=4096, n_slots=n_slots
    )
    assert soup.tobytes() == expected.tobytes()


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("budget", ["7MB", "60MB"])
def test_soups_are_those_of_the_cpu(
    checkpoints: list[Path], tmp_path: Path, io: Any, budget: str
) -> None:
    """Uniform, weighted, and into other dtypes: the same files, byte for byte, and verified."""
    for n, (dtype, factors) in enumerate(
        [("same", None), ("same", [0.5, 0.2, 0.2, 0.05, 0.05]), ("f32", None), ("bf16", None)]
    ):
        soups = []
        for name in ("cpu", "cuda"):
            options = Options(
                device=name, device_memory=budget, dtype=dtype, memory="2GB", io=io, threads=2
            )
            output = tmp_path / f"{name}{n}"
            if factors is None:
                soups.append(streamsoup.uniform(checkpoints, output=output, options=options))
            else:
                soups.append(streamsoup.mix(checkpoints, factors, output=output, options=options))
        assert weights(soups[0]) == weights(soups[1])
        assert soups[0].provenance.tensors == soups[1].provenance.tensors
    streamsoup.verify(soups[1].path)


class Model(nn.Module):
    """A module with the tensors of the checkpoints, some in other dtypes, or out of order."""

    def __init__(self, like: Path) -> None:
        from safetensors.torch import load_file

        super().__init__()
        for name, tensor in load_file(like).items():
            zeros = torch.zeros_like(tensor, device="cpu")
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                if name == "f16":
                    zeros = torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).t()
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros)


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("factors", [None, [0.5, 0.2, 0.2, 0.05, 0.05]], ids=["mean", "weighted"])
def test_live_mix_in_place(
    checkpoints: list[Path], tmp_path: Path, factors: list[float] | None
) -> None:
    """A model on the device gets the bytes that a file would, and its parameters stay in place."""
    model = Model(checkpoints[0]).cuda()
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    streamsoup.mix_into(model, checkpoints, factors, options=Options(memory="2GB"))
    options = Options(device="cpu")
    if factors is None:
        soup = streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    else:
        soup = streamsoup.mix(checkpoints, factors, output=tmp_path / "soup", options=options)
    expected = load_file(Path(soup.path) / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert raw(tensor) == raw(expected[name]), name
        assert tensor.data_ptr() == places[name]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_there_may_be_mixed_into_itself(layout: torch.memory_format) -> None:
    """As on the host: that is no change by somebody else, and torch knows of it."""
    host = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model = copy.deepcopy(host).to("cuda", memory_format=layout)  # type: ignore[call-overload]
    other = {name: tensor + 1 for name, tensor in host.state_dict().items()}
    versions = [tensor._version for tensor in model.parameters()]
    for each in (host, model):
        streamsoup.mix_into(each, [each, other], [0.75, 0.25], options=Options(memory="2GB"))
    for mine, theirs in zip(host.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu())
    changed = [tensor._version for tensor in model.parameters()]
    assert all(after > before for after, before in zip(changed, versions, strict=True))


def test_candidates_with_a_running_sum(checkpoints: list[Path], tmp_path: Path) -> None:
    """Growing and changing candidates in a live model: each has the bytes of a pass over all."""
    paths = []
    for path in checkpoints:  # a running sum cannot carry float64
        tensors = {name: t for name, t in load_file(path).items() if t.dtype != torch.float64}
        paths.append(tmp_path / path.name)
        save_file(tensors, paths[-1])
    ordered = order(paths, Linear(Coefficients.uniform(5)), method="greedy", options=Options())
    model = Model(paths[0]).cuda()
    sink = ModelSink(model, ordered.plan)
    candidates = DeviceCandidates(
        ordered.plan, sink, mapped=True, place=None, options=Options(memory="2GB", threads=2)
    )
    for n, members in enumerate([(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 3, 4), (2, 0)]):
        moved = candidates.mix(members, sink, keep=True)
        if n == 4:  # the sum of 0, 1 is on the device: 3 and 4 are all that is read
            assert moved.nbytes_read == 2 * ordered.plan.ingredients[0].nbytes
        soup = streamsoup.uniform([paths[i] for i in members], output=tmp_path / str(n))
        expected = load_file(Path(soup.path) / "model.safetensors")
        for name, tensor in model.state_dict().items():
            assert raw(tensor) == raw(expected[name]), (members, name)
    candidates.forget()


TASK = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(9000, dtype=torch.bfloat16))


def build():
    return Model().to("cuda")


def score(model, split):
    return -float((model.w.float() * model.w.float()).sum())


def loss(model, split):
    yield (model.w.float() * model.w.float()).sum(), 1
"""


@pytest.mark.parametrize(
    ("command", "device"), [("greedy", "auto"), ("greedy", "cuda"), ("learned", "cuda")]
)
def test_searches_from_the_command_line(tmp_path: Path, command: str, device: str) -> None:
    """A search with its model on the device, in a worker process: the bytes are the CPU's."""
    (tmp_path / "task.py").write_text(TASK)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for i, path in enumerate(paths):
        g = torch.Generator().manual_seed(i)
        save_file({"w": torch.randn(9000, generator=g).bfloat16()}, path)
    common = [command, *paths, "--task", str(tmp_path / "task.py"), "--memory", "2GB", "--json"]
    soups, where = [], []
    for name in ("cpu", device):
        output = tmp_path / f"soup-{name}"
        line = [sys.executable, "-m", "streamsoup", *common, "-o", str(output), "--device", name]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        where.append(found.get("report", found)["mixed_on"])
        soups.append((output / "model.safetensors").read_bytes())
    assert soups[0] == soups[1]
    told = "cuda, as told" if device == "cuda" else "cuda:0, where the model lives"
    assert where[0].startswith("cpu, as told")
    assert where[1].startswith(told)


def test_an_ingredient_that_is_not_finite(checkpoints: list[Path], tmp_path: Path) -> None:
    """NaN is refused, with its place named, or propagated with the bits of the CPU."""
    tensors = load_file(checkpoints[0])
    tensors["f32"][77] = float("nan")
    tensors["bf16"][3] = float("-inf")
    save_file(tensors, tmp_path / "bad.safetensors")
    paths = [checkpoints[1], tmp_path / "bad.safetensors"]
    with pytest.raises(NonFiniteError, match=r"bad\.safetensors: (f32|bf16): holds (nan|-inf) at"):
        streamsoup.uniform(paths, output=tmp_path / "refused", options=CUDA)
    both = [
        streamsoup.uniform(
            paths,
            output=tmp_path / name,
            options=Options(device=name, non_finite="propagate", memory="2GB"),
        )
        for name in ("cpu", "cuda")
    ]
    assert weights(both[0]) == weights(both[1])


def test_memory_comes_back(checkpoints: list[Path], tmp_path: Path) -> None:
    """After a run, and after one that failed, torch has all of the device's memory again."""
    before = torch.cuda.memory_allocated()
    streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=CUDA)
    assert torch.cuda.memory_allocated() == before


def test_too_little_memory_is_refused_beforehand(checkpoints: list[Path], tmp_path: Path) -> None:
    """A budget that is too small says how much would do, before anything is made."""
    options = Options(device="cuda", device_memory="1MB", memory="2GB")
    with pytest.raises(BudgetError, match=r"device_memory of 1 MB is too small: cuda:0 needs"):
        streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    assert not (tmp_path / "soup").exists()


def test_out_of_memory_leaves_all_usable(device: Accelerator) -> None:
    """A lane that does not fit says so in one line, and the next one works."""
    free = device.free_nbytes()
    asked = nbytes_text(free)
    with pytest.raises(BudgetError, match=rf"not enough memory for {asked}; lower device_memory"):  # noqa: SIM117
        with our_errors(asked):
            Lane(device, LaneShape(free, 2, 2, 2, False))
    torch.cuda.empty_cache()
    test_neither_blocks_nor_slots_change_bits(device, 4097, 2)


def test_a_failing_read_in_mid_stream(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes out as it is, nothing is left behind, and the next run works."""
    whole = on_disk.read_into
    count = [0]

    def failing(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == 9:
            raise OSError(5, "Input/output error")
        whole(*arguments)

    options = Options(device="cuda", io="read", memory="2GB")
    monkeypatch.setattr(on_disk, "read_into", failing)
    with pytest.raises(streamsoup.StreamsoupError, match="cannot be read"):
        streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    assert not (tmp_path / "soup").exists()
    monkeypatch.setattr(on_disk, "read_into", whole)
    streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    streamsoup.verify(tmp_path / "soup")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise, as in a terminal; a shell's background jobs are started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_in_mid_stream(checkpoints: list[Path], tmp_path: Path) -> None:
    """Ctrl-C stops the lanes, gives memory back, and leaves the device usable."""

    def interrupt(progress: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = torch.cuda.memory_allocated()
    options = Options(device="cuda", memory="2GB", on_event=interrupt)
    with pytest.raises(KeyboardInterrupt):
        streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    assert torch.cuda.memory_allocated() == before
    assert threading.active_count() == len(threading.enumerate())
    streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=CUDA)
    streamsoup.verify(tmp_path / "soup")


STEPS = [
    "cudaMalloc:1+",
    "cudaHostAlloc:2",
    "cudaMemcpyAsync:3",
    "cudaMemcpyAsync:17",
    "cudaLaunchKernel:1",
    "cudaLaunchKernel:40",
    "cudaEventRecord:5",
    "cudaStreamWaitEvent:4",
    "cudaEventSynchronize:6",
]


@simulated_only
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_each_step(checkpoints: list[Path], tmp_path: Path, step: str) -> None:
    """Whatever call of the runtime fails, one line says so, and the next run works."""
    torch.cuda.empty_cache()
    torch.accelerator.empty_host_cache()
    before = torch.cuda.memory_allocated()
    with (
        simcuda.settings(fail=step),
        pytest.raises((BudgetError, DeviceError), match=r"^(not enough|the device)[^\n]*$"),
    ):
        streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=CUDA)
    assert torch.cuda.memory_allocated() == before
    assert not (tmp_path / "soup").exists()
    soup = streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=CUDA)
    again = streamsoup.uniform(checkpoints, output=tmp_path / "cpu")
    assert weights(soup) == weights(again)


@simulated_only
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slow", ["", "h2d", "kernel", "d2h"])
def test_delays_change_nothing(
    checkpoints: list[Path], tmp_path: Path, slow: str, seed: int
) -> None:
    """With delays on each kind of operation in turn, the bytes stay."""
    options = Options(device="cuda", device_memory="7MB", memory="2GB")
    with simcuda.settings(delay_us=20, seed=seed, slow=slow):
        soup = streamsoup.uniform(checkpoints, output=tmp_path / "soup", options=options)
    assert weights(soup) == weights(streamsoup.uniform(checkpoints, output=tmp_path / "cpu"))


@simulated_only
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", ["11MB", "40MB", "200MB"])
def test_peaks_are_within_the_plan(tmp_path: Path, budget: str, threads: int) -> None:
    """Measured peaks, device and pinned, are at most the planned ones, and the same for any k."""
    peaks = set()
    values = torch.randn(3_000_000).bfloat16()
    for k in (2, 9):
        paths = [tmp_path / f"{k}-{i}.safetensors" for i in range(k)]
        for path in paths:
            save_file({"a": values, "b": values[:1000].float()}, path)
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()
        torch.accelerator.synchronize()
        held = [simcuda.bytes_in_use(kind) for kind in ("device", "pinned")]
        simcuda.reset_peaks()
        options = Options(device="cuda", device_memory=budget, memory="2GB", threads=threads)
        ordered = order(paths, Linear(Coefficients.uniform(k)), method="uniform", options=options)
        assert ordered.on_device is not None
        plan = ordered.on_device.plan
        make(ordered, output=tmp_path / f"soup{k}", options=options)
        device, pinned = (
            simcuda.peak_bytes(kind) - h for kind, h in zip(("device", "pinned"), held, strict=True)
        )
        assert device <= plan.device_nbytes <= parse_nbytes(budget)
        assert pinned <= plan.pinned_nbytes
        peaks.add((device, pinned, plan.device_nbytes, plan.pinned_nbytes))
    assert len({(d, p) for _, _, d, p in peaks}) == 1
    if threads == 1:
        assert len(peaks) == 1


@simulated_only
@pytest.mark.parametrize(("budget", "kept"), [("60MB", True), ("34MB", True), ("28MB", False)])
def test_peaks_of_a_search_are_within_its_budget(tmp_path: Path, budget: str, kept: bool) -> None:
    """Lanes and the running sum together, however many candidates are made."""
    n = 3_000_000
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        save_file({"w": torch.randn(n).bfloat16()}, path)
    options = Options(device_memory=budget, memory="2GB")
    ordered = order(paths, Linear(Coefficients.uniform(4)), method="greedy", options=Options())
    sink = ModelSink(Model(paths[0]).cuda(), ordered.plan)
    torch.cuda.empty_cache()
    held = simcuda.bytes_in_use("device")
    simcuda.reset_peaks()
    candidates = DeviceCandidates(ordered.plan, sink, mapped=True, place=None, options=options)
    for members in ((0,), (0, 1), (0, 1, 2), *[(0, 1, 3)] * 9):
        candidates.mix(members, sink, keep=True)
    moved = candidates.mix((0, 1, 3), sink, keep=True)
    assert simcuda.peak_bytes("device") - held <= parse_nbytes(budget)
    assert ("the running sum is there" in moved.where) == kept
    assert moved.nbytes_read == ordered.plan.ingredients[0].nbytes * (1 if kept else 3)
    candidates.forget()


@simulated_only
def test_copies_and_sums_overlap(device: Accelerator) -> None:
    """With operations of 2 ms each, two slots take at most 0.7 of the time that one slot takes."""
    seconds = {}
    for name, (factors, divisor) in {
        "F32": ((1.0,) * 8, 8.0),
        "BF16": ((1.0,) * 8, 8.0),
    }.items():
        dtype = DTYPES[name]
        ingredients = random_ingredients(dtype, 8, 8 * 256, ties=True)
        for n_slots in (1, 3):
            with simcuda.settings(delay_us=0, fix_h2d_us=2000, fix_d2h_us=2000, fix_kernel_us=2000):
                started = time.monotonic()
                through_lane(
                    device, ingredients, dtype, dtype, factors, divisor, block=256, n_slots=n_slots
                )
                seconds[name, n_slots] = time.monotonic() - started
    print({key: round(value, 3) for key, value in seconds.items()})
    for name in ("F32", "BF16"):
        assert seconds[name, 3] <= 0.7 * seconds[name, 1]


def test_predicted_bytes_of_a_lane(device: Accelerator) -> None:
    """What torch takes from the driver for lanes of many shapes is at most what was predicted."""
    for block in (4096, 1 << 16, 1 << 18):
        for size in (2, 8):
            shape = LaneShape(block, 3, size, size, size == 8)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_reserved()
            lanes = [Lane(device, shape) for _ in range(2)]
            taken = torch.cuda.max_memory_reserved() - before
            for lane in lanes:
                lane.close()
            assert taken <= held_nbytes(shape, 2)[0]
            del lanes


def test_work_queued_before_is_waited_for(device: Accelerator) -> None:
    """A lane's memory may be in use by the default stream until just now: it waits for that."""
    n = 1 << 16
    old = torch.ones(n, dtype=torch.float64, device="cuda")
    for _ in range(8):
        old.mul_(1.0)
    del old
    data = np.full(n, 3.0).view(np.uint8)
    soup, _ = through_lane(device, [data], DTYPES["F64"], DTYPES["F64"], (1.0,), 1.0, block=n)
    assert soup.tobytes() == data.tobytes()


def test_slopes_of_a_model_on_the_device(tmp_path: Path) -> None:
    """Gradients on the device give the products, to the bit, that they give on the CPU."""
    paths = []
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        values = {"a": torch.randn(9000, generator=g), "b": torch.randn(70, 3, generator=g).half()}
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(values, paths[-1])
    ordered = order(paths, Linear(Coefficients.uniform(3)), method="learned", options=Options())

    class Toy:
        """A loss of products alone: no matrix multiplication is needed."""

        splits = ("val",)

        def score(self, model: Any, split: str) -> float:
            return 0.0

        def loss(self, model: Any, split: str) -> Iterator[tuple[torch.Tensor, int]]:
            yield (model.a * model.a).sum() + (model.b * model.b).float().sum(), 1

    found = []
    for device in ("cpu", "cuda"):
        model = Model(paths[0]).to(device)
        sink = ModelSink(model, ordered.plan)
        mixture = parametrise(
            ["a", "b"], {}, 3, granularity="tensor", constraint="softmax", temperature=False
        )
        slopes = Slopes(
            load_task(Toy()),
            sink,
            mixture,
            {},
            split="val",
            guard_split=None,
            guard_every=0,
            mapped=True,
            options=Options(memory="2GB"),
        )
        looked = slopes.evaluate(mixture.start(), backward=True)
        found.append((looked.slopes.tobytes(), raw(model.a), raw(model.b)))
    assert found[0] == found[1]


def test_a_gradient_takes_no_room_on_the_device() -> None:
    """It is looked at where it comes to, however large it is: the device may be full."""
    dense = torch.zeros(3 << 20)
    dense[torch.tensor([7, 5000])] = torch.tensor([1.5, -2.0])
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[7, 5000]]), torch.tensor([1.5, -2.0]), dense.shape, check_invariants=True
    )
    for gradient in (dense.cuda(), sparse.cuda()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vector = _vector(gradient, "w")
        assert torch.cuda.max_memory_allocated() == before
        assert vector.data.tobytes() == dense.numpy().tobytes()


class Forgetful(Accelerator):
    """A device that leaves out one kind of wait."""

    def __init__(self, forget: tuple[str, int, int]) -> None:
        super().__init__(torch.device("cuda:0"))
        self._forget = forget
        self._streams: list[torch.Stream] = []
        self._recorded: dict[int, int] = {}

    def stream(self) -> torch.Stream:
        self._streams.append(super().stream())
        return self._streams[-1]

    def record(self, event: torch.Event, stream: torch.Stream) -> None:
        self._recorded[id(event)] = self._streams.index(stream)
        super().record(event, stream)

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        kind = ("stream", self._streams.index(stream), self._recorded.get(id(event), -1))
        if kind != self._forget:
            super().wait(stream, event)

    def host_wait(self, event: torch.Event) -> None:
        if ("host", -1, self._recorded.get(id(event), -1)) != self._forget:
            super().host_wait(event)


@simulated_only
@pytest.mark.parametrize("n_slots", [1, 2, 3])
@pytest.mark.parametrize("kind", [None, *KINDS], ids=lambda kind: "none" if not kind else str(kind))
def test_every_wait_left_out_is_found_as_a_race(
    kind: tuple[str, int, int] | None, n_slots: int
) -> None:
    """The planted faults, on the runtime: happens-before finds each, and nothing in the whole."""
    import hsan

    dtype = DTYPES["BF16"]
    ingredients = random_ingredients(dtype, 5, 5000, ties=True)
    device = Forgetful(kind or ("", 0, 0))
    raced = False
    with simcuda.settings(race="quiet"):
        try:
            with hsan.check():
                through_lane(
                    device, ingredients, dtype, dtype, (1.0,) * 5, 5.0, block=1024, n_slots=n_slots
                )
        except hsan.RaceError:
            raced = True
    assert raced == (kind is not None)
