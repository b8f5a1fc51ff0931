"""Models of transformers 5: what their checkpoints call and store in another way than they do.

``from_pretrained`` renames the tensors of many families, adds or strips the prefix of the base
model, stacks experts, and cuts or joins projections; ``save_pretrained`` does the reverse. Both are
done here by transformers' own conversions, which depend on its version, on tensors without elements
(`formats.tracing`). So each tensor of a checkpoint is known as views of the live model's memory,
and nothing is copied; what cannot be told is refused by name.

transformers is imported only where a model at hand is one of its own.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamsoup.errors import FormatError, printable, some

if TYPE_CHECKING:
    from torch import Tensor

    from streamsoup.formats.tracing import Piece

__all__ = ["Loading", "Part", "family_of", "is_pretrained", "loading", "released", "side_files_of"]


class Part(NamedTuple):
    """Elements of a stored tensor, and where a live model has them."""

    begin: int
    """The first of them, counted in C order."""
    live: str
    """The name of the live tensor that has them."""
    tensor: Tensor
    """A view of it that has them in C order, whatever its shape and strides."""


class Loading(msgspec.Struct):
    """What ``from_pretrained`` would do with the tensors of a checkpoint."""

    parts: dict[str, tuple[Part, ...]]
    """Where each stored tensor goes, in order, and completely."""
    filled: set[str]
    """Names of the live tensors that the stored ones fill."""
    left_out: list[str]
    """Stored tensors of a part that the live model does not have, such as a head."""
    kept: list[str]
    """Live tensors of a head or a pooler that the checkpoint does not have."""
    strange: list[str]
    """Stored tensors that have no place, of parts that the live model has."""
    misshapen: dict[str, tuple[int, ...]]
    """Live tensors, and the shapes that the stored ones make, where these differ."""
    problems: dict[str, list[str]]
    """What keeps tensors from being written in place, and which."""


def is_pretrained(module: Any) -> bool:
    """Return True for models of transformers, whose checkpoints it may convert."""
    return any(
        each.__name__ == "PreTrainedModel" and each.__module__.partition(".")[0] == "transformers"
        for each in type(module).__mro__
    )


def family_of(module: Any) -> str:
    """Return the name of a model's family, as its configuration has it."""
    family = getattr(getattr(module, "config", None), "model_type", None)
    return printable(family or type(module).__name__)


def loading(
    module: Any, live: Mapping[str, Tensor], stored: Mapping[str, Sequence[int]]
) -> Loading | None:
    """Return where ``from_pretrained`` would put stored tensors of these shapes.

    `live` has the tensors of `module` by name. Returns None where transformers has no conversions
    (before version 5). Changes nothing, and calls none of the model's code but that for its
    conversions. Costs some microseconds for each tensor and each pattern of the family.
    """
    try:
        core = import_module("transformers.core_model_loading")
        mapping_of = import_module("transformers.conversion_mapping").get_model_conversion_mapping
        rename, natural = core.rename_source_key, core.dot_natural_key
        renaming_kind, converter_kind = core.WeightRenaming, core.WeightConverter
    except (ImportError, AttributeError):
        return None
    from streamsoup.formats.tracing import Trace

    found = Loading({}, set(), [], [], [], {}, {})
    prefix = getattr(module, "base_model_prefix", "")
    transforms = mapping_of(module)
    renamings = [each for each in transforms if isinstance(each, renaming_kind)]
    converters = [each for each in transforms if isinstance(each, converter_kind)]
    converter_of = {source: each for each in converters for source in each.source_patterns}
    part_of = _parts(module, live, prefix)
    parts_held = {part_of(name) for name in live}
    expendable = _matcher(
        [
            *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()),
            *(r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"),
        ]
    )
    place_of: dict[str, tuple[str, str | None]] = {}
    for name in sorted(stored, key=natural):
        renamed, pattern = rename(name, renamings, converters, prefix, live)
        if renamed not in live and name in live:
            renamed, pattern = rename(name, [], [], prefix, live)
        if renamed in live:
            place_of[name] = renamed, pattern
        elif part_of(renamed) not in parts_held or expendable(renamed):
            found.left_out.append(name)
        else:
            found.strange.append(name)
    trace = Trace({name: (stored[name], live[at].dtype) for name, (at, _) in place_of.items()})
    results: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    from_names: dict[str, list[str]] = {}
    for name, (at, pattern) in place_of.items():
        from_names.setdefault(at, []).append(name)
        if pattern is None:
            results[at] = trace.sources[name]
        else:
            if at not in groups:
                groups[at] = copy.deepcopy(converter_of[pattern])
            groups[at].add_tensor(at, name, pattern, trace.sources[name])
    for at, names in from_names.items():
        if at not in groups and len(names) > 1:
            found.problems.setdefault(f"stored twice, for {printable(at)}", []).extend(names)
    with trace:
        for at, group in groups.items():
            try:
                made = group.convert(at, model=module, config=module.config)
            except Exception as error:  # any code of a family, on tensors that may not fit it
                reason = f"not converted by transformers ({printable(str(error))})"
                found.problems.setdefault(reason, []).extend(from_names.pop(at))
            else:
                made = made[0] if isinstance(made, tuple) else made  # before 5.1: and errors
                results |= {each: _lone(value) for each, value in made.items()}
    parts: dict[str, list[Part]] = {name: [] for names in from_names.values() for name in names}
    for at, result in results.items():
        _place(found, parts, at, result, live.get(at), trace.pieces(result))
    told = {name for names in found.problems.values() for name in names}
    for name, places in parts.items():
        if name not in told:
            _tile(found, name, stored[name], places)
    spared = _matcher([*(getattr(module, "_keys_to_ignore_on_load_missing", None) or ())])
    parts_filled = {part_of(name) for name in found.filled}
    has_base = hasattr(module, prefix) if prefix else False
    for name in live:
        part = part_of(name)
        is_head = has_base and not name.startswith(f"{prefix}.")
        is_added = (is_head or part.endswith("pooler")) and part not in parts_filled
        if name not in found.filled and (is_added or spared(name)):
            found.kept.append(name)
    return found


def released(module: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a live model under the names, and in the form, of its checkpoints.

    They are views where they can be. Those that a checkpoint has as one, and the model as several,
    or in an order that no strides give, are copied. Raises `FormatError` for what transformers does
    not convert back, or in ways that cannot be followed. Before transformers 5: `state` as it is.
    """
    try:
        revert = import_module("transformers.core_model_loading").revert_weight_conversion
    except (ImportError, AttributeError):
        return dict(state)
    from streamsoup.formats.tracing import Trace

    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    trace = Trace({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()})
    what = f"{family_of(module)}, a model of transformers"
    advice = "save it with save_pretrained, and give the folder"
    try:
        with trace:
            made = revert(module, dict(trace.sources))
    except Exception as error:
        raise FormatError(
            f"{what}: cannot be brought into the form of its checkpoints "
            f"({printable(str(error))}); {advice}"
        ) from None
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, result in made.items():
        result = _lone(result)
        pieces = trace.pieces(result)
        if pieces is None:
            unknown.append(name)
        else:
            found[name] = _gathered(result, pieces, kept)
    if unknown:
        raise FormatError(
            f"{what}: how its checkpoints store these is not known here: {some(unknown)}; {advice}"
        )
    return found


def side_files_of(module: Any) -> tuple[tuple[str, bytes], ...]:
    """Return the configuration that ``save_pretrained`` would write beside a model's weights."""
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = str(module.dtype).removeprefix("torch.")
    files = [("config.json", config.to_json_string().encode())]
    generation = getattr(module, "generation_config", None)
    if generation is not None and module.can_generate():
        files.append(("generation_config.json", generation.to_json_string().encode()))
    return tuple(files)


def _lone(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _place(
    found: Loading,
    parts: dict[str, list[Part]],
    at: str,
    result: Any,
    tensor: Tensor | None,
    pieces: list[Piece] | None,
) -> None:
    """Add the parts of stored tensors that a result puts into a live tensor, or say why not."""
    if tensor is None:
        found.problems.setdefault("converted into what the model lacks", []).append(at)
        return
    found.filled.add(at)
    if pieces is None:
        found.problems.setdefault("converted in a way that cannot be followed", []).append(at)
        return
    if result.shape != tensor.shape:
        found.misshapen[at] = tuple(result.shape)
        for piece in pieces:
            parts.pop(piece.source, None)
        return
    for piece in pieces:
        part = _part(piece, at, tensor)
        if part is None:
            reason = "stored in an order that cannot be written in place"
            found.problems.setdefault(reason, []).append(piece.source)
        elif piece.source in parts:
            parts[piece.source].append(part)


def _part(piece: Piece, at: str, tensor: Tensor) -> Part | None:
    """Return a piece as a range of the stored elements and a view of the live tensor, if it is."""
    import torch

    with torch.no_grad():
        try:
            view = tensor[piece.box].view(piece.shape)
        except RuntimeError:  # stored in other dimensions than these strides allow
            return None
        # The stored elements in their own order: the longest steps first.
        long_first = sorted(range(len(piece.shape)), key=lambda i: -piece.stride[i])
        long_first.sort(key=lambda i: piece.shape[i] != 1)
        step = 1
        for i in reversed(long_first):
            if piece.shape[i] != 1 and piece.stride[i] != step:
                return None
            step *= piece.shape[i]
        return Part(piece.offset, at, view.permute(long_first))


def _tile(found: Loading, name: str, shape: Sequence[int], places: list[Part]) -> None:
    """Note the parts of a stored tensor in order, if they are all of it."""
    import torch

    places.sort(key=lambda part: part.begin)
    end = 0
    for begin, _, tensor in places:
        if begin != end:
            break
        end += tensor.numel()
    if end != math.prod(shape) or not places:
        found.problems.setdefault("used in part, or not at all", []).append(name)
        return
    if len(places) == 1:
        with torch.no_grad():
            try:
                places = [Part(0, places[0].live, places[0].tensor.view(tuple(shape)))]
            except RuntimeError:
                pass  # in order, but in no strides of this shape
    found.parts[name] = tuple(places)


def _gathered(result: Tensor, pieces: list[Piece], state: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that `result` stands for: a view of the state where there is one."""
    import torch

    views = []
    for piece in pieces:
        source = state[piece.source].detach()
        whole = piece.shape == tuple(source.shape) and source.numel() == result.numel()
        if whole and piece.stride == torch.empty(source.shape, device="meta").stride():
            views.append(source)
            continue
        source = source.contiguous()
        offset = source.storage_offset() + piece.offset
        views.append(source.as_strided(piece.shape, piece.stride, offset))
    if len(pieces) == 1:
        return views[0].reshape(result.shape)
    made = torch.empty(result.shape, dtype=result.dtype, device=views[0].device)
    for piece, view in zip(pieces, views, strict=True):
        place = made[piece.box]
        place.copy_(view.reshape(place.shape))
    return made


def _parts(module: Any, live: Mapping[str, Tensor], prefix: str) -> Callable[[str], str]:
    """Return a function from names to the part of the model that they belong to.

    A part is a child of the model, of its base, or of a model within it: a head, a pooler, a tower.
    """
    models = {path for path, each in module.named_modules() if is_pretrained(each)}
    base = f"{prefix}."
    has_base = any(name.startswith(base) for name in live)

    def part_of(name: str) -> str:
        steps = (name if has_base else name.removeprefix(base)).split(".")
        n = next(n for n in range(len(steps) - 1, -1, -1) if ".".join(steps[:n]) in models)
        return ".".join(steps[: n + 1])

    return part_of


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a test for names in which one of some patterns is found."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(each.search(name) for each in compiled)
