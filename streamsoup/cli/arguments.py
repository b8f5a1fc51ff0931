"""The arguments and options that commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from streamsoup.cli import planning
from streamsoup.cli.results import tell
from streamsoup.cli.values import ByName as ByName
from streamsoup.cli.values import Factors as Factors
from streamsoup.cli.values import Integer as Integer
from streamsoup.cli.values import Number as Number
from streamsoup.cli.values import Numbers as Numbers
from streamsoup.cli.values import Size as Size
from streamsoup.cli.values import by_name as by_name
from streamsoup.cli.values import for_each as for_each
from streamsoup.cli.values import numbers as numbers
from streamsoup.errors import printable

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
