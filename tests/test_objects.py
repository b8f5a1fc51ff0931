"""Compiled kernels: what names them, where they are kept, and how they get into memory."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import pwd
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save, tensor

from streamsoup import versions
from streamsoup.kernels import cpu, linking, objects, processor
from streamsoup.tensors import DTYPES

x86_alone = pytest.mark.skipif(platform.machine() != "x86_64", reason="others are left to LLVM")


def smallest() -> tuple[str, bytes]:
    """Compile the smallest of our kernels."""
    from streamsoup.kernels.loops import compile_mix

    return compile_mix(DTYPES["F64"], DTYPES["F64"])


@x86_alone
def test_a_kernel_placed_by_us_is_the_one_of_llvm() -> None:
    """The same object file, put into memory in both ways, computes the same."""
    from streamsoup.kernels.loops import compile_mix

    name, code = compile_mix(DTYPES["BF16"], DTYPES["BF16"])
    placed = linking.place(code, name)
    assert placed is not None
    ours = cpu.Mixer(objects.Kernel(*placed))
    theirs = cpu.Mixer(objects._load_by_llvm(name, code))
    rng = np.random.default_rng(0)
    for k, factors in ((3, [1.0] * 3), (11, [0.1] * 11)):
        inputs = [rng.integers(0, 0x7F00, 3001, np.uint16) for _ in range(k)]
        found = np.zeros((2, 3001), np.uint16)
        for mixer, output in zip((ours, theirs), found, strict=True):
            addresses = [column.ctypes.data for column in inputs]
            mixer(0, addresses, factors, True, 3.0, output.ctypes.data, 3001)
        assert found[0].any()
        assert (found[0] == found[1]).all()


@x86_alone
def test_what_is_not_foreseen_is_left_to_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors, other relocations, unknown names, memory that may not be executable."""
    name, code = smallest()
    assert linking.place(code, name) is not None
    assert linking.place(code, "another") is None
    assert linking.place(code[:500], name) is None
    assert linking.place(code[: len(code) // 2], name) is None
    assert linking.place(b"", name) is None
    arm = bytearray(code)
    struct.pack_into("<H", arm, 18, 183)
    assert linking.place(bytes(arm), name) is None
    for constant, value in (("_ABSOLUTE", 2), ("_WRITE", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(linking, constant, value)
            assert linking.place(code, name) is None
    with monkeypatch.context() as patch:
        patch.setattr(linking, "NEVER_CALLED", ())
        assert linking.place(code, name) is None
    with monkeypatch.context() as patch:
        patch.setattr(linking._LIBC, "mprotect", lambda *_: -1)
        assert linking.place(code, name) is None


def test_where_nothing_is_placed_llvm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of all other processors: a kernel is made, kept, found and called."""
    monkeypatch.setattr(objects, "place", lambda code, name: None)
    f32 = DTYPES["F32"]
    cpu.mixer(f32, f32)
    found = cpu.find_mixer(f32, f32)
    assert found is not None
    values, output = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    found(0, [values.ctypes.data] * 2, [1.0, 2.0], True, 1.0, output.ctypes.data, 8)
    assert (output == 3 * values).all()


def test_a_processor_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without /proc, or where it is empty, LLVM is asked what there is; and knows the same."""
    told = processor.description(), processor.features()
    assert "cpu MHz" not in told[0]
    for path in (tmp_path / "none", tmp_path / "empty"):
        monkeypatch.setattr(processor, "_CPUINFO", str(path))
        processor._facts.cache_clear()
        assert processor.description() not in ("", told[0])
        if processor.is_x86():
            assert {"avx2", "f16c"} & processor.features() == {"avx2", "f16c"} & told[1]
        (tmp_path / "empty").touch()
    processor._facts.cache_clear()


def test_versions_are_those_of_the_packages() -> None:
    """However they are found out, they are the ones that were installed."""
    told = versions.versions() | {"llvmlite": versions.llvmlite_version()}
    for package in ("numpy", "numba", "llvmlite", "xxhash"):
        assert told[package] == importlib.metadata.version(package)


def test_a_compiled_kernel_loads_without_any_library(tmp_path: Path) -> None:
    """A soup by a kernel from the cache waits for neither numba nor LLVM, nor for numpy."""
    f32 = DTYPES["F32"]
    cpu.mixer(f32, f32)
    script = (
        "import sys, streamsoup\n"
        "streamsoup.uniform(['a', 'b'], output='out')\n"
        "print(*sys.modules)\n"
    )
    for name in "ab":
        save(tmp_path / name, {"t": tensor(np.zeros(100, np.float32))})
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    libraries = {"torch", "numba"}
    if processor.is_x86():
        libraries |= {"numpy", "llvmlite"}
    assert not libraries.intersection(ran.stdout.split())


def test_a_full_disk_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that cannot be kept is no kernel, and no file either."""

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        objects._store(str(tmp_path), "mix.o", b"code")
    assert os.listdir(tmp_path) == []
    objects._store(str(tmp_path), "mix.o", b"code")
    assert os.listdir(tmp_path) == ["mix.o"]


def test_what_numba_is_told_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled under other settings, in any of numba's variables, are other kernels."""
    names = {objects._cache_name("mix", ["loops.py"])}
    for variable, value in (("NUMBA_OPT", "0"), ("NUMBA_LOOP_VECTORIZE", "\udcff")):
        monkeypatch.setenv(variable, value)
        names.add(objects._cache_name("mix", ["loops.py"]))
    monkeypatch.setenv("NUMBER", "7")
    names.add(objects._cache_name("mix", ["loops.py"]))
    assert len(names) == 3


def test_without_a_home_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, or a cache that is not an absolute path: compiled kernels are kept nowhere."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert objects._cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert objects._cache_folder() == str(tmp_path / "cache" / "streamsoup")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert objects._cache_folder() is None
    assert os.listdir(tmp_path) == ["cache"]


def test_kernels_are_found_in_any_locale() -> None:
    """Their name is made of our sources, which no locale needs to be able to say."""
    script = (
        "from streamsoup.kernels.objects import _cache_name\n"
        "print(_cache_name('x', ['means.py', 'sums.py']))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            check=True,
            env=os.environ | locale,
        ).stdout
        for locale in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    ]
    assert found[0] == found[1] != b""
