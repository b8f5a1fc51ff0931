"""The command that shows what soups are good for."""

from __future__ import annotations

import click

from streamsoup.cli import common
from streamsoup.cli.help import command


@command()
@click.option("--output", "-o", default="streamsoup-demo", show_default=True, metavar="DIR")
def demo(output: str) -> int:
    """Fine-tune ten small networks on digits, soup them, and show how well it worked."""
    from streamsoup.demo import main as run_demo

    with common.ending_in_order():
        run_demo(output)
    return 0
