"""A machine that fails at the n-th file-system call of the real command line.

A server process imports streamsoup once, and forks for every command (so that hundreds of runs
take seconds). In the fork, each function of `os` through which streamsoup touches files is wrapped:
calls that concern the folder `stage` are counted, and at call number `at` the machine fails:

* ``kill``: SIGKILL, in the middle of the write if it is one;
* ``power``: the same, and what was never synced is lost (see `Disk`);
* ``lost``: the next fsync fails, once, and the kernel drops what it could not write, as it may;
* ``short``: this write, and every one after it, writes a third of what it is given;
* ``INT``, ``TERM``, ``HUP``: the signal, to the supervisor and to the worker, as a terminal does;
* ``ENOSPC``, ``EIO``, …: the call fails so; with a ``+`` at the end, as do all writes after it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("open", "pwrite", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
LOOKS = ("stat", "lstat", "listdir", "scandir", "pread", "close")

AT_EXIT = -1
"""For `at`: when all is done, just before the process is gone."""

# -- the test's side ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    n_calls: int
    """Calls counted; at least `at` if the machine failed."""
    seconds: float


class Machine:
    """Runs commands, and fails where it is told."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def run(
        self, *argv: str | Path, stage: Path, at: int = 0, action: str = "kill", plant: str = ""
    ) -> Result:
        """Run ``streamsoup ARGV``; fail at call `at` (0: never), with the fault `plant`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"argv": list(map(str, argv)), "stage": str(stage), "at": at, "action": action}
        print(json.dumps(request | {"plant": plant}), file=self._server.stdin, flush=True)
        return Result(**json.loads(self._server.stdout.readline()))


# -- the server's side ----------------------------------------------------------------------------


class Disk:
    """What of a folder would be there after a power cut: what was synced, and nothing else.

    A file has the bytes of its last fsync (zeros where there was none), a folder the names.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.number = itertools.count()
        self.keys: dict[int, int] = {}  # inodes are used again; keys are not
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        for at, folders, names in os.walk(stage):
            for name in (*folders, *names):
                self.sync(os.path.join(at, name))
        self.sync(stage)

    def key(self, inode: int) -> int:
        return self.keys.setdefault(inode, next(self.number))

    def made(self, path: str) -> None:
        status = os.stat(path)
        key = self.keys[status.st_ino] = next(self.number)
        if stat.S_ISDIR(status.st_mode):
            self.folders[key] = {}
        else:
            self.files[key] = b"\0" * 100

    def sync(self, path: str) -> None:
        status = os.stat(path)
        key = self.key(status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            entries = list(os.scandir(path))
            self.folders[key] = {entry.name: self.key(entry.inode()) for entry in entries}
        else:
            self.files[key] = Path(path).read_bytes()

    def forget(self, descriptor: int) -> None:
        """Return a file the bytes of its last sync, and zeros where it has grown since."""
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            synced = self.files[self.key(status.st_ino)][: status.st_size]
            with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
                file.write(synced.ljust(status.st_size, b"\0"))

    def leave(self, target: str) -> None:
        """Put what is left into the folder `target`."""
        self._leave(self.key(os.stat(self.stage).st_ino), target)

    def _leave(self, key: int, target: str) -> None:
        os.mkdir(target)
        for name, child in self.folders[key].items():
            path = os.path.join(target, name)
            if child in self.files:
                Path(path).write_bytes(self.files[child])
            else:
                self._leave(child, path)


class Fault:
    """Wraps the calls, counts those below the stage, and fails at one of them."""

    def __init__(self, stage: str, at: int, action: str, counter: mmap.mmap) -> None:
        self.stage, self.at, self.action, self.counter = stage, at, action, counter
        self.disk = Disk(stage) if action in ("power", "lost") else None
        self.lost = False
        self.busy = threading.local()
        self.lock = threading.Lock()
        for name in (*NAMES, *LOOKS, "_exit"):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        import streamsoup.output.write
        from streamsoup.system import libc

        for name in ("renameat2", "fallocate", "sync_file_range"):
            libc._LIBC = Library(libc._LIBC, name, self)  # type: ignore[assignment]
        streamsoup.output.write.EARLY_NBYTES = 1  # our leaves are small

    def wrap(self, name: str, real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            if getattr(self.busy, "yes", False):
                return real(*args, **named)
            self.busy.yes = True
            try:
                return self.call(name, real, args, named)
            finally:
                self.busy.yes = False

        return call

    def call(self, name: str, real: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        path = self.path(name, args, named)
        if path is None:
            return real(*args, **named)
        with self.lock:
            n = int.from_bytes(self.counter[:8], "little") + 1
            self.counter[:8] = n.to_bytes(8, "little")
        if (0 < self.at <= n) or (self.at == AT_EXIT and name == "_exit"):
            args = self.fail(name, real, args, n)
        if name == "fsync":  # the disk is spared
            result = None
        else:
            new = self.disk and name in ("open", "mkdir") and not os.path.lexists(path)
            result = real(*args, **named)
            if self.disk and new and os.path.lexists(path):
                self.disk.made(path)
        if self.disk and name == "fsync":
            self.disk.sync(path)
        return result

    def path(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> str | None:
        """Find the path a call is about, if it is below the stage."""
        if name in ("_exit", "renameat2", "fallocate"):
            return self.stage
        about = args[0] if args else "."
        try:
            if isinstance(about, int):
                path = os.readlink(f"/proc/self/fd/{about}")
            elif (above := named.get("dir_fd", named.get("src_dir_fd"))) is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{above}"), about)
            else:
                path = os.path.abspath(os.fsdecode(about))
        except OSError:
            return None
        return path if path == self.stage or path.startswith(self.stage + "/") else None

    def fail(self, name: str, real: Any, args: tuple[Any, ...], n: int) -> tuple[Any, ...]:
        if self.action == "short":
            if name in ("write", "pwrite"):
                return (args[0], bytes(args[1])[: max(1, len(args[1]) // 3)], *args[2:])
        elif self.action == "lost":
            if name == "fsync" and self.disk and not self.lost:
                self.lost = True
                self.disk.forget(args[0])
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif self.action in ("kill", "power"):
            if self.disk:
                self.disk.leave(self.stage + ".after")
            elif name in ("write", "pwrite"):
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action in ("INT", "TERM", "HUP"):
            if n == self.at:
                os.killpg(os.getpgid(0), getattr(signal, "SIG" + self.action))
                time.sleep(0.01)
        elif name not in (*LOOKS, "_exit") and (n == self.at or self.action.endswith("+")):
            code = getattr(errno, self.action.rstrip("+"))
            writes = name not in ("open", "unlink", "rmdir") or code == errno.EROFS
            if n == self.at or writes:
                raise OSError(code, os.strerror(code))
        return args


class Library:
    """A C library with one function wrapped."""

    def __init__(self, real: Any, name: str, fault: Fault) -> None:
        import ctypes

        function = getattr(real, name)

        def call(*args: Any) -> int:
            try:
                return int(fault.wrap(name, function)(*args))
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1

        self._real = real
        setattr(self, name, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def plant_fault(name: str) -> None:
    """Break streamsoup in one way that the tests must notice."""
    import streamsoup.output.staging as staging
    import streamsoup.output.write as write
    from streamsoup.system import folders

    if name == "writes in place":
        begin = staging.Staging._begin

        def faulty_begin(self: staging.Staging, fingerprint: str) -> None:
            begin(self, fingerprint)
            os.makedirs(self.target, exist_ok=True)
            if self._soup is not None:
                self._soup.close()
                self._soup = folders.Folder.open(self.target)

        staging.Staging._begin = faulty_begin  # type: ignore[method-assign]
        staging.Staging._put_in_place = lambda self: None  # type: ignore[method-assign]
    elif name == "no sync of shards":
        write.sync_file = lambda folder, name: None
    elif name == "sync errors pass":
        sync_file = write.sync_file

        def faulty_sync_file(folder: folders.Folder, name: str) -> None:
            with contextlib.suppress(OSError):
                sync_file(folder, name)

        write.sync_file = faulty_sync_file
    elif name == "no sync of folders":
        folders.Folder.sync = lambda self: None  # type: ignore[method-assign]
    elif name == "no checkpoints":  # no fault: a run that is done before the first one
        import streamsoup.engine.stream

        streamsoup.engine.stream.CHECKPOINT_S = 1e9
    elif name == "no checkpoints, no sync of shards":
        plant_fault("no checkpoints")
        write.FileSink.sync = lambda self, numbers=None: None  # type: ignore[method-assign]
    elif name == "believes its notes":
        write.FileLedger.restore = (  # type: ignore[method-assign]
            lambda self, leaf: self.digests.get(leaf.number) if self.noted(leaf) else None
        )
    elif name == "notes no scores":
        import streamsoup.search.scoring.journal as scorebook

        def faulty_put(self: Any, members: Any, outcome: Any, to_beat: Any) -> None:
            self.scores[members] = outcome
            self.paid.append(outcome)

        scorebook.ScoreJournal.put = faulty_put  # type: ignore[method-assign]
    elif name == "no exchange":
        rename = staging.rename

        def faulty_rename(source: str, target: str, flag: int, **named: int) -> bool:
            return flag != 2 and rename(source, target, flag, **named)

        staging.rename = faulty_rename
    elif name:
        raise ValueError(name)


def serve() -> None:
    """Answer requests, a line each."""
    import email.parser  # noqa: F401
    import importlib.metadata

    import streamsoup.cli.terminal
    import streamsoup.engine.plan
    import streamsoup.engine.reduce
    import streamsoup.engine.stream
    import streamsoup.methods.fixed
    import streamsoup.output.write
    from streamsoup.cli import cli

    streamsoup.engine.plan.LEAF = 512
    streamsoup.engine.stream.CHECKPOINT_S = 0.0
    streamsoup.engine.stream.ALONE_NBYTES = -1  # so that there are checkpoints
    streamsoup.engine.stream.TICK_S = 0.001
    make_leaf = streamsoup.engine.stream._Pass.make_leaf

    def slow_leaf(*args: Any) -> None:
        time.sleep(0.002)  # so that there is something to note when the first leaf is finished
        make_leaf(*args)

    streamsoup.engine.stream._Pass.make_leaf = slow_leaf  # type: ignore[method-assign]
    leave = os._exit
    importlib.metadata.version("streamsoup")
    gc.freeze()
    gc.disable()
    counter = mmap.mmap(-1, mmap.PAGESIZE)
    for line in sys.stdin:
        request = json.loads(line)
        counter[:8] = bytes(8)
        said = [os.memfd_create("stdout"), os.memfd_create("stderr")]
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(said[0], 1)
            os.dup2(said[1], 2)
            status = 99
            try:
                plant_fault(request["plant"])
                Fault(request["stage"], request["at"], request["action"], counter)
                status = cli(request["argv"])
                sys.stdout.flush()
            finally:
                leave(status)
        _, status = os.waitpid(child, 0)
        texts = [Path(f"/proc/self/fd/{descriptor}").read_text() for descriptor in said]
        for descriptor in said:
            os.close(descriptor)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "stdout": texts[0],
            "stderr": texts[1],
            "n_calls": int.from_bytes(counter[:8], "little"),
            "seconds": time.monotonic() - started,
        }
        print(json.dumps(answer), flush=True)


def restore(stage: Path, before: Path) -> None:
    """Make `stage` a copy of `before` again."""
    for leftover in (stage, Path(f"{stage}.after")):
        if leftover.exists():
            shutil.rmtree(leftover)
    shutil.copytree(before, stage, symlinks=True)


if __name__ == "__main__":
    serve()
