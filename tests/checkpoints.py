"""Checkpoints made and read by hand, with `struct` and `json`, without the code under test."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Tensor = tuple[str, Sequence[int], bytes]
"""Dtype, shape and raw bytes."""

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


def needs(module: ModuleType, *version: int) -> pytest.MarkDecorator:
    """Skip a test of what came with a later version than the one here."""
    here = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[: len(version)])
    wanted = ".".join(map(str, version))
    return pytest.mark.skipif(here < version, reason=f"needs {module.__name__} {wanted}")


def tensor(array: Any, dtype: str | None = None) -> Tensor:
    """Return a numpy array as a tensor; `dtype` names the bits where numpy has no name for them."""
    array = np.asarray(array)
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64"}
    names |= {"int32": "I32", "uint8": "U8", "bool": "BOOL"}
    return dtype or names[array.dtype.name], array.shape, array.tobytes()


def header_text(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Return the JSON of a header, unpadded."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        end = offset + len(data)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return json.dumps(entries).encode()


def raw(text: bytes, data: bytes = b"") -> bytes:
    """Return the bytes of a file with this header and these data, however wrong."""
    return struct.pack("<Q", len(text)) + text + data


def content(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Return the bytes of a safetensors file."""
    return raw(header_text(tensors, metadata), b"".join(data for _, _, data in tensors.values()))


def save(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Any = None, name: str = "model"
) -> Path:
    """Make a folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(content(tensors, metadata))
    return folder


def save_sharded(folder: Path, shards: Sequence[Mapping[str, Tensor]]) -> Path:
    """Make a folder with shards and their index, as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / name).write_bytes(content(tensors, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(len(data) for tensors in shards for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_hub_snapshot(folder: Path, cache: Path) -> Path:
    """Move a folder's files into a download cache: blobs, and a snapshot of links to them."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


def load(path: Path) -> dict[str, Tensor]:
    """Read a file, or all safetensors files of a folder, by hand."""
    if path.is_dir():
        merged: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            merged |= load(file)
        return merged
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    entries = json.loads(whole[8 : 8 + length])
    entries.pop("__metadata__", None)
    data = whole[8 + length :]
    found = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def load_array(path: Path, name: str) -> np.ndarray[Any, Any]:
    """Read one tensor of a dtype that numpy knows, by hand."""
    dtype, shape, data = load(path)[name]
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape)


def random_model(seed: int, **more: Tensor) -> dict[str, Tensor]:
    """Return a small model of several dtypes; what is not averaged is the same for every seed."""
    rng = np.random.default_rng(seed)
    bf16 = (rng.standard_normal(3000).astype("<f4").view("<u4") >> 16).astype("<u2")
    return {
        "embed.weight": tensor(rng.standard_normal((50, 40)).astype(np.float32)),
        "layer.weight": tensor(bf16.reshape(60, 50), "BF16"),
        "layer.bias": tensor(rng.standard_normal(129).astype(np.float16)),
        "scale": tensor(np.float64(rng.standard_normal())),
        "empty": tensor(np.zeros((0, 3), np.float32)),
        "steps": tensor(np.array([1, 2, 3])),
        "e4m3": tensor(rng.integers(0, 0x70, 33, np.uint8), "F8_E4M3"),
        "mask": tensor(np.array([True, False, True])),
    } | more


_EXPECTED = re.compile(
    r"^warning: .*(without elements in all|given more than once|are all zero|the same in all).*\n",
    re.MULTILINE,
)


def unexpected(stderr: str) -> str:
    """Return what a command said beside its warnings of copies, zeros and empty tensors."""
    return _EXPECTED.sub("", stderr)


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "streamsoup", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
        **options,
    )
