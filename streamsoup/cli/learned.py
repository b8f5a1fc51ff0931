"""The command that learns the coefficients of a soup."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, reports, results
from streamsoup.cli.help import command
from streamsoup.errors import count, printable

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options
    from streamsoup.search.learned import LearnedSoup


@command()
@arguments.INGREDIENTS
@arguments.TASK
@click.option(
    "--per",
    "granularity",
    type=click.Choice(["global", "layer", "tensor"]),
    default="global",
    show_default=True,
    help="What has coefficients of its own.",
)
@click.option(
    "--constraint",
    type=click.Choice(["softmax", "affine", "free"]),
    default="softmax",
    show_default=True,
    help="Positive with sum 1; sum 1; or any.",
)
@click.option("--temperature", is_flag=True, help="Learn a factor of the logits too.")
@click.option(
    "--optimizer",
    type=click.Choice(["lbfgs", "adamw"]),
    default="lbfgs",
    show_default=True,
    help="Few evaluations of all batches, or the paper's minibatches.",
)
@click.option(
    "--evaluations",
    type=arguments.Integer(),
    default=40,
    show_default=True,
    help="At most, for lbfgs.",
)
@click.option("--epochs", type=arguments.Integer(), default=5, show_default=True, help="For adamw.")
@click.option("--lr", type=arguments.Number(), default=0.05, show_default=True, help="For adamw.")
@click.option(
    "--patience",
    type=arguments.Integer(),
    default=6,
    show_default=True,
    help="Evaluations without gain.",
)
@click.option("--split", metavar="NAME", help="To learn on; default: the task's first.")
@click.option("--guard", metavar="NAME", help="A split to validate on.")
@click.option(
    "--guard-every",
    type=arguments.Integer(),
    default=5,
    show_default=True,
    metavar="N",
    help="Or: hold out every Nth batch to validate; 0 for none.",
)
@click.option("--restart", is_flag=True, help="Forget an unfinished search.")
@click.option("--plot", metavar="PNG", help="Draw the coefficients.")
@reports.REPORT
@arguments.WRITING
@arguments.MAKING
@arguments.RUNNING
@arguments.TRACEBACK
@arguments.REPORTING
def learned(
    ingredients: tuple[str, ...],
    task: str,
    granularity: Any,
    constraint: Any,
    temperature: bool,
    optimizer: Any,
    evaluations: int,
    epochs: int,
    lr: float,
    patience: int,
    split: str | None,
    guard: str | None,
    guard_every: int,
    restart: bool,
    plot: str | None,
    report: str | None,
    output: str,
    **settings: Any,
) -> int:
    """Learn how much of each checkpoint to take, on the held-out loss of a task."""
    quiet = bool(settings["quiet"])

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        from msgspec.structs import replace

        from streamsoup.search.learned import LearnedSettings, learned

        if plot is not None:
            from streamsoup.output.destination import check_outside
            from streamsoup.study.plot import check_plot

            check_plot(plot)
            check_outside(plot, ingredients)
        reports.check(report, ingredients, output)
        search = LearnedSettings(
            granularity=granularity,
            constraint=constraint,
            temperature=temperature,
            optimizer=optimizer,
            evaluations=evaluations,
            epochs=epochs,
            lr=lr,
            patience=patience,
            split=split,
            guard=guard,
            guard_every=guard_every,
            restart=restart,
        )
        options = replace(options, on_event=common.telling_notes(watcher, quiet=quiet))
        soup = learned(ingredients, task, output=output, settings=search, options=options)
        watcher.close()
        if plot is not None:
            import numpy as np

            from streamsoup.study.names import short_names
            from streamsoup.study.plot import plot_coefficients

            names = short_names(soup.recipe.ingredients, 24)
            plot_coefficients(np.array(soup.rows), soup.groups, names, plot)
        seen = reports.write(soup, report)
        if as_json:
            found = {"path": soup.path, "peak_nbytes": watcher.peak_nbytes} | dict(soup.report)
            found["warnings"] = watcher.warnings
            results.tell([json.dumps(found)])
            return
        results.tell([*describe(soup), *seen])

    return common.supervise(work, "learned", ingredients, settings)


def describe(soup: LearnedSoup) -> list[str]:
    """Return lines on the learned coefficients, and on the cost."""
    from streamsoup.sizes import nbytes_text
    from streamsoup.study.names import short_names

    first, best = soup.evaluations[0], soup.evaluations[soup.best]
    report = soup.report
    names = short_names(soup.recipe.ingredients, 40)
    lines = []
    width = max(map(len, names))
    for i, name in enumerate(names):
        column = [row[i] for row in soup.rows]
        text = f"{column[0]:.4f}"
        if len(column) > 1:
            text = f"{sum(column) / len(column):.4f}  ({min(column):.4f} to {max(column):.4f})"
        lines.append(f"{name:{width}}  {text}")
    if report["temperature"]:
        lines.append(f"factor of the logits {soup.beta:.4f} (not in the files)")
    watched = (
        "" if first.guard != first.guard else f", validation {first.guard:.5g} to {best.guard:.5g}"
    )
    lines += [
        f"loss {first.loss:.5g} (uniform) to {best.loss:.5g}{watched}; {report['ended']}",
        f"learned soup of {len(names)} in {printable(soup.path)}: "
        f"{count(len(soup.evaluations), 'evaluation')}, {count(report['n_passes'], 'pass')} "
        f"(at most {report['predicted']['passes']} predicted), "
        f"{nbytes_text(report['nbytes_read'])} read in {report['elapsed_s']:.2f} s"
        + (f" of {report['n_runs']} runs" if report["n_runs"] > 1 else ""),
    ]
    return lines
