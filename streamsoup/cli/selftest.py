"""The command that tests this machine."""

from __future__ import annotations

import json
import sys

import click

from streamsoup.cli import arguments, common, results
from streamsoup.cli.help import command


@command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda or cuda:N; auto takes an accelerator if there is one.",
)
@click.option(
    "--size",
    type=arguments.Size(),
    default="256MB",
    show_default=True,
    metavar="SIZE",
    help="Of what is timed.",
)
@click.option("--folder", metavar="DIR", help="Where to put files; default: temporary files.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def selftest(device: str, size: int, folder: str | None, as_json: bool) -> int:
    """Test bits, order and memory on this machine, and measure its rates."""
    from streamsoup.selftest import selftest as run
    from streamsoup.sizes import nbytes_text

    out = sys.stderr if as_json else sys.stdout

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    with common.ending_in_order():
        report = run(device, nbytes=size, folder=folder, say=say)
    for title, rates in (("limits of this machine", report.limits), ("reached", report.rates)):
        say(f"{title}:")
        for name, rate in rates.items():
            say(f"     {name:28} {nbytes_text(rate):>9}/s")
    for name, ratio in report.ratios.items():
        say(f"     {name}: {ratio:.2f}")
    for warning in report.warnings:
        say(f"warning: {warning}")
    about = report.environment
    what = f"{about['device']} {about.get('device_name', '')}".strip()
    n_failed = sum(not check.passed for check in report.checks)
    say(
        f"{'all is right' if report.passed else f'{n_failed} CHECKS FAILED'}: {what}, "
        f"torch {about['torch']}, streamsoup {about['streamsoup']}"
    )
    if as_json:
        results.tell([json.dumps(report.as_json())])
    return 0 if report.passed else 1
