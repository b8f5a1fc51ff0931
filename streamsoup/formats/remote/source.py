"""A checkpoint in safetensors files at addresses, read by ranges, with no copy on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamsoup.formats.files import Access
from streamsoup.formats.layout import Layout
from streamsoup.formats.remote.ranges import RemoteFile, Requests
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.system.buffers import Bytes

__all__ = ["Remote"]

_RANGE = 1 << 23
"""Bytes of a tensor that are asked for at once. A leaf of 4 Mi elements of 16 bits is as large, and
the ranges begin at multiples, so that a thread reads each answer to its end."""

_CURSOR_NBYTES = 300_000
"""Bytes of a connection: its buffers, and those of TLS. 200 kB were measured for OpenSSL 3."""


class Remote(Source):
    """A checkpoint in one or several safetensors files at addresses."""

    def __init__(
        self,
        *,
        name: str,
        path: str,
        files: Sequence[tuple[str, RemoteFile, int]],
        index_name: str | None,
        layout: Layout,
        fetch_side_files: Callable[[str], None] | None,
        connect: Callable[[], Requests],
        opening_nbytes: int,
        pinned: bool,
    ) -> None:
        """Hold what was opened.

        Args:
            name: The address or id as it was given, without secrets.
            path: The address it can be opened from again, with the commit where there is one.
            files: Name, file, and offset of the first byte behind the header, of each.
            index_name: File name of its index, if it has one.
            layout: Which tensor is in which file.
            fetch_side_files: Puts the side files into a folder; None for a lone file.
            connect: Begins the requests of a thread.
            opening_nbytes: Bytes held at most while it was opened.
            pinned: True if its files never change, as those of a commit.
        """
        self._name, self._path, self._index_name = name, path, index_name
        self._files, self.layout, self._fetch = tuple(files), layout, fetch_side_files
        self._connect, self._opening_nbytes, self._pinned = connect, opening_nbytes, pinned
        self._folder: str | None = None

    @property
    def name(self) -> str:
        """The address or id as it was given, without secrets."""
        return self._name

    @property
    def path(self) -> str:
        """The address it can be opened from again."""
        return self._path

    @property
    def folder(self) -> str | None:
        """A temporary folder with its side files, which are downloaded when first asked for."""
        if self._folder is None and self._fetch is not None:
            folder = tempfile.mkdtemp(prefix="streamsoup-")
            weakref.finalize(self, shutil.rmtree, folder, True)
            self._fetch(folder)
            self._folder = folder
        return self._folder

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors, file by file, in file order."""
        return {
            name: SourceTensor(spec.dtype.name, spec.shape, None, number)
            for name, (number, spec) in self.layout.places.items()
        }

    @property
    def file_names(self) -> Sequence[str]:
        """The names of its files."""
        return tuple(name for name, _, _ in self._files)

    @property
    def index_name(self) -> str | None:
        """File name of its index, if it has one."""
        return self._index_name

    @property
    def contiguous(self) -> bool:
        """Tensors lie side by side: headers with holes are refused."""
        return True

    @property
    def fingerprint(self) -> Any:
        """Its address, and size and validator of each file."""
        told = [[name, file.size, file.validator] for name, file, _ in self._files]
        return ["remote", self._path, told]

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Ask for a byte of each file at the end of a pass, unless a commit is read.

        Between, each answer is checked as it comes.
        """
        if tensor is not None or self._pinned:
            return
        requests = self._connect()
        try:
            for _, file, _ in self._files:
                requests.check(file)
        finally:
            requests.close()

    def cost(self, *, mapped: bool) -> ReadingCost:
        """What is read goes into the block itself."""
        return ReadingCost(cursor_nbytes=_CURSOR_NBYTES, opening_nbytes=self._opening_nbytes)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor with a connection of its own, which it opens when first asked."""
        return _RemoteCursor(self._files, self.layout, self._connect())

    def where(self, tensor: str) -> str:
        """Return the address of the file that holds a tensor, and the tensor."""
        name = self._files[self.layout.places[tensor][0]][0]
        lone = self._path.endswith(".safetensors")
        return f"{self._path if lone else os.path.join(self._path, name)}: {tensor}"


class _RemoteCursor(Cursor):
    """Ranges over one connection."""

    def __init__(
        self, files: Sequence[tuple[str, RemoteFile, int]], layout: Layout, requests: Requests
    ) -> None:
        self._files, self._places, self._requests = files, layout.places, requests

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        number, spec = self._places[tensor]
        _, file, data_begin = self._files[number]
        at = data_begin + spec.begin
        until = min(spec.nbytes, begin - begin % _RANGE + _RANGE)
        self._requests.read(file, at + begin, block, at + until)

    def close(self) -> None:
        self._requests.close()
