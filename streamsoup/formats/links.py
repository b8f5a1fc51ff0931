"""Where links inside an ingredient may lead: a folder may come from anywhere.

A link in a downloaded folder can point at a private key or at ``/proc/self/environ``, and what is
copied beside a soup is uploaded with it. So a link is followed only if it stays inside the
ingredient, or leads into the ``blobs`` of the Hugging Face cache that the ingredient is a snapshot
of. The path that the user gave is followed wherever it leads.
"""

from __future__ import annotations

import os

from streamsoup.errors import FormatError, printable

__all__ = ["check_inside", "real_inside"]


def real_inside(path: str, folder: str) -> str | None:
    """Return the real path of an entry of an ingredient's `folder`; None if that is outside of it.

    Links that are circular or lead to nothing inside are returned as they are.
    """
    root, real = os.path.realpath(folder), os.path.realpath(path)
    inside = [root]
    snapshots, _, revision = root.rpartition("/snapshots/")
    if revision:
        inside.append(f"{snapshots}/blobs")
    return real if any(real.startswith(f"{each.rstrip('/')}/") for each in inside) else None


def check_inside(path: str, folder: str) -> None:
    """Raise `FormatError` for a file of weights that is a link out of its ingredient."""
    if os.path.islink(path) and os.path.exists(path) and real_inside(path, folder) is None:
        raise FormatError(
            f"{printable(path)}: is a link out of the ingredient, to "
            f"{printable(os.path.realpath(path))}; put the file itself there, or give the path of "
            "the file or folder you mean"
        )
