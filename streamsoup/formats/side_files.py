"""What lies beside the weights: configuration, tokenizer, chat template, licence.

A model folder that lost one of these still loads, and works worse without a word (mergekit#275),
so everything is copied but what is known to be weights, training state, or about another model.
Only regular files are ever opened, by small pieces, and no link is followed out of the folder: it
may come from anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import NoReturn

import msgspec

from streamsoup.errors import FormatError, MissingFileError, printable, some
from streamsoup.formats.configs import (
    changes,
    config_folder,
    is_of_quantisation,
    read_config,
    with_vocabulary,
    without_quantisation,
)
from streamsoup.formats.fitting.rows import Lengthened
from streamsoup.formats.fitting.vocabulary import is_of_tokenizer
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.links import check_inside, real_inside
from streamsoup.formats.weights import PICKLES, SUFFIXES, names_in
from streamsoup.reading import Reading
from streamsoup.system.regular import reading as reading_of
from streamsoup.tensors import DTYPES, TORCH_NAMES, DType

__all__ = ["SideFile", "gather_side_files", "is_equal", "pieces"]

LEFT_OUT = (
    *(f"*{suffix}" for suffix in SUFFIXES),
    *("*.index.json", "*.index.*.json"),
    *("weights*.npz", "trainer_state.json", "trainer_log.jsonl", "training_args*"),
    *("training_loss.png", "*_results.json", "*_results.csv", "latest", "zero_to_fp32.py"),
    *("results.json", "metrics.json", "metrics.csv", "hparams.yaml"),
    *("readme*", "model_card*", "streamsoup.json", "mergekit_config.yml"),
    *("run.json", "events.out.*", "*.tfevents*", "*.log", "*.log.*", "nohup.out", "slurm-*.out"),
    *("*logits*.np[yz]", "*logits*.json*", "*logits*.csv", "*logits*.parquet", "*logits*.txt"),
    *("*predictions*.np[yz]", "*predictions*.json*", "*predictions*.csv", "*predictions*.txt"),
    *("rng_state*", "optimizer_state*", "scheduler_state*", "wandb-*.json", "emissions.csv"),
)
"""Weights, the state of a training run, and descriptions of the one model it came from."""

_FAMILIAR = (
    *("*model*", "*weights*", "consolidated*", "*.distcp", "*.ot", "mp_rank_*"),
    *("optim*", "sched*", "scaler*", "sampler*", "*_state*", "*rng*", "training_args*", "epoch*"),
    *("*checkpoint*", "last*", "best*", "latest*", "ema*", "*step*"),
)
"""What weights and the state of a run are called, where `LEFT_OUT` needs no word."""

_MODELS = ("pytorch_model", "diffusion_pytorch_model", "adapter_model")
"""How the names of pickled weights begin that loaders look for."""

_OF_A_SOUP = ("*.safetensors", "*.index.json", "*.index.*.json", "streamsoup.json", "readme.md")
"""What a soup has files of, so that no folder may have such a name in it."""

_OF_TRAINING = (
    *(".", "checkpoint-", "global_step", "runs", "wandb"),
    *("optimizer_", "pytorch_model_fsdp", "average"),
)
"""What the names of folders begin with that a training run leaves."""

LARGEST = 1_000_000_000
"""Size in bytes beyond which a file is not a side file: left out, with a warning."""


class SideFile(msgspec.Struct, frozen=True):
    """A file to put beside the soup."""

    name: str
    """Relative to the folder, with ``/`` between parts."""
    path: str
    """Where it is copied from."""
    content: bytes | None
    """What to write instead, if it has to change."""


def gather_side_files(
    ingredients: Sequence[Ingredient],
    dtype: DType | None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> tuple[list[SideFile], list[str]]:
    """List the side files of the first ingredient, and warn where others have different ones.

    With `dtype`, the configuration is made to say it; if weights are dequantised in `reading`, it
    says nothing of quantisation. The tokenizer is that of the longest vocabulary. Reads the side
    files of all ingredients that
    have any.
    """
    first = ingredients[0].folder
    if first is None and (held := _held(ingredients[0])):
        if dtype is None:
            return held, []
        return [_with_dtype(f, dtype) if f.name == "config.json" else f for f in held], []
    if first is None:
        weights = ingredients[0].source.files
        beside = os.path.join(os.path.dirname(weights[0]), "config.json") if weights else ""
        if not os.path.isfile(beside):
            return [], []
        return [], [
            f"{printable(ingredients[0].name)}: is a lone file, so what lies beside it, such as "
            "config.json, is not copied; copy it, or give the folder"
        ]
    copied = ingredients[0].source.copied
    for name in copied:
        _check_copied(os.path.join(first, name), first)
    names, strange, heavy = _walk(first, _folders(ingredients[0]))
    read = [os.path.relpath(path, first) for path in ingredients[0].source.files]
    ours = {*ingredients[0].file_names, *copied, *read}
    heavy = [name for name in heavy if name not in ours]
    spare = [
        name
        for component in _folders(ingredients[0])
        for name in _safetensors_in(first, component)
        if name not in {*ours, *heavy}
    ]
    warnings = []
    if heavy:
        warnings.append(
            f"{printable(first)}: left out what may be weights of another model; if the soup needs "
            f"it, copy it there, or a soup of it: {some(heavy)}"
        )
    pickles = [name for name in names_in(first) if name.startswith(_MODELS)]
    pickles = [name for name in pickles if name.endswith(PICKLES) and name not in ours]
    if pickles:
        warnings.append(
            f"{printable(first)}: left out {some(pickles)}, as there is "
            f"{printable(next(iter(sorted(ours))))}"
        )
    if spare:
        warnings.append(
            f"{printable(first)}: left out weights that are not part of "
            f"{printable(_called(ingredients[0]))}: {some(spare)}"
        )
    if strange:
        warnings.append(
            f"{printable(first)}: left out what is neither a plain file nor a link to one in this "
            f"folder; if the soup needs it, copy it there: {some(strange)}"
        )
    for name in [name for name in names if _size(os.path.join(first, name)) > LARGEST]:
        names.remove(name)
        warnings.append(
            f"{printable(os.path.join(first, name))}: left out, too large for a side file"
        )
    unfetched = [name for name in names if _is_pointer(os.path.join(first, name))]
    if unfetched:
        warnings.append(
            f"{printable(first)}: has Git LFS pointers, whose content was never fetched; run "
            f"`git lfs pull`, or put the content beside the soup: {some(unfetched)}"
        )
    # As links lead now, so that what they lead to later is not copied.
    dequantised = reading.dequantize
    if dequantised:
        names = [name for name in names if not is_of_quantisation(name)]
    source = ingredients[0].source
    changed = source.side_files
    files = [
        SideFile(name, os.path.realpath(os.path.join(first, name)), changed.get(name))
        for name in (*names, *copied)
    ]
    longest = config_folder(source.longest) if isinstance(source, Lengthened) else None
    if longest is not None:
        files = _with_vocabulary(files, longest)
    if dequantised:
        files = [_without_quantisation(file) for file in files]
        values = any(spec.delivered for _, spec in ingredients[0].layout.places.values())
        dtype = DTYPES["BF16"] if dtype is None and values else dtype
    if dtype is not None:
        configs = {
            os.path.join(component, "config.json") for component in ingredients[0].components
        }
        files = [_with_dtype(file, dtype) if file.name in configs else file for file in files]
    first_parts = ingredients[0].components
    for other in ingredients[1:]:
        if other.folder is None or os.path.realpath(other.folder) == os.path.realpath(first):
            continue
        theirs, _, _ = _walk(other.folder, _folders(other))
        apart = tuple(f"{each}/" for each in _folders(ingredients[0]) if each not in first_parts)
        different = [
            text
            for name in sorted({*theirs, *names} - (changed.keys() & {"adapter_config.json"}))
            if not (dequantised and is_of_quantisation(name))
            and not (longest is not None and is_of_tokenizer(name))
            and not (apart and name.startswith(apart))
            and (text := _difference(name, first, other.folder, reading)) is not None
        ]
        if different:
            warnings.append(
                f"side files of {printable(other.name)} differ from those of "
                f"{printable(ingredients[0].name)}, which are used: {some(different)}"
            )
    return files, warnings


def _difference(name: str, first: str, other: str, reading: Reading) -> str | None:
    """Return a side file's name where two folders differ in it, with the keys if it has any.

    None where they do not, or in bookkeeping alone.
    """
    paths = os.path.join(first, name), os.path.join(other, name)
    if is_equal(*paths):
        return None
    configs = [read_config(path) if name.endswith(".json") else None for path in paths]
    if configs[0] is None or configs[1] is None:
        return name
    one, two = configs[0], configs[1]
    if reading.dequantize:
        one, two = without_quantisation(one), without_quantisation(two)
    found = changes(one, two)
    telling = [change for change in found if change.kind != "bookkeeping"]
    if reading.embeddings == "common":
        telling = [change for change in telling if not change.is_of_vocabulary]
    if telling:
        return f"{name} ({some(telling, 3)})"
    return None  # or the same keys and values, written in another way


def _held(ingredient: Ingredient) -> list[SideFile]:
    """List the side files that a source holds itself: those of a live model."""
    files = ingredient.source.side_files
    return [SideFile(name, ingredient.path, content) for name, content in files.items()]


def _folders(ingredient: Ingredient) -> list[str]:
    """List the folders in that of an ingredient whose files may belong to the soup."""
    copied = map(os.path.dirname, ingredient.source.copied)
    return list(dict.fromkeys(["", *ingredient.components, *copied]))


def _safetensors_in(folder: str, component: str) -> list[str]:
    """List the safetensors files in a folder of an ingredient, relative to it."""
    inner = os.path.join(folder, component)
    names = names_in(inner) if os.path.isdir(inner) else []
    return [
        os.path.join(component, name)
        for name in names
        if name.endswith(".safetensors") and name[0] != "."
    ]


def _check_copied(path: str, folder: str) -> None:
    """Raise an error for weights that have to be copied and cannot: a soup would not load."""
    check_inside(path, folder)
    if not os.path.isfile(path):
        raise MissingFileError(
            f"{printable(path)}: no such file, and the soup needs it to load; the pipeline is not "
            "complete, so download or save it again"
        )


def _called(ingredient: Ingredient) -> str:
    """Return what the weights of an ingredient are called: its index, file or components."""
    if ingredient.components != ("",):
        return f"the components {some(ingredient.components)}"
    return ingredient.index_name or ingredient.file_names[0]


def _walk(folder: str, parts: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """List the side files below a folder, and what has their place but is not a regular file.

    What may be weights of another model comes third, folders with all that they hold, but for the
    `parts` that are components; those of a training run are passed over. Raises `FormatError` for
    what cannot be looked at: it may be a tokenizer.
    """
    names: list[str] = []
    strange: list[str] = []
    heavy: list[str] = []
    for at, folders, files in os.walk(folder, onerror=_refuse_unlisted, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith(_OF_TRAINING))
        weighty = [
            name
            for name in folders
            if _holds_weights(os.path.join(at, name))
            and os.path.relpath(os.path.join(at, name), folder) not in parts
        ]
        heavy += [os.path.relpath(os.path.join(at, name), folder) for name in weighty]
        folders[:] = [name for name in folders if name not in weighty]
        ours = [name for name in folders if _matches(name, _OF_A_SOUP)]
        strange += [os.path.relpath(os.path.join(at, name), folder) for name in ours]
        folders[:] = [name for name in folders if name not in ours]
        linked = [name for name in folders if os.path.islink(os.path.join(at, name))]
        for name in sorted(files + linked):
            path = os.path.join(at, name)
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            if name.startswith("."):
                continue
            if _matches(name, LEFT_OUT):
                if name.lower().endswith(SUFFIXES) and not _matches(name, _FAMILIAR):
                    heavy.append(relative)
                continue
            fits = _is_regular(path) and _is_inside(path, folder)
            (names if fits else strange).append(_checked(relative, path))
    return names, strange, heavy


def _is_inside(path: str, folder: str) -> bool:
    """Return False for a link that leads out of the ingredient: see `formats.links`."""
    return not os.path.islink(path) or real_inside(path, folder) is not None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def _refuse_unlisted(error: OSError) -> NoReturn:
    path = printable(os.fsdecode(error.filename))
    raise FormatError(
        f"{path}: cannot be listed: {error.strerror}; fix that and run again"
    ) from None


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link that leads nowhere
            return False
        raise FormatError(
            f"{printable(path)}: cannot be read: {error.strerror}; fix that and run again"
        ) from None


def _checked(name: str, path: str) -> str:
    """Refuse names that could not be noted in a provenance, before hours of work."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FormatError(
            f"{printable(path)}: the name of this side file is not Unicode; rename or remove it"
        ) from None
    return name


def _holds_weights(path: str) -> bool:
    try:
        files = os.listdir(path)
    except OSError as error:
        _refuse_unlisted(error)
    return any(file.lower().endswith(SUFFIXES) for file in files)


def pieces(path: str, *, follows: bool = True) -> Iterator[bytes]:
    """Yield the content of a regular file, a piece at a time. Raise `OSError` for all others."""
    with reading_of(path, follows=follows) as (descriptor, _):
        while piece := os.read(descriptor, 1 << 20):
            yield piece


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _is_pointer(path: str) -> bool:
    try:
        head = b"".join(pieces(path)) if _size(path) < 1024 else b""
    except (OSError, ValueError):
        return False
    return head.startswith(b"version https://git-lfs.github.com/")


def is_equal(a: str, b: str) -> bool:
    """Return True if two paths lead to regular files of the same content."""
    try:
        if os.path.samefile(a, b):
            return True
        if os.path.getsize(a) != os.path.getsize(b):
            return False
        return all(x == y for x, y in zip(pieces(a), pieces(b), strict=True))
    except (OSError, ValueError):
        return False


def _with_dtype(file: SideFile, dtype: DType) -> SideFile:
    """Make a model's configuration name the dtype of the soup, under the key it uses."""
    config = read_config(file.path) if file.content is None else json.loads(file.content)
    if config is None:
        return file
    if not _say_dtype(config, TORCH_NAMES[dtype.name]):
        return file
    return _rewritten(file, config)


def _with_vocabulary(files: Sequence[SideFile], longest: str) -> list[SideFile]:
    """Return side files with the tokenizer in a folder, and a configuration with its length."""
    names, _, _ = _walk(longest, ())
    found = [file for file in files if not is_of_tokenizer(file.name)]
    found += [
        SideFile(name, os.path.realpath(os.path.join(longest, name)), None)
        for name in names
        if is_of_tokenizer(name)
    ]
    whole = read_config(os.path.join(longest, "config.json"))
    for number, file in enumerate(found):
        config = read_config(file.path) if file.name == "config.json" else None
        if config is not None and whole is not None:
            found[number] = _rewritten(file, with_vocabulary(config, whole))
    return sorted(found, key=lambda file: file.name)


def _without_quantisation(file: SideFile) -> SideFile:
    """Make a model's configuration say nothing of quantisation."""
    if os.path.basename(file.name) not in ("config.json", "params.json"):
        return file
    config = read_config(file.path) if file.content is None else json.loads(file.content)
    if config is None:
        return file
    plain = without_quantisation(config)
    return file if plain == config else _rewritten(file, plain)


def _rewritten(file: SideFile, config: Mapping[str, object]) -> SideFile:
    """Return a configuration with another content."""
    try:
        content = json.dumps(config, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character can only be written as the escape it came as
        content = json.dumps(config, indent=2).encode()
    except RecursionError:  # read without trouble, but nested too deep to be written with indents
        content = json.dumps(config).encode()
    return SideFile(file.name, file.path, content + b"\n")


def _say_dtype(config: dict[str, object], name: str) -> bool:
    """Put a dtype wherever there is one, in the parts of a model too; say if there was any."""
    parts, found = [config], False
    for part in parts:
        inner = [value for key, value in part.items() if key.endswith("_config")]
        parts += [value for value in inner if isinstance(value, dict)]
        for key in ("dtype", "torch_dtype"):
            # A part that says null goes by the whole.
            if key in part and (part is config or part[key] is not None):
                part[key], found = name, True
    return found
