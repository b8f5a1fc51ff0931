"""What do the steps of a learned soup take, beside autograd with all ingredients in memory?

The loss costs little more than reading the model, so what is seen is the soup's part of a step.
A step is a look at the loss and its gradient; streamsoup's time of one is the difference of a
search with many and one with few, divided by how many more there were.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup
from benchmarks.peers import PEERS, install, python_of
from benchmarks.rows import Session

__all__ = ["run"]

HERE = Path(__file__).parent.parent
SHOWN = {"step_s": "s per step:", "peak_anonymous_nbytes": "peak memory:", "wall_s": "s in all:"}
FEW, MANY = 1, 4
"""Epochs of a search: each is one step on the one batch, and a look."""


def run(session: Session, cases: Sequence[Case], *, rounds: int = 2) -> None:
    """Measure cases with more and more ingredients."""
    install(PEERS[:1])
    output = cache_folder() / "soups" / "learned"
    for round_ in range(rounds):
        for case in cases:
            ingredients = make(case)
            settle()
            warm_cache(ingredients)
            env = {"STREAMSOUP_BENCH_LIKE": str(ingredients[0])}
            line = streamsoup("learned", *ingredients, "--task", HERE / "live_task.py")
            line += [
                "-o",
                str(output),
                "-q",
                "--json",
                "--optimizer",
                "adamw",
                "--guard-every",
                "0",
            ]
            few = measure([*line, "--epochs", str(FEW)], output=output, env=env)
            settle()
            warm_cache(ingredients)
            many = measure([*line, "--epochs", str(MANY)], output=output, env=env)
            assert few.status == many.status == 0, few.stderr + many.stderr
            step_s = (many.wall_s - few.wall_s) / (MANY - FEW)
            shown = {"round": round_, "n": case.n, "shown": SHOWN}
            session.add("learned", "streamsoup", case.label, step_s=step_s, **shown, **many.row())
            script = HERE / "peers" / "learned_in_memory.py"
            peer = measure([str(python_of(PEERS[0])), str(script), "4", *map(str, ingredients)])
            if peer.status == 0:
                step_s = statistics.median(json.loads(peer.stdout)[1:])
                name = "autograd, all in memory"
                session.add("learned", name, case.label, step_s=step_s, **shown, **peer.row())
    remove(output)
