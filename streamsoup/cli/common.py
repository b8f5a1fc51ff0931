"""What the commands share: options, and the supervised run that ends in one line."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import planning
from streamsoup.cli.values import ByName as ByName
from streamsoup.cli.values import Factors as Factors
from streamsoup.cli.values import Integer as Integer
from streamsoup.cli.values import Number as Number
from streamsoup.cli.values import Numbers as Numbers
from streamsoup.cli.values import Size as Size
from streamsoup.cli.values import by_name as by_name
from streamsoup.cli.values import for_each as for_each
from streamsoup.cli.values import numbers as numbers
from streamsoup.errors import (
    OutputError,
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

Command = Callable[..., Any]


def stack(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several, applied as if written one below the other."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


INGREDIENTS = click.argument("ingredients", nargs=-1, required=True, metavar="CKPT...")
TASK = click.option("--task", required=True, metavar="TASK", help="task.py, or module:object.")
COEFFICIENTS = click.option(
    "--coefficients",
    "-c",
    type=Factors(),
    multiple=True,
    callback=by_name,
    metavar="C,C,…|SOUP",
    help="One factor for each, such as .7,.3; or a soup, to take those it was made with. "
    "Again with a pattern of tensor names, '*mlp*=.3,.7'; 0~1 goes over the layers.",
)
TRACEBACK = click.option(
    "--traceback", is_flag=True, help="Where a task fails, print every frame of it."
)
NORMALIZE = click.option("--normalize", is_flag=True, help="Divide by the sum of the coefficients.")
REPORTING = stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress, no warnings."),
)
CONFIG = click.option(
    "--config",
    type=click.Choice(["same", "first"]),
    default="same",
    show_default=True,
    help="Configurations must mean the same, or come from the first.",
)


class Names(click.ParamType):  # type: ignore[type-arg]
    """A list of names, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the names in order; refuse empty ones."""
        if not isinstance(value, str):
            return value
        names = tuple(value.split(","))
        if not all(names):
            raise click.BadParameter(
                f"{printable(value)!r} is not a list of names such as unet,vae", ctx, param
            )
        return names


DOWNLOAD = stack(
    click.option(
        "--download",
        is_flag=True,
        help="Download models of the Hugging Face Hub (org/name) that its cache lacks.",
    ),
    click.option(
        "--network-timeout",
        type=Number(0.1, 900_000),
        default=120.0,
        show_default=True,
        metavar="SECONDS",
        help="Without a byte of a remote file, until that is an error.",
    ),
)
READING = stack(
    click.option(
        "--key",
        metavar="KEY",
        help="Of pickles with several sets of weights: which, such as state_dict_ema.",
    ),
    click.option(
        "--dequantize", is_flag=True, help="Read quantised weights as what they stand for, in bf16."
    ),
    click.option(
        "--rename",
        multiple=True,
        metavar="OLD=>NEW",
        help="Replace a prefix of the names of tensors, as in 'module.=>'.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Average these tensors only, as in '*.layers.*'; the rest is the first's.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Do not average these tensors."
    ),
    click.option("--drop", is_flag=True, help="Leave out the rest, rather than take the first's."),
    click.option(
        "--embeddings",
        type=click.Choice(["same", "common"]),
        default="same",
        show_default=True,
        help="Vocabularies of one length, or average the rows that all have.",
    ),
    click.option(
        "--components",
        type=Names(),
        default=(),
        metavar="NAME,…",
        help="Of pipelines: read these alone; a soup has the others of the first.",
    ),
    DOWNLOAD,
)
"""How the files of ingredients become tensors: the fields of `streamsoup.reading.Reading`."""
MAKING = stack(
    READING,
    click.option(
        "--rank",
        type=Integer(1),
        metavar="R",
        help="Of adapters alone: the most ranks of a module of the one they make.",
    ),
    click.option("--dtype", default="same", show_default=True, help="f32, bf16, f16, f64, …"),
    click.option(
        "--shard-size", type=Size(), metavar="SIZE", help="Largest shard; default: as in the first."
    ),
    click.option(
        "--non-float",
        type=click.Choice(["same", "first"]),
        default="same",
        show_default=True,
        help="Integers must be the same, or come from the first.",
    ),
    CONFIG,
    click.option(
        "--card/--no-card", default=True, help="Write a model card, README.md; default: yes."
    ),
    click.option(
        "--non-finite",
        type=click.Choice(["refuse", "propagate"]),
        default="refuse",
        show_default=True,
        help="What to do with NaN and Inf.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; auto is cpu for what goes to disk.",
    ),
    click.option(
        "--device-memory",
        type=Size(),
        metavar="SIZE",
        help="On the device, by all --jobs; default: 1/8 of what is free.",
    ),
)
RUNNING = stack(
    click.option(
        "--memory",
        type=Size(),
        metavar="SIZE",
        help="Of the whole process; default: 150MB, more from 5,000 tensors on.",
    ),
    click.option("--threads", type=Integer(1), help="Default: one per CPU, 8 at most."),
    click.option(
        "--io",
        type=click.Choice(["auto", "mmap", "read"]),
        default="auto",
        show_default=True,
        help="Map shards or read them; auto reads on network file systems.",
    ),
)
CHOOSING = stack(
    click.option(
        "--by",
        type=click.Choice(["step", "name", "time", "given"]),
        help="Order of checkpoints; default: RUN by step, a list as given if its steps rise.",
    ),
    click.option("--best", type=Integer(1), metavar="N", help="Only the N best, by --metric."),
    click.option("--metric", metavar="NAME", help="As the run noted it, such as eval_loss."),
    click.option("--lowest", "direction", flag_value="lowest", help="Low values are the best;"),
    click.option("--highest", "direction", flag_value="highest", help="or high ones."),
    click.option(
        "--every", type=Integer(1), default=1, metavar="K", help="Each K-th, back from the newest."
    ),
    click.option("--last", type=Integer(1), metavar="N", help="Then only the N newest."),
)
CHOICE = ("by", "best", "metric", "direction", "every", "last")
"""Which checkpoints of a run are averaged, and what the verbs call these options."""
RAY = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Spread the work over the nodes of Ray: local, auto, or HOST:PORT.",
)
SHARING = stack(
    click.option(
        "--part",
        metavar="I/N",
        help="Make one part of N; auto or auto/N: as the launcher of the job says.",
    ),
    click.option("--commit", is_flag=True, help="After the last part, put the soup in place."),
    RAY,
)
"""How the work of one soup is shared out to several processes."""


class _Output(click.Option):
    """An output, which is required unless the command only prints its recipe."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value; None if there is none and none is needed."""
        if ctx.params.get("print_recipe") and self.value_is_missing(value):
            return None
        return super().process_value(ctx, value)


def _printing(command: Command) -> Command:
    """Make a command print its recipe, and do nothing else, with --print-recipe."""

    @wraps(command)
    def run_or_print(*args: Any, print_recipe: bool, **settings: Any) -> Any:
        if not print_recipe:
            return command(*args, **settings)
        from streamsoup.cli.recipes import recipe_text

        if planning.is_asked_for():
            raise click.UsageError(
                "--print-recipe is for the command itself, without plan or sweep"
            )
        tell([recipe_text(click.get_current_context()).rstrip()])
        return 0

    return run_or_print


PRINT_RECIPE = stack(
    click.option(
        "--print-recipe",
        is_flag=True,
        is_eager=True,
        help="Print this command as a recipe for `run`, and do nothing else.",
    ),
    _printing,
)
"""What makes a command one that recipes may name: see `cli.recipes`."""
WRITING = stack(
    click.option(
        "--output", "-o", cls=_Output, required=True, metavar="OUT", help="Folder to make."
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT, in the last step."),
    PRINT_RECIPE,
)


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
        f"{count(len(errors), 'module')} of rank {soup.recipe.reading.rank}, the best "
        f"approximations of their sums: relative errors of {min(errors.values()):.2g} to "
        f"{errors[worst]:.2g} ({printable(worst)})"
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
