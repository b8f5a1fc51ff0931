"""Checkpoints and plans in words, from headers alone."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamsoup.engine.read import mapped_nbytes
from streamsoup.errors import in_options, option, printable
from streamsoup.formats.ingredients import Ingredient
from streamsoup.sizes import nbytes_text

if TYPE_CHECKING:
    from streamsoup.output.make import Order

__all__ = [
    "describe_ingredient",
    "describe_order",
    "record_ingredient",
    "record_order",
    "short_names",
]


def describe_ingredient(ingredient: Ingredient, *, tensors: bool) -> dict[str, Any]:
    """Say what a checkpoint holds: files, tensors, dtypes, sizes."""
    layout, files = ingredient.layout, ingredient.file_names
    dtypes: Counter[str] = Counter()
    for _, spec in layout.places.values():
        dtypes[spec.dtype.name] += spec.n_elements
    description: dict[str, Any] = {
        "checkpoint": printable(ingredient.name),
        "files": [printable(name) for name in files],
        "tensors": len(layout.places),
        "parameters": layout.n_parameters,
        "dtypes": ", ".join(f"{name} {count}" for name, count in dtypes.most_common()),
        "size": f"{layout.nbytes} bytes ({nbytes_text(layout.nbytes)})",
    }
    if tensors:
        description["tensor_list"] = [
            f"{printable(name)}  {spec.dtype.name}  {list(spec.shape)}  {printable(files[number])}"
            for name, (number, spec) in layout.places.items()
        ]
    return description


def describe_order(ordered: Order) -> dict[str, Any]:
    """Say what a planned soup would read, write and hold."""
    plan, memory = ordered.plan, ordered.memory
    operations = Counter(tensor.operation for tensor in plan.tensors)
    written = sum(file.nbytes for file in ordered.files.files)
    words = {"mix": "averaged", "same": "copied if equal", "first": "copied from the first"}
    words["code"] = "copied if equal, as parts of quantised weights"
    return {
        "ingredients": [printable(ingredient.name) for ingredient in plan.ingredients],
        "tensors": ", ".join(f"{count} {words[name]}" for name, count in operations.items()),
        "reads": f"{plan.nbytes_read} bytes ({nbytes_text(plan.nbytes_read)})",
        "writes": f"{written} bytes ({nbytes_text(written)})",
        "files": [f"{printable(f.name)}  {nbytes_text(f.nbytes)}" for f in ordered.files.files],
        "side_files": [printable(file.name) for file in ordered.side_files] or "none",
        "peak_memory": f"{memory.peak_nbytes} bytes at most ({nbytes_text(memory.peak_nbytes)}), "
        "of anonymous memory",
        "mapped": _mapped_text(mapped_nbytes(plan, memory, mapped=ordered.mapped)),
        "running_sum": f"{nbytes_text(plan.nbytes_summed)} more, where a search keeps one",
        "threads": memory.threads,
        "device": _device_text(ordered),
        "input": "mapped" if ordered.mapped else "read",
        "free_here": nbytes_text(shutil.disk_usage(os.curdir).free),
        "warnings": [*map(in_options, ordered.warnings)] or "none",
    }


def record_ingredient(ingredient: Ingredient, *, tensors: bool) -> dict[str, Any]:
    """Give what `describe_ingredient` says as plain numbers and names, for machines."""
    layout, files = ingredient.layout, ingredient.file_names
    dtypes: Counter[str] = Counter()
    for _, spec in layout.places.values():
        dtypes[spec.dtype.name] += spec.n_elements
    record: dict[str, Any] = {
        "checkpoint": ingredient.name,
        "files": list(files),
        "n_tensors": len(layout.places),
        "n_parameters": layout.n_parameters,
        "dtypes": dict(dtypes.most_common()),
        "nbytes": layout.nbytes,
    }
    if tensors:
        record["tensors"] = {
            name: {
                "dtype": spec.dtype.name,
                "shape": list(spec.shape),
                "file": files[number],
                "nbytes": spec.nbytes,
            }
            for name, (number, spec) in layout.places.items()
        }
    return record


def record_order(ordered: Order) -> dict[str, Any]:
    """Give what `describe_order` says as plain numbers and names, for machines."""
    plan, memory = ordered.plan, ordered.memory
    on_device = ordered.on_device.plan if ordered.on_device is not None else None
    return {
        "ingredients": [ingredient.name for ingredient in plan.ingredients],
        "n_tensors": len(plan.tensors),
        "operations": dict(Counter(tensor.operation for tensor in plan.tensors)),
        "nbytes_read": plan.nbytes_read,
        "nbytes_written": sum(file.nbytes for file in ordered.files.files),
        "files": {file.name: file.nbytes for file in ordered.files.files},
        "side_files": [file.name for file in ordered.side_files],
        "peak_nbytes": memory.peak_nbytes,
        "mapped_nbytes": mapped_nbytes(plan, memory, mapped=ordered.mapped),
        "running_sum_nbytes": plan.nbytes_summed,
        "threads": memory.threads,
        "device": str(on_device.device) if on_device is not None else "cpu",
        "summed_on": ordered.summed_on,
        "device_nbytes": on_device.device_nbytes if on_device is not None else 0,
        "pinned_nbytes": on_device.pinned_nbytes if on_device is not None else 0,
        "io": "mmap" if ordered.mapped else "read",
        "free_nbytes": shutil.disk_usage(os.curdir).free,
        "warnings": [*map(in_options, ordered.warnings)],
    }


def short_names(paths: Sequence[str], limit: int) -> list[str]:
    """Leave out what all paths begin and end with, and the middle of what is still too long.

    Names that come out alike are told apart by their numbers, from 1.

    >>> short_names(("runs/a/model.safetensors", "runs/b/model.safetensors"), 20)
    ['a', 'b']
    >>> short_names(("runs/llama-sft-lr1e-5-seed1", "runs/llama-sft-lr3e-5-seed2"), 20)
    ['…lr1e-5-seed1', '…lr3e-5-seed2']
    >>> short_names(("runs/x1-aaaaaaaaaaaa-z", "runs/x1-aaaabbaaaaaa-z"), 11)
    ['…aa…a-z #1', '…aa…a-z #2']
    """
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    if len(set(paths)) > 1:
        while len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
            parts = [p[1:] for p in parts]
        while len({p[-1] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
            parts = [p[:-1] for p in parts]
    else:
        parts = [p[-1:] for p in parts]
    names = [printable("/".join(p).removesuffix(".safetensors")) for p in parts]
    if len(names) > 1 and max(map(len, names)) > limit:
        # What they have in common goes first: the middle may be where they differ.
        shared = os.path.commonprefix(names)  # noqa: RUF071 - of characters, not of folders
        alike = re.sub(r"[^\W_]+$", "", shared)
        names = [f"…{n[len(alike) :]}" for n in names] if len(alike) > 1 else names
    counts = Counter(_cut(name, limit) for name in names)
    return [
        _cut(name, limit)
        if counts[_cut(name, limit)] == 1
        else f"{_cut(name, limit - len(str(i)) - 2)} #{i}"
        for i, name in enumerate(names, start=1)
    ]


def _cut(name: str, limit: int) -> str:
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"


def _mapped_text(nbytes: int) -> str:
    """Return what mapped files add to the resident memory, and how to do without."""
    if not nbytes:
        return "nothing: files are read into buffers, which the peak counts"
    return (
        f"{nbytes} bytes of files at most ({nbytes_text(nbytes)}) besides, which the system can "
        f"take back; for a job limit that counts them: {in_options(option('io', 'read'))}"
    )


def _device_text(ordered: Order) -> str:
    """Say where the sums are made, why, and what that takes."""
    if ordered.on_device is None:
        return ordered.summed_on
    plan = ordered.on_device.plan
    return (
        f"{ordered.summed_on}: {plan.device_nbytes} bytes at most "
        f"({nbytes_text(plan.device_nbytes)}), {plan.pinned_nbytes} pinned on the host; torch and "
        "the driver hold their own beside that"
    )
