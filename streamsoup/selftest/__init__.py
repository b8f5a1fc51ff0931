"""One command for an unknown machine: are the bits right, and how fast is it?

`checks` can fail: bits, order, memory, trouble, places. `rates` cannot: a slow machine is a slow
machine, and low efficiency is a warning. The report is plain data, to be pasted or committed.
"""

from __future__ import annotations

import errno
import os
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

from streamsoup.errors import OutputError, StreamsoupError, option, printable
from streamsoup.kernels.accelerator.device import (
    Accelerator,
    HostDevice,
    accelerator_type,
    open_device,
)
from streamsoup.options import n_cpus
from streamsoup.selftest.findings import Check, Report
from streamsoup.system.schemes import check_local
from streamsoup.system.versions import versions

__all__ = ["Check", "Report", "selftest"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a disk says that has no room left: no fault of what is tested."""


def selftest(
    device: str = "auto",
    *,
    nbytes: int = 256_000_000,
    folder: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Test the arithmetic, the pipeline and the memory bound on `device`, then measure rates.

    ``auto`` takes an accelerator if there is one, else the CPU. `nbytes` is the size of the
    checkpoints that rates are measured with, all together; they are made in `folder`, or among the
    temporary files, and removed. `say` is given a line as each check ends. Raises `DeviceError` if
    the device is not there, `OutputError` if there is no room for files. Takes a minute or so.
    """
    if folder is not None:
        check_local(folder, OutputError)
    opened, why = _open(device)
    say(f"on {opened.name}, {why}")
    report = Report({"device": opened.name, "why": why, **_environment(opened)})
    try:
        with tempfile.TemporaryDirectory(prefix="streamsoup-selftest-", dir=folder) as room:
            _fill(report, opened, room, nbytes, say)
    except OSError as error:
        foreseen = isinstance(error, StreamsoupError) and error.errno not in _FULL
        if foreseen or isinstance(error, BrokenPipeError):  # or stdout was closed
            raise
        raise OutputError(
            f"{printable(folder or tempfile.gettempdir())}: files to test with cannot be made "
            f"there ({os.strerror(error.errno or 0)}); choose another {option('folder')} or a "
            f"smaller {option('nbytes', cli='size')}"
        ) from None
    return report


def _fill(
    report: Report,
    device: Accelerator | HostDevice,
    room: str,
    nbytes: int,
    say: Callable[[str], None],
) -> None:
    """Make all checks, then measure."""
    from streamsoup.selftest import checks, rates

    for name, check in checks.all_checks(device, room):
        started = time.monotonic()
        try:
            passed, detail = check()
        except Exception as error:  # a check that cannot be made has failed
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            passed, detail = False, f"{type(error).__name__}: {str(error)[:300]}"
        report.checks.append(Check(name, passed, detail, time.monotonic() - started))
        say(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}")
    rates.measure(device, room, nbytes, report)


def _open(name: str) -> tuple[Accelerator | HostDevice, str]:
    """Open a device; ``auto`` is an accelerator if there is one that will do. Say why it is that.

    Raises `DeviceError` and `RecipeError` for a name that was told.
    """
    if name != "auto":
        return open_device(name), "as told"
    kind = accelerator_type()
    try:
        return open_device(kind), "as torch has no other" if kind == "cpu" else "as it is here"
    except StreamsoupError as error:
        return HostDevice(), f"as there is no other ({error})"


def _environment(device: Accelerator | HostDevice) -> dict[str, Any]:
    import psutil
    import torch

    found: dict[str, Any] = {
        **versions(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
        "cpus": n_cpus(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
    }
    if isinstance(device, Accelerator):
        module = torch.get_device_module(device.torch_device)
        found |= {
            "device_name": module.get_device_name(device.torch_device),
            "device_memory": module.mem_get_info(device.torch_device)[1],
            "cuda": torch.version.cuda or "",
            "hip": torch.version.hip or "",
        }
    return found
