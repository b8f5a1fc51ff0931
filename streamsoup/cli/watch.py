"""The command that keeps the average of a run up to date."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common, results
from streamsoup.cli.help import command

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.options import Options


@command()
@click.argument("run")
@click.option(
    "--method",
    type=click.Choice(["uniform", "ema", "lawa", "wsm"]),
    default="lawa",
    show_default=True,
    help="How the checkpoints are weighted.",
)
@click.option(
    "--last", type=arguments.Integer(1), metavar="N", help="Only the N newest; lawa needs it."
)
@click.option(
    "--every",
    type=arguments.Integer(1),
    default=1,
    metavar="K",
    help="Each K-th, back from the newest.",
)
@click.option(
    "--decay",
    type=arguments.Number(),
    default=0.9,
    show_default=True,
    help="For ema: kept at each.",
)
@click.option(
    "--curve",
    type=click.Choice(["linear", "cosine", "sqrt"]),
    default="linear",
    show_default=True,
    help="For wsm: the learning rate decay that it stands in for.",
)
@click.option(
    "--until", type=arguments.Integer(0), metavar="STEP", help="End with a checkpoint of this step."
)
@click.option(
    "--poll",
    "poll_s",
    type=arguments.Number(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks at RUN.",
)
@arguments.WRITING
@arguments.MAKING
@arguments.RUNNING
@arguments.REPORTING
def watch(run: str, output: str, **settings: Any) -> int:
    """Average the newest checkpoints of a RUN while it goes on: again for each complete one.

    OUT is always a complete average. Ctrl-C ends it; the same command goes on from there.
    """
    quiet = settings["quiet"]
    own = ("method", "last", "every", "decay", "curve", "until", "poll_s")
    asked = {name: settings.pop(name) for name in own}
    if asked["method"] == "lawa" and asked["last"] is None:
        raise click.UsageError("lawa needs --last: how many of the newest checkpoints to average")

    def work(options: Options, watcher: Watcher, json_wanted: bool) -> None:
        from msgspec.structs import replace

        from streamsoup.system.supervise import status_of
        from streamsoup.training.watch import watch

        telling = common.telling_notes(watcher, quiet=quiet)
        try:
            soup = watch(run, output=output, options=replace(options, on_event=telling), **asked)
        except KeyboardInterrupt as stop:
            if status_of(stop) != 130:
                raise
            watcher.close()
            if not quiet:
                results.say("stopped; the same command goes on from here")
            return
        watcher.close()
        if json_wanted:
            made = None if soup is None else results.as_json(soup, watcher)
            results.tell([json.dumps(made)])
        elif soup is None:
            results.tell([f"{output}: was up to date"])

    return common.supervise(work, "watch", [run], settings)
