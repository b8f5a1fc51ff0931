"""Checkpoints to soup: Llama-shaped, of several sizes, dtypes and shard counts, and the same ever.

An ingredient is a shared base plus a little noise of its own, as a fine-tuned model is. The noise
comes from one pool of normal numbers, read from a different place for each tensor, so that making
gigabytes takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["SIZES", "Case", "Shape", "cache_folder", "make", "read_headers"]

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that make a Llama."""

    n_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    n_heads: int
    n_kv_heads: int
    tied: bool

    def tensors(self) -> Iterator[Tensor]:
        """Return names and shapes, as transformers names them, sorted."""
        head = self.hidden // self.n_heads
        kv = head * self.n_kv_heads
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for i in range(self.n_layers):
            layer = f"model.layers.{i}."
            yield layer + "input_layernorm.weight", (self.hidden,)
            yield layer + "mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield layer + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield layer + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield layer + "post_attention_layernorm.weight", (self.hidden,)
            yield layer + "self_attn.k_proj.weight", (kv, self.hidden)
            yield layer + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield layer + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield layer + "self_attn.v_proj.weight", (kv, self.hidden)
        yield "model.norm.weight", (self.hidden,)

    def config(self, dtype: str) -> dict[str, object]:
        """Return a ``config.json`` that transformers and mergekit accept."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
            "vocab_size": self.vocabulary,
        }


SIZES = {
    "0.5M": Shape(1, 256, 512, 100, 4, 4, True),  # 1 MB in 16 bits
    "8M": Shape(4, 256, 768, 16_000, 4, 4, True),
    "125M": Shape(12, 768, 2048, 52_000, 12, 12, True),
    "550M": Shape(9, 2048, 5632, 32_000, 32, 4, False),
    "1.1B": Shape(22, 2048, 5632, 32_000, 32, 4, False),  # as TinyLlama
    "2.2B": Shape(47, 2048, 5632, 32_000, 32, 4, False),
}

_WIDTH = {"BF16": 2, "F16": 2, "F32": 4}
_POOL = 1 << 22


@dataclass(frozen=True, slots=True)
class Case:
    """Which ingredients: how many, how large, of what dtype, in how many shards."""

    size: str
    n: int
    dtype: str = "BF16"
    n_shards: int = 1

    @property
    def label(self) -> str:
        """Return a label of a few characters."""
        shards = "" if self.n_shards == 1 else f", {self.n_shards} shards"
        return f"{self.n} × {self.size} {self.dtype.lower()}{shards}"

    @property
    def nbytes_each(self) -> int:
        """Bytes of weights of one ingredient."""
        n_elements = sum(math.prod(shape) for _, shape in SIZES[self.size].tensors())
        return n_elements * _WIDTH[self.dtype]


def cache_folder() -> Path:
    """Return the folder for large files: ``$STREAMSOUP_BENCH``, or one in the user's cache."""
    home = os.environ.get("STREAMSOUP_BENCH")
    return Path(home) if home else Path.home() / ".cache" / "streamsoup-bench"


def make(case: Case) -> list[Path]:
    """Return the folders of the ingredients of a case, made if they are not there yet."""
    room = cache_folder() / "checkpoints"
    name = f"{case.size}-{case.dtype.lower()}-{case.n_shards}"
    folders = [room / f"{name}-{i:02}" for i in range(case.n)]
    missing = [i for i, folder in enumerate(folders) if not folder.exists()]
    if missing:
        free = shutil.disk_usage(_above(room)).free
        if free < (needed := len(missing) * case.nbytes_each + case.nbytes_each):
            raise SystemExit(f"{case.label}: needs {needed / 1e9:.1f} GB of disk")
        pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32)
        for i in missing:
            _make_one(folders[i], case, i, pool)
    return folders


def read_headers(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int, int]]:
    """Locate each tensor of a checkpoint: file, dtype, shape, first byte, end."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (path, entry["dtype"], tuple(entry["shape"]), begin, end)
    return found


def _above(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _make_one(folder: Path, case: Case, number: int, pool: NDArray[np.float32]) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shape = SIZES[case.size]
    shards = _split(list(shape.tensors()), case.n_shards)
    weight_map = {}
    for s, tensors in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{s + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor: name for tensor, _ in tensors}
        _write_shard(partial / name, tensors, case, number, pool)
    if len(shards) > 1:
        metadata = {"total_size": case.nbytes_each}
        index = {"metadata": metadata, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(shape.config(case.dtype), indent=2))
    partial.rename(folder)


def _split(tensors: list[Tensor], n_shards: int) -> list[list[Tensor]]:
    total = sum(math.prod(shape) for _, shape in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(n_shards)]
    before = 0
    for tensor in tensors:
        shards[min(before * n_shards // total, n_shards - 1)].append(tensor)
        before += math.prod(tensor[1])
    return [shard for shard in shards if shard]


def _write_shard(
    path: Path, tensors: list[Tensor], case: Case, number: int, pool: NDArray[np.float32]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + math.prod(shape) * _WIDTH[case.dtype]
        header[name] = {"dtype": case.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            _write_tensor(file, name, math.prod(shape), case.dtype, number, pool)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(
    file: object, name: str, n: int, dtype: str, number: int, pool: NDArray[np.float32]
) -> None:
    base = np.random.default_rng(list(name.encode()))
    own = np.random.default_rng([number, *name.encode()])
    step = _POOL // 2
    for start in range(0, n, step):
        m = min(step, n - start)
        at, beside = int(base.integers(0, step)), int(own.integers(0, step))
        values = pool[at : at + m] * np.float32(0.02)
        values += pool[beside : beside + m] * np.float32(0.002)
        file.write(_narrow(values, dtype).data)  # type: ignore[attr-defined]


def _narrow(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
