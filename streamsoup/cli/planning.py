"""Plans of any soup: its command is run until the soup is planned, and no further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from streamsoup.options import Options, Planned
    from streamsoup.output.make import Soup

__all__ = ["VERBS", "Tell", "is_asked_for", "plan_soup", "plan_verb"]

VERBS = frozenset(
    (
        *("uniform", "mix", "interpolate", "stock", "slerp", "ema", "lawa", "wsm", "arithmetic"),
        *("ties", "dare", "breadcrumbs", "della", "sce", "ram", "nearswap"),
        *("karcher", "multislerp", "nuslerp"),
    )
)
"""The commands that make one soup."""

_TELLS = "streamsoup.plan"
"""Under this name click's contexts hold what is done with a plan, where one is asked for."""

Tell = Callable[["Planned", dict[str, Any]], None]


def is_asked_for() -> bool:
    """Return True if the soup of the command at work is to be planned only."""
    context = click.get_current_context(silent=True)
    return context is not None and _TELLS in context.meta


def plan_verb(context: click.Context, words: Sequence[str], tell: Tell) -> Any:
    """Run a command, given with all its words, until its soup is planned.

    `tell` is called with the plan, and with what the command was told that any soup may be.
    """
    assert isinstance(context.parent, click.Context)
    assert isinstance(context.parent.command, click.Group)
    name, *own = words
    verb = context.parent.command.commands[name]
    context.meta[_TELLS] = tell
    # A command asks for an output; nothing looks at it before the soup is planned.
    words = ["--output", "OUT", *own]
    try:
        with verb.make_context(f"{context.info_name} {name}", words, context.parent) as inner:
            return verb.invoke(inner)
    finally:
        del context.meta[_TELLS]


def plan_soup(make: Callable[[Options], Soup], settings: dict[str, Any]) -> int:
    """Call `make` until its soup is planned, and hand over the plan."""
    from streamsoup.options import Options
    from streamsoup.output.planned import planned

    told = {name: value for name, value in settings.items() if name in Options.__struct_fields__}
    tell: Tell = click.get_current_context().meta[_TELLS]
    tell(planned(make, Options(**told)), settings)
    return 0
