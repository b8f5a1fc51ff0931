"""What tells an ingredient on any machine, for processes that read the same files."""

from __future__ import annotations

import os

import msgspec
import xxhash

from streamsoup.errors import RecipeError, option, printable
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.remote.addresses import is_address

__all__ = ["IngredientIdentity", "how_files_differ", "identity_of"]

HEAD_NBYTES = 1 << 16
"""Bytes at the beginning of each ingredient's file that are digested: most of its header."""


class IngredientIdentity(msgspec.Struct, frozen=True):
    """What tells an ingredient on any machine: not inodes, which copies of a file do not share."""

    path: str
    files: tuple[tuple[str, int, int, str], ...]
    """Of each file: its name, size, modification time in ns, and the digest of its beginning."""


def identity_of(ingredient: Ingredient, asked: str) -> IngredientIdentity:
    """Return what tells an ingredient's files.

    Raises `RecipeError` for one without files, which names the option that was `asked` for.
    """
    files: list[tuple[str, int, int, str]] = []
    for path in ingredient.source.files:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            head = xxhash.xxh3_128_hexdigest(file.read(HEAD_NBYTES))
        files.append((os.path.basename(path), status.st_size, status.st_mtime_ns, head))
    if not files or ingredient.source.path is None:
        if is_address(ingredient.path):
            raise RecipeError(
                f"{printable(ingredient.name)}: is read over the network, and {option(asked)} "
                "is for files that all processes see; download it, a model of the Hub with "
                f"{option('download', True)}"
            )
        raise RecipeError(
            f"{printable(ingredient.name)}: is not made of files, which other processes could "
            f"read; leave out {option(asked)}"
        )
    return IngredientIdentity(ingredient.path, tuple(files))


def how_files_differ(one: IngredientIdentity, two: IngredientIdentity) -> str:
    """Return how the files of one ingredient differ between two machines, or two moments."""
    if [file[0] for file in one.files] != [file[0] for file in two.files]:
        return "has other files here"
    for (name, *here), (_, *there) in zip(one.files, two.files, strict=True):
        for what, x, y in zip(("size", "time", "digest"), here, there, strict=True):
            if x != y:
                return f"has another {what} here, in {printable(name)}"
    return "differs"
