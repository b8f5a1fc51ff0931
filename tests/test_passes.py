"""Rules of several passes: their plans, their progress, and what is said to be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save

import streamsoup
from streamsoup import Options, Planned, Progress
from streamsoup.cli import cli
from streamsoup.cli.planning import VERBS
from streamsoup.engine import plan, stream
from streamsoup.engine.rules import task_vectors

N = 9000


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Save a base and two fine-tunes of it in bfloat16, of two tensors."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=N).astype(np.float32) for name in ("a", "b")}
    found = []
    for i in range(3):
        content = {}
        for name, values in base.items():
            moved = np.float32(values + 0.01 * i * rng.normal(size=N))
            content[name] = ("BF16", (N,), (moved.view(np.uint32) >> 16).astype("<u2").tobytes())
        found.append(str(save(tmp_path / f"m{i}", content)))
    return found


@pytest.mark.parametrize(("most", "n_passes"), [(1 << 17, 2), (8, 2)])
@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_all_passes_are_counted(
    paths: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    n_passes: int,
    trim: Any,
) -> None:
    """Progress never falls, ends with what the soup says was read, and that is each pass."""
    monkeypatch.setattr(task_vectors, "MOST_COLLECTED", most)
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(stream, "ALONE_NBYTES", 0)
    monkeypatch.setattr(stream, "TICK_S", 0.0)
    seen: list[Progress] = []

    def on_event(event: object) -> None:
        if isinstance(event, Progress):
            seen.append(event)

    soup = streamsoup.ties(
        paths[1:],
        0.5,
        base=paths[0],
        output=tmp_path / "soup",
        trim=trim,
        options=Options(on_event=on_event, threads=2),
    )
    once = 3 * 2 * 2 * N
    assert soup.n_passes == n_passes
    assert soup.nbytes_read == once * n_passes
    done = [each.nbytes_done for each in seen]
    assert done == sorted(done)
    assert all(each.nbytes_done <= each.nbytes for each in seen)
    assert (seen[-1].nbytes_done, seen[-1].nbytes) == (soup.nbytes_read, soup.nbytes_read)


def test_a_rule_of_one_pass_reads_once(paths: list[str], tmp_path: Path) -> None:
    """A mean, and a rule that measures nothing, read every byte once."""
    mean = streamsoup.uniform(paths, output=tmp_path / "mean")
    ram = streamsoup.ram(paths[1:], base=paths[0], output=tmp_path / "ram")
    assert mean.nbytes_read == ram.nbytes_read == 3 * 2 * 2 * N
    assert mean.n_passes == ram.n_passes == 1


def test_a_plan_comes_before_the_first_weight(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that raises when the soup is planned leaves nothing behind, and no byte read."""

    def no_reading(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(stream, "run", no_reading)

    def stops(event: object) -> None:
        if isinstance(event, Planned):
            raise KeyError(event.order.plan.recipe.method)

    with pytest.raises(KeyError, match="ties"):
        streamsoup.ties(
            paths[1:],
            0.5,
            base=paths[0],
            output=tmp_path / "soup",
            options=Options(on_event=stops),
        )
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2"}


OWN = {
    "mix": ["--coefficients", ".5,.5"],
    "ties": ["--density", ".5"],
    "dare": ["--density", ".5"],
    "breadcrumbs": ["--density", ".5"],
    "della": ["--density", ".5"],
    "nearswap": ["-t", ".1"],
    "arithmetic": ["--scale", ".4"],
    "ema": ["--decay", ".9"],
}
BASED = ("arithmetic", "stock", "ties", "dare", "breadcrumbs", "della", "sce", "ram", "nearswap")
PASSES = {
    "ties": (2, 8),
    "breadcrumbs": (2, 8),
    "dare": (2, 2),
    "della": (2, 2),
    "sce": (2, 2),
} | dict.fromkeys(("slerp", "stock", "karcher", "multislerp", "nuslerp"), (2, 2))


@pytest.mark.parametrize("verb", sorted(VERBS - {"lawa", "wsm", "ema"}))
def test_every_soup_can_be_planned(
    paths: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    """`plan` with a verb and its options says the bytes and passes of that soup, and makes none."""
    ckpts = paths[1:2] if verb == "nearswap" else paths[1:]
    based = ["--base", paths[0]] if verb in BASED else []
    assert cli(["plan", verb, *ckpts, *based, *OWN.get(verb, []), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["usual_passes"], told["n_passes"]) == PASSES.get(verb, (1, 1))
    n = len(told["ingredients"])
    assert told["nbytes_read"] == n * 2 * 2 * N
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2"}


def test_a_planned_refusal_is_one_line(
    paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the verb refuses, its plan refuses; and in words it says the passes."""
    words = ["plan", "ties", *paths[1:], "--base", paths[0], "--density"]
    assert cli([*words, "2"]) == 2
    assert "2.0 is not in the range 0<=x<=1" in capsys.readouterr().err
    assert cli([*words, ".5"]) == 0
    assert "in each of usually 2, at most 8 passes" in capsys.readouterr().out
