"""The command that scores a soup at every point of a grid of its parameters."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, greedy, planning, reports, results
from streamsoup.cli.help import Command
from streamsoup.errors import printable

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options, Planned
    from streamsoup.output.make import Order

NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"{NUMBER}:{NUMBER}:{NUMBER}")


WINDOWS = "windows"
"""What is swept in the place of a verb: which of the last checkpoints of a run, and how."""


class _Sweep(Command):
    """``sweep VERB …``, with the options of the verb, of which some are ranges."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the name of the verb and the options of the sweep; all others are for the verb."""
        if args and args[0] in (*planning.VERBS, WINDOWS):
            ctx.obj = args[0]
            args = args[1:]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what is particular to a sweep, as click knows of no ranges."""
        formatter.write_usage(
            ctx.command_path, "VERB CKPT... --base BASE --PARAMETER FROM:TO:STEP [OPTIONS]"
        )


@click.command(
    cls=_Sweep, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@greedy.TASK
@greedy.SCORING
@reports.REPORT
@click.option("--output", "-o", required=True, metavar="OUT", help="Folder of the best soup.")
def sweep(
    words: tuple[str, ...],
    output: str,
    report: str | None,
    **told: Any,
) -> int:
    """Score a soup at every point of a grid of its parameters, and write the best.

    VERB is a command that makes a soup, such as ties, with all its own options. Those given as
    FROM:TO:STEP are swept, all combinations of them:

    streamsoup sweep ties A B --base BASE --density .1:.9:.1 --lambda .2:1:.2 --task task.py -o OUT

    With windows in the place of VERB: how many of the last checkpoints of a run are averaged, how
    far apart, and by which curve (uniform, ema, sqrt, cosine):

    streamsoup sweep windows RUN --last 2:6:1 --every 1:2:1 --task task.py -o OUT
    """
    context = click.get_current_context()
    verb = context.obj
    if verb is None:
        raise click.UsageError(
            f"first the command that makes the soup: {', '.join(sorted(planning.VERBS))}; or "
            f"{WINDOWS}"
        )
    rules = {name: told.pop(name) for name in greedy.SCORED}
    split = told.pop("split")
    greedy.check_scoring(told)
    if verb == WINDOWS:
        points, first, settings = _windows(context, words)
    else:
        points, first, settings = _planned(context, verb, words)
    paths = first.plan.recipe.ingredients
    quiet = settings["quiet"]

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from msgspec.structs import replace

        from streamsoup.search.sweep import SweepSettings, sweep_points

        reports.check(report, paths, output)
        in_server = bool(rules["servers"])
        chosen = SweepSettings(split=split, isolate=not in_server, **rules)
        task = greedy.make_task(told, chosen.timeout, paths[0], in_server=in_server)
        watch = common.telling_notes(watcher, quiet=as_json or quiet, line_of=_line_of)
        options = replace(options, on_event=watch)
        soup = sweep_points(points, first, task, output=output, settings=chosen, options=options)
        watcher.close()
        seen = reports.write(soup, report)
        if as_json:
            found = results.as_json(soup, watcher) | {"report": soup.report}
            results.tell([json.dumps(found)])
            return
        from streamsoup.study.report.sweeps import lines

        results.tell([*lines(soup.report), f"the best is in {printable(soup.path)}", *seen])

    return common.supervise(work, "sweep", paths, settings)


@click.command(WINDOWS, add_help_option=False)
@arguments.INGREDIENTS
@click.option("--last", default="1:6:1")
@click.option("--every", default="1")
@click.option("--curve", "curves", type=arguments.Names(), default="uniform,ema,sqrt,cosine")
@click.option("--decay", type=arguments.Number(), default=0.9)
@click.option("--by", type=click.Choice(["step", "name", "time", "given"]))
@arguments.MAKING
@arguments.RUNNING
@arguments.RAY
@arguments.REPORTING
def _window_options(**_: Any) -> None:
    """Declare the options of windows, besides those of a sweep."""


def _windows(context: click.Context, words: Sequence[str]) -> tuple[list[Any], Any, dict[str, Any]]:
    """Plan windows of a run; return what `_planned` returns."""
    from streamsoup.options import Options
    from streamsoup.search.windows import plan_windows
    from streamsoup.study.measures.barriers import parse_alphas

    told = _window_options.make_context(context.info_name, list(words), context).params
    numbers: dict[str, Any] = {}
    for name in ("last", "every"):
        given = parse_alphas(told[name], f"--{name}")
        numbers[name] = [int(n) if n == int(n) else n for n in given]
    settings = {name: value for name, value in told.items() if name in Options.__struct_fields__}
    points, ordered = plan_windows(
        told["ingredients"],
        **numbers,
        curves=told["curves"],
        decay=told["decay"],
        by=told["by"],
        options=Options(**settings),
    )
    return points, ordered, settings | {name: told[name] for name in ("quiet", "as_json")}


def _planned(
    context: click.Context, verb: str, words: Sequence[str]
) -> tuple[list[Any], Any, dict[str, Any]]:
    """Plan the soup of each point; return all points, one of the plans, and the options."""
    from streamsoup.search.sweep import Point, places

    axes = _axes(words)
    if not axes:
        raise click.UsageError(
            "nothing to sweep: give an option of the command as FROM:TO:STEP, such as "
            "--density .1:.9:.1"
        )
    found: list[tuple[Planned, dict[str, Any]]] = []
    points: list[Point] = []
    every: dict[str, int] = {}
    """Numbers of all ingredients: a range of checkpoints takes others at each point."""
    for values in places(dict(axes.values())):
        own = list(words)
        for (at, (_name, _)), value in zip(axes.items(), values.values(), strict=True):
            text = str(int(value)) if value == int(value) else repr(value)
            own[at] = RANGE.sub(text, own[at])
        planning.plan_verb(context, [verb, *own], lambda plan, told: found.append((plan, told)))
        plan, settings = found.pop()
        if plan.n_before:
            raise click.UsageError(
                f"{verb} takes its coefficients from the angles between the weights, and cannot "
                "be swept"
            )
        recipe = plan.order.plan.recipe
        members = tuple(every.setdefault(name, len(every)) for name in recipe.ingredients)
        points.append(Point(values, recipe.rule, members))
    return points, _over_all(list(every), plan.order, settings), settings


def _over_all(names: Sequence[str], one: Order, settings: dict[str, Any]) -> Order:
    """Return the plan of a soup of all ingredients that points take, for what one of them plans."""
    if list(one.plan.recipe.ingredients) == list(names):
        return one
    from msgspec.structs import replace

    from streamsoup.engine.rules.linear import Linear
    from streamsoup.options import Options
    from streamsoup.output.make import order
    from streamsoup.recipe import Coefficients

    rule, method = Linear(Coefficients.uniform(len(names))), one.plan.recipe.method
    told = {name: value for name, value in settings.items() if name in Options.__struct_fields__}
    whole = order(names, rule, method=method, options=Options(**told))
    base = {name: one.report[name] for name in ("base",) if name in one.report}
    return replace(whole, report=base)


def _axes(words: Sequence[str]) -> dict[int, tuple[str, list[float]]]:
    """Return the options that are ranges: by the place of the word, its name and its numbers."""
    from streamsoup.study.measures.barriers import parse_alphas

    axes = {}
    for at, (before, word) in enumerate(itertools.pairwise(["", *words])):
        name, _, text = word.rpartition("=") if "=" in word else (before, "", word)
        if name.startswith("-") and RANGE.fullmatch(text):
            axes[at] = (name.lstrip("-"), parse_alphas(text, name))
    return axes


def _line_of(event: object) -> str | None:
    from streamsoup.options import Step

    if isinstance(event, Step) and event.what == "point" and event.text:
        return event.text
    return None
