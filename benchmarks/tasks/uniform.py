"""How fast is a uniform soup, beside its peers and beside what the machine can do?

Every round measures the limit, then streamsoup, then each peer, so that whatever else the machine
does falls on all alike. The limit is: read every mapped page of every input once, with all cores,
then write and sync as many bytes as the output has, in the fastest of the `WAYS`. For a cold cache,
it is the fastest of several ways to read the files from the disk, and nothing for the output;
beside it, the fastest while as many bytes are written to the same disk and synced.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.answers import Answer, check
from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.limits import WAYS
from benchmarks.measure import (
    drop_cache,
    limit,
    measure,
    remove,
    settle,
    warm_cache,
    weights_of,
)
from benchmarks.ours import uniform
from benchmarks.peers import Peer, command, install, versions, why_not
from benchmarks.rows import Session

__all__ = ["run"]


def run(
    session: Session,
    case: Case,
    *,
    peers: Sequence[Peer] = (),
    rounds: int = 5,
    peer_rounds: int = 3,
    cold: bool = False,
) -> None:
    """Check every answer, then measure all tools, interleaved."""
    ingredients = make(case)
    failed = install(peers)
    for peer in peers:
        reason = failed.get(peer.room) or why_not(peer, case, _available())
        if reason:
            session.add("uniform", peer.name, case.label, skipped=reason)
    peers = [p for p in peers if p.room not in failed and not why_not(p, case, _available())]
    tiny = make(Case("0.5M", 2, case.dtype))
    answers: dict[str, Answer] = {}
    for name, line, env in [("streamsoup", _ours(ingredients), {})] + [
        (peer.name, command(peer, _output(peer.name), ingredients), dict(peer.env))
        for peer in peers
    ]:
        output = _output(name)
        result = measure(line, output=output, env=env)
        if result.status:
            reason = result.stderr.strip().rpartition("\n")[2][:200]
            session.add("uniform", name, case.label, skipped=f"failed: {reason}")
        else:
            ours = _output("streamsoup") if answers else None
            answers[name] = check(output, ingredients, ours)
            assert answers["streamsoup"].share_wrong == 0, "streamsoup is wrong: nothing was timed"
        if name != "streamsoup":
            remove(output)
    drop_cache(ingredients)  # to be read anew: see `warm_cache`
    for round_ in range(rounds):
        cache = "cold" if cold else "warm"
        numbers = {"cache": cache, "round": round_, "input_nbytes": case.n * case.nbytes_each}
        numbers |= _limits(session, case, ingredients, numbers)
        for name, answer in answers.items():
            if name != "streamsoup" and round_ >= peer_rounds:
                continue
            peer_of = {peer.name: peer for peer in peers}
            peer = peer_of.get(name)
            output = _output(name)
            line = command(peer, output, ingredients) if peer is not None else _ours(ingredients)
            env = dict(peer.env) if peer is not None else {}
            # Its libraries are to be in the page cache, as its ingredients are: some machines
            # take from the cache what lay there for a minute.
            start = command(peer, output, tiny) if peer is not None else uniform(output, tiny)
            measure(start, output=output, env=env)
            _prepare(ingredients, cold)
            result = measure(line, output=output, env=env)
            remove(output)
            session.add(
                "uniform",
                name,
                case.label,
                **numbers,
                **result.row(),
                answer=answer.row(),
                status=result.status,
                tool_versions=versions(peer) if peer is not None else {},
            )


def _limits(
    session: Session, case: Case, ingredients: Sequence[Path], numbers: dict[str, object]
) -> dict[str, float]:
    """Measure the machine's own limits for a case, in seconds."""
    files = weights_of(ingredients)
    cold = numbers["cache"] == "cold"
    n_cpus = len(os.sched_getaffinity(0))
    room = cache_folder() / "soups"
    room.mkdir(parents=True, exist_ok=True)
    read, written = case.n * case.nbytes_each, case.nbytes_each

    def add(what: str, nbytes: int, *arguments: object) -> float:
        _prepare(ingredients, cold)
        seconds = limit(*arguments)
        if math.isfinite(seconds):  # it can be done here
            rate = nbytes / seconds / 1e9
            session.add("limits", what, case.label, **numbers, seconds=seconds, gb_per_s=rate)
        return seconds

    ways = [("mapped", n_cpus), ("plain", n_cpus), ("plain", 1)]
    if cold:
        ways += [("plain", 4), ("plain", 8)]
    reading = [add(f"read {way}, {n} threads", read, way, n, *files) for way, n in ways]
    output = room / "limit"
    writing = [
        add(f"write and sync{way.how}", written, "write", name, written, output)
        for name, way in WAYS.items()
    ]
    if not cold:
        return {"limit_s": reading[0] + min(writing), "writing_s": min(writing)}
    at_once = [
        add(
            f"read plain, {n} threads, write and sync meanwhile{way.how}",
            read + written,
            *("both", n, name, written, output, *files),
        )
        for n in (n_cpus, 8)
        for name, way in WAYS.items()
        if way.reserved
    ]
    return {"limit_s": min(reading), "at_once_s": min(at_once)}


def _prepare(ingredients: Sequence[Path], cold: bool) -> None:
    settle()
    (drop_cache if cold else warm_cache)(ingredients)


def _output(name: str) -> Path:
    return cache_folder() / "soups" / "".join(c if c.isalnum() else "-" for c in name)


def _ours(ingredients: Sequence[Path]) -> list[str]:
    return uniform(_output("streamsoup"), ingredients)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0
