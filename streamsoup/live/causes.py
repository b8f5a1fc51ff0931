"""Why ingredients do not fit into a live model, where that can be told, and what to do then.

An adapter beside the weights, a parametrization such as weight norm, masks of pruning, and an
embedding of another size each leave their mark on the names or shapes of a model's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from streamsoup.errors import MismatchError, some
from streamsoup.live.matching import Match

__all__ = ["misfit"]


def misfit(problems: Iterable[str], model: nn.Module, found: Match | None = None) -> MismatchError:
    """Return the error that names all problems, the likely cause of each, and what to do."""
    lines = list(problems)
    causes = _causes(model, found) if found is not None else []
    lines += causes
    if found is not None and found.note:
        lines.append(found.note)
    if found is not None and found.problems:
        lines.append(
            f"transformers does not store a {found.family} checkpoint as the model has it, and "
            "these cannot be written in place; score files that are written and loaded again "
            "instead, by a command"
        )
    elif found is not None and found.family and not causes:
        lines.append(
            f"these were compared as transformers loads a {found.family} checkpoint into "
            f"{type(found.module).__name__}; build the model by the ingredients' config.json, or "
            "give ingredients of its architecture"
        )
    elif not causes:
        lines.append(
            "where a model names or stores its weights in another way than its checkpoint, "
            "score files instead, by a command"
        )
    text = "\n".join(f"  {line}" for line in lines)
    return MismatchError(f"the ingredients cannot be put into the model:\n{text}")


def _causes(model: nn.Module, found: Match) -> list[str]:
    """Return a line for each likely cause, with what to do."""
    modules = list(model.named_modules())
    each = [
        _adapter(modules, found),
        _parametrized(modules, found),
        _pruned(modules, found),
        _resized(found),
    ]
    return [line for line in each if line is not None]


def _adapter(modules: list[tuple[str, nn.Module]], found: Match) -> str | None:
    """Recognise PEFT, around the model or within it."""
    inside = [name for name, module in modules if type(module).__module__.startswith("peft.")]
    if not inside or not (found.missing or found.strange):
        return None
    if inside[0] == "":
        return (
            "the model is a PEFT model, which has adapters beside the weights and names of its "
            "own; let build() return model.merge_and_unload() or model.unload(); ingredients have "
            "to be whole checkpoints: give each adapter as BASE+ADAPTER"
        )
    return (
        f"the model has PEFT adapters in it ({some(inside)}), which the ingredients do not have; "
        "build it without them; ingredients have to be whole checkpoints: give each adapter "
        "as BASE+ADAPTER"
    )


def _parametrized(modules: list[tuple[str, nn.Module]], found: Match) -> str | None:
    """Recognise weight norm, spectral norm and the like, by parametrization or by hook."""
    missing = set(found.missing)
    kinds: dict[str, list[str]] = {}
    for path, module in modules:
        start = f"{path}." if path else ""
        for name, steps in getattr(module, "parametrizations", {}).items():
            if any(each.startswith(f"{start}parametrizations.{name}.") for each in missing):
                kind = " and ".join(type(step).__name__.lstrip("_") for step in steps)
                how = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
                kinds.setdefault(f"{kind}|{how}", []).append(f"{start}{name}")
        for hook in module._forward_pre_hooks.values():
            kind, name = type(hook).__name__, getattr(hook, "name", None)
            remove = _REMOVERS.get(kind)
            if remove and any(each.startswith(f"{start}{name}_") for each in missing):
                how = f"torch.nn.utils.{remove}(module)"
                kinds.setdefault(f"{kind}|{how}", []).append(f"{start}{name}")
    lines = []
    for told, names in kinds.items():
        kind, _, how = told.partition("|")
        lines.append(
            f"{kind} was put on the model after its checkpoints were written: {some(names)}; "
            f"build it without, or take it off ({how})"
        )
    return "; ".join(lines) or None


_REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
"""Hooks that replace a weight by what it is made of, and what takes them off."""


def _pruned(modules: list[tuple[str, nn.Module]], found: Match) -> str | None:
    """Recognise the masks of ``torch.nn.utils.prune``."""
    names = []
    for path, module in modules:
        start = f"{path}." if path else ""
        for mask in module._buffers:
            weight = mask.removesuffix("_mask")
            if weight != mask and f"{start}{weight}_orig" in found.missing:
                names.append(f"{start}{weight}")
    if not names:
        return None
    return (
        f"the model is pruned (torch.nn.utils.prune), which the ingredients are not: "
        f"{some(names)}; build it without, or make the pruning permanent (prune.remove)"
    )


def _resized(found: Match) -> str | None:
    """Recognise embeddings and heads of a vocabulary of another size."""
    embeddings = {
        f"{path}.weight" if path else "weight"
        for path, module in found.module.named_modules()
        if isinstance(module, nn.Embedding)
    }
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, shape in found.misshapen.items():
        live = tuple(found.tensors[name].shape)
        if live and live[1:] == shape[1:] and live[0] != shape[0]:
            sizes.setdefault((live[0], shape[0]), []).append(name)
    for (ours, theirs), names in sizes.items():
        if embeddings.intersection(names):
            resize = "build() it with the ingredients' vocabulary"
            if hasattr(found.module, "resize_token_embeddings"):
                resize += f", or call model.resize_token_embeddings({theirs})"
            return (
                f"the embeddings were resized: {ours} rows in the model, {theirs} in the "
                f"ingredients: {some(names)}; {resize}"
            )
    return None
