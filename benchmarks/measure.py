"""One command run in a child process, and what it cost: time, memory, bytes moved.

Anonymous memory is sampled over the whole tree of processes (there is no counter of its peak);
time and processor time are the kernel's, and so are bytes that really went to and from the disk.
After each run the harness syncs what was written, and says how long that took: peers do not sync,
and what they leave to be written must not slow down the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

__all__ = [
    "Measurement",
    "drop_cache",
    "limit",
    "measure",
    "settle",
    "sync",
    "warm_cache",
    "weights_of",
]

_LIMITS = Path(__file__).parent / "limits.py"

SAMPLE_S = 0.01
"""Time between looks at memory: about half a percent of one core."""

_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
"""Packages have been compiled to bytecode when they were installed. One that is worked on would be
compiled anew for every run where the environment forbids to keep it: 30 to 45 ms for streamsoup."""

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run cost."""

    status: int
    wall_s: float
    cpu_s: float
    peak_anonymous_nbytes: int
    peak_cgroup_nbytes: int | None
    """With the page cache that it filled; None where no memory cgroup (v2) can be made."""
    read_nbytes: int
    """From the disk; nothing when the page cache has it."""
    written_nbytes: int
    others_cpus: float
    """Processors that others kept busy meanwhile, of the whole machine."""
    sync_s: float
    """What was left to wait for until its output was on disk."""
    stdout: str
    stderr: str

    def row(self) -> dict[str, object]:
        """Return the numbers for a row."""
        row = asdict(self)
        del row["stdout"], row["stderr"], row["status"]
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


def measure(
    command: Sequence[str],
    *,
    output: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 1800,
) -> Measurement:
    """Run a command to its end, and measure it. `output` is removed before, and synced after."""
    if output is not None:
        remove(output)
        output.parent.mkdir(parents=True, exist_ok=True)
    with _cgroup() as group:
        started, busy_s = time.perf_counter(), _busy_s()
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **_COMPILED, **(env or {})},
            preexec_fn=group.join if group else None,
        )
        watch = _Watch(child.pid)
        watch.start()
        texts: list[bytes] = [b"", b""]
        readers = [
            threading.Thread(target=_drain, args=(pipe, texts, i))
            for i, pipe in enumerate((child.stdout, child.stderr))
        ]
        for reader in readers:
            reader.start()
        killer = threading.Timer(timeout_s, child.kill)
        killer.start()
        try:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            child.kill()
            raise
        wall_s = time.perf_counter() - started
        busy_s = _busy_s() - busy_s
        killer.cancel()
        moved = _moved(child.pid)
        watch.stop.set()
        watch.join()
        for reader in readers:
            reader.join()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak_cgroup = group.peak() if group else None
    return Measurement(
        status=child.returncode,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_anonymous_nbytes=watch.peak,
        peak_cgroup_nbytes=peak_cgroup,
        read_nbytes=moved[0],
        written_nbytes=moved[1],
        others_cpus=max(0.0, (busy_s - usage.ru_utime - usage.ru_stime) / wall_s),
        sync_s=sync(output) if output is not None else 0.0,
        stdout=texts[0].decode(errors="replace"),
        stderr=texts[1].decode(errors="replace"),
    )


def limit(*arguments: object) -> float:
    """Ask `limits.py` for something the machine can do, and give the seconds that it took."""
    result = measure([sys.executable, str(_LIMITS), *map(str, arguments)])
    assert result.status == 0, result.stderr
    return float(json.loads(result.stdout))


def settle(most_s: float = 60.0) -> None:
    """Wait until no other process keeps the machine busy, up to a limit."""
    give_up = time.monotonic() + most_s
    while time.monotonic() < give_up:
        before = _busy_s()
        time.sleep(0.25)
        if _busy_s() - before < 0.05:
            return


def _busy_s() -> float:
    """Seconds that all processors together have worked since the machine started."""
    with open("/proc/stat", "rb") as file:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS


def drop_cache(folders: Sequence[Path]) -> None:
    """Put the files out of the page cache, as after a reboot. They must be on disk already."""
    for path in files_of(folders):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm_cache(folders: Sequence[Path]) -> None:
    """Read the files once, so that the page cache has them.

    The cache holds a file in pieces of the size in which it was written or read. Mapping the same
    file takes twice as long in small pieces as in large ones (measured: 14 and 28 GB/s), so files
    that are to be compared are dropped first, and then all read in this one way.
    """
    buffer = bytearray(1 << 22)
    for path in files_of(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def files_of(folders: Sequence[Path]) -> list[Path]:
    """List the files of checkpoints."""
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def weights_of(folders: Sequence[Path]) -> list[Path]:
    """List the shards of checkpoints."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def sync(output: Path) -> float:
    """Wait until a file, or all files of a folder, are on disk, and say how long it took."""
    started = time.perf_counter()
    for path in files_of([output]) if output.is_dir() else [output] if output.exists() else []:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def remove(path: Path) -> None:
    """Remove a file or a folder, and what a killed run left beside it."""
    for each in (path, path.with_name(path.name + ".partial")):
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


class _Watch(threading.Thread):
    """Looks at the anonymous memory of a process and all below it, again and again."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.stop = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.peak = max(self.peak, sum(_anonymous(pid) for pid in _tree(self.pid)))
            self.stop.wait(SAMPLE_S)


def _tree(pid: int) -> list[int]:
    pids = [pid]
    for each in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{each}/task"):
                children = Path(f"/proc/{each}/task/{task}/children").read_text()
                pids += [int(child) for child in children.split()]
    return pids


def _anonymous(pid: int) -> int:
    # Of statm, resident less shared: pages of no file. Much cheaper than status.
    try:
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * _PAGE


def _moved(pid: int) -> tuple[int, int]:
    """Bytes read from and written to the disk by a process that ended, and those it waited for."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return -1, -1
    numbers = {key: int(value) for key, _, value in (line.partition(":") for line in lines)}
    return numbers["read_bytes"], numbers["write_bytes"]


def _drain(pipe: IO[bytes], texts: list[bytes], i: int) -> None:
    with pipe:
        texts[i] = pipe.read()


class _Cgroup:
    """A memory cgroup of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def join(self) -> None:
        """Move this process into it; called in the child."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Return the most it ever held, page cache included."""
        return int((self.folder / "memory.peak").read_text())


@contextlib.contextmanager
def _cgroup() -> Iterator[_Cgroup | None]:
    """Make a cgroup below our own, where version 2 is in use and we may."""
    own = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().split() if line[:3] == "0::"),
        None,
    )
    folder = Path(f"/sys/fs/cgroup{own}/streamsoup-bench-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        yield _Cgroup(folder) if (folder / "memory.peak").exists() else None
    finally:
        folder.rmdir()
