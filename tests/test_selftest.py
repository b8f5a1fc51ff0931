"""The self-test passes here, can fail, and reports in words and as JSON."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from checkpoints import needs

from streamsoup import selftest
from streamsoup.cli import cli
from streamsoup.kernels.accelerator import torch_blocks
from streamsoup.kernels.accelerator.device import HostDevice
from streamsoup.selftest import checks, rates


def test_selftest_on_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    """All checks pass, with a line each; the JSON has them too, and rates beside them."""
    assert cli(["selftest", "--device", "cpu", "--size", "2MB", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["passed"]
    assert {check["name"] for check in report["checks"]} >= {"bits", "soups", "memory", "trouble"}
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["why"] == "as told"
    assert all(rate > 0 for rate in [*report["limits"].values(), *report["rates"].values()])
    assert {"storage, cached", "host copy", "writing and syncing"} <= set(report["limits"])
    assert "all is right: cpu" in err
    assert err.count("ok   ") == len(report["checks"])


def test_selftest_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: rounding twice, as torch itself does, fails the check of bits."""

    def twice(sums, output, constants, rounded, spare, *, infinite):  # type: ignore[no-untyped-def]
        rounded.copy_(sums.float().double())

    monkeypatch.setattr(torch_blocks, "round_", twice)
    assert checks._bits(HostDevice())[0] is False


def test_selftest_refuses_a_device_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    """A missing accelerator is one line and status 1, not a failed check."""
    assert cli(["selftest", "--device", "xpu"]) == 1
    assert capfd.readouterr().err.startswith("error: --device xpu: torch")


@pytest.mark.parametrize("room", ["checks", "rates"])
def test_a_full_disk_is_no_failed_check(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """No room for the files it makes is one line that says what to do; so is a folder not there."""
    command = ["selftest", "--device", "cpu", "--size", "2MB"]
    assert cli([*command, "--folder", "/nowhere"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: /nowhere: files to test with cannot be made there (No such file")
    made, calls = checks.make_checkpoints, itertools.count()

    def full(folder: str, k: int, n: int) -> list[str]:
        if (next(calls) == 1) == (room == "checks"):
            raise OSError(28, "No space left on device")
        return made(folder, k, n)

    monkeypatch.setattr(rates if room == "rates" else checks, "make_checkpoints", full)
    assert cli(command) == 1
    out, err = capfd.readouterr()
    assert "FAIL" not in out
    assert err.endswith("(No space left on device); choose another --folder or a smaller --size\n")


@needs(torch, 2, 7)
@pytest.mark.parametrize(
    ("built_for", "why"),
    [
        (None, "as torch has no other"),
        ("cuda", "as there is no other (device cuda: torch "),
        ("xpu", "as there is no other (device xpu: torch "),
    ],
)
def test_auto_takes_any_accelerator(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, why: str
) -> None:
    """Whichever torch is built for, if it is here; else the CPU, and the report says why."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available or built_for is None else torch.device(built_for)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    opened, said = selftest._open("auto")
    assert isinstance(opened, HostDevice)
    assert said.startswith(why)
    if built_for is not None:
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available=False: torch.device(built_for),
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        opened, said = selftest._open("auto")
        assert (opened.name, said) == (f"{built_for}:0", "as it is here")


@pytest.mark.cuda
def test_selftest_on_a_device(capfd: pytest.CaptureFixture[str]) -> None:
    """On a device, order under delays and the model in place are checked as well."""
    assert cli(["selftest", "--device", "cuda", "--size", "2MB", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    names = {check["name"] for check in report["checks"]}
    assert names >= {"a model in place", "order with slow sums", "memory"}
