"""Commands for merges of task vectors, and for means on a sphere of other kinds than SLERP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common
from streamsoup.cli.closed import BASE, SOUP
from streamsoup.cli.help import command

if TYPE_CHECKING:
    from streamsoup.options import Options
    from streamsoup.output.make import Soup

Command = Callable[..., Any]

DENSITY = click.option(
    "--density",
    type=arguments.ByName(0, 1),
    multiple=True,
    callback=arguments.by_name,
    required=True,
    metavar="D",
    help="Share that is kept, such as .5; or one for each. Again with a pattern of tensor names, "
    "'*mlp*=.3'; .2~.8 goes over the layers.",
)
WEIGHTS = arguments.stack(
    click.option("--base", metavar="CKPT", help="Turn task vectors, rather than whole weights."),
    click.option(
        "--weights",
        "-w",
        type=arguments.Numbers(),
        metavar="W,W,…",
        help="A weight for each; default: all alike.",
    ),
)


def terms(*, consensus: str, normalize: str, rescale: str) -> Callable[[Command], Command]:
    """Make the options of a sum of task vectors, with the defaults of a method."""
    return arguments.stack(
        DENSITY,
        click.option(
            "--coefficients",
            "-c",
            type=arguments.ByName(),
            multiple=True,
            callback=arguments.by_name,
            default=["1"],
            show_default="1",
            metavar="W",
            help="Factor of each task vector; or one for each: .4,.3,-1. By pattern and layer as "
            "density.",
        ),
        click.option(
            "--lambda",
            "lambda_",
            type=arguments.Number(),
            default=1.0,
            show_default=True,
            help="Factor of their sum.",
        ),
        click.option(
            "--consensus",
            type=click.Choice(["sum", "none"]),
            default=consensus,
            show_default=True,
            help="Leave out what has not the sign of the sum; or nothing.",
        ),
        click.option(
            "--normalize/--no-normalize",
            default=None,
            help=f"Divide by the sum of the coefficients.  [default: {normalize}]",
        ),
        click.option(
            "--rescale",
            type=click.Choice(["l1", "density", "none"]),
            default=rescale,
            show_default=True,
            help="Make up for what is dropped.",
        ),
        click.option("--no-rescale", is_flag=True, help="The same as --rescale none."),
    )


TRIM = click.option(
    "--trim",
    type=click.Choice(["tensor", "model"]),
    default="tensor",
    show_default=True,
    help="Rank magnitudes in each tensor, or over all.",
)
SEED = click.option(
    "--seed", type=arguments.Integer(), default=0, show_default=True, help="Of the random masks."
)


@command()
@arguments.INGREDIENTS
@BASE
@terms(consensus="sum", normalize="yes", rescale="none")
@TRIM
@SOUP
def ties(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Keep the largest changes, elect a sign for each, and average what agrees (TIES)."""
    return merge("ties", ingredients, settings, ["density"])


@command()
@arguments.INGREDIENTS
@BASE
@terms(consensus="none", normalize="no", rescale="l1")
@SEED
@SOUP
def dare(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Drop random changes, and make up for them (DARE); with --consensus sum, dare_ties."""
    return merge("dare", ingredients, settings, ["density"])


@command()
@arguments.INGREDIENTS
@BASE
@terms(consensus="none", normalize="no", rescale="none")
@click.option(
    "--gamma",
    type=arguments.Numbers(0, 1),
    default="0.01",
    show_default=True,
    help="Share of outliers dropped.",
)
@TRIM
@SOUP
def breadcrumbs(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Drop the largest changes and the small ones, and add what is left (Breadcrumbs)."""
    return merge("breadcrumbs", ingredients, settings, ["density", "gamma"])


@command()
@arguments.INGREDIENTS
@BASE
@terms(consensus="sum", normalize="if there is a consensus", rescale="l1")
@click.option(
    "--epsilon",
    type=arguments.Numbers(0, 1),
    default="0.15",
    show_default=True,
    help="Probabilities lie so far around D.",
)
@SEED
@SOUP
def della(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Drop random changes, small ones rather than large ones (DELLA)."""
    return merge("della", ingredients, settings, ["density", "epsilon"])


@command()
@arguments.INGREDIENTS
@BASE
@click.option(
    "--select-topk",
    type=arguments.Number(0, 1),
    default=1.0,
    show_default=True,
    help="Share of the elements, those that vary most.",
)
@SOUP
def sce(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Select by variance, weigh by energy, leave out minority signs (SCE)."""
    return merge("sce", ingredients, settings)


@command()
@arguments.INGREDIENTS
@BASE
@click.option(
    "--epsilon",
    type=arguments.Number(0),
    default=1e-5,
    show_default=True,
    help="A change is one beyond it.",
)
@SOUP
def ram(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Keep whole what one ingredient changes, and average what several do (RAM)."""
    return merge("ram", ingredients, settings)


@command()
@arguments.INGREDIENTS
@BASE
@click.option(
    "-t", "t", type=arguments.Number(0), required=True, help="Distance up to which CKPT is taken."
)
@SOUP
def nearswap(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Take from CKPT what lies near the base, and the less the further it lies (NearSwap)."""
    return merge("nearswap", ingredients, settings)


@command()
@arguments.INGREDIENTS
@WEIGHTS
@SOUP
def karcher(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Take the Karcher mean on a sphere, tensor by tensor."""
    return mean("karcher", ingredients, settings)


@command()
@arguments.INGREDIENTS
@WEIGHTS
@SOUP
def multislerp(ingredients: tuple[str, ...], **settings: Any) -> int:
    """Average directions and lengths, tensor by tensor (multi-SLERP)."""
    return mean("multislerp", ingredients, settings)


@command()
@arguments.INGREDIENTS
@WEIGHTS
@click.option(
    "-t", "t", type=arguments.Number(0, 1), help="0 is the first, 1 the second; default .5."
)
@click.option("--row-wise", is_flag=True, help="Turn each row by an angle of its own.")
@SOUP
def nuslerp(ingredients: tuple[str, ...], t: float | None, **settings: Any) -> int:
    """Turn from the first to the second, tensor by tensor (NuSLERP)."""
    if t is not None and settings["weights"] is not None:
        raise click.UsageError("-t and --weights say the same; give one of them")
    return mean("nuslerp", ingredients, settings, None if t is None else [1.0 - t, t])


def merge(
    method: str, ingredients: tuple[str, ...], settings: dict[str, Any], listed: Sequence[str] = ()
) -> int:
    """Make a soup with a verb of `methods.merges`; `listed` options hold a number for each."""
    given = _own(settings)
    base = given.pop("base")
    for name in [*listed, *(["coefficients"] if "coefficients" in given else [])]:
        given[name] = arguments.for_each(given[name], len(ingredients))
    if given.pop("no_rescale", False):
        given["rescale"] = "none"
    if given.get("normalize", 0) is None:
        del given["normalize"]

    def make(options: Options) -> Soup:
        from streamsoup.methods import merges

        output = given.pop("output")
        verb: Callable[..., Soup] = getattr(merges, method)
        return verb(ingredients, base=base, output=output, options=options, **given)

    return common.make_soup(make, (base, *ingredients), settings)


def mean(
    method: str,
    ingredients: tuple[str, ...],
    settings: dict[str, Any],
    weights: list[float] | None = None,
) -> int:
    """Make a soup with a verb of `methods.spheres`."""
    given = _own(settings)
    base, output = given.pop("base"), given.pop("output")
    told = given.pop("weights")
    if told is not None:
        weights = told

    def make(options: Options) -> Soup:
        from streamsoup.methods import spheres

        verb: Callable[..., Soup] = getattr(spheres, method)
        return verb(ingredients, weights, base=base, output=output, options=options, **given)

    return common.make_soup(make, ingredients if base is None else (base, *ingredients), settings)


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    """Move out of `settings` what is neither an option of every verb nor about its report."""
    from streamsoup.options import Options

    shared = {*Options.__struct_fields__, "as_json", "quiet"}
    return {name: settings.pop(name) for name in list(settings) if name not in shared}
