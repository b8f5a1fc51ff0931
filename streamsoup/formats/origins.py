"""Where ingredients come from: models of the Hugging Face Hub that their files name.

A folder in the cache of the Hub is named after its model. Others name the model they were trained
from, in the front matter of their card (``base_model``) or in a configuration. The files may come
from anywhere, so only what has the form of a model's id or of a plain word is ever believed, and no
YAML is parsed: of a front matter, lines of the form ``key: word`` and ``- word`` are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from streamsoup.formats.links import real_inside
from streamsoup.formats.listings import INDEX, MODULES
from streamsoup.system.regular import read_whole

__all__ = ["Origin", "find_origin"]

_LIMIT = 4_000_000
"""Bytes of a card or a configuration that are read."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LINE = re.compile(r"""(?P<key>[A-Za-z_]+):[ \t]*(?:(["']?)(?P<word>[^"'\s]+)\2)?[ \t]*""")
_ITEM = re.compile(r"""[ \t]*-[ \t]+(["']?)(?P<word>[^"'\s]+)\1[ \t]*""")

_LOCAL = re.compile(
    r"(?i)(\.|out(put)?s?|results?|runs?|(check)?points?|ckpts?|models?|tmp|home|data|work|content)/"
    r"|.*/(checkpoint|step|epoch)[-_]?\d*$"
)
"""Matches paths on a disk that look like the id of a model."""


class Origin(msgspec.Struct, frozen=True):
    """What the files of an ingredient say about where it comes from."""

    hub_id: str = ""
    """The model itself, if it lies in the cache of the Hub."""
    bases: tuple[str, ...] = ()
    """The models that it was trained from."""
    library: str = ""
    """The library that loads it."""
    license: str = ""
    """The license in its card."""
    task: str = ""
    """The ``pipeline_tag`` in its card."""


def find_origin(path: str | None, folder: str | None) -> Origin:
    """Return what the card and the configurations of an ingredient say.

    Args:
        path: Where the ingredient lies; None for what has no path.
        folder: The folder of its side files; None for a lone file and a state dict.

    Reads ``README.md`` and configurations; what cannot be read says nothing.
    """
    cached = None if path is None else _CACHED.search(os.path.abspath(path))
    hub_id = f"{cached[1]}/{cached[2]}" if cached else ""
    if path is not None and path.startswith("hf://"):
        hub_id = path.removeprefix("hf://").partition("@")[0]
    hub_id = hub_id if _HUB_ID.fullmatch(hub_id) else ""
    if folder is None:
        return Origin(hub_id)
    card = _front_matter(_text(folder, "README.md"))
    bases = [name for name in card.get("base_model", ()) if _HUB_ID.fullmatch(name)]
    bases = bases or _named_in_configs(folder)
    word = {key: card[key][0] for key in card if card[key] and _WORD.fullmatch(card[key][0])}
    return Origin(
        hub_id,
        tuple(dict.fromkeys(bases)),
        word.get("library_name") or _library(folder),
        word.get("license", ""),
        word.get("pipeline_tag", ""),
    )


def _front_matter(text: str) -> dict[str, Sequence[str]]:
    """Return the words that the front matter of a card has under each key of its first level."""
    lines = text.lstrip("\ufeff").splitlines()
    found: dict[str, list[str]] = {}
    if not lines or lines[0].strip() != "---":
        return {}
    key = ""
    for line in lines[1:1000]:
        if line.strip() == "---":
            return dict(found)
        item, pair = _ITEM.fullmatch(line), _LINE.fullmatch(line)
        if pair is not None:
            key = pair["key"]
            found[key] = [pair["word"]] if pair["word"] else []
        elif item is not None and key:
            found[key].append(item["word"])
        elif not line.startswith((" ", "\t")):
            key = ""
    return {}


def _named_in_configs(folder: str) -> list[str]:
    """Return the models that the configurations of a folder were loaded from."""
    found = []
    for name in ("adapter_config.json", "config.json", INDEX):
        config = _json(folder, name)
        for key in ("base_model_name_or_path", "_name_or_path"):
            value = config.get(key)
            if isinstance(value, str) and _HUB_ID.fullmatch(value) and not _LOCAL.match(value):
                found.append(value)
    return [name for name in found if not os.path.exists(name)]


def _library(folder: str) -> str:
    """Return the name of the library that loads a folder, by its files; empty if unknown."""
    for name, library in (
        (INDEX, "diffusers"),
        (MODULES, "sentence-transformers"),
        ("adapter_config.json", "peft"),
        ("open_clip_config.json", "open_clip"),
    ):
        if os.path.isfile(os.path.join(folder, name)):
            return library
    config = _json(folder, "config.json")
    if "pretrained_cfg" in config:
        return "timm"
    if "_diffusers_version" in config:
        return "diffusers"
    return "transformers" if {"architectures", "model_type"} & config.keys() else ""


def _json(folder: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(folder, name))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(folder: str, name: str) -> str:
    """Return the text of a file in a folder; empty where there is none, or a link out of it."""
    path = os.path.join(folder, name)
    if os.path.islink(path) and real_inside(path, folder) is None:
        return ""
    try:
        return read_whole(path, _LIMIT).decode(errors="replace")
    except OSError:
        return ""
