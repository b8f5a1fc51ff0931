"""Which modules of a live model the components of a pipeline stand for.

A component is found by its path as an attribute (``unet``), by the number that begins it
(``2_Dense`` is the module ``2`` of sentence-transformers, and the folder itself the model within
``0``), by its route (``query_0_Dense`` is the first module of the route ``query`` of a ``Router``),
or, if it is the only one, as the whole model. Each is then matched on its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from streamsoup.formats.memory import unwrapped
from streamsoup.formats.released import Part, is_pretrained
from streamsoup.live.matching import Match, match, memory_of, tensors_of

__all__ = ["match_components"]

_Shapes = dict[str, tuple[int, ...]]


def match_components(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> Match:
    """Match tensors of a plan with those of a model, component by component where that is needed.

    Args:
        shapes: Shapes by the names of the plan, ``unet/conv_in.weight`` for a component.
        model: Any module; it is not changed.

    Returns:
        The match of the whole model. Where names alone fit, or no component is found in the model,
        that of `match`.
    """
    found = match(shapes, model)
    if found.parts and not found.strange:
        return found
    groups: dict[str, _Shapes] = {}
    for name, shape in shapes.items():
        component, _, inner = name.rpartition("/")
        groups.setdefault(component, {})[inner] = shape
    inner_model = unwrapped(model)
    places = _places(groups, inner_model)
    joined = None if places is None else _joined(groups, places, inner_model)
    return joined if joined is not None and len(joined.parts) > len(found.parts) else found


def _places(components: Collection[str], model: nn.Module) -> dict[str, str] | None:
    """Return the path of each component's module; None if one of them is not to be found."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, str] = {}
    alone = len(components) == 1
    for component in components:
        number = re.match(r"(\d+)_", component)
        tried = [component.replace("/", ".")] if component else _within_first(modules)
        tried += [number[1]] if number else []
        route = re.fullmatch(r"(?:.*/)?([^/]+)_(\d+)_[^_/]+", component)
        end = f"sub_modules.{route[1]}.{route[2]}" if route else ""
        tried += [path for path in modules if route and path.endswith(end)]
        tried += [""] if alone and component else []
        path = next((path for path in tried if path in modules), None)
        if path is None:
            return None
        places[component] = path
    return places


def _within_first(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the path of the model of transformers in the first of several modules, if any."""
    inside = [path for path in modules if path == "0" or path.startswith("0.")]
    return [path for path in inside if is_pretrained(modules[path])] or inside[:1]


def _joined(
    groups: Mapping[str, _Shapes], places: Mapping[str, str], model: nn.Module
) -> Match | None:
    """Match each component with its module; None if a module's names are not those of the model."""
    whole = Match(model, tensors_of(model), {}, [], [])
    families: list[str] = []
    for component, shapes in groups.items():
        above = f"{component}/" if component else ""
        prefix = f"{places[component]}." if places[component] else ""
        found = match(shapes, model.get_submodule(places[component]))
        if any(prefix + name not in whole.tensors for name in found.tensors):
            return None
        for name, parts in found.parts.items():
            whole.parts[above + name] = tuple(
                Part(part.begin, prefix + part.live, part.tensor) for part in parts
            )
        whole.strange += [above + name for name in found.strange]
        whole.left_out += [above + name for name in found.left_out]
        whole.kept += [prefix + name for name in found.kept]
        whole.misshapen |= {prefix + name: shape for name, shape in found.misshapen.items()}
        for problem, names in found.problems.items():
            whole.problems.setdefault(problem, []).extend(above + name for name in names)
        families += [found.family] if found.family else []
        whole.note = whole.note or found.note
    whole.family = ", ".join(dict.fromkeys(families))
    memory = {name: memory_of(name, tensor) for name, tensor in whole.tensors.items()}
    covered = {memory[part.live] for parts in whole.parts.values() for part in parts}
    absent = [name for name in whole.tensors if memory[name] not in covered]
    whole.missing = [name for name in absent if name not in whole.kept]
    whole.kept = [name for name in absent if name in whole.kept]
    return whole
