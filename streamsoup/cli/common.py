"""What the commands share: the supervised run, which ends in a result or in one line of error."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import planning
from streamsoup.cli.results import ReaderGoneError, as_json, keep_for_the_result, say, tell
from streamsoup.errors import (
    StreamsoupError,
    in_options,
    printable,
    signal_name,
)
from streamsoup.system.supervise import status_of, supervised

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options
    from streamsoup.output.make import Soup
    from streamsoup.reading import Reading


def make_options(settings: dict[str, Any], watcher: Watcher | None = None) -> Options:
    """Return options from click's values for `MAKING`, `RUNNING` and `WRITING`."""
    from streamsoup.options import Options

    return Options(**settings, on_event=watcher)


def telling_notes(
    watcher: Watcher, *, quiet: bool, line_of: Callable[[object], str | None] = lambda event: None
) -> Callable[[object], None]:
    """Return a callback that prints notes, and events that `line_of` has a line for.

    All events go on to `watcher`.
    """

    def on_event(event: object) -> None:
        from streamsoup.options import Note

        line = event.text if isinstance(event, Note) else line_of(event)
        if line is not None and not quiet:
            say(line)
        watcher(event)

    return on_event


def make_soup(
    make: Callable[[Options], Soup],
    ingredients: Sequence[str] | Callable[[], Sequence[str]],
    settings: Any,
    say: Callable[[Soup], list[str]] | None = None,
) -> int:
    """Make a soup in a supervised process, and print a summary; `say` returns further lines."""
    if planning.is_asked_for():
        return planning.plan_soup(make, settings)
    # No code of the user's runs here, and ours has no large matrices: starting OpenBLAS's threads
    # takes 30 ms of processor time (measured), where numpy has to do without compiled kernels.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def work(options: Options, watcher: Watcher, json_wanted: bool) -> None:
        # What every soup needs stays to the end: looking for garbage in it takes 6 ms.
        gc.disable()
        importlib.import_module("streamsoup.output.make")
        gc.freeze()
        gc.enable()
        from streamsoup.cli.terminal import summary

        soup = make(options)
        watcher.close()
        if json_wanted:
            tell([json.dumps(as_json(soup, watcher))])
            return
        n = len(soup.recipe.ingredients)
        what = f"{soup.recipe.method} soup of {n} in {printable(soup.path)}"
        if soup.part is not None:
            what = f"part {soup.part[0]} of {soup.part[1]} of the {what}"
        if soup.finished:
            tell([f"{what}: an earlier run had finished it"])
            return
        numbers = (soup.nbytes_read, soup.nbytes_written, soup.elapsed_s, watcher.peak_nbytes)
        done = f"{summary(what, *numbers, soup.n_passes)}; summed on {soup.summed_on}"
        tell(
            [
                done,
                *_chosen(soup),
                *_reduced(soup),
                *(say(soup) if say is not None else ()),
                *_left(soup),
            ]
        )

    return supervise(work, "soup", ingredients, settings)


def _reduced(soup: Soup) -> list[str]:
    """Return a line on what an adapter of a lower rank leaves out."""
    errors: Any = soup.provenance.report.get("rank_errors", {})
    if not errors:
        return []
    from streamsoup.errors import count

    worst = max(errors, key=errors.__getitem__)
    return [
        f"{count(len(errors), 'module')} approximated with rank {soup.recipe.reading.rank}: "
        f"relative errors of {min(errors.values()):.2g} to {errors[worst]:.2g} "
        f"({printable(worst)})"
    ]


def _left(soup: Soup) -> list[str]:
    """Return a line on what is left to do, after a part."""
    from streamsoup.errors import some

    if soup.part is None:
        return []
    if not soup.missing:
        line = f"streamsoup commit {printable(soup.path)}"
        return [f"all parts are made; unless another one does it, put them in place: {line}"]
    return [f"parts still missing: {some([str(each) for each in soup.missing], 12)}"]


def _chosen(soup: Soup) -> list[str]:
    """Return a line on the averaged checkpoints of a run, where they were chosen."""
    from streamsoup.errors import some

    report = soup.provenance.report
    names, steps = report.get("checkpoints"), report.get("steps")
    if not isinstance(names, (list, tuple)) or not isinstance(steps, (list, tuple)):
        return []
    known = None not in steps
    what = f"steps {some(steps, 20)}" if known else some(names, 20)
    metric, scores = report.get("metric"), report.get("scores")
    if metric is not None and isinstance(scores, (list, tuple)):
        shown = some([f"{score:g}" for score in scores], 20)
        what += f"; of {report['best']} {printable(metric)}: {shown}"
    return [f"{len(names)} of {report['n_found']} checkpoints, oldest first: {what}"]


def run_paths(paths: Sequence[str]) -> Callable[[], Sequence[str]]:
    """Return what lists the ingredients, where the folder of a run stands for its checkpoints."""

    def listed() -> Sequence[str]:
        from streamsoup.methods.checkpoints import choose_any

        with suppress(StreamsoupError):
            choice = choose_any(paths)
            return paths if choice is None else [str(path) for path in choice.ingredients]
        return paths

    return listed


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end the block as Ctrl-C does: it tidies up.

    Restores the former handlers, as the caller may be another program. Outside the main thread,
    where handlers cannot be set, it changes none.
    """

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            # None: set by another language's code, which Python could not put back.
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    work: Callable[[Options, Watcher, bool], None],
    label: str,
    paths: Sequence[str] | Callable[[], Sequence[str]],
    settings: dict[str, Any],
) -> int:
    """Run `work` in a child process; turn its errors into lines and exit statuses.

    `paths` are those of the ingredients, or a callable that returns them: if reading one kills the
    child, the message names it.
    """
    from streamsoup.cli.terminal import clear_line

    if planning.is_asked_for():
        raise click.UsageError("only what makes one soup can be planned")
    as_json, quiet = settings.pop("as_json"), settings.pop("quiet")
    with_traceback = settings.pop("traceback", False)

    def child() -> int:
        from streamsoup.cli.terminal import Watcher, fitted, show_warnings

        if as_json or settings.get("ray") is not None:  # Ray tells on stdout what it has lost
            keep_for_the_result()
        watcher = Watcher(label, quiet)
        watcher.warnings = show_warnings(quiet)
        try:
            work(make_options(settings, watcher), watcher, as_json)
        except StreamsoupError as error:
            watcher.close()
            if with_traceback:
                traceback.print_exception(error)
            print(fitted(f"error: {in_options(error.text)}", sys.stderr), file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            return status_of(stop)
        except ReaderGoneError:
            return 0
        except Exception as error:
            watcher.close()
            print(fitted(f"error: {in_words(error)}", sys.stderr), file=sys.stderr)
            return 1
        finally:
            watcher.close()
        return 0

    after = "" if label in ("geometry", "verify") else "; the same command goes on from there"

    def explain(number: int, started: float) -> str:
        clear_line()
        from streamsoup.reading import Reading

        names = Reading.__struct_fields__
        reading = Reading(**{name: settings[name] for name in names if name in settings})
        return _explain(number, started, paths() if callable(paths) else paths, after, reading)

    status = supervised(child, explain)
    if status > 128:
        clear_line()
        print(f"interrupted by {signal_name(status - 128)}{after}", file=sys.stderr)
    return status


def in_words(error: Exception) -> str:
    """Return an unexpected error as one line, with the place where it was raised."""
    if isinstance(error, MemoryError):
        return "out of memory; lower --memory or --threads"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{printable(os.fsdecode(error.filename))}: {error.strerror}"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    at = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last is not None else "?"
    if isinstance(error, OSError):
        # Help and versions are printed by click.
        printing = last is not None and last.tb_frame.f_globals.get("__name__") == "click.utils"
        where = "stdout: cannot be written" if printing else f"the system failed at {printable(at)}"
        return f"{where}: {error.strerror or printable(error)}"
    return (
        f"{type(error).__name__}: {printable(error)} (at {printable(at)}); "
        "this should not happen: please report it"
    )


def _explain(
    number: int, started: float, paths: Sequence[str], after: str, reading: Reading
) -> str:
    """Return why the child died, with the shard if one caused it, followed by `after`."""
    from streamsoup.formats.ingredients import open_ingredients

    if number == signal.SIGBUS:
        times: dict[str, int] = {}
        for path in paths:
            try:
                (ingredient,) = open_ingredients([path], reading)
                times |= {file: os.stat(file).st_mtime_ns for file in ingredient.source.files}
            except (StreamsoupError, OSError) as error:
                return f"an ingredient shrank while it was being read: {error}"
        # A modification time in the future was set by hand, and tells nothing.
        since = range(int((started - 1) * 1e9), int((time.time() + 1) * 1e9))
        rewritten = [file for file, time_ns in times.items() if time_ns in since]
        if rewritten:
            return (
                f"{printable(max(rewritten, key=times.__getitem__))}: was rewritten while it was "
                "being read; nothing was written. Run again once no other process writes to it"
            )
        return (
            "a mapped ingredient could not be read (SIGBUS): its disk failed, or it was truncated "
            f"for a moment. It is one of {', '.join(map(printable, paths))}; --io read says which"
        )
    name = signal_name(number)
    why = "; the machine may be out of memory" if number == signal.SIGKILL else ""
    return f"the working process was killed by {name}{why}{after}"
