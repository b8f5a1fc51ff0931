"""The command: ``python -m benchmarks quick``, ``full``, a single task, or ``report``."""

from __future__ import annotations

import argparse
import sys

from benchmarks.checkpoints import SIZES, Case
from benchmarks.peers import PEERS
from benchmarks.rows import Session
from benchmarks.tasks import (
    average,
    gram,
    greedy,
    growth,
    kernels,
    learned,
    merges,
    startup,
    tiers,
    uniform,
)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("quick", help="some ten minutes, 3 GB of disk")
    commands.add_parser("full", help="about an hour, 40 GB of disk")
    one = commands.add_parser("uniform", help="one case of the uniform soup")
    one.add_argument("size", choices=SIZES)
    one.add_argument("n", type=int)
    one.add_argument("--dtype", default="BF16", choices=("BF16", "F16", "F32"))
    one.add_argument("--shards", type=int, default=1)
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--peer-rounds", type=int, default=3)
    one.add_argument("--cold", action="store_true")
    one.add_argument("--no-peers", action="store_true")
    for name in (
        "growth",
        "growth-sizes",
        "kernels",
        "tiers",
        "startup",
        "greedy",
        "gram",
        "learned",
        "average",
        "merges-125M",
        "merges-1.1B",
    ):
        commands.add_parser(name)
    commands.add_parser("report", help="make tables and pictures anew from the rows")
    asked = parser.parse_args()
    if asked.command == "report":
        from benchmarks.report import main as report

        report()
        return
    session = Session()
    if asked.command == "uniform":
        uniform.run(
            session,
            Case(asked.size, asked.n, asked.dtype, asked.shards),
            peers=() if asked.no_peers else PEERS,
            rounds=asked.rounds,
            peer_rounds=asked.peer_rounds,
            cold=asked.cold,
        )
        return
    for task in {"quick": QUICK, "full": FULL}.get(asked.command, (asked.command,)):
        print(f"== {task}", file=sys.stderr, flush=True)
        run(session, task)


QUICK = ("kernels", "startup", "uniform-125M")
FULL = (
    *QUICK,
    *("uniform-125M-f16", "uniform-125M-f32", "uniform-1.1B", "uniform-1.1B-cold"),
    *("tiers", "growth", "growth-sizes", "greedy", "gram", "learned", "average"),
    *("merges-125M", "merges-1.1B"),
)


def run(session: Session, task: str) -> None:
    """Run one task of the lists above."""
    if task == "kernels":
        kernels.run(session)
    elif task == "tiers":
        tiers.run(session, [Case("125M", 8, dtype) for dtype in ("BF16", "F16", "F32")])
    elif task == "startup":
        startup.run(session, first=Case("125M", 8))
    elif task == "uniform-125M":
        uniform.run(session, Case("125M", 8), peers=PEERS)
    elif task == "uniform-125M-f16":
        uniform.run(session, Case("125M", 8, "F16"), peers=PEERS[:6], peer_rounds=2)
    elif task == "uniform-125M-f32":
        uniform.run(session, Case("125M", 8, "F32"), peers=PEERS[:6], peer_rounds=2)
    elif task == "uniform-1.1B":
        uniform.run(session, Case("1.1B", 4, "BF16", 2), peers=PEERS, peer_rounds=2)
    elif task == "uniform-1.1B-cold":
        uniform.run(session, Case("1.1B", 4, "BF16", 2), rounds=3, cold=True)
    elif task == "growth":
        growth.run(session, [Case("125M", n) for n in (2, 4, 8, 16, 32, 64)])
    elif task == "growth-sizes":
        sizes = ("125M", "550M", "1.1B", "2.2B")
        growth.run(session, [Case(size, 2) for size in sizes])
    elif task == "greedy":
        greedy.run(session, Case("125M", 8))
    elif task == "gram":
        gram.run(session, Case("125M", 32))
    elif task == "average":
        average.run(session)
    elif task == "merges-125M":
        merges.run(session, Case("125M", 4))
    elif task == "merges-1.1B":
        merges.run(session, Case("1.1B", 4, "BF16", 2), rounds=1, peer_rounds=0)
    elif task == "learned":
        learned.run(session, [Case("125M", n) for n in (4, 8, 16)])


if __name__ == "__main__":
    main()
