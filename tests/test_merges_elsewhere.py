"""Merges outside of the plain case: into live models, as streams, and after kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamsoup
from streamsoup import Options
from streamsoup.engine import plan, stream

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "rescale": "l1", "trim": "model"}),
    ("dare", {"density": 0.4, "rescale": "density", "seed": 2}),
    ("dare", {"density": (0.4, 0.6, 1.0)}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("della", {"density": 0.5}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {}),
    ("ram", {"epsilon": 0.01}),
    ("nearswap", {"t": 0.1}),
]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Save a base and three networks near it, with the same running variances."""
    found = networks.ingredients(tmp_path / "in", 4)
    for path in found:
        file = Path(path) / "model.safetensors"
        save_file(load_file(file) | {"1.running_var": torch.ones(24)}, file)
    return found


def merge(method: str, paths: list[str], output: Path | str, told: Any, **more: Any) -> Any:
    """Call a verb of the library."""
    others = paths[1:2] if method == "nearswap" else paths[1:]
    options = Options(non_float="first", **more)
    verb = getattr(streamsoup, method)
    return verb(others, base=paths[0], output=output, options=options, **told)


@pytest.mark.parametrize(("method", "told"), METHODS)
def test_a_merge_into_a_live_model_is_the_file(
    paths: list[str], tmp_path: Path, method: str, told: dict[str, Any]
) -> None:
    """mix_into and stream_mix with any built-in rule make the bits of the soup's file."""
    soup = merge(method, paths, tmp_path / "soup", told)
    written = load_file(Path(soup.path) / "model.safetensors")
    model = networks.build()
    kept = {name: value.data_ptr() for name, value in model.state_dict().items()}
    options = Options(non_float="first", threads=2)
    recipe = soup.recipe
    streamsoup.mix_into(model, recipe.ingredients, recipe.rule, options=options)
    state = model.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], value) for name, value in written.items())
    assert {name: value.data_ptr() for name, value in state.items()} == kept
    if not recipe.rule.spans_model:
        streamed = dict(streamsoup.stream_mix(recipe.ingredients, recipe.rule, options=options))
        assert all(torch.equal(streamed[name], value) for name, value in written.items())


KILLED = """
import os
import streamsoup
from streamsoup.engine import plan, stream
from streamsoup.engine.rules import task_vectors
plan.LEAF, stream.CHECKPOINT_S, stream.ALONE_NBYTES, stream.TICK_S = 4096, 1e9, -1, 0.001
task_vectors.MOST_COLLECTED = 4
n = 0
def counted(method):
    def call(self, *arguments):
        global n
        n += 1
        if n == {after}:
            self.ledger.checkpoint()
            os._exit(9)
        return method(self, *arguments)
    return call
stream._Pass.make_leaf = counted(stream._Pass.make_leaf)
stream._Pass.measure_leaf = counted(stream._Pass.measure_leaf)
one = streamsoup.Options(threads=1)
streamsoup.{method}({others!r}, base={base!r}, output={output!r}, options=one, **{told!r})
"""


def three_leaves(folder: Path) -> list[str]:
    """Save a base and two fine-tunes of two tensors of three leaves each, as cut by `KILLED`."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=10_000) for name in ("a", "b")}
    found = []
    for i in range(3):
        path = folder / f"m{i}"
        path.mkdir()
        state = {
            name: torch.tensor(values + 0.1 * i * rng.normal(size=10_000), dtype=torch.bfloat16)
            for name, values in base.items()
        }
        save_file(state, path / "model.safetensors")
        found.append(str(path))
    return found


@pytest.mark.parametrize(
    ("method", "told", "after"),
    [
        ("ties", {"density": 0.4}, 2),  # while it measures
        ("ties", {"density": 0.4}, 5),  # while it makes the first tensor
        ("ties", {"density": 0.4, "trim": "model", "rescale": "l1"}, 15),
        ("dare", {"density": 0.4, "rescale": "density"}, 4),
        ("dare", {"density": 0.4}, 8),  # between the passes over the second tensor
        ("breadcrumbs", {"density": 0.4}, 11),
        ("sce", {"select_topk": 0.4}, 13),
        ("ram", {}, 3),
    ],
)
def test_a_merge_is_resumed_after_a_kill(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    told: dict[str, Any],
    after: int,
) -> None:
    """Killed between leaves, within any pass, the same command ends with the bytes of one run."""
    base, *others = three_leaves(tmp_path)
    verb = getattr(streamsoup, method)
    whole = verb(others, base=base, output=tmp_path / "whole", **told)
    output = str(tmp_path / "soup")
    script = KILLED.format(
        after=after, method=method, others=others, base=base, output=output, told=told
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert not Path(output).exists()
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(stream, "ALONE_NBYTES", -1)
    verb(others, base=base, output=output, **told)
    name = "model.safetensors"
    assert (Path(output) / name).read_bytes() == (Path(whole.path) / name).read_bytes()
