"""The commands, by what one wants: where each lives, a line on it, an example, and its page.

The list of commands is shown from here, so that no command has to be imported for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["COMMANDS", "SECTIONS", "Entry"]

PAGES = "docs/"


class Entry(NamedTuple):
    """A command in the list of commands."""

    room: str
    """The file of this folder that it lives in: only that of the one asked for is imported, which
    saves a small soup 13 ms."""
    line: str
    """What it does, in at most 60 characters."""
    example: str
    page: str
    """The page that explains it, in the documentation."""


SECTIONS: Mapping[str, Mapping[str, Entry]] = {
    "Make a soup": {
        "uniform": Entry(
            "fixed",
            "Average checkpoints, all weighted alike.",
            "streamsoup uniform run1 run2 run3 -o soup",
            "methods/uniform.md",
        ),
        "mix": Entry(
            "fixed",
            "Add checkpoints up, each times its coefficient.",
            "streamsoup mix run1 run2 -c .7,.3 -o soup",
            "methods/uniform.md",
        ),
        "interpolate": Entry(
            "fixed",
            "Go part of the way from a base to its fine-tune (WiSE-FT).",
            "streamsoup interpolate base run1 --alpha .5 -o soup",
            "methods/interpolate.md",
        ),
        "lawa": Entry(
            "closed",
            "Average the latest checkpoints of a run (LAWA).",
            "streamsoup lawa run --last 5 -o soup",
            "tasks/average-a-run.md",
        ),
        "ema": Entry(
            "closed",
            "Average a run, later checkpoints weighing more (EMA).",
            "streamsoup ema run --decay .9 -o soup",
            "tasks/average-a-run.md",
        ),
        "wsm": Entry(
            "closed",
            "Average a run in place of a decay of its learning rate.",
            "streamsoup wsm run --curve sqrt -o soup",
            "tasks/average-a-run.md",
        ),
        "watch": Entry(
            "watch",
            "Keep the average of a run up to date while it goes on.",
            "streamsoup watch run --last 5 -o soup",
            "tasks/average-a-run.md",
        ),
        "stock": Entry(
            "closed",
            "Go from a base towards the mean as angles say (Model Stock).",
            "streamsoup stock run1 run2 --base base -o soup",
            "methods/stock.md",
        ),
        "slerp": Entry(
            "closed",
            "Interpolate two checkpoints, or more, on a sphere.",
            "streamsoup slerp run1 run2 -t .3 -o soup",
            "methods/slerp.md",
        ),
    },
    "Merge fine-tunes for different tasks": {
        "arithmetic": Entry(
            "closed",
            "Add scaled task vectors to a base (task arithmetic).",
            "streamsoup arithmetic run1 run2 --base base --scale .4 -o soup",
            "methods/arithmetic.md",
        ),
        "ties": Entry(
            "merges",
            "Largest changes only, one sign for each, their mean (TIES).",
            "streamsoup ties run1 run2 --base base --density .2 -o soup",
            "methods/ties.md",
        ),
        "dare": Entry(
            "merges",
            "Drop random changes, and rescale the rest (DARE).",
            "streamsoup dare run1 run2 --base base --density .2 -o soup",
            "methods/dare.md",
        ),
        "breadcrumbs": Entry(
            "merges",
            "Drop the largest and the smallest changes (Breadcrumbs).",
            "streamsoup breadcrumbs run1 run2 --base base --density .9 -o soup",
            "methods/breadcrumbs.md",
        ),
        "della": Entry(
            "merges",
            "Drop random changes, small ones more often (DELLA).",
            "streamsoup della run1 run2 --base base --density .5 -o soup",
            "methods/della.md",
        ),
        "sce": Entry(
            "merges",
            "Select by variance, weigh by energy, elect signs (SCE).",
            "streamsoup sce run1 run2 --base base --select-topk .1 -o soup",
            "methods/sce.md",
        ),
        "ram": Entry(
            "merges",
            "Keep what one fine-tune changes, average shared changes.",
            "streamsoup ram run1 run2 --base base -o soup",
            "methods/ram.md",
        ),
        "nearswap": Entry(
            "merges",
            "Take from a checkpoint what lies near the base.",
            "streamsoup nearswap run1 --base base -t .001 -o soup",
            "methods/nearswap.md",
        ),
        "karcher": Entry(
            "merges",
            "Average directions on a sphere (Karcher mean).",
            "streamsoup karcher run1 run2 run3 -o soup",
            "methods/spheres.md",
        ),
        "multislerp": Entry(
            "merges",
            "Average directions and lengths (Multi-SLERP).",
            "streamsoup multislerp run1 run2 run3 -o soup",
            "methods/spheres.md",
        ),
        "nuslerp": Entry(
            "merges",
            "Turn from one checkpoint to another (NuSLERP).",
            "streamsoup nuslerp run1 run2 -t .3 -o soup",
            "methods/spheres.md",
        ),
    },
    "Make what a file says": {
        "run": Entry(
            "run",
            "Run a recipe: ours, mergekit's, or that of a soup.",
            "streamsoup run recipe.yaml -o soup",
            "reference/recipe-format.md",
        ),
    },
    "Search for a good one": {
        "greedy": Entry(
            "greedy",
            "Add checkpoints one by one, each only if the score allows.",
            "streamsoup greedy run1 run2 run3 --task task.py -o soup",
            "tasks/which-belong-together.md",
        ),
        "learned": Entry(
            "learned",
            "Learn coefficients by gradient, on held-out loss.",
            "streamsoup learned run1 run2 run3 --task task.py -o soup",
            "methods/learned.md",
        ),
        "sweep": Entry(
            "sweep",
            "Score a merge on a grid of its parameters, keep the best.",
            "streamsoup sweep ties run1 run2 --base base --density .2:.8:.2 --task task.py -o soup",
            "tasks/sweep.md",
        ),
    },
    "Study": {
        "compare": Entry(
            "compare",
            "Compare checkpoints, soups and ensembles on every split.",
            "streamsoup compare run1 run2 run3 --base base --task task.py -o report",
            "tasks/which-belong-together.md",
        ),
        "landscape": Entry(
            "compare",
            "Draw error and loss on the plane through three checkpoints.",
            "streamsoup landscape base run1 run2 --task task.py --plot plane.png",
            "tasks/task-file.md",
        ),
        "geometry": Entry(
            "geometry",
            "Show norms, angles and distances of checkpoints.",
            "streamsoup geometry run1 run2 run3 --base base",
            "start/which-command.md",
        ),
    },
    "Look before and after": {
        "plan": Entry(
            "looks",
            "Show what a soup would read, write and hold.",
            "streamsoup plan run1 run2 run3",
            "guarantees/memory.md",
        ),
        "inspect": Entry(
            "looks",
            "Show what a checkpoint holds, from its headers alone.",
            "streamsoup inspect run1",
            "index.md",
        ),
        "verify": Entry(
            "looks",
            "Make a soup again, and compare every byte.",
            "streamsoup verify soup",
            "reference/provenance.md",
        ),
        "commit": Entry(
            "commit",
            "Put a soup in place that was made in parts (--part).",
            "streamsoup commit soup",
            "tasks/on-a-cluster.md",
        ),
    },
    "This installation": {
        "demo": Entry(
            "demo",
            "Fine-tune ten small networks, soup them, show who wins.",
            "streamsoup demo",
            "index.md",
        ),
        "selftest": Entry(
            "selftest",
            "Test bits, order and memory here, and measure rates.",
            "streamsoup selftest",
            "tasks/on-a-gpu.md",
        ),
    },
}
"""What one may want, the common first."""

COMMANDS: Mapping[str, Entry] = {
    name: entry for section in SECTIONS.values() for name, entry in section.items()
}
