"""``python -m streamsoup`` and the console script."""

from __future__ import annotations

import gc
import io
import sys


def main() -> None:
    """Run the command line, and exit with its status."""
    try:
        gc.disable()
        from streamsoup.cli import cli
        from streamsoup.system.supervise import leave, open_standard_streams

        # What is imported stays to the end: no garbage is in it, and looking for some takes 6 ms.
        gc.freeze()
        gc.enable()
        open_standard_streams()
        for stream in (sys.stdout, sys.stderr):
            # A terminal that lacks a character must not turn a finished soup into a failure.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        status = cli()
    except KeyboardInterrupt:  # while the command line itself was still being imported
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    leave(status)


if __name__ == "__main__":
    main()
