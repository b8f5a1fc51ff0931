"""Pipelines made by hand, as diffusers and sentence-transformers save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensor, load, save, tensor

UNET, VAE, TEXT = "unet", "vae", "text_encoder"
WEIGHTS = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model"}


def random(seed: int, *names: str) -> dict[str, Tensor]:
    """Make tensors of these names."""
    rng = np.random.default_rng(seed)
    return {name: tensor(rng.standard_normal((5, 3)).astype("f4")) for name in names}


def diffusers(folder: Path, seed: int) -> Path:
    """Make a pipeline as diffusers saves it: three components with weights, two without."""
    classes: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None] * 2,
    }
    for i, (part, stem) in enumerate(WEIGHTS.items()):
        save(folder / part, random(10 * seed + i, "w", "x.weight"), name=stem)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": part, "width": 3}))
        classes[part] = ["diffusers", part.title()]
    for part in ("scheduler", "tokenizer"):
        (folder / part).mkdir()
        classes[part] = ["diffusers", part.title()]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta": 0.1}))
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    classes["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(classes))
    return folder


def sentences(folder: Path, seed: int) -> Path:
    """Make a model as sentence-transformers saves it: weights in the folder, and in 2_Dense."""
    save(folder, random(seed, "embeddings.weight"))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3}))
    save(folder / "2_Dense", random(seed + 7, "linear.weight"))
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 3}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]  # the last has no folder
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"x.{p}"} for i, p in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def mean(a: Path, b: Path) -> dict[str, Any]:
    """Average two safetensors files with numpy."""
    one, two = load(a), load(b)
    return {
        name: (
            (np.frombuffer(one[name][2], "<f4").astype("f8") + np.frombuffer(two[name][2], "<f4"))
            / 2
        )
        .astype("<f4")
        .tobytes()
        for name in one
    }


def held(path: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor in a file."""
    return {name: data for name, (_, _, data) in load(path).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder but the provenance, which has a date."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.name != "streamsoup.json"
    }
