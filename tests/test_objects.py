"""Compiled kernels: what names them, where they are kept, and how they get into memory."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import pwd
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import load, save, tensor

import streamsoup
from streamsoup.engine import reduce
from streamsoup.kernels import cpu
from streamsoup.kernels.fast import linking, objects, processor
from streamsoup.system import buffers, versions
from streamsoup.system.folders import Folder
from streamsoup.tensors import DTYPES

x86_alone = pytest.mark.skipif(not processor.is_x86(), reason="others are left to LLVM")


@pytest.fixture(scope="module")
def smallest() -> tuple[str, bytes]:
    """Compile the smallest of our kernels: its symbol, and its object file."""
    from streamsoup.kernels.fast.mix import compile_mix

    return compile_mix(DTYPES["F64"], DTYPES["F64"])


@x86_alone
def test_a_kernel_linked_by_us_is_the_one_of_llvm() -> None:
    """The same object file, put into memory in both ways, computes the same."""
    from streamsoup.kernels.fast.mix import compile_mix

    name, code = compile_mix(DTYPES["BF16"], DTYPES["BF16"])
    linked = linking.link(code, name)
    assert linked is not None
    ours, theirs = cpu.Mixer(linked), cpu.Mixer(objects._load_by_llvm(name, code))
    rng = np.random.default_rng(0)
    for k, factors in ((3, [1.0] * 3), (11, [0.1] * 11)):
        inputs = [rng.integers(0, 0x7F00, 3001, np.uint16) for _ in range(k)]
        found = np.zeros((2, 3001), np.uint16)
        for mixer, output in zip((ours, theirs), found, strict=True):
            addresses = [column.ctypes.data for column in inputs]
            mixer(0, addresses, factors, True, 3.0, output.ctypes.data, 3001)
        assert found[0].any()
        assert (found[0] == found[1]).all()


def changed(code: bytes, kind: int, field: int, value: int) -> bytes:
    """Set a field of the header of the first section of a kind."""
    table, n = struct.unpack_from("<Q", code, 0x28)[0], struct.unpack_from("<H", code, 0x3C)[0]
    headers = [linking._SECTION.unpack_from(code, table + i * 64) for i in range(n)]
    i = next(i for i, header in enumerate(headers) if header[1] == kind and header[5])
    header = list(headers[i])
    header[field] = value
    made = bytearray(code)
    linking._SECTION.pack_into(made, table + i * 64, *header)
    return bytes(made)


@x86_alone
def test_what_is_not_foreseen_is_left_to_llvm(
    smallest: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processors, sections and relocations, unknown names, memory that may not be code."""
    name, code = smallest
    assert linking.link(code, name) is not None
    assert linking.link(code, "another") is None
    for n in (0, 40, 500, len(code) // 2):
        assert linking.link(code[:n], name) is None
    arm = bytearray(code)
    struct.pack_into("<H", arm, 18, 183)
    assert linking.link(bytes(arm), name) is None
    for kind, field, value in (
        (linking._PROGBITS, 2, 3),  # writable
        (linking._PROGBITS, 2, 0),  # referred to, and not in memory
        (linking._PROGBITS, 8, 1 << 16),  # at multiples of more than a page
        (linking._UNWIND, 1, 9),  # relocations without addends
    ):
        assert linking.link(changed(code, kind, field, value), name) is None, (kind, field, value)
    with monkeypatch.context() as patch:
        patch.setattr(linking, "_ABSOLUTE", 2)
        assert linking.link(code, name) is None


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_where_memory_may_not_be_code_numpy_does(
    ours: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that denies it (systemd's MemoryDenyWriteExecute) has soups all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    f64 = DTYPES["F64"]
    if kept:
        cpu.mixer(f64, f64)
    model = save(tmp_path / "m", {"t": tensor(np.ones(1000))})
    script = (
        "import ctypes, logging, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):\n"
        "    sys.exit(77)\n"
        "import streamsoup\n"
        "from streamsoup.engine import reduce\n"
        "from streamsoup.kernels.fast import objects\n"
        "logging.basicConfig()\n"
        "reduce.COMPILE_NBYTES = 1\n"
        f"if not {ours}:\n"
        "    objects.link = lambda code, name: None\n"
        "streamsoup.uniform(sys.argv[2:], output=sys.argv[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(model), str(model)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode == 77:
        pytest.skip("the system is older than this prohibition")
    assert ran.returncode == 0, ran.stderr
    assert "numpy makes the same sums" in ran.stderr
    assert load(tmp_path / "out") == load(model)


@pytest.mark.parametrize(("dtype", "early"), [("same", False), ("F64", True)])
def test_numpy_is_there_before_threads_need_it(dtype: str, early: bool, tmp_path: Path) -> None:
    """Where memory is short, importing it in a thread at work may end the process."""
    f32 = DTYPES["F32"]
    cpu.mixer(f32, f32)
    model = save(tmp_path / "m", {"t": tensor(np.ones(1000, np.float32))})
    script = (
        "import sys\n"
        "from streamsoup import Coefficients, Options\n"
        "from streamsoup.engine import reduce\n"
        "from streamsoup.engine.rules.linear import Linear\n"
        "from streamsoup.output.make import order\n"
        "reduce.find_mixer = lambda one, other, found=reduce.find_mixer: (\n"
        "    found(one, other) if one is other else None)\n"
        "options = Options(dtype=sys.argv[2])\n"
        "equal = Coefficients.uniform(2)\n"
        "planned = order([sys.argv[1]] * 2, Linear(equal), method='uniform', options=options)\n"
        "reduce.Mix(planned.plan, planned.memory, reduce.Engine(planned.plan))\n"
        "print('streamsoup.kernels.blocks' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(model), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{early}\n"


def test_a_name_that_nobody_has_is_not_called(
    smallest: tuple[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A later numba may call functions that are not there: plain loops stand in, with a warning."""
    name, code = smallest
    unknown = code.replace(b"\0PyErr_Clear\0", b"\0PyErr_Clean\0")
    assert "PyErr_Clean" in linking.needed(unknown)
    assert linking.link(unknown, name) is None
    with pytest.raises(ImportError, match="numba calls PyErr_Clean, which is nowhere"):
        objects._load_by_llvm(name, unknown)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("streamsoup.kernels.fast.mix.compile_mix", lambda *_: (name, unknown))
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 1)
    model = save(tmp_path / "m", {"t": tensor(np.ones(1000))})
    streamsoup.uniform([model, model], output=tmp_path / "out")
    assert "numba calls PyErr_Clean, which is nowhere; plain ones make the same" in caplog.text
    assert not list(tmp_path.glob("cache/streamsoup/*"))


def test_where_nothing_is_linked_llvm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of all other processors: a kernel is made, kept, found and called."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(objects, "link", lambda code, name: None)
    f32 = DTYPES["F32"]
    assert cpu.find_mixer(f32, f32) is None
    cpu.mixer(f32, f32)
    found = cpu.find_mixer(f32, f32)
    assert found is not None
    values, output = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    found(0, [values.ctypes.data] * 2, [1.0, 2.0], True, 1.0, output.ctypes.data, 8)
    assert (output == 3 * values).all()


def test_a_processor_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LLVM is asked where /proc is missing, empty, or that of another kind of processor."""
    told, has = processor.description(), processor.has_f16c()
    assert "cpu MHz" not in told
    (tmp_path / "empty").touch()
    other = "Features\t: fp asimd\n" if processor.is_x86() else "flags\t\t: fpu f16c\n"
    (tmp_path / "other").write_text(f"model name\t: none\n{other}")
    by_llvm = set()
    for name in ("none", "empty", "other"):
        monkeypatch.setattr(processor, "_CPUINFO", str(tmp_path / name))
        by_llvm.add(processor.description())
        assert processor.has_f16c() == has
    assert len(by_llvm) == 1
    assert not by_llvm & {"", told}


def test_versions_are_those_of_the_packages() -> None:
    """However they are found out, they are the ones that were installed."""
    told = versions.versions() | {"llvmlite": versions.llvmlite_version()}
    for package in ("numpy", "numba", "llvmlite", "xxhash"):
        assert told[package] == importlib.metadata.version(package)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('version = "2.4.6"\n__version__ = version\n', "2.4.6"),
        ('\n{\n "error": null,\n "version": "0.68.1"\n}\n', "0.68.1"),
        ("version_version = '0.44.0'\nversion_full = 'ab12'\n", "0.44.0"),
        ('vinfo: dict[str, str]\nversion = vinfo["version"]\n', None),
        ("def get_versions():\n    return {'version': get()}\n", None),
    ],
)
def test_how_versions_are_written(text: str, found: str | None) -> None:
    """As numpy, numba and llvmlite write theirs; older and unbuilt ones are asked otherwise."""
    match = versions._ASSIGNED.search(text)
    assert (match[1] if match else None) == found


def test_memory_is_our_own() -> None:
    """What is touched counts as this process's, and a forked child has a copy of its own."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    block = buffers.buffer(50_000_000)
    assert anonymous() - before < 10_000_000
    for at in range(0, len(block), 4096):
        block[at] = 1
    assert anonymous() - before > 40_000_000
    child = os.fork()
    if child == 0:
        block[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert block[0] == 1
    with pytest.raises(MemoryError, match="bytes"):
        buffers.buffer(1 << 60)


def test_blocks_are_compared_by_their_bytes() -> None:
    """To the last byte, wherever they lie; empty ones are the same."""
    one, other = (memoryview(bytearray(b"soup soup")) for _ in range(2))
    assert buffers.is_same(one, other)
    assert buffers.is_same(one[:4], other[5:])
    assert not buffers.is_same(one[:4], other[4:8])
    assert not buffers.is_same(one, other[:8])
    assert buffers.is_same(buffers.buffer(0), one[9:])


def test_a_compiled_kernel_loads_without_any_library(tmp_path: Path) -> None:
    """A soup by a kernel from the cache waits for neither numba nor LLVM, nor for numpy."""
    f32 = DTYPES["F32"]
    cpu.mixer(f32, f32)
    script = (
        "import sys, streamsoup\n"
        "streamsoup.uniform(['a', 'b'], output='out')\n"
        "nine = ['a'] + ['b'] * 8  # more than are read at once\n"
        "streamsoup.uniform(nine, output='o', options=streamsoup.Options(io='read'))\n"
        "print(*sys.modules)\n"
    )
    for name in "ab":
        counter = tensor(np.array(7))  # as BatchNorm has
        save(tmp_path / name, {"t": tensor(np.zeros(100, np.float32)), "n": counter})
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

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Folder.open(str(tmp_path)) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            objects._store(folder, "mix.o", b"code")
        assert os.listdir(tmp_path) == []
        objects._store(folder, "mix.o", b"code")
    assert os.listdir(tmp_path) == ["mix.o"]


def test_what_numba_is_told_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled under other settings, in any of numba's variables, are other kernels."""
    names = {objects._cache_name("mix", ["fast/mix.py"])}
    for variable, value in (("NUMBA_OPT", "0"), ("NUMBA_LOOP_VECTORIZE", "\udcff")):
        monkeypatch.setenv(variable, value)
        names.add(objects._cache_name("mix", ["fast/mix.py"]))
    monkeypatch.setenv("NUMBER", "7")
    names.add(objects._cache_name("mix", ["fast/mix.py"]))
    assert len(names) == 3


def test_without_a_home_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, or a cache that is not an absolute path: compiled kernels are kept nowhere."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert objects._cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = objects._cache_folder()
    assert folder is not None
    assert os.path.samestat(os.fstat(folder.descriptor), os.stat(tmp_path / "cache" / "streamsoup"))
    folder.close()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert objects._cache_folder() is None
    assert os.listdir(tmp_path) == ["cache"]


def test_kernels_are_found_in_any_locale() -> None:
    """Their name is made of our sources, which no locale needs to be able to say."""
    script = (
        "from streamsoup.kernels.fast.objects import _cache_name\n"
        "print(_cache_name('x', ['fast/means.py', 'fast/sums.py']))"
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


def test_numba_loads_nothing_that_others_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own cache holds pickles, which run code: it is used beside the code alone, or not."""
    from streamsoup.kernels import plain, plain_low_rank

    asked: list[bool] = []

    def cfunc(signature: object, *, error_model: str, cache: bool = False) -> object:
        asked.append(cache)
        return lambda function: function

    monkeypatch.setattr(plain.numba, "cfunc", cfunc)
    plain_low_rank.compile_low_rank()
    plain.compile_mix()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(plain.numba.config, "CACHE_DIR", "/tmp/shared")
        plain.compile_mix()
    with monkeypatch.context() as installed:
        installed.setattr(plain.os, "access", lambda *_: False)
        plain.compile_products()
    assert asked == [False, True, False, False]
