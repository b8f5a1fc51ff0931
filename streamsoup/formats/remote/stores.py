"""Buckets of S3 and of Google Cloud Storage, by fsspec: their listings, and addresses of objects.

The libraries of the stores (s3fs, gcsfs) know endpoints, regions and credentials. They list a
folder, and give each object an address that opens it: a signed one for S3, one with a token in a
header for Google. Its bytes are then read as those of any address, with the same retries and
checks (`formats.remote.ranges`). When an address has expired, the object is given a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from streamsoup.errors import FormatError, MissingFileError, StreamsoupError, printable
from streamsoup.formats.remote.addresses import shown
from streamsoup.formats.remote.tries import Broken, Tries

__all__ = ["Opened", "Store"]

_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
"""Scheme, which is the name of the extra, too, and the library behind it."""

_SIGNED_S = 3600
"""Seconds for which an address of S3 is signed."""

_MOST_TRIES = 8
"""Tries of a listing."""


class Opened(msgspec.Struct, frozen=True):
    """An address that opens an object for some time. Both parts are secrets: neither is shown."""

    url: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        """Return it without secrets."""
        return f"<Opened {shown(self.url)}>"


class Store:
    """The objects of one kind of store, as the credentials on this machine see them."""

    def __init__(self, scheme: str, timeout_s: float) -> None:
        """Load the library of a store. Nothing is asked of a network.

        Args:
            scheme: ``s3`` or ``gs``.
            timeout_s: Seconds without an answer that end in an error.

        Raises:
            MissingFileError: The library is not installed.
            FormatError: It does not accept its settings, or finds no credentials.
        """
        self._scheme, self._timeout_s = scheme, timeout_s
        try:
            self._files = _connected(scheme)
        except ImportError:
            raise MissingFileError(
                f"{scheme}:// is read with {_EXTRAS[scheme]}, which is not installed; type: "
                f"pip install 'streamsoup[{scheme}]'"
            ) from None
        except Exception as error:  # its text may hold secrets
            raise _no_settings(scheme, error) from None

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, sorted; none if there is no such folder.

        Raises:
            MissingFileError: The store does not let us list it.
            FormatError: It cannot be reached, or fails for too long.
        """
        inside = folder.partition("://")[2].rstrip("/")
        found = self._tried(folder, lambda: self._files.ls(f"{inside}/", detail=True, refresh=True))
        names = []
        for each in found or ():
            path = str(each["name"])
            if each.get("type") == "file" and path.startswith(f"{inside}/"):
                names.append(path.removeprefix(f"{inside}/"))
        return sorted(name for name in names if name)

    def open(self, url: str) -> Opened:
        """Return an address that opens an object, which need not exist."""
        path = url.partition("://")[2]
        if self._scheme == "s3":
            signed = self._tried(url, lambda: self._files.sign(path, expiration=_SIGNED_S))
            return Opened(str(signed), {})
        headers: dict[str, str] = {}
        self._tried(url, lambda: self._files.credentials.apply(headers))
        return Opened(str(self._files.url(path)), headers)

    def _tried(self, url: str, call: Callable[[], Any]) -> Any:
        """Call the library until it answers; return None for what does not exist.

        Its errors are named by their kinds alone: their texts may hold secrets.
        """
        trying = Tries(url, self._timeout_s, _MOST_TRIES)
        while True:
            try:
                return call()
            except FileNotFoundError:
                return None
            except PermissionError:
                raise MissingFileError(
                    f"{shown(url)}: may not be read by us; check the name and the credentials of "
                    f"{_EXTRAS[self._scheme]} (a public bucket: FSSPEC_{self._scheme.upper()}_"
                    f"{'ANON=true' if self._scheme == 's3' else 'TOKEN=anon'})"
                ) from None
            except StreamsoupError:
                raise
            except Exception as error:
                kind = type(error).__name__
                if "Credential" in kind or "Auth" in kind or isinstance(error, ValueError):
                    raise _no_settings(self._scheme, error, shown(url)) from None
                trying.again(Broken(f"{_EXTRAS[self._scheme]} failed: {kind}"))


def _connected(scheme: str) -> Any:
    """Return a file system of fsspec that keeps no listings, and that no other code holds."""
    import fsspec

    kept = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        return fsspec.filesystem("s3", **kept, cache_regions=True)
    return fsspec.filesystem("gs", **kept, access="read_only")


def _no_settings(scheme: str, error: Exception, where: str = "") -> FormatError:
    return FormatError(
        f"{where or f'{scheme}://'}: {_EXTRAS[scheme]} finds no credentials, or settings that it "
        f"cannot use ({printable(type(error).__name__)}); set them as for any program that uses "
        f"{_EXTRAS[scheme]}, and for a public bucket FSSPEC_{scheme.upper()}_"
        f"{'ANON=true' if scheme == 's3' else 'TOKEN=anon'}"
    )
