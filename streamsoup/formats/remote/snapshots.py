"""The folder of a model of the Hugging Face Hub: its snapshot in the cache, downloaded if asked."""

from __future__ import annotations

import os

from streamsoup.errors import FormatError, MissingFileError, printable
from streamsoup.formats.remote.hub_cache import HubModel, find_cached, hub_model, not_found
from streamsoup.formats.weights import SUFFIXES

__all__ = ["snapshot_of", "with_snapshots"]

_OTHERS = tuple(f"*{suffix}" for suffix in SUFFIXES if suffix != ".safetensors")


def snapshot_of(model: HubModel, *, download: bool) -> str:
    """Return the folder of a model: a complete snapshot of one commit, in the Hub's cache.

    Args:
        model: The model and its revision.
        download: Download what the cache lacks, with huggingface_hub.

    Raises:
        MissingFileError: The cache lacks it and `download` is false, or the Hub has no such model,
            or huggingface_hub is not installed.
        FormatError: The download failed.

    A snapshot that is complete costs its listing; nothing is asked of the network.
    """
    cached = find_cached(model)
    if cached is not None and not cached.missing:
        return cached.folder
    if not download:
        raise not_found(model, cached)
    folder = _download(model)
    cached = find_cached(model)
    if cached is not None and cached.folder == folder and cached.missing:
        raise not_found(model, cached)
    return folder


def with_snapshots(path: str, *, download: bool) -> str:
    """Return ``BASE+ADAPTER`` with the snapshots of models of the Hub in the place of their ids.

    Any other path is returned as it is. Raises what `snapshot_of` raises.
    """
    parts = path.split("+")
    if len(parts) < 2 or "\0" in path or os.path.lexists(path):
        return path
    models = [hub_model(part) for part in parts]
    known = all(
        model is not None or os.path.lexists(part)
        for part, model in zip(parts, models, strict=True)
    )
    if not known or not any(models):
        return path
    return "+".join(
        part if model is None else snapshot_of(model, download=download)
        for part, model in zip(parts, models, strict=True)
    )


def _download(model: HubModel) -> str:
    """Download the files of a model into the Hub's cache, but weights of other kinds."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingFileError(
            f"{printable(model)}: is downloaded with huggingface_hub, which is not installed; "
            "type: pip install 'streamsoup[hub]'"
        ) from None
    try:
        names = huggingface_hub.HfApi().list_repo_files(model.id, revision=model.revision)
        safe = any(name.endswith(".safetensors") for name in names)
        folder: str = huggingface_hub.snapshot_download(
            model.id, revision=model.revision, ignore_patterns=[*_OTHERS] if safe else None
        )
    except Exception as error:
        raise _refused(model, error) from None
    return folder


def _refused(model: HubModel, error: Exception) -> MissingFileError | FormatError:
    """Return the error for a download that failed.

    Its own text is left out: it may hold a signed address, which opens a private file.
    """
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        return MissingFileError(
            f"{printable(model)}: the Hub does not give it to us ({kind}, status {status}); check "
            "the name and the revision, and for a private or gated model type `hf auth login`"
        )
    told = f"{kind}, status {status}" if status else kind
    return FormatError(
        f"{printable(model)}: could not be downloaded from the Hub ({told}); check the network, "
        "and run again: what was downloaded is kept"
    )
