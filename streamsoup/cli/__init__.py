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

from streamsoup import __version__
from streamsoup.cli.closed import arithmetic, ema, lawa, slerp, stock, wsm
from streamsoup.cli.common import in_words
from streamsoup.cli.compare import compare, landscape
from streamsoup.cli.demo import demo
from streamsoup.cli.fixed import interpolate, mix, uniform
from streamsoup.cli.geometry import geometry
from streamsoup.cli.greedy import greedy
from streamsoup.cli.learned import learned
from streamsoup.cli.looks import inspect, plan, verify
from streamsoup.cli.selftest import selftest
from streamsoup.errors import StreamsoupError

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
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output is gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamsoup")
def main() -> None:
    """Average fine-tuned checkpoints that are too large to hold in memory.

    A CKPT is a .safetensors file, or a folder with one, or with shards and their index.
    """


for command in (uniform, mix, interpolate, inspect, plan, verify, demo):
    main.add_command(command)
for command in (stock, slerp, ema, lawa, wsm, arithmetic, geometry, learned):
    main.add_command(command)
for command in (greedy, compare, landscape):
    main.add_command(command)
main.add_command(selftest)
