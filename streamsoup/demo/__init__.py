"""The whole idea in one minute: fine-tune ten small networks, soup them, count who wins.

`streamsoup demo` pretrains one network on handwritten digits, fine-tunes it ten times on the digits
of other writers, mixes the ten with `streamsoup.uniform`, and prints how often each of them is
right; also where the soup is worse.

* `digits`: the two data sets, their splits, and the corruptions
* `network`: the small network, and how it lies on disk
* `training`: pretraining and the fine-tunings, in plain torch
* `table`: the rows, and an honest comparison
* `kitchen`: all of it, in order

Importing this package costs nothing; torch is loaded by `main`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamsoup.errors import OutputError
from streamsoup.system.schemes import check_local

if TYPE_CHECKING:
    import os

__all__ = ["main"]


def main(folder: str | os.PathLike[str] = "streamsoup-demo") -> None:
    """Run the demo, leave its checkpoints and results in `folder`, and print the table.

    Takes under a minute on two cores.  Whatever `folder` holds from an earlier demo is
    replaced; `OutputExistsError` if it holds anything else, `OutputError` for an address.

    Raises `SystemExit` with a line of advice if the extra dependencies are not installed.
    """
    check_local(folder, OutputError)
    try:
        from streamsoup.demo import kitchen
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in {"mlxtend", "sklearn"}:
            raise
        raise SystemExit(
            f"error: the demo needs {package}; install its extras: pip install 'streamsoup[demo]'"
        ) from None
    kitchen.serve(folder)
