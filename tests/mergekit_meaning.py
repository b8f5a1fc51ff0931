"""What mergekit's plan and methods mean, in numpy and float64, for whole small models.

Written from the description of the format and the papers, with PyYAML's own constructor; nothing of
the package under test. Random methods are left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

__all__ = ["meaning"]

Model = Mapping[str, np.ndarray[Any, Any]]
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def meaning(text: str, models: Mapping[str, Model]) -> dict[str, Any]:
    """Return the soup of a recipe."""
    recipe = yaml.safe_load(text)
    if "modules" in recipe:
        recipe |= recipe["modules"]["default"]
    slices = recipe.get("slices") or [
        {"sources": [{**each, "layer_range": [0, 4]} for each in recipe["models"]]}
    ]
    base = recipe.get("base_model")
    if "slices" not in recipe and base not in (None, *(m["model"] for m in recipe["models"])):
        slices[0]["sources"].append({"model": base, "layer_range": [0, 4]})
    soup: dict[str, Any] = {}
    for name in next(iter(models.values())):
        if LAYER.match(name) is None:
            part = slices[0] if "embed" in name else slices[-1]
            soup[name] = merged(recipe, part, name, 0, 0.0, models)
    at = 0
    for part in slices:
        first, end = part["sources"][0]["layer_range"]
        for offset in range(end - first):
            t = offset / (end - first - 1) if end - first > 1 else 1.0
            for name in next(iter(models.values())):
                if name.startswith("model.layers.0."):
                    out = name.replace(".0.", f".{at}.", 1)
                    soup[out] = merged(recipe, part, out, offset, t, models)
            at += 1
    return soup


def merged(
    recipe: Any, part: Any, name: str, offset: int, t: float, models: Mapping[str, Model]
) -> Any:
    """Return one tensor of the soup."""
    method, base = recipe["merge_method"], part.get("base_model", recipe.get("base_model"))
    as_input = method in ("linear", "karcher", "passthrough")
    tensors, own, origin = [], [], None
    for source in part["sources"]:
        there = LAYER.sub(f"model.layers.{source['layer_range'][0] + offset}.", name)
        value = models[source["model"]][there].astype(np.float64)
        if source["model"] == base and not as_input:
            origin = value
            continue
        tensors.append(value)
        scopes = [source.get("parameters"), part.get("parameters"), recipe.get("parameters")]
        own.append((scopes, there))

    def each(key: str, default: Any = None) -> list[Any]:
        return [setting(scopes, key, there, t, default) for scopes, there in own]

    def one(key: str, default: Any = None) -> Any:
        scopes = [part.get("parameters"), recipe.get("parameters")]
        return setting(scopes, key, name, t, default)

    return METHODS[method](origin, tensors, each, one)


def setting(scopes: Any, key: str, name: str, t: float, default: Any) -> Any:
    """Return a setting of the innermost scope that has one."""
    for scope in scopes:
        if scope and key in scope:
            value = settled(scope[key], name, t)
            if value is not None:
                return value
    return default


def settled(value: Any, name: str, t: float) -> Any:
    """Return the value of a filter, of a gradient, or as it is."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return float(value) if isinstance(value, str) else value
    if isinstance(value[0], dict):
        fits = (
            each for each in value if each.get("filter") in (None, "*") or each["filter"] in name
        )
        found = next(fits, None)
        return None if found is None else settled(found["value"], name, t)
    return float(np.interp(t, np.linspace(0, 1, len(value)), value))


def linear(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    weights = each("weight")
    total = sum(w * tensor for w, tensor in zip(weights, tensors, strict=True))
    return total / sum(weights) if one("normalize", True) else total


def arc(t: float, a: Any, b: Any) -> Any:
    """Return the point at t on the arc from a to b."""
    cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    angle = math.acos(min(1.0, cosine))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def slerp(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    return arc(one("t"), origin, tensors[0])


def nuslerp(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    weights = each("weight")
    start = 0.0 if origin is None else origin
    t = weights[1] / sum(weights)
    return start + arc(t, tensors[0] - start, tensors[1] - start)


def multislerp(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    weights = np.array(each("weight")) / sum(each("weight"))
    start = 0.0 if origin is None else origin
    vectors = [tensor - start for tensor in tensors]
    lengths = [np.linalg.norm(vector) for vector in vectors]
    mean = sum(w * v / n for w, v, n in zip(weights, vectors, lengths, strict=True))
    return start + mean / np.linalg.norm(mean) * np.dot(weights, lengths)


def karcher(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    lengths = [np.linalg.norm(tensor) for tensor in tensors]
    units = [tensor / n for tensor, n in zip(tensors, lengths, strict=True)]
    point = sum(units) / np.linalg.norm(sum(units))
    for _ in range(100):
        step = 0.0
        for unit in units:
            cosine = min(1.0, np.vdot(point, unit))
            angle = math.acos(cosine)
            step = step + (unit - cosine * point) * (angle / math.sin(angle) if angle else 1.0)
        step = step / len(units)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        point = math.cos(size) * point + math.sin(size) * step / size
    return point * np.mean(lengths)


def summed(sparse: Any, consensus: bool, normalizes: bool) -> Any:
    def merge(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
        weights, density = each("weight"), each("density", 1.0)
        gamma = each("gamma", 0.01)
        terms = [
            w * sparse(tensor - origin, d, g)
            for w, tensor, d, g in zip(weights, tensors, density, gamma, strict=True)
        ]
        sign = np.where(sum(terms) >= 0, 1, -1)
        agrees = [np.sign(term) == sign if consensus else np.ones(sign.shape) for term in terms]
        total = sum(term * mask for term, mask in zip(terms, agrees, strict=True))
        if one("normalize", normalizes):
            divisor = sum(w * mask for w, mask in zip(weights, agrees, strict=True))
            total = total / np.where(divisor == 0, 1, divisor)
        return origin + one("lambda", 1.0) * total

    return merge


def whole(task: Any, density: float, gamma: float) -> Any:
    return task if density else 0 * task


def largest(task: Any, density: float, gamma: float) -> Any:
    flat = task.ravel()
    kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    found = np.zeros_like(flat)
    found[kept] = flat[kept]
    return found.reshape(task.shape)


def middle(task: Any, density: float, gamma: float) -> Any:
    flat = task.ravel()
    n, dropped = int(density * flat.size), int(gamma * flat.size)
    first = max(0, flat.size - n - dropped)
    kept = np.argsort(np.abs(flat), kind="stable")[first : first + n]
    found = np.zeros_like(flat)
    found[kept] = flat[kept]
    return found.reshape(task.shape)


def stock(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    tasks = [tensor - origin for tensor in tensors]
    cosines = [
        np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in itertools.combinations(tasks, 2)
    ]
    n, cosine = len(tasks), np.mean(cosines)
    ratio = max(0.0, n * cosine / (1 + (n - 1) * cosine))  # ours stays at the base
    return origin + ratio * sum(tasks) / n


def sce(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    tasks = np.stack([tensor - origin for tensor in tensors])
    share = one("select_topk", 1.0)
    if share < 1:
        variance = tasks.var(axis=0).ravel()
        kept = np.argsort(-variance, kind="stable")[: int(np.count_nonzero(variance) * share)]
        mask = np.zeros(variance.size)
        mask[kept] = 1
        tasks = tasks * mask.reshape(origin.shape)
    energy = np.array([np.mean(task**2) for task in tasks])
    weights = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(tasks), 1 / len(tasks))
    agrees = np.sign(tasks) == np.where(tasks.sum(axis=0) >= 0, 1, -1)
    shares = weights.reshape(-1, *[1] * origin.ndim) * agrees
    return origin + (tasks * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-6)


def ram(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    tasks = np.stack([tensor - origin for tensor in tensors])
    changed = np.abs(tasks) > one("epsilon", 1e-5)
    return origin + (tasks * changed).sum(axis=0) / np.maximum(changed.sum(axis=0), 1)


def nearswap(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    weight = np.clip(one("t") / np.maximum(np.abs(origin - tensors[0]), 1e-6), 0, 1)
    return weight * tensors[0] + (1 - weight) * origin


def passthrough(origin: Any, tensors: Any, each: Any, one: Any) -> Any:
    return tensors[0] * each("scale", 1.0)[0]


METHODS = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": summed(whole, False, False),
    "ties": summed(largest, True, True),
    "dare_ties": summed(whole, True, False),
    "dare_linear": summed(whole, False, False),
    "breadcrumbs": summed(middle, False, False),
    "breadcrumbs_ties": summed(middle, True, False),
    "model_stock": stock,
    "sce": sce,
    "ram": ram,
    "nearswap": nearswap,
    "passthrough": passthrough,
}
