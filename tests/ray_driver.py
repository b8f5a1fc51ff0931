"""A driver that the tests of Ray kill: ``python ray_driver.py ADDRESS OUTPUT PAUSE CKPT…``."""

from __future__ import annotations

import sys

from outside.slow_mean import SlowMean

import streamsoup
from streamsoup.cluster import units

units.SMALLEST_NBYTES = 1
units.ROUNDS = 6


def main() -> int:
    """Make a slow mean, and print a line for each unit."""
    address, output, pause_s, *paths = sys.argv[1:]
    seen = 0

    def on_event(event: object) -> None:
        nonlocal seen
        if isinstance(event, streamsoup.Progress) and event.nbytes_done > seen:
            seen = event.nbytes_done
            print("unit", *event.nodes, flush=True)

    options = streamsoup.Options(ray=address, threads=1, on_event=on_event)
    try:
        streamsoup.apply(paths, SlowMean(float(pause_s)), output=output, options=options)
    except streamsoup.StreamsoupError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
