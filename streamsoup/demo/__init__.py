"""Model soups in a minute or two, on real data: ten fine-tuned networks, averaged and compared.

`streamsoup demo` pretrains one network on handwritten digits, fine-tunes it ten times on sixty
digits of other writers, averages the ten in three ways, and prints how often each model is right,
and where a soup is better or worse than the best single model.

* `digits`: the two data sets, their splits, and the corruptions
* `network`: the small network, and its files
* `training`: pretraining and the fine-tunings, in plain torch
* `soups`: uniform, greedy and learned
* `judging`: right answers, and paired intervals of their differences
* `table`: the rows and the verdicts
* `comparison`: the report
* `task`: the task file, as a user would write one
* `steps`: all of it, in order

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

    Takes one to two minutes on two cores. The results of an earlier demo in `folder` are replaced.

    Args:
        folder: Where to write; made if it does not exist.

    Raises:
        OutputExistsError: `folder` holds anything but an earlier demo.
        OutputError: `folder` is an address, or cannot be written to.
        SystemExit: the extra dependencies are not installed; with the command that does it.
    """
    check_local(folder, OutputError)
    try:
        from streamsoup.demo import steps
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in {"mlxtend", "sklearn"}:
            raise
        raise SystemExit(
            f"error: the demo needs {package}; install its extras: pip install 'streamsoup[demo]'"
        ) from None
    steps.run(folder)
