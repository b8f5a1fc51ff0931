"""Whatever fails in mid-stream ends in one line, gives all memory back, and the next run is right.

Every call of the device in turn, here on plain memory; reads, writes and Ctrl-C as well.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from simulated import SimulatedDevice
from test_device import candidates_by_the_pipeline, make_half_checkpoints, ordered_on_host

import streamsoup
from streamsoup.engine.device import OnDevice
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, DeviceError
from streamsoup.formats import on_disk
from streamsoup.kernels.accelerator import device as kernels_device
from streamsoup.kernels.accelerator.device import HostDevice
from streamsoup.live import mix as live_mix
from streamsoup.options import Options, Progress
from streamsoup.output import write
from streamsoup.output.make import make, order
from streamsoup.recipe import Coefficients

PREFERENCES = list(itertools.permutations(range(3)))

FULL = "CUDA out of memory. Tried to allocate 4 MiB.\nmore"
BROKEN = "CUDA error: an illegal memory access was encountered\nmore"


class FailingDevice(HostDevice):
    """Fails at one of its calls, and knows which of its memory is still held."""

    name = "failing"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails_at = -1
        self.error: BaseException = RuntimeError()
        self.stays_broken = False
        self._made: list[weakref.ref[torch.Tensor]] = []

    def n_held(self) -> int:
        """Count the allocations that are still held."""
        return sum(made() is not None for made in self._made)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        n = len(self.calls) - 1
        if n == self.fails_at or (self.stays_broken and n > self.fails_at >= 0):
            raise self.error if n == self.fails_at else RuntimeError("and so on")

    def _allocate(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.full((n * dtype.itemsize,), 0xCB, dtype=torch.uint8).view(dtype)
        self._made.append(weakref.ref(made))
        return made

    def stream(self) -> None:
        self._call("stream")

    def event(self) -> None:
        self._call("event")

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        self._call("pinned")
        return self._allocate(n, dtype)

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        self._call("device")
        return self._allocate(n, dtype)

    def launch(self, stream: None, work: Callable[[], object]) -> None:
        self._call("launch")
        work()

    def record(self, event: None, stream: None) -> None:
        self._call("record")

    def wait(self, stream: None, event: None) -> None:
        self._call("wait")

    def host_wait(self, event: None) -> None:
        self._call("host_wait")

    def settle(self) -> None:
        self._call("settle")

    def fail(self, n: int, error: BaseException) -> None:
        """Fail with `error` at the call numbered `n`, from now on."""
        self.calls.clear()
        self.fails_at, self.error = n, error


def attempt(paths: list[Path], device: HostDevice, output: Path, threads: int, **told: Any) -> None:
    """Make a uniform soup by way of `device`, in blocks of 2048."""
    options = Options(**told)
    ordered = order(
        paths, Linear(Coefficients.uniform(len(paths))), method="uniform", options=options
    )
    ordered = ordered_on_host(ordered, block=2048, threads=threads)
    assert ordered.on_device is not None
    on_device = OnDevice(device, ordered.on_device.plan)
    make(replace(ordered, on_device=on_device), output=output, options=options)


@pytest.mark.parametrize(
    ("threads", "text", "kind", "said"),
    [
        (
            1,
            FULL,
            BudgetError,
            r"not enough memory for [\d.]+ MB on failing .* lower device_memory",
        ),
        (2, BROKEN, DeviceError, r"the device failed, with [\d.]+ MB on failing .*illegal memory"),
    ],
    ids=["full", "broken"],
)
def test_every_call_may_fail(
    tmp_path: Path, threads: int, text: str, kind: type[Exception], said: str
) -> None:
    """One line with bytes and what to lower; nothing held, nothing left; the next run is right."""
    paths = make_half_checkpoints(tmp_path, 2)
    device = FailingDevice()
    attempt(paths, device, tmp_path / "whole", threads)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert device.n_held() == 0
    met = set()
    n_calls = len(device.calls)
    for n in range(n_calls):
        device.fail(n, RuntimeError(text))
        output = tmp_path / f"soup{n}"
        with pytest.raises(kind, match=said) as caught:
            attempt(paths, device, output, threads)
        assert str(caught.value).count("\n") == 0
        met.add(device.calls[n])
        assert device.n_held() == 0, (n, device.calls[n])
        assert not output.exists()
        device.fail(-1, RuntimeError())
        attempt(paths, device, output, threads)
        assert (output / "model.safetensors").read_bytes() == expected
    assert met == {
        *("stream", "event", "pinned", "device", "launch"),
        *("record", "wait", "host_wait", "settle"),
    }


def test_the_first_error_is_shown(tmp_path: Path) -> None:
    """A device that stays broken, as CUDA's do, fails again while the run is ended: never mind."""
    paths = make_half_checkpoints(tmp_path, 2)
    device = FailingDevice()
    attempt(paths, device, tmp_path / "whole", 1)
    device.stays_broken = True
    for n in range(len(device.calls)):
        device.fail(n, RuntimeError(BROKEN))
        with pytest.raises(DeviceError, match="illegal memory access"):
            attempt(paths, device, tmp_path / "soup", 1)
        assert device.n_held() == 0


def test_every_call_of_a_search_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running sum that a failure left in between is not used: the next candidate is right."""
    paths = make_half_checkpoints(tmp_path, 4)
    device = FailingDevice()
    for room in (live_mix, kernels_device):
        monkeypatch.setattr(room, "open_device", lambda name: device)
    monkeypatch.setattr("streamsoup.engine.device.LARGEST_DEVICE_BLOCK", 4096)
    candidates, sink = candidates_by_the_pipeline(paths, place="memory", device_memory=None)
    grown = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 3]]
    expected = []
    for members in grown:
        candidates.mix(members, sink, keep=True)
        expected.append(sink["w"].detach().clone())
    soup = streamsoup.uniform([paths[i] for i in grown[-1]], output=tmp_path / "soup")
    assert expected[-1].equal(load_file(Path(soup.path) / "model.safetensors")["w"])
    n_calls = len(device.calls)
    for n in range(n_calls):
        candidates.forget()
        device.fail(n, RuntimeError(BROKEN))
        n_failed = 0
        for members, right in zip(grown, expected, strict=True):
            try:
                candidates.mix(members, sink, keep=True)
            except DeviceError:
                n_failed += 1
                candidates.mix(members, sink, keep=True)
            assert sink["w"].detach().equal(right), (n, device.calls[n])
        assert n_failed == 1, (n, device.calls[n])
    candidates.forget()
    assert device.n_held() == 0


ORDERS = [
    *({"order": kind, "preference": p} for p in PREFERENCES for kind in ("lazy", "eager")),
    *({"order": "random", "seed": seed} for seed in range(4)),
]


@pytest.mark.parametrize("place", ["memory", "reread"])
def test_a_search_in_the_worst_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    """Results that go straight into a model, from sums that stay on the device: the same bits."""
    monkeypatch.setattr("streamsoup.engine.device.LARGEST_DEVICE_BLOCK", 4096)
    monkeypatch.setattr(SimulatedDevice, "name", "cpu")  # where the model is
    paths = make_half_checkpoints(tmp_path, 4)
    grown = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 2], [3, 1]]
    expected = []
    for members in grown:
        soup = streamsoup.uniform([paths[i] for i in members], output=tmp_path / str(members))
        expected.append(load_file(Path(soup.path) / "model.safetensors")["w"])
    for told in ORDERS:
        device = SimulatedDevice(**told)
        for room in (live_mix, kernels_device):
            monkeypatch.setattr(room, "open_device", lambda name, device=device: device)
        candidates, sink = candidates_by_the_pipeline(paths, place=place, device_memory=None)
        for members, right in zip(grown, expected, strict=True):
            candidates.mix(members, sink, keep=True)
            assert device.is_idle()
            assert sink["w"].detach().equal(right), (told, members)
        candidates.forget()


def test_a_model_still_in_use_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a task queued before, on a stream of its own, sees the candidate it was meant for."""
    monkeypatch.setattr(SimulatedDevice, "name", "cpu")  # where the model is
    device = SimulatedDevice("lazy", (1, 2, 3, 0))
    theirs = device.stream()
    for room in (live_mix, kernels_device):
        monkeypatch.setattr(room, "open_device", lambda name: device)
    paths = make_half_checkpoints(tmp_path, 3)
    candidates, sink = candidates_by_the_pipeline(paths, place=None, device_memory=None)
    there, seen = [sink["w"].detach().clone()], []
    for members in ([0], [0, 1], [0, 1, 2]):
        device.launch(theirs, lambda: seen.append(sink["w"].detach().clone()))
        candidates.mix(members, sink, keep=True)
        there.append(sink["w"].detach().clone())
    assert all(a.equal(b) for a, b in zip(seen, there[:3], strict=True))
    assert not there[1].equal(there[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_reads_and_writes_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """A failing read or a full disk in mid-stream: memory is given back, and the next run works."""
    paths = make_half_checkpoints(tmp_path, 2)
    device = FailingDevice()
    attempt(paths, device, tmp_path / "whole", threads, io="read")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for room, name, said, n in (
        (on_disk, "read_into", "cannot be read", 7),
        (write, "write_at", "cannot be written: No space left", 2),
    ):
        whole, calls = getattr(room, name), itertools.count()

        def failing(*arguments: Any, whole: Any = whole, calls: Any = calls, n: int = n) -> None:
            if next(calls) == n:
                raise OSError(28, "No space left on device")
            whole(*arguments)

        output = tmp_path / name
        with monkeypatch.context() as patched:
            patched.setattr(room, name, failing)
            with pytest.raises(streamsoup.StreamsoupError, match=said):
                attempt(paths, device, output, threads, io="read")
        assert device.n_held() == 0
        assert not output.exists()
        attempt(paths, device, output, threads, io="read")
        assert (output / "model.safetensors").read_bytes() == expected


def test_an_interruption_that_is_kept_holds_no_memory(tmp_path: Path) -> None:
    """Somebody may keep the exception of a Ctrl-C, as Jupyter does: not the lanes with it."""
    paths = make_half_checkpoints(tmp_path, 2)
    device = FailingDevice()

    def interrupt(event: Any) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        attempt(paths, device, tmp_path / "soup", 2, on_event=interrupt)
    assert "device" in device.calls
    assert device.n_held() == 0
    del kept
