"""How long do the merges of task vectors and on spheres take, beside a uniform soup and mergekit?

Every round measures the uniform soup of the same files first: the times of the others are shares
of that one. Merges of task vectors read a base beside the ingredients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import Measurement, measure, remove, settle, warm_cache
from benchmarks.ours import streamsoup
from benchmarks.peers import PEERS, command, install, versions
from benchmarks.rows import Session

__all__ = ["run"]

DENSITY = ("--density", ".5")
OF_TASK_VECTORS = {
    "ties": ("ties", *DENSITY),
    "dare, rescaled by density": ("dare", *DENSITY, "--rescale", "density"),
    "dare, rescaled to the l1 norm": ("dare", *DENSITY),
    "dare_ties": ("dare", *DENSITY, "--consensus", "sum"),
    "breadcrumbs": ("breadcrumbs", *DENSITY),
    "della": ("della", *DENSITY),
    "sce": ("sce", "--select-topk", ".5"),
    "ram": ("ram",),
}
ON_SPHERES = {"karcher": ("karcher",), "multislerp": ("multislerp",)}
OF_PEERS = ("ties", "dare_ties")
SHOWN = {
    "wall_s": "s:",
    "times_uniform": "times uniform:",
    "cpu_s": "CPU s:",
    "peak_anonymous_nbytes": "peak memory:",
}


def run(session: Session, case: Case, *, rounds: int = 3, peer_rounds: int = 1) -> None:
    """Merge the ingredients of a case, over one more as their base; some by mergekit, too."""
    base, *ingredients = folders = make(replace(case, n=case.n + 1))
    lines = {"uniform": streamsoup("uniform", *ingredients, *_to("uniform"))}
    for name, words in OF_TASK_VECTORS.items():
        lines[name] = streamsoup(*words, *ingredients, "--base", base, *_to(name))
    for name, words in ON_SPHERES.items():
        lines[name] = streamsoup(*words, *ingredients, *_to(name))
    peer = next(each for each in PEERS if each.name == "mergekit, best flags")
    failed = install([peer]) if peer_rounds else {}
    for round_ in range(rounds):
        uniform = 0.0
        for name, line in lines.items():
            result = _measured(line, _output(name), folders)
            uniform = uniform or result.wall_s
            _add(session, "streamsoup", name, case, round_, result, uniform)
        for name in OF_PEERS if round_ < peer_rounds and not failed else ():
            output, env = _output("mergekit"), {**dict(peer.env), "MERGEKIT_METHOD": name}
            result = _measured(command(peer, output, folders), output, folders, env)
            _add(session, peer.name, name, case, round_, result, uniform, versions(peer))


def _add(
    session: Session,
    tool: str,
    name: str,
    case: Case,
    round_: int,
    result: Measurement,
    uniform_s: float,
    tool_versions: dict[str, str] | None = None,
) -> None:
    session.add(
        "merges",
        tool,
        f"{name}, {case.label}",
        round=round_,
        times_uniform=result.wall_s / uniform_s,
        shown=SHOWN,
        tool_versions=tool_versions or {},
        **result.row(),
    )


def _measured(
    line: Sequence[str], output: Path, inputs: Sequence[Path], env: dict[str, str] | None = None
) -> Measurement:
    """Run a command with its inputs in the page cache, and remove what it wrote."""
    settle()
    warm_cache(inputs)
    result = measure(line, output=output, env=env or {})
    assert result.status == 0, result.stderr
    remove(output)
    return result


def _output(name: str) -> Path:
    return cache_folder() / "soups" / "".join(c if c.isalnum() else "-" for c in name)


def _to(name: str) -> list[object]:
    return ["-o", _output(name), "--quiet"]
