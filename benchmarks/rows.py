"""Rows: what was measured, when, on which machine, with which versions; only ever appended.

One file per task in `results/`, one JSON object per line and run. Rows of one session share its
name, which is the time it began.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "Row",
    "Session",
    "compared",
    "latest",
    "median",
    "of_tool",
    "read",
    "share",
    "undisturbed",
]

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


class Session:
    """One run of the harness: rows are written as they come, so that a stop loses nothing."""

    def __init__(self, folder: Path = RESULTS, *, log: bool = True) -> None:
        """Find out where we are."""
        self.folder = folder
        self.began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.about = {"session": self.began, **machine(), "commit": commit()}
        self.log = log

    def add(self, task: str, tool: str, case: str, **numbers: object) -> Row:
        """Append a row."""
        row: Row = {"task": task, "tool": tool, "case": case, **numbers, **self.about}
        row["load"] = round(os.getloadavg()[0], 2)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{task}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self.log:
            shown = {k: v for k, v in numbers.items() if k in _SHOWN and v is not None}
            text = " ".join(f"{k}={_short(v)}" for k, v in shown.items())
            print(f"{task:9} {case:22} {tool:26} {text}", file=sys.stderr, flush=True)
        return row


_SHOWN = (
    "cache",
    "wall_s",
    "others_cpus",
    "peak_anonymous_nbytes",
    "gb_per_s",
    "answer",
    "seconds",
)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value > 1_000_000:
        return f"{value / 1e6:.0f}M"
    return str(value)


def machine() -> dict[str, object]:
    """Describe the machine: its kind, never its name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "n_cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("streamsoup", "numpy", "numba", "xxhash")},
    }


def commit() -> str:
    """Return the commit of the working tree, with a mark if the package differs from it."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "streamsoup")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def read(folder: Path = RESULTS) -> list[Row]:
    """Read all rows, in the order in which they were measured."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def latest(rows: Iterable[Row], task: str, case: str, **where: object) -> list[Row]:
    """Return the rows of a case's last session that agree with `where`."""
    found = [
        row
        for row in rows
        if row["task"] == task
        and row["case"] == case
        and all(row.get(key) == value for key, value in where.items())
    ]
    last = max((row["session"] for row in found), default="")
    return undisturbed([row for row in found if row["session"] == last])


def undisturbed(rows: list[Row]) -> list[Row]:
    """Leave out runs during which others kept a processor busy, where there are enough without."""
    tools = dict.fromkeys(row["tool"] for row in rows)
    kept = []
    for tool in tools:
        mine = [row for row in rows if row["tool"] == tool]
        calm = [row for row in mine if row.get("others_cpus", 0.0) <= DISTURBED]
        kept += calm or mine
    return kept


DISTURBED = 0.25
"""Processors kept busy by others from which a run is not counted."""


def compared(rows: Sequence[Row], case: str, cache: str) -> list[Row]:
    """Return a case's last session with peers, if any: only times side by side compare."""
    beside = [
        row["session"]
        for row in rows
        if (row["task"], row["case"], row.get("cache")) == ("uniform", case, cache)
        and row["tool"] != "streamsoup"
    ]
    session = max(beside, default=None)
    within = [row for row in rows if session is None or row["session"] == session]
    return latest(within, "uniform", case, cache=cache)


def of_tool(rows: Sequence[Row], case: str, tool: str, cache: str = "warm") -> list[Row]:
    """Return the runs of a tool that succeeded in that session."""
    found = compared(rows, case, cache)
    return [row for row in found if row["tool"] == tool and row["status"] == 0]


def median(rows: Sequence[Row], key: str) -> float:
    """Return the median of a number."""
    return statistics.median(row[key] for row in rows)


def share(rows: Sequence[Row], limit: str) -> float:
    """Return the median of a limit over the wall time of its own round."""
    return statistics.median(row[limit] / row["wall_s"] for row in rows)
