"""Law 1 from end to end: nothing but the recipe and the ingredients changes a soup's bytes."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import as_hub_snapshot, load, random_model, save, save_sharded, tensor

from streamsoup import Options, mix, uniform
from streamsoup.engine import budget, plan, reduce, stream
from streamsoup.errors import Interrupted, MismatchError
from streamsoup.kernels import cpu
from streamsoup.output import write
from streamsoup.output.make import Soup
from streamsoup.recipe import DIGEST
from streamsoup.tensors import DTYPES

FACTORS = [0.5, -0.25, 0.75]


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into many leaves and blocks, so that small models meet every boundary."""
    monkeypatch.setattr(plan, "LEAF", 1000)
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 512)
    monkeypatch.setattr(budget, "SMALLEST_BLOCK", 64)


def halves(seed: int) -> list[dict[str, Any]]:
    """Return a small model in two shards."""
    model = random_model(seed)
    names = list(model)
    return [{n: model[n] for n in names[:3]}, {n: model[n] for n in names[3:]}]


def ingredients(folder: Path, k: int = 3) -> list[Path]:
    """Make sharded ingredients."""
    return [save_sharded(folder / f"m{i}", halves(i)) for i in range(k)]


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each shard and index."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name not in ("streamsoup.json", "README.md")  # both name the ingredients
    }


def digests(soup: Soup) -> object:
    """Return what a provenance says of tensors and ingredients."""
    return soup.provenance.tensors, [each.digest for each in soup.provenance.ingredients]


SETTINGS = [
    Options(threads=1),
    Options(threads=2),
    Options(threads=7),
    Options(io="mmap"),
    Options(io="read"),
    Options(io="read", threads=5),
    Options(memory="2GB"),
    Options(memory=10**9, threads=3),
]


@pytest.mark.usefixtures("small_leaves")
def test_settings_do_not_change_bytes(tmp_path: Path) -> None:
    """Threads, memory and way of reading change neither shards nor digests."""
    paths = ingredients(tmp_path)
    first = mix(paths, FACTORS, output=tmp_path / "first", options=Options(threads=1))
    for number, options in enumerate(SETTINGS):
        soup = mix(paths, FACTORS, output=tmp_path / f"out{number}", options=options)
        assert content(tmp_path / f"out{number}") == content(tmp_path / "first")
        assert digests(soup) == digests(first)
    # Planted fault: what does decide bytes, the order, changes them.
    other = mix(paths[::-1], FACTORS, output=tmp_path / "other", options=Options())
    assert content(tmp_path / "other") != content(tmp_path / "first")
    assert digests(other) != digests(first)


@pytest.mark.parametrize("block", [64, 128, 512])
def test_blocks_do_not_change_bytes(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a block changes nothing, whatever boundaries it cuts at."""
    paths = ingredients(tmp_path)
    whole = uniform(paths, output=tmp_path / "whole")
    monkeypatch.setattr(budget, "LARGEST_BLOCK", block)
    monkeypatch.setattr(budget, "SMALLEST_BLOCK", 64)
    cut = uniform(paths, output=tmp_path / "cut", options=Options(io="read"))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert digests(cut) == digests(whole)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_caller_that_flushes_subnormals_changes_no_byte(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a caller has told its processor does not hold for us, and holds for it afterwards."""
    for name in ("F64", "F32", "BF16", "F16", "F8_E5M2"):
        cpu.mixer(DTYPES[name], DTYPES[name])  # found from then on
    if not compiled:
        monkeypatch.setattr(reduce, "find_mixer", lambda source, output: None)
    codes = np.arange(1, 125)  # all of them subnormal, in each of these
    paths = [
        save(
            tmp_path / f"m{i}",
            {
                "f64": tensor((codes + i).astype(np.uint64).view(np.float64)),
                "f32": tensor((codes + i).astype(np.uint32).view(np.float32)),
                "bf16": tensor(np.repeat((codes + i).astype(np.uint16), 9), "BF16"),
                "f16": tensor(np.repeat((codes + i).astype(np.uint16), 9).view(np.float16)),
                "f8": tensor(np.repeat((codes % 4).astype(np.uint8), 9), "F8_E5M2"),
            },
        )
        for i in range(3)
    ]
    uniform(paths, output=tmp_path / "standard")
    expected = content(tmp_path / "standard")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    smallest = sys.float_info.min
    try:
        assert smallest / 2 == 0.0
        uniform(paths, output=tmp_path / "flushed", options=Options(threads=1))
        uniform(paths, output=tmp_path / "threads", options=Options(threads=2))
        assert smallest / 2 == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert smallest / 2 > 0.0
    assert content(tmp_path / "flushed") == expected
    assert content(tmp_path / "threads") == expected
    assert any(load(tmp_path / "standard")["f32"])


def test_engines_do_not_change_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy alone, compiled kernels alone, and a change in mid-run give the same bytes."""
    rng = np.random.default_rng(1)
    paths = [
        save(tmp_path / f"m{i}", {"w": tensor(rng.standard_normal(600_000).astype(np.float16))})
        for i in range(3)
    ]
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 1 << 18)  # three blocks
    monkeypatch.setattr(reduce, "find_mixer", lambda source, output: None)
    numpys = mix(paths, FACTORS, output=tmp_path / "numpy")
    original = reduce.Engine.mixer
    n_calls = 0

    def late(self: reduce.Engine, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:  # after those for the run, the leaf and its first block
            self.load()
        return original(self, *arguments)

    monkeypatch.setattr(reduce.Engine, "mixer", late)
    both = mix(paths, FACTORS, output=tmp_path / "both", options=Options(threads=1))
    assert n_calls >= 5
    assert digests(both) == digests(numpys)
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 1)
    reached: list[Any] = []
    monkeypatch.setattr(
        *(reduce.Engine, "mixer"),
        lambda *arguments: reached.append(original(*arguments)) or reached[-1],
    )
    mix(paths, FACTORS, output=tmp_path / "numba", options=Options(threads=2))
    assert None not in reached != []
    assert content(tmp_path / "numpy") == content(tmp_path / "both")
    assert content(tmp_path / "numpy") == content(tmp_path / "numba")


def test_sharding_does_not_change_tensors(tmp_path: Path) -> None:
    """How ingredients or the soup are cut into files changes no tensor and no digest."""
    sharded = ingredients(tmp_path)
    single = [save(tmp_path / f"s{i}", random_model(i)) for i in range(3)]
    copies = [save_sharded(tmp_path / f"c{i}", halves(i)) for i in range(3)]
    linked = [as_hub_snapshot(copy, tmp_path / f"h{i}") for i, copy in enumerate(copies)]
    first = uniform(sharded, output=tmp_path / "out")
    expected = load(tmp_path / "out")
    for number, (paths, size) in enumerate(
        [(single, None), (linked, None), (sharded, 4000), (sharded, "1GB"), (single, 1)]
    ):
        soup = uniform(paths, output=tmp_path / f"o{number}", options=Options(shard_size=size))
        assert load(tmp_path / f"o{number}") == expected
        assert digests(soup) == digests(first)
    assert content(tmp_path / "o1") == content(tmp_path / "out")
    mixed = uniform([sharded[0], single[1], linked[2]], output=tmp_path / "mixed")
    assert load(tmp_path / "mixed") == expected
    assert digests(mixed) == digests(first)


def test_tensor_order_may_differ(tmp_path: Path) -> None:
    """An ingredient whose tensors lie in another order is matched by name, not by place."""
    models = [random_model(i) for i in range(2)]
    backwards = {name: models[1][name] for name in reversed(models[1])}
    a = save(tmp_path / "a", models[0])
    b, c = save(tmp_path / "b", models[1]), save(tmp_path / "c", backwards)
    one = uniform([a, b], output=tmp_path / "one")
    two = uniform([a, c], output=tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert digests(one) == digests(two)


@pytest.mark.usefixtures("small_leaves")
def test_a_restart_does_not_change_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped after some leaves and run again ends with the bytes of one uninterrupted."""
    paths = ingredients(tmp_path)
    whole = uniform(paths, output=tmp_path / "whole")
    monkeypatch.setattr(stream, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(stream, "TICK_S", 0.001)
    written = write.FileSession.write
    lock = threading.Lock()
    for stop_after in (1, 4, 9):
        left = stop_after

        def stopping(self: Any, *arguments: Any) -> None:
            nonlocal left
            with lock:
                left -= 1
            if left < 0:
                raise KeyboardInterrupt
            written(self, *arguments)

        monkeypatch.setattr(write.FileSession, "write", stopping)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            uniform(paths, output=tmp_path / "out", options=Options(threads=2))
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(write.FileSession, "write", written)
    soup = uniform(paths, output=tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert digests(soup) == digests(whole)
    assert sorted(os.listdir(tmp_path)) == ["m0", "m1", "m2", "out", "whole"]


def _golden_ingredients(folder: Path) -> list[Path]:
    """Two ingredients spelled out: bf16 1.0, 2.0, -0 and f32 0.1, 3; a step counter."""
    a = {
        "w": ("BF16", (3,), bytes.fromhex("803f 0040 0080")),
        "b": ("F32", (2,), bytes.fromhex("cdcccc3d 00004040")),
        "n": ("I64", (), bytes.fromhex("0700000000000000")),
    }
    b = {
        "w": ("BF16", (3,), bytes.fromhex("813f 0340 0080")),
        "b": ("F32", (2,), bytes.fromhex("cdcc4c3e 0000a0c0")),
        "n": ("I64", (), bytes.fromhex("0700000000000000")),
    }
    return [save(folder / "a", a), save(folder / "b", b)]


GOLDEN_HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"w":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},'
    b'"n":{"dtype":"I64","shape":[],"data_offsets":[14,22]}}'
)
GOLDEN_DATA = bytes.fromhex(
    # (1 + 1.0078125)/2 is a tie between 3f80 and 3f81, to the even 3f80;
    # (2 + 2.046875)/2 = 2.0234375 a tie between 4001 and 4002, to 4002; -0 stays.
    "803f 0240 0080"
    # (0.1 + 0.2)/2 of the float32 values is 0.15 (3e19999a); (3 - 5)/2 = -1.
    "9a99193e 000080bf"
    "0700000000000000"
)


def test_golden_bytes(tmp_path: Path) -> None:
    """A soup worked out by hand, byte for byte, header included."""
    text = GOLDEN_HEADER + b" " * (-len(GOLDEN_HEADER) % 8)
    golden = len(text).to_bytes(8, "little") + text + GOLDEN_DATA
    soup = uniform(_golden_ingredients(tmp_path), output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == golden
    assert soup.provenance.tensors == GOLDEN_DIGESTS


GOLDEN_DIGESTS = {
    # Of each tensor's bytes above, the xxh3-128 of its xxh3-128, from the xxhash library.
    "w": "705bfa6296980ce23dee77e5893b52c4",
    "b": "21e11300151e8dbb25beb3008a19ecaa",
    "n": "b47aaac0f597912865dbbba42e0ff19c",
}


def test_leaves_are_never_tuned() -> None:
    """The leaf is part of the digests in every provenance: 2²² elements."""
    assert plan.LEAF == 1 << 22
    assert str(1 << 22) in DIGEST


def test_what_is_not_averaged_is_copied_or_refused(tmp_path: Path) -> None:
    """Equal integers and odd dtypes are copied bit for bit; different ones refused, or first."""
    odd = {
        "f4": ("F4", (6,), b"\x12\x34\x56"),
        "e8": ("F8_E8M0", (2,), b"\x01\xff"),
        "c": ("C64", (1,), bytes(range(8))),
        "empty": ("I8", (0,), b""),
        "w": tensor(np.float32(1)),
    }
    a = save(tmp_path / "a", odd)
    b = save(tmp_path / "b", odd)
    uniform([a, b], output=tmp_path / "out")
    assert load(tmp_path / "out") == {n: (d, tuple(s), x) for n, (d, s, x) in odd.items()}
    c = save(tmp_path / "c", odd | {"f4": ("F4", (6,), b"\x12\x34\x57")})
    for options in (Options(), Options(io="read")):
        with pytest.raises(
            MismatchError, match=rf"^ingredient 3: {c}/model\.safetensors: f4: this F4 tensor"
        ):
            uniform([a, b, c], output=tmp_path / "no", options=options)
    assert not (tmp_path / "no").exists()
    uniform([c, b], output=tmp_path / "first", options=Options(non_float="first"))
    assert load(tmp_path / "first")["f4"][2] == b"\x12\x34\x57"
