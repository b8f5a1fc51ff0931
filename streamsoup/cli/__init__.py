"""The command line: words in, one library call, words out.

Exit status: 0 done; 1 refused or failed, with one ``error: …`` on stderr; 2 wrong usage;
130 interrupted, 143 terminated. With ``--json`` the result is JSON on stdout, and everything else
is on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from streamsoup.cli.common import in_words
from streamsoup.cli.help import Commands, Group
from streamsoup.cli.results import ReaderGoneError
from streamsoup.cli.terminal import fitted
from streamsoup.errors import StreamsoupError, in_options

__all__ = ["cli", "main"]


def cli(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and give its exit status."""
    try:
        status = main.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name="streamsoup",
            standalone_mode=False,
        )
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except StreamsoupError as error:
        print(fitted(f"error: {in_options(error.text)}", sys.stderr), file=sys.stderr)
        return 1
    except BrokenPipeError as error:
        # The reader of stdout has closed it: there is nowhere to print a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if isinstance(error, ReaderGoneError) else 1
    except Exception as error:
        print(fitted(f"error: {in_words(error)}", sys.stderr), file=sys.stderr)
        return 1


def _show_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the versions of streamsoup, Python and the packages that compute."""
    if not wanted or context.resilient_parsing:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from streamsoup.version import __version__

    click.echo(f"streamsoup {__version__}")
    click.echo(f"  Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "safetensors", "numba", "numpy", "xxhash"):
        try:
            click.echo(f"  {name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"  {name} is not installed")
    context.exit()


@click.group(
    cls=Group,
    commands=Commands(),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Show the versions that matter and exit.",
)
def main() -> None:
    """Average fine-tuned checkpoints that are too large to hold in memory.

    A CKPT is a .safetensors file, or a folder with one, or with shards and their index.
    """
