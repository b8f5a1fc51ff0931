"""A narrow seam to whatever holds tensors beside the host: streams, events, pinned memory.

Everything asynchronous in streamsoup passes through these few calls, so that the one pipeline can
run on an accelerator, on the plain CPU, and in tests on a simulation that does the queued work in
the worst orders the rules allow. The rules are those of CUDA: work is done in order within a
stream, in any order between streams; a wait is for what the event last recorded *at the call*; an
event never recorded is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from streamsoup.errors import BudgetError, DeviceError, RecipeError, StreamsoupError, option

if TYPE_CHECKING:
    import torch

__all__ = [
    "Accelerator",
    "Device",
    "HostDevice",
    "accelerator_type",
    "open_device",
    "our_errors",
]

S = TypeVar("S")
E = TypeVar("E")


class Device(Protocol, Generic[S, E]):
    """What the pipeline asks of a device; `S` are its streams, `E` its events."""

    name: str

    def stream(self) -> S:
        """Make a stream of its own, not the default one."""

    def event(self) -> E:
        """Make an event that counts as done until it is recorded."""

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate ``(n,)`` on the host, where the device can copy from and to."""

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate ``(n,)`` on the device."""

    def launch(self, stream: S, work: Callable[[], object]) -> None:
        """Queue `work`, tensor operations, on `stream`."""

    def record(self, event: E, stream: S) -> None:
        """Let `event` be done once all that is now queued on `stream` is."""

    def wait(self, stream: S, event: E) -> None:
        """Hold back what is queued on `stream` from now on until `event` is done."""

    def host_wait(self, event: E) -> None:
        """Hold back the caller until `event` is done."""

    def settle(self) -> None:
        """Hold back the caller until all streams are idle."""

    def free_nbytes(self) -> int:
        """Return the memory of the device that is free."""


class Accelerator:
    """CUDA, or whatever else torch calls its accelerator. Memory comes from torch's caches."""

    def __init__(self, device: torch.device) -> None:
        """Use one device; see `open_device`. Holds no more than its name, so it can be pickled."""
        self.torch_device = device
        self.name = str(device)

    def stream(self) -> torch.Stream:
        """Make a stream."""
        import torch

        return torch.Stream(device=self.torch_device)

    def event(self) -> torch.Event:
        """Make an event."""
        import torch

        return torch.Event(device=self.torch_device)

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate page-locked memory: each call its own allocation."""
        import torch

        return torch.empty(n, dtype=dtype, pin_memory=True)

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate device memory."""
        import torch

        return torch.empty(n, dtype=dtype, device=self.torch_device)

    def launch(self, stream: torch.Stream, work: Callable[[], object]) -> None:
        """Queue `work` on `stream`."""
        with stream:
            work()

    def record(self, event: torch.Event, stream: torch.Stream) -> None:
        """Record `event` on `stream`."""
        event.record(stream)

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Make `stream` wait."""
        stream.wait_event(event)

    def host_wait(self, event: torch.Event) -> None:
        """Make the host wait. Other Python threads go on."""
        event.synchronize()

    def settle(self) -> None:
        """Wait for the device."""
        import torch

        torch.accelerator.synchronize(self.torch_device)

    def free_nbytes(self) -> int:
        """Ask the driver, and add what torch holds in reserve."""
        import torch

        module = torch.get_device_module(self.torch_device)
        try:
            free = module.mem_get_info(self.torch_device)[0]
            reserve = module.memory_reserved(self.torch_device)
            return int(free + reserve - module.memory_allocated(self.torch_device))
        except AttributeError:
            raise DeviceError(
                f"{option('device')} {self.name}: torch cannot say how much of its memory is free; "
                f"give {option('device_memory')}"
            ) from None


class HostDevice:
    """The CPU as a device: everything is done at the call. For tests, and for machines without."""

    name = "cpu"

    def stream(self) -> None:
        """Need no stream."""

    def event(self) -> None:
        """Need no event."""

    def pinned(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate plain memory."""
        return self.device(n, dtype)

    def device(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate plain memory."""
        import torch

        return torch.empty(n, dtype=dtype)

    def launch(self, stream: None, work: Callable[[], object]) -> None:
        """Do `work`."""
        work()

    def record(self, event: None, stream: None) -> None:
        """Note nothing."""

    def wait(self, stream: None, event: None) -> None:
        """Wait for nothing."""

    def host_wait(self, event: None) -> None:
        """Wait for nothing."""

    def settle(self) -> None:
        """Wait for nothing."""

    def free_nbytes(self) -> int:
        """Return the memory that is available."""
        import psutil

        return int(psutil.virtual_memory().available)


def open_device(name: str) -> Accelerator | HostDevice:
    """Find the device called `name`: ``cpu``, ``cuda``, ``cuda:1``, … Imports torch.

    Raises `RecipeError` for a name that is no device, and `DeviceError` for one that is not here:
    torch broken, too old or built without it, or no driver, or too few of them.
    """
    try:
        import torch
    except Exception as error:  # ValueError and OSError, too, for libraries that are missing
        raise DeviceError(
            f"{option('device')} {name}: torch cannot be imported ({str(error)[:200]}); install it "
            "anew"
        ) from None
    if name == "cpu":
        return HostDevice()
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = torch.device("cpu")
    if wanted.type in ("cpu", "meta"):
        raise RecipeError(
            f"{option('device')} {name!r} is not a device; use auto, cpu, cuda or cuda:N"
        )
    if not _knows_accelerators():
        raise DeviceError(
            f"{option('device')} {name}: torch {torch.__version__} is too old; install 2.7 or newer"
        )
    # Without check_available, a build for CUDA says "cuda" on machines that have no driver.
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != wanted.type:
        here = "none" if found is None else f"only {found.type}"
        raise DeviceError(
            f"{option('device')} {name}: torch {torch.__version__} finds {here} on this machine; "
            f"use {option('device', 'cpu')}, or install a driver and a build of torch for it"
        )
    count = torch.accelerator.device_count()
    index = wanted.index if ":" in name else torch.accelerator.current_device_index()
    if index >= count:
        raise DeviceError(f"{option('device')} {name}: there are {count}, numbered from 0")
    if wanted.type == "mps":
        raise DeviceError(
            f"{option('device')} {name}: it has no float64, in which sums are; use "
            f"{option('device', 'cpu')}"
        )
    return Accelerator(torch.device(wanted.type, index))


def accelerator_type() -> str:
    """Name the kind of accelerator that torch is built for, here or not; ``cpu`` for none."""
    import torch

    found = torch.accelerator.current_accelerator() if _knows_accelerators() else None
    return "cpu" if found is None else found.type


def _knows_accelerators() -> bool:
    """Return whether torch can: in 2.6, it could not be asked whether a device is available."""
    import torch

    return [int(part) for part in torch.__version__.split(".")[:2]] >= [2, 7]


@contextmanager
def our_errors(asked: str) -> Iterator[None]:
    """Turn torch's errors into ours: out of memory, for the bytes `asked` for; or failed."""
    try:
        yield
    except StreamsoupError:
        raise
    except RuntimeError as error:
        error.__traceback__ = None  # its frames hold on to the memory
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if "out of memory" in first.lower():
            raise BudgetError(
                f"not enough memory for {asked}; lower {option('device_memory')} or "
                f"{option('threads')}, or free some "
                f"of what others hold there ({first})"
            ) from None
        raise DeviceError(f"the device failed, with {asked}: {first}") from None
