"""The structure of a recipe of mergekit: which layers of which models are merged, and how.

Keys that mergekit ignores are named in a warning; what it does and we do not is refused, at its
line, with the reason.
"""

from __future__ import annotations

from difflib import get_close_matches

import msgspec

from streamsoup.errors import RecipeError, is_plain, printable
from streamsoup.formats.documents import Items, Node, Table, Text
from streamsoup.tensors import float_dtype

__all__ = ["Configuration", "Input", "Slice", "is_mergekit", "read_configuration", "refused"]

NOT_HERE = {
    "experts": "mixtures of experts are not built here; use mergekit-moe",
    "gate_mode": "mixtures of experts are not built here; use mergekit-moe",
    "genome": "recipes are not evolved here; see `streamsoup greedy` and `streamsoup learned`",
}
"""What is refused by its key."""

KNOWN = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "modules"),
)

_OF_A_MODEL = ("model", "parameters")
_OF_A_SOURCE = ("model", "layer_range", "parameters")
_OF_A_SLICE = ("sources", "base_model", "parameters")


class Input(msgspec.Struct, frozen=True):
    """A model, or layers of one, with its own parameters."""

    model: str
    """A path, as `streamsoup` opens it."""
    where: str
    layers: tuple[int, int] | None = None
    """The first one, and the number after the last; None for all."""
    parameters: Table | None = None

    @property
    def n_layers(self) -> int:
        """Layers of a slice."""
        assert self.layers is not None
        return self.layers[1] - self.layers[0]


class Slice(msgspec.Struct, frozen=True):
    """Layers that are made of the same number of layers of each input."""

    inputs: tuple[Input, ...]
    base: str | None
    where: str
    parameters: Table | None = None


class Configuration(msgspec.Struct, frozen=True):
    """A recipe of mergekit."""

    file: str
    method: str
    where: str
    """Of the method."""
    slices: tuple[Slice, ...]
    whole: bool
    """True for `models`: one slice with all layers of each."""
    base: str | None
    base_where: str
    parameters: Table | None
    dtype: str | None
    """Of the soup; None for that of the models."""
    tokenizer: str | None
    """The model whose tokenizer is taken; None for that of the first."""
    tokenizer_where: str
    warnings: tuple[str, ...]


def is_mergekit(table: Table) -> bool:
    """Return True for a recipe of mergekit."""
    return bool({"merge_method", "experts", "genome"} & set(table.entries))


def refused(where: str, why: str) -> RecipeError:
    """Return the error for what is not supported."""
    return RecipeError(f"{where}: {why}")


def read_configuration(table: Table) -> Configuration:
    """Read a recipe of mergekit.

    Args:
        table: The file.

    Raises:
        RecipeError: Something is missing, contradictory, of another kind, or not supported; the
            message names the line.
    """
    warnings: list[str] = []
    for key in table.entries:
        if key in NOT_HERE:
            raise refused(table.at(key), NOT_HERE[key])
    _warn_unknown(table, KNOWN, warnings)
    if "merge_method" not in table.entries:
        raise RecipeError(f"{table.where}: names no merge_method")
    base = _node(table, "base_model")
    base_model = None if base is None else _model(base, table.at("base_model"), warnings)
    slices, whole = _slices(table, base_model, warnings)
    tokenizer, tokenizer_where = _tokenizer(table, warnings)
    _check_template(table, warnings)
    return Configuration(
        file=table.file,
        method=_text(table.entries["merge_method"], table.at("merge_method")),
        where=table.at("merge_method"),
        slices=slices,
        whole=whole,
        base=base_model,
        base_where=table.at("base_model"),
        parameters=_table(table, "parameters"),
        dtype=_dtype(table),
        tokenizer=tokenizer,
        tokenizer_where=tokenizer_where,
        warnings=tuple(warnings),
    )


def _node(table: Table, key: str) -> Node | None:
    """Return a value; None where it is absent or empty."""
    node = table.entries.get(key)
    return None if node is None or node.is_nothing else node


def _text(node: Node, at: str) -> str:
    if not isinstance(node, Text) or node.is_nothing:
        raise RecipeError(f"{at}: expected one word, got {node.kind}")
    return node.text


def _table(table: Table, key: str) -> Table | None:
    node = _node(table, key)
    if node is not None and not isinstance(node, Table):
        raise RecipeError(f"{table.at(key)}: expected keys with values, got {node.kind}")
    return node


def _items(table: Table, key: str) -> list[Table]:
    """Return the tables of a list."""
    node = table.entries[key]
    if not isinstance(node, Items) or not node.items:
        raise RecipeError(f"{table.at(key)}: expected a list, got {node.kind}")
    found = []
    for item in node.items:
        if not isinstance(item, Table):
            raise RecipeError(f"{item.where}: expected keys with values, got {item.kind}")
        found.append(item)
    return found


def _warn_unknown(table: Table, known: tuple[str, ...], warnings: list[str]) -> None:
    for key in table.entries:
        if key not in known:
            close = get_close_matches(key, known, 1)
            advice = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"{table.at(key)}: is ignored, as mergekit does{advice}")


def _model(node: Node, at: str, warnings: list[str]) -> str:
    """Return a model as a path: ``path``, ``path@revision``, ``base+adapter``."""
    if not isinstance(node, Table):
        return _text(node, at)
    inner = _node(node, "model") or node
    path = _revised(inner, at)
    lora = _node(node, "lora")
    if "override_architecture" in node.entries:
        warnings.append(f"{node.at('override_architecture')}: is not needed, and ignored")
    return path if lora is None else f"{path}+{_revised(lora, node.at('lora'))}"


def _revised(node: Node, at: str) -> str:
    if not isinstance(node, Table):
        return _text(node, at)
    path = _node(node, "path")
    if path is None:
        raise RecipeError(f"{at}: a model needs a path")
    revision = _node(node, "revision")
    text = _text(path, node.at("path"))
    return text if revision is None else f"{text}@{_text(revision, node.at('revision'))}"


def _slices(table: Table, base: str | None, warnings: list[str]) -> tuple[tuple[Slice, ...], bool]:
    """Read `models`, as one slice, or `slices`, which may stand in a lone module."""
    modules = _table(table, "modules")
    if modules is not None and not {"models", "slices"} & set(table.entries):
        if len(modules.entries) != 1:
            raise refused(
                table.at("modules"), "models are not merged by their modules; give models"
            )
        (name,) = modules.entries
        inner = _table(modules, name)
        if inner is None:
            raise RecipeError(f"{modules.at(name)}: names neither models nor slices")
        _warn_unknown(inner, ("models", "slices"), warnings)
        return _slices(inner, base, warnings)
    given = [key for key in ("models", "slices", "modules") if _node(table, key) is not None]
    if len(given) != 1:
        what = f"both {' and '.join(given)}" if given else "neither models nor slices"
        raise RecipeError(f"{table.where}: names {what}; give one of them")
    if given == ["models"]:
        inputs = tuple(_input(each, _OF_A_MODEL, warnings) for each in _items(table, "models"))
        return (Slice(inputs, base, table.at("models")),), True
    found = []
    for each in _items(table, "slices"):
        _warn_unknown(each, _OF_A_SLICE, warnings)
        if "sources" not in each.entries:
            raise RecipeError(f"{each.where}: a slice needs sources")
        inputs = tuple(_input(source, _OF_A_SOURCE, warnings) for source in _items(each, "sources"))
        lengths = {source.n_layers for source in inputs}
        if len(lengths) > 1:
            raise RecipeError(
                f"{each.where}: sources have {' and '.join(map(str, sorted(lengths)))} layers; all "
                "of a slice need as many"
            )
        own = _node(each, "base_model")
        own_base = base if own is None else _model(own, each.at("base_model"), warnings)
        found.append(Slice(inputs, own_base, each.where, _table(each, "parameters")))
    return tuple(found), False


def _input(table: Table, known: tuple[str, ...], warnings: list[str]) -> Input:
    _warn_unknown(table, known, warnings)
    node = _node(table, "model")
    if node is None:
        raise RecipeError(f"{table.where}: names no model")
    layers = None
    if "layer_range" in known:
        if "layer_range" not in table.entries:
            raise RecipeError(f"{table.where}: a source needs a layer_range, such as [0, 8]")
        layers = _range(table.entries["layer_range"], table.at("layer_range"))
    model = _model(node, table.at("model"), warnings)
    return Input(model, table.where, layers, _table(table, "parameters"))


def _range(node: Node, at: str) -> tuple[int, int]:
    ends = (
        [each.text for each in node.items if isinstance(each, Text)]
        if (isinstance(node, Items))
        else []
    )
    if len(ends) == 2 and all(is_plain(end) and end.isdigit() and len(end) < 7 for end in ends):
        first, end = map(int, ends)
        if first < end:
            return first, end
    raise RecipeError(f"{at}: expected two numbers, the first layer and the one after the last")


def _dtype(table: Table) -> str | None:
    """Return the dtype of the soup: that of the file, if it differs from that of the work."""
    for key in ("out_dtype", "dtype"):
        node = _node(table, key)
        if node is not None:
            text = _text(node, table.at(key))
            try:
                return float_dtype(text).name
            except RecipeError:
                raise refused(
                    table.at(key), f"{printable(text)!r} is no dtype that is averaged in"
                ) from None
    return None


def _tokenizer(table: Table, warnings: list[str]) -> tuple[str | None, str]:
    """Return the model whose tokenizer is taken, and where that is said."""
    at = table.at("tokenizer_source")
    node = _node(table, "tokenizer_source")
    inner = _table(table, "tokenizer")
    if inner is not None:
        if node is not None:
            raise RecipeError(f"{table.at('tokenizer')}: and tokenizer_source; give one of them")
        for key in ("tokens", "pad_to_multiple_of"):
            if _node(inner, key) is not None:
                raise refused(inner.at(key), "vocabularies are not changed here; leave it out")
        _warn_unknown(inner, ("source", "tokens", "pad_to_multiple_of"), warnings)
        at = inner.at("source") if "source" in inner.entries else table.at("tokenizer")
        node = _node(inner, "source") or Text(table.file, inner.line, "union", False)
    if node is None:
        return None, at
    model = _model(node, at, warnings)
    if model == "union":
        raise refused(
            at,
            "a union of vocabularies is not built here; where all models have the same one, "
            "`base` means the same",
        )
    return model, at


def _check_template(table: Table, warnings: list[str]) -> None:
    node = _node(table, "chat_template")
    if node is None:
        return
    if isinstance(node, Text) and node.text == "auto":
        warnings.append(
            f"{table.at('chat_template')}: auto takes the most common one; here it is that of the "
            "model whose tokenizer is taken"
        )
        return
    raise refused(
        table.at("chat_template"),
        "templates are taken from a model, and not written; put chat_template.jinja beside the "
        "soup instead",
    )
