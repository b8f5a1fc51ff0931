"""Law 2: the measured peak is below the planned, and grows neither with models nor their number."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
import weakref
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import raw

from streamsoup import Options, uniform
from streamsoup.engine import inner, read, reduce
from streamsoup.engine.budget import fixed_nbytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.formats import on_disk
from streamsoup.formats.files import Window
from streamsoup.methods.angles import geometry, plan_geometry
from streamsoup.methods.fixed import find_coefficients
from streamsoup.output.make import order
from streamsoup.output.records import record_of
from streamsoup.recipe import Coefficients
from streamsoup.system.cgroup import memory_limit
from streamsoup.tensors import DTYPES

SCRIPT = """
import json, sys, threading, time
from streamsoup import Options, recipe
from streamsoup.methods import angles
from streamsoup.engine import inner
from streamsoup.engine import reduce
from streamsoup.engine.rules.linear import Linear
from streamsoup.output import coefficients as given_coefficients
from streamsoup.output import make

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

peak = 0
threading.Thread(target=watch, daemon=True).start()
settings = json.loads(sys.argv[1])
reduce.COMPILE_NBYTES = settings.pop("compile_nbytes")
inner.COMPILE_S = 0
if settings.pop("in_numpy"):
    reduce.find_mixer = inner.find_products = lambda *_: None
    inner.COMPILE_S = 1e9
given = settings.pop("coefficients")
options = Options(**settings)
paths = sys.argv[3:]
if sys.argv[2] == "geometry":
    planned = angles.plan_geometry(paths, base=None, options=options)[1].peak_nbytes
    angles.geometry(paths, options=options)
else:
    uniform = recipe.Coefficients.uniform(len(paths))
    coefficients = uniform if given is None else given_coefficients.find_coefficients(given)
    order = make.order(paths, Linear(coefficients), method="mix", options=options)
    planned = order.memory.peak_nbytes
    make.make(order, output=sys.argv[2], options=options)
print(max(peak, anonymous()), planned)
"""


@pytest.mark.parametrize(("k", "threads"), [(2, 1), (3, 2), (9, 2)])
def test_no_more_is_mapped_than_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, threads: int
) -> None:
    """The pages of all windows that are open at a time are within what `plan` says; read, none."""
    sizes = {f"t{n}": ("F32", (1000, 1000 + n), 4000 * (1000 + n)) for n in range(4)}
    paths = [str(sparse(tmp_path / "in", sizes))] * k
    live: list[int] = []
    peaks: list[int] = []

    class Counted(Window):
        def __init__(self, shard: Any, begin: int, end: int) -> None:
            super().__init__(shard, begin, end)
            pages = -(-end // PAGESIZE) - begin // PAGESIZE
            live.append(pages * PAGESIZE)
            peaks.append(sum(live))
            # The pages go with the last view of them, which may outlive the window.
            mapping = self._content.obj.mapping
            weakref.finalize(mapping, live.remove, pages * PAGESIZE)

    monkeypatch.setattr(on_disk, "Window", Counted)
    monkeypatch.setattr(read, "WINDOW", 1 << 21)
    monkeypatch.setattr(read, "WINDOWS", 1 << 23)
    found = {}
    for io in ("mmap", "read"):
        options = Options(threads=threads, io=io, overwrite=True)  # type: ignore[arg-type]
        ordered = order(paths, Linear(Coefficients.uniform(k)), method="mix", options=options)
        found[io] = record_of(ordered).mapped_nbytes
        assert found[io] == read.mapped_nbytes(ordered.plan, ordered.memory, mapped=io == "mmap")
        peaks.clear()
        uniform(paths, output=tmp_path / "out", options=options)
        assert max(peaks, default=0) <= found[io], io
        if io == "mmap":
            assert max(peaks) > found[io] // (4 * threads)
    assert found["read"] == 0


def sparse(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> Path:
    """Make a checkpoint of zeros that takes no room on the disk, and symlinks make many of it."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        head = raw(json.dumps(entries).encode())
        file.write(head)
        file.truncate(len(head) + at)
    return folder


def links(tmp_path: Path, model: Path, k: int) -> list[str]:
    """Make `k` links to a model."""
    paths = []
    for i in range(k):
        link = tmp_path / f"{model.name}-{i}"
        if not link.is_symlink():
            link.symlink_to(model)
        paths.append(str(link))
    return paths


def measure(
    tmp_path: Path,
    model: Path,
    k: int,
    *,
    in_numpy: bool = False,
    compile_nbytes: int = 10**15,
    geometry: bool = False,
    coefficients: str | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Make a soup of `k` links to a model in a fresh process; give its peak and the planned.

    It is the uniform one, unless the path of a file with `coefficients` is given.

    With `geometry` they are measured instead, by a kernel that is compiled anew; with a
    `compile_nbytes` of 1, those of soups are. With `in_numpy`, no compiled kernel is used.
    """
    settings = options | {"in_numpy": in_numpy, "compile_nbytes": compile_nbytes}
    settings["coefficients"] = coefficients
    out = "geometry" if geometry else str(tmp_path / f"out-{len(os.listdir(tmp_path))}")
    anew = geometry or compile_nbytes == 1
    env = {"XDG_CACHE_HOME": str(tmp_path)} if anew else {}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(settings), out, *links(tmp_path, model, k)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | env,
    )
    peak, planned = map(int, ran.stdout.split())
    return peak, planned


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_the_peak_does_not_grow(io: str, tmp_path: Path) -> None:
    """4 or 64 ingredients, 32 or 160 MB each: the same memory, below the plan and 150 MB."""
    small = sparse(tmp_path / "s", {f"t{i}": ("F32", (1000, 500), 2_000_000) for i in range(16)})
    large = sparse(tmp_path / "l", {f"t{i}": ("F32", (1000, 5000), 20_000_000) for i in range(8)})
    # Without compiled kernels: those depend on what the cache holds. Reads go by fours. The budget
    # lets all have blocks of one size.
    options: dict[str, Any] = {"io": io, "threads": 2, "memory": "140MB", "in_numpy": True}
    few = measure(tmp_path, small, 4, **options)
    many = measure(tmp_path, small, 64, **options)
    big = measure(tmp_path, large, 4, **options)
    for peak, planned in (few, many, big):
        assert peak <= planned <= 150_000_000
        assert abs(peak - few[0]) < 0.06 * few[0]


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 8},
        {"threads": 8, "io": "read"},
        {"threads": 4, "memory": "130MB", "dtype": "f64"},
        {"threads": 4, "memory": "400MB"},
    ],
    ids=str,
)
def test_the_plan_holds(options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the settings, the measured peak is below the planned one."""
    dtypes = (("F32", 4), ("BF16", 2), ("F16", 2), ("F8_E5M2", 1))
    model = sparse(
        tmp_path / "m",
        {f"{name}.{i}": (name, (10**6,), size * 10**6) for i in range(2) for name, size in dtypes},
    )
    peak, planned = measure(tmp_path, model, 5, **options)
    assert peak <= planned


@pytest.mark.parametrize(
    ("names", "memory", "compiles"),
    [
        ("F8_E4M3 F8_E5M2 F16 BF16", "300MB", True),
        ("F8_E4M3 F8_E5M2 F16 BF16", "120MB", False),
        ("BF16 F32", "150MB", True),
    ],
)
def test_compiling_is_in_the_plan(names: str, memory: str, compiles: bool, tmp_path: Path) -> None:
    """Kernels, those that take most among them, are compiled within the plan, or not at all."""
    n = 10**6
    kinds = names.split()
    tensors = {name: (name, (n,), n * DTYPES[name].itemsize) for name in kinds}
    model = sparse(tmp_path / "m", tensors)
    peak, planned = measure(tmp_path, model, 2, compile_nbytes=1, threads=1, memory=memory)
    assert peak <= planned
    assert (len(list(tmp_path.glob("streamsoup/*.o"))) == len(kinds)) == compiles


def test_many_tensors_fit_the_default_budget(tmp_path: Path) -> None:
    """8,000 tensors of 8 ingredients: headers, plan, digests and journal are within the plan."""
    model = sparse(tmp_path / "m", {f"layers.{i}.weight": ("BF16", (8,), 16) for i in range(8000)})
    peak, planned = measure(tmp_path, model, 8, threads=2)
    assert peak <= planned <= 150_000_000


@pytest.mark.parametrize(("n", "length"), [(50_000, 40), (4_000, 8_000)])
def test_headers_are_in_the_plan(n: int, length: int, tmp_path: Path) -> None:
    """Empty tensors, of which there is nothing but the names, and long names."""
    names = [f"layers.{i}.".ljust(length, "x") for i in range(n)]
    model = sparse(tmp_path / "m", dict.fromkeys(names, ("BF16", (0,), 0)))
    peak, planned = measure(tmp_path, model, 2, memory="300MB")
    assert 70_000_000 < peak <= planned


def test_coefficients_of_each_tensor_are_in_the_plan(tmp_path: Path) -> None:
    """64 numbers for each of 5,000 tensors, read from a file and written into the provenance."""
    names = [f"layers.{i}.weight" for i in range(5000)]
    model = sparse(tmp_path / "m", dict.fromkeys(names, ("F32", (4,), 16)))
    rows = np.random.default_rng(0).random((len(names), 64)).tolist()
    whole = {"values": rows[0], "per_tensor": dict(zip(names, rows, strict=True))}
    (tmp_path / "c.json").write_text(json.dumps(whole))
    few: dict[str, Any] = {"memory": "125MB", "in_numpy": True}
    peak, planned = measure(tmp_path, model, 64, coefficients=str(tmp_path / "c.json"), **few)
    assert peak <= planned <= 125_000_000
    plain, _ = measure(tmp_path, model, 64, **few)
    paths = links(tmp_path, model, 64)
    counted = [
        fixed_nbytes(order(paths, Linear(given), method="mix", options=Options()).plan)
        for given in (find_coefficients(tmp_path / "c.json"), Coefficients.uniform(64))
    ]
    assert 20_000_000 < peak - plain <= counted[0] - counted[1]


@pytest.mark.parametrize(
    "metadata",
    [
        {"tags": "x" * 25_000_000},
        {"tags": "\U0001f372" + "x" * 25_000_000},
        {"tags": '"' * 12_500_000},
        {f"{i:0250}": "\U0001f372" for i in range(90_000)},
    ],
    ids=["ascii", "wide", "escapes", "keys"],
)
@pytest.mark.parametrize("geometry", [False, True])
def test_metadata_is_in_the_plan(metadata: dict[str, str], geometry: bool, tmp_path: Path) -> None:
    """What trainers write into headers by the megabyte is read, checked and let go."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"__metadata__": metadata, "t": entry}, ensure_ascii=False)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw(text.encode(), bytes(4)))
    peak, planned = measure(tmp_path, folder, 8, geometry=geometry, in_numpy=geometry)
    assert 25_000_000 < peak <= planned < 150_000_000


OPENED = """
import sys
from streamsoup.errors import CorruptFileError
from streamsoup.formats.stored import open_stored

try:
    open_stored(sys.argv[1])
except CorruptFileError as error:
    print(str(error)[-160:])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

TINY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
MANY = b",".join(b'"%07x":%b' % (i, TINY) for i in range(320_000))
BACK = b",".join(
    b'"%07x":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1)
    for i in reversed(range(270_000))
)
REFUSED = {
    "a tensor at the end": (b"{%b,%b}" % (MANY, b'"z":1'), "exactly"),
    "one name twice": (b'{%b,"0000007":%b}' % (MANY, TINY), "twice"),
    "unsorted, with an overlap": (
        b'{%b,"z":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}' % BACK,
        "overlaps",
    ),
    "a shape without end": (b'{"a":{"shape":[%b0]}}' % (b"0," * 10_000_000), "65536"),
    "nested": (b'{"a":' + b"[" * 20_000_000, "nested"),
    "metadata of many keys": (
        b'{"__metadata__":{%b}}' % b",".join(b'"%x":""' % i for i in range(1_700_000)),
        "entries in __metadata__",
    ),
    "metadata that ends wrong": (b'{"__metadata__":{"a":"%b"},}' % (b"x" * 20_000_000), "JSON"),
    "a long name": (b'{"%b":1}' % (b"x" * 20_000_000), "a key of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_header_takes_little_more_than_its_text(case: str, tmp_path: Path) -> None:
    """Whatever 20 MB of header say before the mistake, at most 36 MB more are held, numpy included.

    So 100 MB, the most that is read, take at most 260.
    """
    text, phrase = REFUSED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(text))
    ran = subprocess.run(
        [sys.executable, "-c", OPENED, path], capture_output=True, text=True, check=True
    )
    assert phrase in ran.stdout
    peak = 1024 * int(ran.stdout.split()[-2])
    (tmp_path / "plain.safetensors").write_bytes(raw(b"{}"))
    ran = subprocess.run(
        [sys.executable, "-c", OPENED, tmp_path / "plain.safetensors"],
        capture_output=True,
        text=True,
        check=True,
    )
    plain = 1024 * int(ran.stdout.split()[-2])
    assert 0.9 * len(text) <= peak - plain <= 20_000_000 + 36_000_000


def test_a_json_reader_would_take_more() -> None:
    """Planted fault: decoding the whole header first takes many times its text."""
    text = REFUSED["a tensor at the end"][0]
    tracemalloc.start()
    json.loads(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > 5 * len(text)


@pytest.mark.parametrize(
    "options",
    [{}, {"threads": 1, "io": "read"}, {"in_numpy": True}, {"memory": "60MB"}],
    ids=str,
)
def test_the_plan_of_inner_products_holds(options: dict[str, Any], tmp_path: Path) -> None:
    """Compiling, blocks, and the products of all pairs in every tensor are within the plan.

    So are the rows that numpy multiplies where nothing is compiled.
    """
    tensors = {f"layers.{i}.weight": ("BF16", (8,), 16) for i in range(400)}
    model = sparse(tmp_path / "m", tensors | {"large": ("F32", (10**6,), 4_000_000)})
    peak, planned = measure(tmp_path, model, 32, geometry=True, **options)
    assert peak <= planned <= 150_000_000
    compiled = len(list(tmp_path.glob("streamsoup/*.o"))) == 1
    assert compiled == (not {"in_numpy", "memory"} & options.keys())


def test_products_of_64_fit_the_default_budget(tmp_path: Path) -> None:
    """A base and 64 ingredients of 1,500 tensors, with room for two threads."""
    model = sparse(tmp_path / "m", {f"layers.{i}.weight": ("BF16", (8,), 16) for i in range(1500)})
    base, *paths = links(tmp_path, model, 65)
    _, memory, _ = plan_geometry(paths, base=base, options=Options(threads=2))
    assert memory.threads == 2


def test_hoarding_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a run that keeps one whole ingredient in memory exceeds the plan."""
    model = sparse(tmp_path / "m", {"t": ("F32", (10**6,), 4_000_000)})
    hoard = "kept = bytearray(b'x') * 150_000_000\nprint(max(peak, anonymous())"
    monkeypatch.setattr(
        sys.modules[__name__], "SCRIPT", SCRIPT.replace("print(max(peak, anonymous())", hoard)
    )
    peak, planned = measure(tmp_path, model, 2)
    assert peak > planned


def test_the_narrowest_memory_group_counts(tmp_path: Path) -> None:
    """Groups of both versions, those above ours, and those that a container hides."""
    (tmp_path / "proc/self").mkdir(parents=True)
    own = tmp_path / "proc/self/cgroup"
    assert memory_limit(str(tmp_path)) == math.inf
    version1 = tmp_path / "sys/fs/cgroup/memory"
    version2 = tmp_path / "sys/fs/cgroup/a.slice/b"
    for folder in (version1, version2):
        folder.mkdir(parents=True)
    own.write_text("4:cpuset:/c\n3:cpu,memory:/docker/0:1\n0::/a.slice/b\n")
    assert memory_limit(str(tmp_path)) == math.inf
    (version2 / "memory.max").write_text("max\n")
    assert memory_limit(str(tmp_path)) == math.inf
    (version2 / "memory.max").write_text("300\n")
    assert memory_limit(str(tmp_path)) == 300
    (version2.parent / "memory.max").write_text("200\n")
    assert memory_limit(str(tmp_path)) == 200
    (version1 / "memory.limit_in_bytes").write_text("100\n")
    assert memory_limit(str(tmp_path)) == 100


@pytest.mark.parametrize("error", [OSError("no libllvmlite.so"), ImportError("no llvmlite")])
def test_without_a_compiler_numpy_does(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where LLVM's library cannot be loaded, a warning says so, and numpy does the work."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith(needs):
                raise error

    # Numba is loaded already in this process: what is compiled by it is to be loaded anew.
    needs = ("llvmlite", "streamsoup.kernels.plain")
    for name in [each for each in sys.modules if each.startswith(needs)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 1)
    monkeypatch.setattr(inner, "COMPILE_S", 0.0)
    model = sparse(tmp_path / "m", {"t": ("F32", (10**6,), 4_000_000)})
    uniform([model] * 20, output=tmp_path / "soup")
    assert "numpy makes the same sums, more slowly" in caplog.text
    caplog.clear()
    assert geometry([model] * 2).total.gram.tolist() == [[0.0] * 2] * 2
    assert "numpy makes the same sums, more slowly" in caplog.text


@pytest.mark.parametrize(("allowed", "compiled"), [(150_000_000, 0), (math.inf, 1)])
def test_where_the_compiler_would_crawl_numpy_does(
    allowed: float, compiled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a memory group too small for LLVM nothing is compiled, however large the job."""
    made: list[object] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reduce, "memory_limit", lambda: allowed)
    monkeypatch.setattr(reduce, "mixer", lambda *dtypes: made.append(dtypes))
    model = sparse(tmp_path / "m", {"t": ("F32", (10**6,), 4_000_000)})
    plan = order(
        [model] * 260, Linear(Coefficients.uniform(260)), method="uniform", options=Options()
    ).plan
    reduce.Engine(plan)
    assert len(made) == compiled
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    reduce.Engine(plan)
    assert len(made) == compiled
