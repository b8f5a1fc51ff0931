"""What commands print: results on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from streamsoup.errors import OutputError

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.output.make import Soup


class ReaderGoneError(BrokenPipeError):
    """All work is done, and the reader of stdout has closed it."""


def say(line: str, end: str = "\n") -> None:
    """Print a line on stderr; a closed stderr does not stop the work."""
    with suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


def tell(lines: Sequence[str]) -> None:
    """Print the result of finished work. Raises `ReaderGoneError` if stdout is closed."""
    from streamsoup.cli.terminal import fitted

    with telling():
        for line in lines:
            print(line if line.startswith(("{", "[")) else fitted(line, sys.stdout))


_kept: int | None = None
"""Descriptor of the real stdout, while only the result may go there; None otherwise."""


def keep_for_the_result() -> None:
    """Redirect stdout to stderr, for a user's task and all it calls, except in `telling`."""
    global _kept
    _kept = os.dup(1)
    os.dup2(2, 1)


@contextmanager
def telling() -> Iterator[None]:
    """Print the result of finished work; raise `OutputError` if stdout cannot be written."""
    try:
        if _kept is not None:
            sys.stdout.flush()
            os.dup2(_kept, 1)
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGoneError from None
    except OSError as error:
        raise OutputError(
            f"stdout: cannot be written: {error.strerror}; all work is done, but its result is not "
            "printed"
        ) from None


def tell_rows(lines: Iterable[str], watcher: Watcher) -> None:
    """Print JSON lines as one list, whose first entry has the warnings, too."""
    first, *others = [json.loads(line) for line in lines]
    tell([json.dumps([first | {"warnings": watcher.warnings}, *others])])


def as_json(soup: Soup, watcher: Watcher) -> dict[str, Any]:
    """Describe a finished soup as plain JSON."""
    import msgspec

    report = soup.provenance.report
    return {
        "path": soup.path,
        "recipe": msgspec.to_builtins(soup.recipe),
        "nbytes_read": soup.nbytes_read,
        "n_passes": soup.n_passes,
        "nbytes_written": soup.nbytes_written,
        "elapsed_s": soup.elapsed_s,
        "peak_nbytes": watcher.peak_nbytes,
        "summed_on": soup.summed_on,
        "part": soup.part,
        "missing": soup.missing,
        "warnings": watcher.warnings,
    } | {name: report[name] for name in ("rank", "rank_errors") if name in report}


def print_description(description: dict[str, Any]) -> None:
    """Print a description, a line for each entry."""
    width = max(len(key) for key in description)
    lines: list[str] = []
    for key, value in description.items():
        values = value if isinstance(value, list) else [value]
        alone = values[0] if len(values) == 1 else ""
        lines.append(f"{key.replace('_', ' '):{width}}  {alone}")
        lines += [f"  {each}" for each in values] if len(values) > 1 else []
    tell(lines)
