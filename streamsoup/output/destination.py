"""Where an output may go: never into, over or around an ingredient, and over nothing unasked."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence

from streamsoup.errors import (
    OutputError,
    OutputExistsError,
    StreamsoupError,
    option,
    printable,
    some,
)
from streamsoup.formats.files import is_mounted
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.listings import LISTINGS
from streamsoup.formats.weights import PICKLES
from streamsoup.output.belongings import part_folders, strange_files
from streamsoup.recipe import PROVENANCE_NAME
from streamsoup.system.folders import Folder
from streamsoup.system.schemes import check_local

__all__ = ["check_output", "check_outside", "check_replaceable", "exists_already"]

_Id = tuple[int, int]
"""Device and inode: the same for every path to a file or folder, bind mounts included."""


def check_output(
    output: str, ingredients: Sequence[Ingredient], *, overwrite: bool, resumes: bool
) -> str:
    """Return the real path of `output`, if a soup may be put there.

    Args:
        output: Path of the folder to make.
        ingredients: What may not be overwritten, by any link or mount.
        overwrite: An existing checkpoint may be replaced.
        resumes: An existing output may be the very soup that an unfinished run was to make.

    Raises:
        OutputExistsError: Something exists there that may not be replaced.
        OutputError: The output would lie in, over or around an ingredient, or cannot be made.
    """
    try:
        return _check_output(output, ingredients, overwrite=overwrite, resumes=resumes)
    except OSError as error:
        if isinstance(error, StreamsoupError):
            raise
        raise OutputError(
            f"{printable(output)}: cannot be made: {error.strerror}; choose another folder"
        ) from None


def _check_output(
    output: str, ingredients: Sequence[Ingredient], *, overwrite: bool, resumes: bool
) -> str:
    where = printable(output)
    check_local(output, OutputError)
    if "\0" in output:
        raise OutputError(f"{where}: the path holds a NUL character; check the path")
    if output.endswith(".safetensors"):
        raise OutputError(f"{where}: the output is a folder; leave out '.safetensors'")
    if output.split("/")[0] == "~":
        # Python would make a folder named ~, and a user might one day remove it in a shell.
        raise OutputError(
            f"{where}: only a shell replaces ~, and only where it is not quoted; "
            "write the whole path, or ./~ for a folder of that name"
        )
    try:
        target = os.path.realpath(output)
    except FileNotFoundError:
        raise OutputError(
            f"{where}: cannot be made, as the current folder was removed; go to another, or give "
            "the whole path"
        ) from None
    if not os.path.basename(target):
        raise OutputError(f"{where}: cannot be replaced; name a new folder")
    above = _ids_above(target)
    for ingredient in ingredients:
        if ingredient.folder is not None and _id(ingredient.folder) in above:
            raise OutputError(
                f"{where}: lies in the ingredient {printable(ingredient.name)}; "
                "choose a folder outside of it"
            )
    for path in (target, target + ".partial"):
        if os.path.lexists(path):
            _check_apart(path, ingredients)
    if not os.path.lexists(target):
        return target
    if not os.path.isdir(target):
        raise OutputExistsError(f"{where}: is a file; the output is a folder")
    begun = resumes and os.path.lexists(target + ".partial")
    if overwrite or not begun:
        check_replaceable(target)
    if not overwrite and not begun:
        # With work begun, an earlier run may have been killed just after it put this very output
        # in place: `Staging` finds out, and cleans up.
        raise exists_already(target)
    return target


def check_outside(path: str, ingredients: Iterable[str]) -> None:
    """Raise `OutputError` if `path` lies in an ingredient's folder, or is an address."""
    check_local(path, OutputError)
    above = _ids_above(path)
    for ingredient in ingredients:
        if os.path.isdir(ingredient) and _id(ingredient) in above:
            raise OutputError(
                f"{printable(path)}: lies in the ingredient {printable(ingredient)}; choose a "
                "folder outside of it"
            )


def exists_already(target: str) -> OutputExistsError:
    """Return the error for an output that may not be replaced."""
    return OutputExistsError(
        f"{printable(target)}: exists already; {option('overwrite', True)} replaces it"
    )


def _check_apart(folder: str, ingredients: Sequence[Ingredient]) -> None:
    """Raise `OutputError` for a folder that is an ingredient, or that one needs."""
    here = _id(folder) if os.path.exists(folder) else None
    inside = _ids_inside(folder)
    seen: dict[str, set[_Id]] = {}
    for ingredient in ingredients:
        for file in ingredient.source.files:
            ids = _ids([file])
            for path in (file, os.path.realpath(file)):
                above = os.path.dirname(path)
                if above not in seen:
                    seen[above] = _ids_above(above)
                if here in ids or ids & inside or here in seen[above]:
                    raise OutputError(
                        f"{printable(folder)}: holds the ingredient {printable(file)}; "
                        "choose another folder"
                    )


def check_replaceable(target: str) -> None:
    """Refuse to replace a folder that holds more than one checkpoint, as it was made.

    An empty folder may be replaced, a soup with the files that its provenance names and no others,
    unchanged, and a checkpoint of another tool with files of a checkpoint and no others. Costs a
    read of the headers and of the side files. Raises `OutputExistsError`.
    """
    where = printable(target)
    names = os.listdir(target)
    ours = (".safetensors", PROVENANCE_NAME, *LISTINGS)
    if names and not any(name.endswith(ours) for name in names):
        raise OutputExistsError(
            f"{where}: is not a checkpoint, so {option('overwrite', True)} does not replace it; "
            "choose another folder or remove it yourself"
        )
    parts = part_folders(target)
    others = [
        os.path.relpath(at, target)
        for at, _, files in os.walk(target, onerror=_fail)
        if at != target and any(file.endswith((".safetensors", *PICKLES)) for file in files)
    ]
    others = [path for path in others if path not in parts]
    if others:
        raise OutputExistsError(
            f"{where}: holds more than one checkpoint ({some(sorted(others))}), so "
            f"{option('overwrite', True)} "
            "does not replace it; choose another folder or remove it yourself"
        )
    with Folder.open(target) as folder:
        strange, edited = strange_files(folder)
    if edited:
        raise OutputExistsError(
            f"{where}: holds files that were changed since the soup was made ({some(edited)}) and "
            f"would be lost, so {option('overwrite', True)} does not replace it; choose another "
            f"folder or move them "
            "away"
        )
    if strange:
        raise OutputExistsError(
            f"{where}: holds files that are not part of a checkpoint ({some(strange)}) and would "
            f"be lost, so {option('overwrite', True)} does not replace it; choose another folder "
            f"or move them away"
        )
    above = os.stat(os.path.dirname(target))
    owners = (0, above.st_uid, os.stat(target).st_uid)
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        raise OutputExistsError(
            f"{where}: belongs to another user, and only its owner may replace it in that folder; "
            "choose another folder"
        )
    if not os.access(target, os.W_OK, effective_ids=True):
        raise OutputExistsError(
            f"{where}: is read-only, and so cannot be replaced; choose another folder"
        )
    if _id(target) in _ids_above(_here()) or is_mounted(target):
        raise OutputExistsError(
            f"{where}: is a mount point, or the current folder, and so cannot be replaced; "
            "choose a new folder in it"
        )


def _here() -> str:
    """Return the current folder, or the root folder if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _id(path: str) -> _Id:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _ids(paths: Sequence[str]) -> set[_Id]:
    """Identify what `paths` lead to, where they lead to something."""
    found = set()
    for path in paths:
        try:
            found.add(_id(path))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
    return found


def _fail(error: OSError) -> None:
    """Stop a walk at a folder that cannot be listed: it may hold an ingredient."""
    if error.errno != errno.ENOTDIR:
        raise error


def _ids_inside(folder: str) -> set[_Id]:
    """Identify all files below a folder; those that symbolic links lead to, too."""
    found: set[_Id] = set()
    for at, _, names in os.walk(folder, onerror=_fail):
        found |= _ids([os.path.join(at, name) for name in names])
    return found


def _ids_above(path: str) -> set[_Id]:
    """Identify the folders that `path` lies in, itself included, as far as they exist."""
    found: set[_Id] = set()
    at = os.path.realpath(path)
    while True:
        found |= _ids([at])
        above = os.path.dirname(at)
        if above == at:
            return found
        at = above
