"""Commands for soups whose coefficients follow from a formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamsoup.cli import arguments, common
from streamsoup.cli.help import command

if TYPE_CHECKING:
    from streamsoup.options import Options
    from streamsoup.output.make import Soup

SOUP = arguments.stack(
    arguments.WRITING, arguments.SHARING, arguments.MAKING, arguments.RUNNING, arguments.REPORTING
)
BASE = click.option(
    "--base", required=True, metavar="CKPT", help="What the others were fine-tuned from."
)


@command()
@arguments.INGREDIENTS
@click.option(
    "--decay", type=arguments.Number(), default=0.9, show_default=True, help="Kept at each step."
)
@arguments.CHOOSING
@SOUP
def ema(ingredients: tuple[str, ...], decay: float, output: str, **settings: Any) -> int:
    """Compute the exponential moving average of checkpoints, oldest first, or of those in a RUN."""
    chosen = {name: settings.pop(name) for name in arguments.CHOICE}

    def make(options: Options) -> Soup:
        from streamsoup.methods.averages import ema

        return ema(ingredients, decay, **chosen, output=output, options=options)

    return common.make_soup(make, common.run_paths(ingredients), settings)


@command()
@arguments.INGREDIENTS
@click.option(
    "--window", type=arguments.Integer(), metavar="K", help="How many of the latest; or say --last."
)
@arguments.CHOOSING
@SOUP
def lawa(ingredients: tuple[str, ...], window: int | None, output: str, **settings: Any) -> int:
    """Average the latest checkpoints of a RUN, or of a list, oldest first (LAWA)."""
    chosen = {name: settings.pop(name) for name in arguments.CHOICE}
    if window is None and chosen["last"] is None:
        raise click.UsageError("lawa needs --window or --last: how many checkpoints to average")

    def make(options: Options) -> Soup:
        from streamsoup.methods.averages import lawa

        return lawa(ingredients, window, **chosen, output=output, options=options)

    return common.make_soup(make, common.run_paths(ingredients), settings)


@command()
@arguments.INGREDIENTS
@click.option(
    "--curve",
    type=click.Choice(["linear", "cosine", "sqrt"]),
    default="linear",
    show_default=True,
    help="The learning rate decay that it stands in for.",
)
@arguments.CHOOSING
@SOUP
def wsm(ingredients: tuple[str, ...], curve: Any, output: str, **settings: Any) -> int:
    """Merge checkpoints of a constant learning rate, oldest first, in place of its decay (WSM)."""
    chosen = {name: settings.pop(name) for name in arguments.CHOICE}

    def make(options: Options) -> Soup:
        from streamsoup.methods.averages import wsm

        return wsm(ingredients, curve, **chosen, output=output, options=options)

    return common.make_soup(make, common.run_paths(ingredients), settings)


@command()
@arguments.INGREDIENTS
@BASE
@click.option(
    "--scale",
    type=arguments.ByName(),
    multiple=True,
    callback=arguments.by_name,
    required=True,
    metavar="L",
    help="λ, such as .4; or one for each: .4,.3,-1. Again with a pattern of tensor names, "
    "'*mlp*=.3'; .2~.8 goes over the layers.",
)
@SOUP
def arithmetic(
    ingredients: tuple[str, ...], base: str, scale: Any, output: str, **settings: Any
) -> int:
    """Add λ times each task vector to the base (task arithmetic)."""

    def make(options: Options) -> Soup:
        from streamsoup.methods.closed import arithmetic

        given = arguments.for_each(scale, len(ingredients))
        return arithmetic(ingredients, given, base=base, output=output, options=options)

    return common.make_soup(make, (base, *ingredients), settings)


@command()
@arguments.INGREDIENTS
@BASE
@SOUP
def stock(ingredients: tuple[str, ...], base: str, output: str, **settings: Any) -> int:
    """Go from the base towards the mean, tensor by tensor, as far as angles say (Model Stock)."""

    def make(options: Options) -> Soup:
        from streamsoup.methods.closed import stock

        return stock(ingredients, base=base, output=output, options=options)

    def say(soup: Soup) -> list[str]:
        report = soup.provenance.report
        lines = [
            f"ratio t from the base (0) to the mean (1): {report['ratio_mean']:.3f} on average, "
            f"{report['ratio_min']:.3f} to {report['ratio_max']:.3f}"
        ]
        if report["n_negative"]:
            lines.append(
                "held at the base, as their task vectors point apart: "
                f"{report['negative']} ({report['n_negative']} in all)"
            )
        return lines

    return common.make_soup(make, (base, *ingredients), settings, say)


@command()
@arguments.INGREDIENTS
@click.option("--base", metavar="CKPT", help="Turn task vectors, rather than whole weights.")
@click.option(
    "-t",
    "t",
    type=arguments.Number(0, 1),
    help="For two: 0 is the first, 1 the second; default .5.",
)
@click.option(
    "--weights",
    "-w",
    type=arguments.Numbers(),
    metavar="W,W,…",
    help="For more: a weight for each.",
)
@SOUP
def slerp(
    ingredients: tuple[str, ...],
    base: str | None,
    t: float | None,
    weights: list[float] | None,
    output: str,
    **settings: Any,
) -> int:
    """Compute the mean on a sphere, tensor by tensor: SLERP of two, the barycentre of more."""
    n = len(ingredients)
    if t is not None and weights is not None:
        raise click.UsageError("-t and --weights are two ways to give the same; use one of them")
    if t is not None and n != 2:
        raise click.UsageError("-t is for two checkpoints; give --weights instead")
    if t is not None:
        shares = [1.0 - t, t]
    else:
        shares = [1.0] * n if weights is None else weights

    def make(options: Options) -> Soup:
        from streamsoup.methods.closed import slerp

        return slerp(ingredients, shares, base=base, output=output, options=options)

    paths = ingredients if base is None else (base, *ingredients)
    return common.make_soup(make, paths, settings)
