"""Which file of a folder holds its weights: an index, or the only safetensors file.

Where a folder holds more than one checkpoint, `from_pretrained`'s choice is taken, or none:
then it is refused, and what to do is said.
"""

from __future__ import annotations

import os

from streamsoup.errors import FormatError, UnsafePickleError, option, printable, some
from streamsoup.formats.conversions import of_pickle, of_training_folder
from streamsoup.formats.index import is_index, n_shards, read_index, stem

__all__ = ["PICKLES", "SUFFIXES", "find_weights", "names_in"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How the names of weights end that are not safetensors."""

SUFFIXES = (
    *(".safetensors", *PICKLES),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".gguf", ".tflite", ".ot", ".distcp"),
)
"""How the names of weights end, of any kind."""


def names_in(folder: str) -> list[str]:
    """List a folder."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise FormatError(
            f"{printable(folder)}: cannot be listed: {error.strerror}; fix that and run again"
        ) from None


def find_weights(folder: str) -> str:
    """Choose the file name of the index, or of the only safetensors file, in a folder."""
    names = names_in(folder)
    indexes = [name for name in names if is_index(name)]
    files = [name for name in names if name.endswith(".safetensors") and name[0] != "."]
    where = printable(folder)
    for plain in ("model", "diffusion_pytorch_model"):
        # Variants are only for those who ask for them, as in `from_pretrained`.
        whole = (f"{plain}.safetensors", f"{plain}.safetensors.index.json")
        if not {*whole}.isdisjoint(names):
            other = [name for name in names if name.startswith(f"{plain}.") and name not in whole]
            indexes = [name for name in indexes if name not in other]
            files = [name for name in files if name not in other]
    if "model.safetensors.index.json" in indexes:
        indexes = ["model.safetensors.index.json"]
    if len(indexes) > 1:
        raise FormatError(
            f"{where}: has several indexes ({some(indexes)}); keep one, or give the file you mean"
        )
    if indexes:
        listed = set(read_index(os.path.join(folder, indexes[0]))[0].values())
        single = f"{stem(indexes[0])}.safetensors"
        if single in files and single not in listed:
            raise FormatError(
                f"{where}: has both {printable(single)} and {printable(indexes[0])}, two "
                "checkpoints in one folder; give the file you mean, or remove one"
            )
        return indexes[0]
    if len(files) == 1:
        if n_shards(files[0]) > 1:
            raise FormatError(
                f"{where}: has {printable(files[0])} alone, one of {n_shards(files[0])} by its "
                "name, and no index; download the rest, or give the file if it is all you mean"
            )
        return files[0]
    if files:
        raise FormatError(
            f"{where}: has {len(files)} safetensors files ({some(files, 3)}) and no index that "
            "says how they belong together; give the file you mean, or add the index"
        )
    training = of_training_folder(folder, names)
    if training is not None:
        raise FormatError(
            f"{where}: has no safetensors file, but the state of a training run in parts; make it "
            f"whole first: {printable(training, 800)}"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        likely = [name for name in pickles if "model" in name] or pickles
        line = of_pickle(os.path.join(folder, likely[0]))
        raise UnsafePickleError(
            f"{where}: has no safetensors file, only PyTorch pickles ({some(pickles, 3)}), which "
            f"could run code when opened; convert them to safetensors first: {printable(line, 800)}"
        )
    inside = [name for name in names if _holds_weights(os.path.join(folder, name))]
    if not inside and "snapshots" in names:  # a model in the cache of the hub
        snapshots = [os.path.join("snapshots", name) for name in names_in(f"{folder}/snapshots")]
        inside = [name for name in snapshots if _holds_weights(os.path.join(folder, name))]
    if inside:
        named = [name for name in inside if name.replace("_", "").isalpha()]  # as unet, no steps
        components = f", or name components with {option('components')}" if named else ""
        raise FormatError(
            f"{where}: has no safetensors file, but there are some in its folders "
            f"({some(inside, 3)}); give one of those{components}"
        )
    has = f"only {some(names, 3)}" if names else "nothing at all"
    raise FormatError(f"{where}: has no safetensors file, {has}; give a folder with a checkpoint")


def _holds_weights(path: str) -> bool:
    """Return True if a folder has a safetensors file, as far as can be seen."""
    try:
        return any(name.endswith(".safetensors") for name in os.listdir(path))
    except OSError:
        return False
