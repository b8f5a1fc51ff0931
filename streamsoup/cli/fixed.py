"""Commands for soups whose coefficients are known beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamsoup.cli import arguments, common
from streamsoup.cli.help import command

if TYPE_CHECKING:
    from streamsoup.options import Options
    from streamsoup.output.make import Soup


@command()
@arguments.INGREDIENTS
@arguments.CHOOSING
@arguments.WRITING
@arguments.SHARING
@arguments.MAKING
@arguments.RUNNING
@arguments.REPORTING
def uniform(ingredients: tuple[str, ...], output: str, **settings: Any) -> int:
    """Average checkpoints, or those in a RUN, all weighted alike."""
    chosen = {name: settings.pop(name) for name in arguments.CHOICE}

    def make(options: Options) -> Soup:
        from streamsoup.methods.fixed import uniform

        return uniform(ingredients, **chosen, output=output, options=options)

    return common.make_soup(make, common.run_paths(ingredients), settings)


@command()
@arguments.INGREDIENTS
@arguments.COEFFICIENTS
@arguments.NORMALIZE
@arguments.WRITING
@arguments.SHARING
@arguments.MAKING
@arguments.RUNNING
@arguments.REPORTING
def mix(
    ingredients: tuple[str, ...],
    coefficients: Any,
    normalize: bool,
    output: str,
    **settings: Any,
) -> int:
    """Add checkpoints up, each times its coefficient."""
    if coefficients is None:
        raise click.UsageError("mix needs --coefficients, one for each checkpoint")
    arguments.Factors.check(coefficients)

    def make(options: Options) -> Soup:
        from streamsoup.methods.fixed import mix

        return mix(ingredients, coefficients, normalize=normalize, output=output, options=options)

    def say(soup: Soup) -> list[str]:
        from streamsoup.output.coefficients import coefficients_of, told

        return [told(coefficients_of(soup.recipe))]

    return common.make_soup(make, ingredients, settings, say)


@command()
@click.argument("base")
@click.argument("fine_tuned", metavar="FT")
@click.option(
    "--alpha", type=arguments.Number(), default=0.5, show_default=True, help="0 is BASE, 1 is FT."
)
@click.option(
    "--alphas", metavar="A:B:STEP", help="Measure a sweep: 0:1:0.1, or 0,0.5,1; with --task."
)
@click.option("--task", metavar="TASK", help="For --alphas: task.py, or module:object.")
@click.option(
    "--recalibrate", is_flag=True, help="For --alphas: measure BatchNorm statistics anew for each."
)
@arguments.WRITING
@arguments.SHARING
@arguments.MAKING
@arguments.RUNNING
@arguments.TRACEBACK
@arguments.REPORTING
def interpolate(
    base: str,
    fine_tuned: str,
    alpha: float,
    alphas: str | None,
    task: str | None,
    recalibrate: bool,
    output: str,
    **settings: Any,
) -> int:
    """Go a part of the way from BASE to a fine-tuned checkpoint FT (WiSE-FT).

    With --alphas and --task, no checkpoint is made: OUT is a report of the whole way.
    """
    if (alphas is None) != (task is None):
        raise click.UsageError("a sweep needs both --alphas and --task")
    if alphas is not None and task is not None:
        given = click.get_current_context().get_parameter_source
        if given("alpha") is not ParameterSource.DEFAULT or settings["overwrite"]:
            raise click.UsageError("a sweep takes neither --alpha nor --overwrite")
        from streamsoup.cli.compare import sweep

        return sweep((base, fine_tuned), alphas, task, output, recalibrate, settings)
    if recalibrate:
        raise click.UsageError("--recalibrate is for a sweep, with --alphas and --task")

    def make(options: Options) -> Soup:
        from streamsoup.methods.fixed import interpolate

        return interpolate(base, fine_tuned, alpha, output=output, options=options)

    return common.make_soup(make, (base, fine_tuned), settings)
