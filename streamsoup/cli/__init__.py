"""The command line: words in, one library call, words out.

Exit status: 0 done; 1 refused or failed, with one ``error: …`` on stderr; 2 wrong usage;
130 interrupted, 143 terminated. With ``--json`` the result is JSON on stdout, and everything else
is on stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import click

from streamsoup.cli.common import ReaderGoneError, in_words
from streamsoup.cli.terminal import fitted
from streamsoup.errors import StreamsoupError, in_options
from streamsoup.version import __version__

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


ROOMS = {
    "uniform": "fixed",
    "mix": "fixed",
    "interpolate": "fixed",
    "inspect": "looks",
    "plan": "looks",
    "verify": "looks",
    "commit": "commit",
    "stock": "closed",
    "slerp": "closed",
    "ema": "closed",
    "lawa": "closed",
    "wsm": "closed",
    "arithmetic": "closed",
    "ties": "merges",
    "dare": "merges",
    "breadcrumbs": "merges",
    "della": "merges",
    "sce": "merges",
    "ram": "merges",
    "nearswap": "merges",
    "karcher": "merges",
    "multislerp": "merges",
    "nuslerp": "merges",
    "geometry": "geometry",
    "greedy": "greedy",
    "learned": "learned",
    "compare": "compare",
    "landscape": "compare",
    "demo": "demo",
    "selftest": "selftest",
}
"""Commands, and the rooms of this folder they live in: only that of the one asked for is imported,
which saves a small soup 13 ms."""


class _Commands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> click.Command:
        room = importlib.import_module(f"{__name__}.{ROOMS[name]}")
        command: click.Command = getattr(room, name)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(ROOMS)

    def __len__(self) -> int:
        return len(ROOMS)


@click.group(
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="streamsoup")
def main() -> None:
    """Average fine-tuned checkpoints that are too large to hold in memory.

    A CKPT is a .safetensors file, or a folder with one, or with shards and their index.
    """
