"""Finding a device, planning what it holds, and soups by way of it where there is none."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from checkpoints import needs, save, tensor
from msgspec.structs import replace
from safetensors.torch import load_file
from simulated import SimulatedDevice, TimedDevice

import streamsoup
from streamsoup.cli import cli
from streamsoup.engine import device as device_mix
from streamsoup.engine.device import LARGEST_DEVICE_BLOCK, OnDevice, device_budget, plan_device
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, DeviceError, RecipeError
from streamsoup.formats import on_disk
from streamsoup.kernels.accelerator import pipeline
from streamsoup.kernels.accelerator.device import Accelerator, HostDevice, open_device, our_errors
from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape, held_nbytes, taken_nbytes
from streamsoup.live.mix import DeviceCandidates
from streamsoup.live.model import ModelSink
from streamsoup.options import Options
from streamsoup.output.make import Order, make, order
from streamsoup.recipe import Coefficients
from streamsoup.search.scoring.work import Work, candidates_of


def make_checkpoints(folder: Path, k: int, n: int) -> list[Path]:
    """Make `k` checkpoints of a few dtypes, `n` elements in the largest tensor."""
    paths = []
    for i in range(k):
        rng = np.random.default_rng(i)
        half = rng.normal(size=n).astype(np.float16)
        bf16 = (rng.normal(size=n // 2).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
        tensors = {
            "half": tensor(half),
            "bf16": tensor(bf16, "BF16"),
            "f64": tensor(
                np.append(1.7e308, rng.normal(size=100))
            ),  # the sum of equal ones overflows
            "e4m3": tensor(rng.integers(0, 0x7E, 77).astype(np.uint8), "F8_E4M3"),
            "steps": tensor(np.arange(5)),
            "none": tensor(np.empty(0, np.float32), "F32"),
        }
        paths.append(save(folder / str(i), tensors))
    return paths


def ordered_on_host(ordered: Order, *, block: int, threads: int = 2) -> Order:
    """Have an order made by the pipeline, on plain memory."""
    device = HostDevice()
    plan = plan_device(
        ordered.plan,
        device="cpu",
        budget=1 << 40,
        mapped=ordered.mapped,
        threads=threads,
        memory=1 << 40,
    )
    shape = replace(plan.shape, block=block)
    memory = replace(plan.memory, block=block)
    on_device = OnDevice(device, replace(plan, shape=shape, memory=memory))
    return replace(ordered, memory=memory, on_device=on_device)


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
@pytest.mark.parametrize("method", ["uniform", "weighted"])
def test_soups_by_the_pipeline_are_those_of_the_kernels(
    tmp_path: Path, method: str, block: int, io: Any
) -> None:
    """Copied tensors, float8 and equal float64 among them: the same files, whatever the blocks."""
    paths = make_checkpoints(tmp_path, 5, 3000)
    coefficients = Coefficients.uniform(5)
    if method == "weighted":
        coefficients = Coefficients.given((0.5, 0.2, -0.1, 0.3, 0.1))
    options = Options(io=io)
    ordered = order(paths, Linear(coefficients), method=method, options=options)
    one = make(ordered, output=tmp_path / "one", options=options)
    other = make(ordered_on_host(ordered, block=block), output=tmp_path / "two", options=options)
    files = [(Path(soup.path) / "model.safetensors").read_bytes() for soup in (one, other)]
    assert files[0] == files[1]
    assert one.provenance.tensors == other.provenance.tensors
    assert one.provenance.ingredients == other.provenance.ingredients


def test_a_failure_in_mid_stream_comes_out_as_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that fails ends the run with one line; nothing is left; the next run works."""
    ordered = order(
        make_checkpoints(tmp_path, 3, 3000),
        Linear(Coefficients.uniform(3)),
        method="uniform",
        options=Options(),
    )
    launch = HostDevice.launch
    count = [0]

    def failing(self: HostDevice, stream: None, work: Any) -> None:
        count[0] += work.func is pipeline._sum  # a lane that is being made is in no tensor yet
        if count[0] == 20:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        launch(self, stream, work)

    monkeypatch.setattr(HostDevice, "launch", failing)
    with pytest.raises(
        DeviceError,
        match=r"^the device failed, with [^\n]*MB on cpu [^\n]*, at [^\n]*access[^\n]*$",
    ):
        make(ordered_on_host(ordered, block=64), output=tmp_path / "soup", options=Options())
    assert not (tmp_path / "soup").exists()
    monkeypatch.setattr(HostDevice, "launch", launch)
    make(ordered_on_host(ordered, block=64), output=tmp_path / "soup", options=Options())
    streamsoup.verify(tmp_path / "soup")


def test_out_of_memory_names_bytes_and_what_to_lower() -> None:
    """What torch says of a full device becomes a budget that was too large."""
    with (
        pytest.raises(BudgetError, match="enough memory for 5 MB; lower device_memory or"),
        our_errors("5 MB"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 MiB.")


def test_memory_depends_neither_on_ingredients_nor_on_sizes(tmp_path: Path) -> None:
    """Two or nine ingredients, three or eight million elements: the same plan for the device."""
    plans = set()
    for k, n in ((2, 3_000_000), (9, 3_000_000), (2, 8_000_000)):
        paths = []
        for i in range(k):
            folder = tmp_path / f"{k}-{n}-{i}"
            paths.append(save(folder, {"a": tensor(np.zeros(n, np.float16))}))
        plan = order(
            paths, Linear(Coefficients.uniform(k)), method="uniform", options=Options()
        ).plan
        chosen = plan_device(
            plan, device="cuda:0", budget=10**8, mapped=True, threads=2, memory=10**9
        )
        plans.add((chosen.shape, chosen.device_nbytes, chosen.pinned_nbytes))
    assert len(plans) == 1


@pytest.mark.parametrize("budget", [8 * 10**6, 3 * 10**7, 10**8, 10**9])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_plans_stay_within_the_budget(tmp_path: Path, budget: int, threads: int) -> None:
    """Blocks shrink, then lanes go, until what is predicted fits; more budget, larger blocks."""
    paths = [
        save(tmp_path / str(i), {"a": tensor(np.zeros(3_000_000, np.float16))}) for i in (0, 1)
    ]
    plan = order(paths, Linear(Coefficients.uniform(2)), method="uniform", options=Options()).plan
    chosen = plan_device(
        plan, device="cuda:0", budget=budget, mapped=True, threads=threads, memory=10**9
    )
    assert chosen.device_nbytes <= budget
    assert (chosen.device_nbytes, chosen.pinned_nbytes) == held_nbytes(
        chosen.shape, chosen.memory.threads
    )
    if budget == 10**9:
        assert chosen.shape.block == LARGEST_DEVICE_BLOCK
    with pytest.raises(BudgetError, match=r"device_memory of 1 MB .* cuda:0 needs [\d.]+ MB"):
        plan_device(plan, device="cuda:0", budget=10**6, mapped=True, threads=1, memory=10**9)
    with pytest.raises(BudgetError, match=r"memory budget of 1 MB .* takes [\d.]+ MB at least"):
        plan_device(plan, device="cuda:0", budget=budget, mapped=True, threads=1, memory=10**6)


def test_plain_reads_hold_a_block_of_each_ingredient(tmp_path: Path) -> None:
    """Beside what is pinned, each thread has buffers to read into; mapped files need none."""
    paths = [save(tmp_path / str(i), {"a": tensor(np.zeros(9999, np.float16))}) for i in (0, 1)]
    plan = order(paths, Linear(Coefficients.uniform(2)), method="uniform", options=Options()).plan
    peaks = {}
    for mapped in (True, False):
        chosen = plan_device(
            plan, device="cuda:0", budget=10**9, mapped=mapped, threads=3, memory=10**9
        )
        assert (chosen.memory.threads, chosen.memory.block) == (3, 1 << 14)
        peaks[mapped] = chosen.memory.peak_nbytes
    assert peaks[False] - peaks[True] == 3 * 2 * 2 * (1 << 14)


def test_held_bytes_of_a_hand_case() -> None:
    """Small requests share 2 MiB, middling ones 20 MiB; 2 MiB for the reduction's stream."""
    mib = 1 << 20
    shape = LaneShape(block=1 << 16, n_slots=2, staged=2, made=2, compares=False)
    # 2 x 128 KiB + 2 x 512 KiB + 3 x 512 KiB + 64 KiB + 128 KiB + 2 x 512 B: into two of 2 MiB.
    assert held_nbytes(shape, 1) == (6 * mib, 4 * (128 << 10) + 16)
    shape = LaneShape(block=1 << 20, n_slots=2, staged=2, made=0, compares=False)
    # 2 x 2 MiB + 5 x 8 MiB from three of 20 MiB; 1 MiB and little from 2 MiB; nothing lands.
    assert held_nbytes(shape, 1) == ((60 + 2 + 2) * mib, 2 * (2 << 20) + 16)


def test_taken_bytes_of_a_hand_case() -> None:
    """512 bytes at least; 2 MiB for small requests, 20 for middling ones, their own for large."""
    mib = 1 << 20
    sizes = [100, 3 * mib, 8 * mib, 10 * mib, 15 * mib + 1]
    assert taken_nbytes(sizes) == (2 + 20 + 0 + 10 + 16) * mib
    assert taken_nbytes([513] * 2048) == 2 * mib
    assert taken_nbytes([513] * 2049) == 4 * mib


# ---- candidates of a search


def make_half_checkpoints(folder: Path, k: int) -> list[Path]:
    """Make checkpoints of which a running sum can be kept: no float64."""
    paths = []
    for i in range(k):
        values = np.random.default_rng(i).normal(size=5000).astype(np.float16)
        tensors = {"w": tensor(values), "steps": tensor(np.arange(3))}
        paths.append(save(folder / str(i), tensors))
    return paths


def half_model() -> torch.nn.Module:
    """Make a model for them."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(5000, dtype=torch.float16))
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    return model


def candidates_by_the_pipeline(
    paths: list[Path], *, place: Any, device_memory: str | None
) -> tuple[DeviceCandidates, ModelSink]:
    """Return candidates as they are made on a device, on plain memory, and a model for them."""
    options = Options(device="cpu", device_memory=device_memory, threads=1)
    ordered = order(
        paths, Linear(Coefficients.uniform(len(paths))), method="greedy", options=options
    )
    sink = ModelSink(half_model(), ordered.plan)
    candidates = DeviceCandidates(
        ordered.plan, sink, mapped=ordered.mapped, place=place, options=options
    )
    return candidates, sink


@pytest.mark.parametrize(
    ("place", "device_memory", "n_read"),
    [(None, None, 1), ("memory", "8MB", 1), ("reread", None, 4), (None, "5MB", 4)],
)
def test_the_running_sum_is_kept_where_it_is_told_or_fits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    device_memory: str | None,
    n_read: int,
) -> None:
    """With a sum there, one more candidate reads one ingredient; without, all; the bits stay."""
    monkeypatch.setattr(device_mix, "LARGEST_DEVICE_BLOCK", 4096)  # two blocks, one ragged
    paths = make_half_checkpoints(tmp_path, 5)
    candidates, sink = candidates_by_the_pipeline(paths, place=place, device_memory=device_memory)
    one = candidates.plan.ingredients[0].nbytes
    for members in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]):
        moved = candidates.mix(members, sink, keep=True)
        soup = streamsoup.uniform([paths[i] for i in members], output=tmp_path / str(members))
        expected = load_file(Path(soup.path) / "model.safetensors")["w"]
        assert sink["w"].detach().view(torch.int16).equal(expected.view(torch.int16))
    assert moved.nbytes_read == n_read * one
    assert ("the running sum is there" in moved.where) == (n_read == 1)
    candidates.forget()


def by_simulation(paths: list[Path], device: Any, block: int) -> Order:
    """Plan a uniform soup by way of a simulated device, in one thread."""
    ordered = order(
        paths, Linear(Coefficients.uniform(len(paths))), method="uniform", options=Options()
    )
    ordered = ordered_on_host(ordered, block=block, threads=1)
    assert ordered.on_device is not None
    return replace(ordered, on_device=OnDevice(device, ordered.on_device.plan))


def test_a_worker_ends_one_block_beside_the_next(tmp_path: Path) -> None:
    """A soup takes less time than its copies, sums and ends would, one after the other."""
    paths = make_half_checkpoints(tmp_path, 2)
    device = TimedDevice()
    make(by_simulation(paths, device, 64), output=tmp_path / "soup", options=Options())
    n_blocks = -(-5000 // 64)
    assert device.ticks() < 0.8 * n_blocks * (2 + 1 + 1)


def test_a_worker_that_failed_leaves_nothing_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may be given back after a failing read, though work was queued that uses it."""
    paths = make_half_checkpoints(tmp_path, 3)
    device = SimulatedDevice("lazy")
    ordered = replace(by_simulation(paths, device, 64), mapped=False)
    whole, calls = on_disk.read_into, itertools.count()

    def failing(*arguments: Any) -> None:
        if next(calls) == 4:
            assert not device.is_idle()
            raise OSError(5, "Input/output error")
        whole(*arguments)

    monkeypatch.setattr(on_disk, "read_into", failing)
    with pytest.raises(streamsoup.StreamsoupError, match="cannot be read"):
        make(ordered, output=tmp_path / "soup", options=Options())
    assert device.is_idle()


def test_lanes_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidate after candidate on the same streams, but not after a failure, nor for ever."""
    made: list[Lane[Any, Any]] = []
    init = Lane.__init__

    def counting(self: Lane[Any, Any], *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Lane, "__init__", counting)
    paths = make_half_checkpoints(tmp_path, 3)
    candidates, sink = candidates_by_the_pipeline(paths, place=None, device_memory=None)
    for members in ([0], [0, 1], [0, 1, 2], [0, 1]):
        candidates.mix(members, sink, keep=True)
    assert len(made) == 1

    def failing(self: HostDevice, *arguments: Any) -> None:
        raise RuntimeError("CUDA error")

    for room, name in ((HostDevice, "launch"), (HostDevice, "host_wait"), (Lane, "take")):
        n_made = len(made)
        with monkeypatch.context() as patched:
            patched.setattr(room, name, failing)
            with pytest.raises(DeviceError):
                candidates.mix([0, 1], sink, keep=True)
        candidates.mix([0, 1], sink, keep=True)
        assert len(made) == n_made + 1
    candidates.forget()
    candidates.mix([0, 1], sink, keep=True)
    assert len(made) == 5


def test_a_running_sum_counts_against_the_budget(tmp_path: Path) -> None:
    """What is told to be on the device and does not fit is refused, with bytes; so is a file."""
    paths = make_half_checkpoints(tmp_path, 2)
    with pytest.raises(
        BudgetError,
        match=r"device_memory of 5 MB .* needs 6\.3 MB at least, 2\.1 MB of it for the",
    ):
        candidates_by_the_pipeline(paths, place="memory", device_memory="5MB")
    with pytest.raises(RecipeError, match=r"sums='file' .* \(memory\) or not at all \(reread\)"):
        candidates_by_the_pipeline(paths, place="file", device_memory=None)


def test_jobs_share_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that score at once take what was told, or an eighth of what is free, together."""
    paths = make_half_checkpoints(tmp_path, 2)
    monkeypatch.setattr(HostDevice, "name", "cuda:0")
    monkeypatch.setattr(HostDevice, "free_nbytes", lambda self: 128 * 10**6)
    for room in ("streamsoup.kernels.accelerator.device", "streamsoup.live.mix"):
        monkeypatch.setattr(f"{room}.open_device", lambda name: HostDevice())
    coefficients = Coefficients.uniform(2)
    for told in (None, "16MB"):
        ordered = order(paths, Linear(coefficients), method="greedy", options=Options())
        sink = ModelSink(half_model(), ordered.plan)
        options = Options(device="cuda", device_memory=told, threads=1)
        work = Work(None, None, False, ordered, options, None, 10**8, "", 1)
        kept = [
            "the running sum is there too" in candidates_of(replace(work, n_workers=n), sink).where
            for n in (1, 2, 3)
        ]
        assert kept == [True, True, False]
        with pytest.raises(
            BudgetError, match=r"of 3\.2 MB is too small: cuda:0 needs .*; 5 jobs share it$"
        ):
            candidates_of(replace(work, n_workers=5), sink)


def test_a_device_can_be_sent_to_a_worker() -> None:
    """A search scores in other processes, which are told the device by pickling."""
    device = pickle.loads(pickle.dumps(Accelerator(torch.device("cuda:1"))))
    assert (device.name, device.torch_device) == ("cuda:1", torch.device("cuda:1"))


# ---- where there is no device


@needs(torch, 2, 7)
def test_a_cuda_build_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says cuda until asked whether that is available; then one clear error."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    with pytest.raises(DeviceError, match=r"device cuda: torch .* finds none .* device='cpu'"):
        open_device("cuda")
    paths = make_checkpoints(tmp_path, 2, 100)
    with pytest.raises(DeviceError):
        streamsoup.uniform(paths, output=tmp_path / "no", options=Options(device="cuda"))
    assert not (tmp_path / "no").exists()
    streamsoup.uniform(paths, output=tmp_path / "yes", options=Options(device="auto"))


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot say whether its device is there: one clear error, but the CPU is always there."""
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(DeviceError, match=r"cuda: torch 2\.6\.0.* is too old; install 2\.7"):
        open_device("cuda")
    assert isinstance(open_device("cpu"), HostDevice)


def test_a_torch_that_is_broken(tmp_path: Path) -> None:
    """A build for CUDA whose libraries are missing: one line, and workers say it as well."""
    (tmp_path / "torch.py").write_text("raise ValueError('libcublas.so is not found')")
    (tmp_path / "task.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    paths = [str(path) for path in make_checkpoints(tmp_path, 2, 100)]
    for command, said in (
        (["uniform", "--device", "cuda"], "error: --device cuda: torch cannot be imported (libcu"),
        (["greedy", "--task", str(tmp_path / "task.py")], "libcublas.so is not found"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "streamsoup", *command, *paths, "-o", str(tmp_path / "soup")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "\nerror: " in f"\n{done.stderr}"  # after a note on what is done
        assert said in done.stderr


@needs(torch, 2, 7)
def test_the_adapter_passes_on_what_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the pipeline becomes the one of torch's streams and events that it names."""
    device = Accelerator(torch.device("cuda:0"))
    torchs = Mock()
    stream, event = torchs.stream, torchs.event
    stream.__enter__, stream.__exit__ = Mock(), Mock(return_value=None)
    monkeypatch.setattr(torch.accelerator, "synchronize", torchs.synchronize)
    device.wait(stream, event)
    device.launch(stream, torchs.work)
    device.record(event, stream)
    device.host_wait(event)
    device.settle()
    torchs.assert_has_calls(
        [
            call.stream.wait_event(event),
            call.stream.__enter__(),
            call.work(),
            call.stream.__exit__(None, None, None),
            call.event.record(stream),
            call.event.synchronize(),
            call.synchronize(device.torch_device),
        ]
    )


@needs(torch, 2, 7)
def test_devices_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another accelerator, a number too high, one without float64, an unknown word."""
    for name in ("gpu", "cpu:0", "meta", "cuda:-1", ""):
        with pytest.raises(
            RecipeError, match=f"'{name}' is not a device; use auto, cpu, cuda or cu"
        ):
            open_device(name)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert open_device("cuda").name == "cuda:1"
    assert open_device("cuda:0").name == "cuda:0"
    with pytest.raises(DeviceError, match="cuda:2: there are 2, numbered from 0"):
        open_device("cuda:2")
    with pytest.raises(DeviceError, match="finds only cuda"):
        open_device("xpu")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    with pytest.raises(DeviceError, match="no float64"):
        open_device("mps")


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """``--device cuda`` on a machine without is one error, status 1; ``plan`` tells the device."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    paths = [str(path) for path in make_checkpoints(tmp_path, 2, 100)]
    output = str(tmp_path / "soup")
    assert cli(["uniform", *paths, "-o", output, "--device", "cuda"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: --device cuda: torch")
    assert error.count("\n") == 1
    assert cli(["plan", *paths]) == 0
    assert "cpu, as no device was asked for" in capfd.readouterr().out


def test_soups_say_where_they_were_summed_and_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``auto`` chose, or what was told, ends the last line; and it is in the JSON."""
    paths = [str(path) for path in make_checkpoints(tmp_path, 2, 100)]
    for device, said in (
        ("auto", "cpu, as no device was asked for"),
        ("cpu", "cpu, as told"),
    ):
        output = str(tmp_path / device)
        command = ["uniform", *paths, "-o", output, "--device", device]
        assert cli(command) == 0
        assert capfd.readouterr().out.endswith(f"; summed on {said}\n")
        assert cli([*command, "--overwrite", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["summed_on"] == said
    monkeypatch.setattr(
        "streamsoup.kernels.accelerator.device.open_device", lambda name: HostDevice()
    )
    monkeypatch.setattr(HostDevice, "name", "cuda:0")
    soup = streamsoup.uniform(
        paths, output=tmp_path / "told", options=Options(device="cuda", memory="1GB")
    )
    assert soup.summed_on == "cuda:0, as told"
    assert streamsoup.verify(soup.path).rederived


def test_cpu_and_auto_import_no_torch(tmp_path: Path) -> None:
    """Averaging on the CPU never imports torch, whatever was installed."""
    paths = [str(path) for path in make_checkpoints(tmp_path, 2, 100)]
    code = (
        "import sys; from streamsoup import uniform, Options\n"
        f"uniform({paths!r}, output={str(tmp_path / 'a')!r}, options=Options(device='auto'))\n"
        f"uniform({paths!r}, output={str(tmp_path / 'b')!r}, options=Options(device='cpu'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_accelerator_that_cannot_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every backend of torch has that call: a budget that is told does without."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    device = Accelerator(torch.device("cuda:0"))
    assert device_budget(device, Options(device_memory="5MB")) == 5_000_000
    with pytest.raises(DeviceError, match=r"cannot say how much .* give device_memory"):
        device_budget(device, Options())


def test_the_default_budget_is_a_small_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``--device-memory``, an eighth of what is free on the device."""
    paths = make_checkpoints(tmp_path, 2, 3_000_000)
    plan = order(paths, Linear(Coefficients.uniform(2)), method="uniform", options=Options()).plan
    monkeypatch.setattr(
        "streamsoup.kernels.accelerator.device.open_device", lambda name: HostDevice()
    )
    monkeypatch.setattr(HostDevice, "free_nbytes", lambda self: 8 * 2 * 10**7)
    options = Options(device="cuda", memory="1GB")
    found = device_mix.find_device(plan, options, mapped=True)
    assert found.plan.device_nbytes <= 2 * 10**7
