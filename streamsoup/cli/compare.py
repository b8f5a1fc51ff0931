"""Commands that measure and show: the comparison, a path between two, a plane through three."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, results
from streamsoup.cli.help import command
from streamsoup.cli.reports import this_command
from streamsoup.errors import OutputExistsError, printable

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options
    from streamsoup.study.measures.rows import Comparison

__all__ = ["compare", "landscape", "sweep"]

RECALIBRATE = click.option(
    "--recalibrate", is_flag=True, help="Measure BatchNorm statistics anew for every mixture."
)


@command()
@arguments.INGREDIENTS
@arguments.TASK
@click.option(
    "--output",
    "--report",
    "-o",
    "output",
    required=True,
    metavar="DIR",
    help="Folder of report and cache.",
)
@click.option("--base", metavar="CKPT", help="What all were fine-tuned from: a row, and angles.")
@click.option(
    "--orders",
    type=arguments.Integer(0),
    default=3,
    show_default=True,
    help="Random greedy orders.",
)
@click.option(
    "--curve", type=arguments.Integer(0), default=8, show_default=True, help="Points of the curves."
)
@click.option(
    "--pairs",
    type=arguments.Integer(0),
    default=45,
    show_default=True,
    help="Most pairs to look at.",
)
@click.option("--no-theory", is_flag=True, help="Leave out soup and ensemble in theory.")
@click.option("--no-learned", is_flag=True, help="Leave out learned soups.")
@click.option(
    "--seed",
    type=arguments.Integer(),
    default=0,
    show_default=True,
    help="Of orders, pairs, intervals.",
)
@RECALIBRATE
@arguments.CONFIG
@arguments.READING
@arguments.RUNNING
@arguments.TRACEBACK
@arguments.REPORTING
def compare(
    ingredients: tuple[str, ...],
    task: str,
    output: str,
    base: str | None,
    no_theory: bool,
    no_learned: bool,
    orders: int,
    curve: int,
    pairs: int,
    seed: int,
    recalibrate: bool,
    **settings: Any,
) -> int:
    """Compare checkpoints, their soups and their ensembles on every split of a task.

    Writes DIR/report.html and DIR/report.md. What was measured is kept in DIR/cache: a second run
    measures nothing again, and one more checkpoint costs only what is new.
    """

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from msgspec.structs import replace

        from streamsoup.study.comparison.table import CompareSettings
        from streamsoup.study.comparison.table import compare as run_comparison
        from streamsoup.study.report.write import write_report

        chosen = CompareSettings(
            orders=orders,
            curve=curve,
            pairs=pairs,
            theory=not no_theory,
            learned=() if no_learned else ("global", "layer"),
            recalibrate=recalibrate,
            seed=seed,
        )
        found = run_comparison(
            ingredients,
            task,
            output=output,
            base=base,
            settings=chosen,
            options=options,
        )
        watcher.close()
        found = replace(found, commands=(this_command(),))
        page = write_report(found, output)
        if as_json:
            results.tell_rows(found.to_lines(), watcher)
            return
        known = "nothing was measured again" if not found.n_measured else "the rest was known"
        last = f"{found.n_measured} answers measured, {known}; the report is {printable(page)}"
        results.tell([*_table(found, shutil.get_terminal_size().columns), last])

    paths = ingredients if base is None else (base, *ingredients)
    return common.supervise(work, "compare", paths, settings)


@command()
@click.argument("base")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@arguments.TASK
@click.option("--plot", required=True, metavar="PNG", help="The picture; rows go beside it.")
@click.option("--split", "splits", multiple=True, help="Default: the first one of the task.")
@click.option(
    "--resolution", type=arguments.Integer(2, 1000), default=21, show_default=True,
    help="Points along the longer side.",
)  # fmt: skip
@click.option(
    "--margin", type=arguments.Number(0, 10), default=0.25, show_default=True,
    help="Beyond the checkpoints, as a part of the longer side.",
)  # fmt: skip
@RECALIBRATE
@arguments.CONFIG
@arguments.READING
@arguments.RUNNING
@arguments.TRACEBACK
@arguments.REPORTING
def landscape(
    base: str,
    first: str,
    second: str,
    task: str,
    plot: str,
    splits: tuple[str, ...],
    resolution: int,
    margin: float,
    recalibrate: bool,
    **settings: Any,
) -> int:
    """Draw error and loss on the plane through BASE, A and B.

    What was measured is kept in PNG.cache, so a run that was stopped goes on.
    """

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from streamsoup.output.destination import check_outside
        from streamsoup.study.landscape.landscape import LandscapeSettings
        from streamsoup.study.landscape.landscape import landscape as measure
        from streamsoup.study.pages.page import write_text
        from streamsoup.study.report.figures import check_picture
        from streamsoup.study.report.paths import draw_landscape

        check_picture(plot)
        check_outside(plot, (base, first, second))
        cache, rows = f"{plot}.cache", f"{os.path.splitext(plot)[0]}.jsonl"
        for each in () if os.path.exists(os.path.join(cache, "lock")) else (plot, rows):
            if os.path.lexists(each):
                raise OutputExistsError(
                    f"{printable(each)}: exists already and is not a landscape of streamsoup; "
                    "choose another name for --plot"
                )
        chosen = LandscapeSettings(
            resolution=resolution, margin=margin, splits=splits, recalibrate=recalibrate
        )
        found = measure(
            base,
            first,
            second,
            task,
            cache=cache,
            settings=chosen,
            options=options,
        )
        watcher.close()
        draw_landscape(found, plot)
        write_text(rows, "".join(f"{each}\n" for each in found.to_lines()))
        if as_json:
            results.tell_rows(found.to_lines(), watcher)
            return
        n = len(found.xs) * len(found.ys)
        results.tell([f"{n} points in {printable(plot)}, and as rows in {printable(rows)}"])

    return common.supervise(work, "landscape", (base, first, second), settings)


def sweep(
    ends: tuple[str, str],
    alphas: str,
    task: str,
    output: str,
    recalibrate: bool,
    settings: dict[str, Any],
) -> int:
    """Measure the path between two checkpoints, and report it in the folder `output`."""

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from streamsoup.study.comparison.table import check_folder
        from streamsoup.study.landscape.paths import wise_ft as measure
        from streamsoup.study.measures.barriers import parse_alphas
        from streamsoup.study.report.write import write_report

        at = parse_alphas(alphas)
        check_folder(output, ends)
        cache = os.path.join(output, "cache")
        found = measure(*ends, task, at, cache=cache, recalibrate=recalibrate, options=options)
        watcher.close()
        path = write_report(found, output, commands=(this_command(),))
        if as_json:
            results.tell_rows(found.to_lines(), watcher)
            return
        best, val = found.best, found.splits.val
        score = found.values[val][found.alphas.index(best)]
        said = f"best α on {printable(val)}: {best:g} ({found.metric} {score:.4g})"
        results.tell([f"{said}; see {printable(path)}"])

    return common.supervise(work, "interpolate", ends, settings)


def _table(found: Comparison, width: int) -> list[str]:
    """Return all rows but the ingredients' in columns, wrapped to the width."""
    rows = [row for row in found.rows if row.kind != "ingredient"]
    show: Callable[[float], str] = (
        (lambda x: f"{100 * x:.2f}") if found.is_share else (lambda x: f"{x:.4g}")
    )
    lines = [["", *found.splits.columns, "of"]]
    for row in rows:
        values = [row.cells[column].value for column in found.splits.columns]
        count = f"{row.n_ingredients:.3g}"
        lines.append([row.name, *(show(x) if x == x else "–" for x in values), count])
    names = _one_width([printable(line[0], 1000) for line in lines], max(12, width // 2))
    parts: list[list[list[str]]] = []
    room = 0
    for column in zip(*(line[1:] for line in lines), strict=True):
        cells = _one_width([printable(cell, 1000) for cell in column], max(8, width // 3))
        each = 2 + len(cells[0])
        if not parts or room < each:
            parts.append([names])
            room = width - len(names[0])
        parts[-1].append([cell.strip().rjust(each - 2) for cell in cells])
        room -= each
    text = [["  ".join(row).rstrip() for row in zip(*part, strict=True)] for part in parts]
    return [row for n, rows in enumerate(text) for row in ([""] * bool(n) + rows)]


def _one_width(cells: list[str], most: int) -> list[str]:
    """Return cells of one width, `most` or less, with the middle of longer ones left out."""
    half = (most - 1) // 2
    cells = [cell if len(cell) <= most else f"{cell[:half]}…{cell[-half:]}" for cell in cells]
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]
