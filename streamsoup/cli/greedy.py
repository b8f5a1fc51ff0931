"""The command that finds out which ingredients belong in the soup."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, reports, results
from streamsoup.cli.help import command
from streamsoup.errors import RecipeError, printable
from streamsoup.system.regular import read_whole
from streamsoup.system.schemes import check_local

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options
    from streamsoup.search.greedy import GreedySettings, GreedySoup, Trial

REPORT_LIMIT = 500_000_000
"""Bytes of a report that are read: as of a provenance, which may hold one."""

TASK = arguments.stack(
    click.option("--task", metavar="FILE|MODULE:OBJECT", help="A task file: build() and score()."),
    click.option(
        "--command",
        metavar="COMMAND",
        help="'python eval.py {checkpoint}', say; prints a score, larger is better.",
    ),
    click.option("--lm-eval", metavar="TASKS", help="Of lm-evaluation-harness: a,b.yaml,…"),
    click.option("--limit", type=arguments.Integer(1), help="Examples per task of --lm-eval."),
    click.option("--batch-size", metavar="N|auto", help="Of --lm-eval: examples at once; else 1."),
    click.option("--metric", metavar="NAME", help="Which number of --command or --lm-eval counts."),
    click.option("--split", metavar="NAME", help="Split to search on; default: the task's first."),
)
SCORING = arguments.stack(
    click.option("--recalibrate", is_flag=True, help="Measure BatchNorm statistics anew."),
    click.option("--jobs", type=arguments.Integer(1), default=1, help="Candidates scored at once."),
    click.option(
        "--timeout", type=arguments.Number(), metavar="S", help="Seconds a score may take."
    ),
    click.option("--restart", is_flag=True, help="Forget the scores of an unfinished search."),
    click.option(
        "--server",
        "servers",
        multiple=True,
        metavar="URL",
        help="Score in an inference server; several score side by side.",
    ),
    click.option(
        "--server-kind", type=click.Choice(["vllm", "sglang"]), help="What the servers are."
    ),
    click.option(
        "--scratch", metavar="DIR", help="Where servers find candidates: tmpfs, or an NVMe disk."
    ),
    click.option(
        "--reload-timeout",
        type=arguments.Number(),
        default=600.0,
        metavar="S",
        help="Seconds that a server may take to load one.",
    ),
)
SCORED = (
    *("recalibrate", "jobs", "timeout", "restart"),
    *("servers", "server_kind", "scratch", "reload_timeout"),
)
"""The options of `SCORING`."""
SEARCHING = arguments.stack(
    click.option("--scores", metavar="S,S,…|FILE", help="Known scores, or an earlier soup's file."),
    click.option(
        "--order",
        type=click.Choice(["scores", "given", "random"]),
        default="scores",
        show_default=True,
        help="What to try first.",
    ),
    click.option(
        "--orders",
        "n_orders",
        type=arguments.Integer(1),
        default=1,
        help="How many, with --order random.",
    ),
    click.option("--seed", type=arguments.Integer(), default=0, help="Of the random orders."),
    click.option(
        "--ties",
        type=click.Choice(["accept", "reject"]),
        default="accept",
        show_default=True,
        help="Keep at equal score (the paper), or not (its code).",
    ),
    click.option(
        "--min-gain", type=arguments.Number(), default=0.0, help="How much better it has to get."
    ),
    click.option(
        "--z",
        type=arguments.Number(),
        default=0.0,
        help="The same, in standard errors of a paired comparison.",
    ),
    click.option("--backward", is_flag=True, help="Start from all, and drop the worst."),
    click.option(
        "--passes",
        type=arguments.Integer(1),
        default=1,
        help="Over those left out, while it helps.",
    ),
    click.option(
        "--sums",
        type=click.Choice(["reread", "memory", "file"]),
        help="Where the running sum is kept; default: where the fewest bytes are moved.",
    ),
)

RULES = (
    *("scores", "order", "n_orders", "seed", "ties", "min_gain", "z", "backward", "passes"),
    "sums",
    *SCORED,
)
"""The options of `SEARCHING` and `SCORING`."""


@command()
@arguments.INGREDIENTS
@TASK
@SCORING
@SEARCHING
@reports.REPORT
@arguments.WRITING
@arguments.MAKING
@arguments.RUNNING
@arguments.RAY
@arguments.TRACEBACK
@arguments.REPORTING
def greedy(ingredients: tuple[str, ...], output: str, report: str | None, **settings: Any) -> int:
    """Add checkpoints to a soup, best first, each only if the score does not suffer."""
    names = ("task", "command", "lm_eval", "limit", "batch_size", "metric", "split")
    told = {name: settings.pop(name) for name in names}
    rules = {name: settings.pop(name) for name in RULES}
    check_scoring(told)
    if rules["scores"] is not None:
        rules["scores"] = _read_scores(rules["scores"])
    quiet = settings["quiet"]

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from msgspec.structs import replace

        from streamsoup.search.greedy import greedy

        reports.check(report, ingredients, output)
        in_server = bool(rules["servers"])
        task = make_task(told, rules["timeout"], ingredients[0], in_server=in_server)
        search = _settings(told["split"], rules)
        watch = common.telling_notes(watcher, quiet=as_json or quiet, line_of=_line_of)
        options = replace(options, on_event=watch)
        soup = greedy(ingredients, task, output=output, settings=search, options=options)
        watcher.close()
        seen = reports.write(soup, report)
        if as_json:
            found = results.as_json(soup, watcher) | {"report": soup.report}
            results.tell([json.dumps(found)])
            return
        results.tell([*lines(soup), *seen])

    return common.supervise(work, "greedy", ingredients, settings)


def check_scoring(told: Mapping[str, Any]) -> None:
    """Raise `UsageError` unless the options of `TASK` say one way to score."""
    if sum(told[name] is not None for name in ("task", "command", "lm_eval")) != 1:
        raise click.UsageError(
            "say how to score: one of --task task.py, --command 'python eval.py {checkpoint}', "
            "--lm-eval TASKS"
        )
    for name in ("limit", "batch_size"):
        if told["lm_eval"] is None and told[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --lm-eval")


def make_task(
    told: Mapping[str, Any], timeout: float | None, first: str, *, in_server: bool = False
) -> Any:
    """Return the task that the options name."""
    if told["command"] is not None:
        from streamsoup.task.command import command_task

        main = told["metric"]
        return command_task(told["command"], main=main, timeout=timeout, in_server=in_server)
    if told["lm_eval"] is not None:
        from streamsoup.task.harness import HarnessTask

        tasks = tuple(filter(None, map(str.strip, told["lm_eval"].split(","))))
        batch_size = told["batch_size"] or "1"
        if not re.fullmatch(r"[1-9][0-9]*|auto(:[1-9][0-9]*)?", batch_size):
            raise RecipeError(f"--batch-size {printable(batch_size)}: give a number, or auto")
        where = os.path.abspath(first)
        if in_server:
            raise RecipeError(
                "--lm-eval scores a model in this process; for a server, give --command 'lm_eval "
                "--model local-completions --model_args base_url={server}/v1/completions …'"
            )
        return HarnessTask(tasks, told["limit"], told["metric"], batch_size, where)
    if told["metric"] is not None:
        raise RecipeError("--metric goes with --command and --lm-eval; a task file says main = …")
    return told["task"]


def _settings(split: str | None, rules: Mapping[str, Any]) -> GreedySettings:
    from streamsoup.search.greedy import GreedySettings

    rules = dict(rules)
    rules["direction"] = "backward" if rules.pop("backward") else "forward"
    return GreedySettings(
        **rules,
        split=split,
        isolate=not rules["servers"],
    )


def _read_scores(text: str) -> Sequence[float] | Mapping[str, Any]:
    """Read scores: numbers, or the report in an earlier soup or its JSON."""
    check_local(text, RecipeError)
    path = os.path.join(text, "streamsoup.json") if os.path.isdir(text) else text
    if not os.path.exists(path):
        try:
            return arguments.numbers(text)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message}, and there is no such report") from None
    where = printable(path)
    try:
        found = json.loads(read_whole(path, REPORT_LIMIT))
        return dict(found.get("report", found))
    except OSError as error:
        raise RecipeError(
            f"{where}: cannot be read: {error.strerror}; give a soup, or a file with its report"
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise RecipeError(
            f"{where}: is not the report of a greedy search; give a soup, its streamsoup.json, or "
            "the scores themselves"
        ) from None


def _line_of(event: object) -> str | None:
    from streamsoup.search.trials import Trial

    return _line(event) if isinstance(event, Trial) else None


def _line(trial: Trial) -> str:
    sign = {"single": " ", "add": "+", "drop": "-", "all": " "}[trial.kind]
    name = "all" if trial.kind == "all" else printable(trial.ingredient, 60)
    against = "" if trial.to_beat is None else f" (to beat {trial.to_beat:.6g})"
    score = f"{'at most ' if trial.score.stopped else ''}{trial.score.value:.6g}"
    if trial.averaged is not None:
        score += f" ({trial.averaged.value:.6g} with averaged statistics)"
    decision = "" if trial.kind == "single" else f"  {trial.decision}"
    if trial.kind == "add" and len(trial.members) == 1 and trial.to_beat is None:
        decision += ", the first" if trial.decision == "kept" else ""
    known = "  known" if trial.known else f"  {trial.scoring_s:.2f} s"
    return f"{sign} {name}  {score}{against}{decision}{known}"


def lines(soup: GreedySoup) -> list[str]:
    """Describe a search: a table of what was kept and left out, and what it cost."""
    from streamsoup.study.report.searches import cost

    report = soup.report
    if soup.finished and not soup.runs:
        return [f"greedy soup of {len(soup.members)} in {printable(soup.path)}: already finished"]
    singles = {single["ingredient"]: single["score"] for single in report["singles"]}
    kept = [report["ingredients"][i] for i in report["members"]]
    # What a narrow terminal leaves beside the two other columns.
    limit = min(60, max(16, shutil.get_terminal_size((100, 24)).columns - 24))
    width = max(len(printable(name, limit)) for name in report["ingredients"])
    said = [f"{'ingredient':{width}}  alone     in the soup"]
    others = [name for name in report["ingredients"] if name not in kept]
    for name in [*kept, *sorted(others, key=lambda name: -_rank(singles.get(name)))]:
        alone = "" if name not in singles else f"{float(singles[name]):.6g}"
        inside = "yes" if name in kept else "no"
        said.append(f"{printable(name, limit):{width}}  {alone:8}  {inside}")
    said.append(
        f"{report['rules']['direction']} search: {float(report['score']):.6g} on {report['split']} "
        f"with {len(kept)} of {len(report['ingredients'])}"
    )
    if "over_orders" in report:
        over = report["over_orders"]
        n = len(report["runs"])
        said.append(f"over {n} random orders: {over['mean']:.6g}, deviation {over['sd']:.2g}")
    said.append(cost(report))
    if report.get("mixed_on"):
        said.append(f"candidates were mixed on {report['mixed_on']}")
    if "advice" in report:
        said.append(report["advice"])
    said.append(f"greedy soup of {len(kept)} in {printable(soup.path)}")
    return said


def _rank(score: Any) -> float:
    value = float("-inf") if score is None else float(score)
    return value if value == value else float("-inf")
