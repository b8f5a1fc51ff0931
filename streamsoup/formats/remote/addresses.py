"""Addresses: which are read, how they are shown, and which of them are sent a token.

The query of an address may be a signature that opens a private file, so it is sent and never shown.
A token is sent to the origin of the Hub alone, as huggingface_hub does, and to no redirect.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit, urlunsplit

from streamsoup.errors import MissingFileError, printable

__all__ = [
    *("check_address", "check_object", "endpoint", "is_address", "is_here", "origin", "shown"),
    *("store_of", "token_for"),
]

_SCHEMES = ("https", "http", "hf")
_STORES = ("s3", "gs")


def is_address(path: str) -> bool:
    """Return True for what is read: ``https://``, ``http://``, ``hf://``, ``s3://``, ``gs://``."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.lower() in (*_SCHEMES, *_STORES)


def store_of(path: str) -> str | None:
    """Return the kind of store whose object or folder a path names, ``s3`` or ``gs``; else None."""
    scheme, separator, _ = path.partition("://")
    return scheme.lower() if separator and scheme.lower() in _STORES else None


def check_object(url: str) -> None:
    """Raise `MissingFileError` for an address of a store that names no bucket and key."""
    scheme, _, path = url.partition("://")
    bucket, _, key = path.partition("/")
    where = shown(url)
    if "@" in bucket or ":" in bucket:
        raise MissingFileError(f"{where}: holds a password or port; set these for the library")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise MissingFileError(f"{where}: names no bucket; write {scheme}://bucket/folder")
    if not key.isprintable() or any(c in key for c in "?#*[") or "//" in f"/{key}".rstrip("/"):
        raise MissingFileError(
            f"{where}: is not read: a key has no query, pattern, empty part or control character"
        )


def check_address(url: str) -> None:
    """Raise `MissingFileError` for an address that is not read: the reason, without its secrets."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise MissingFileError("this address cannot be parsed; check it") from None
    where = shown(url)
    if not parts.hostname or any(ord(c) <= 32 or ord(c) > 126 for c in url):
        raise MissingFileError(f"{where}: is not an address; percent-encode what is not ASCII")
    if parts.username is not None or parts.password is not None:
        raise MissingFileError(f"{where}: holds a password, which is not read; leave it out")
    if parts.scheme.lower() == "http" and not is_here(url):
        raise MissingFileError(f"{where}: http:// is read from this machine only; use https://")


def shown(url: str) -> str:
    """Return an address as messages and records have it.

    >>> shown("https://me:secret@host/a.safetensors?Signature=secret#x")
    'https://host/a.safetensors'
    """
    if (scheme := store_of(url)) is not None:
        bucket, slash, key = url.partition("://")[2].partition("/")
        plain = key.partition("?")[0].partition("#")[0]
        return printable(f"{scheme}://{bucket.rpartition('@')[2]}{slash}{plain}")
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address"
    return printable(
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    )


def is_here(url: str) -> bool:
    """Return True for an address of this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of an address."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or (443 if scheme == "https" else 80)


def endpoint() -> str:
    """Return the address of the Hub: ``HF_ENDPOINT``, else https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def token_for(url: str) -> str | None:
    """Return the token of huggingface_hub for an address of the Hub; None for any other.

    It is in ``HF_TOKEN``, or in the file that ``hf auth login`` writes.
    """
    if origin(url) != origin(endpoint()):
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if found := os.environ.get(name, "").strip():
            return _plain(found)
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    above = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(above, "token")
    try:
        with open(os.path.expanduser(os.path.expandvars(path)), encoding="ascii") as file:
            return _plain(file.read(10_000).strip())
    except (OSError, ValueError):
        return None


def _plain(token: str) -> str | None:
    """Return a token that a header can hold."""
    return token if token and token.isascii() and token.isprintable() else None
