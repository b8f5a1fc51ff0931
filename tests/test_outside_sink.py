"""Sinks from outside the package, and soups that no folder is written for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load, save, tensor
from outside.counting_sink import CountingSink, FileOfLeaves
from outside.ties import OutsideTies

import streamsoup
from streamsoup.engine import plan
from streamsoup.errors import RecipeError
from streamsoup.live import streams


def checkpoints(tmp_path: Path, n: int = 3) -> list[str]:
    """Save checkpoints of several dtypes and shapes."""
    rng = np.random.default_rng(0)
    return [
        str(
            save(
                tmp_path / f"m{i}",
                {
                    "a": tensor(rng.normal(size=(50, 300)).astype(np.float32)),
                    "b": tensor(rng.normal(size=()).astype(np.float16)),
                    "c": tensor(np.zeros((0, 4), np.float64)),
                    "n": tensor(np.arange(3)),
                },
            )
        )
        for i in range(n)
    ]


def test_a_sink_is_sent_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of all tensors add up to the bytes of the soup."""
    monkeypatch.setattr(plan, "LEAF", 4096)
    made: list[CountingSink] = []

    def sink(planned: streamsoup.MixPlan) -> CountingSink:
        made.append(CountingSink(planned))
        return made[0]

    recipe = streamsoup.mix_to(sink, checkpoints(tmp_path))
    assert dict(made[0].nbytes) == {"a": 60000, "b": 2, "n": 24}
    assert isinstance(recipe.rule, streamsoup.Linear)


def test_what_a_ledger_knows_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several writers share one output: each makes what the ledger does not have."""
    monkeypatch.setattr(plan, "LEAF", 4096)
    paths = checkpoints(tmp_path)
    for rule in (None, OutsideTies(0.5)):
        first = FileOfLeaves({})
        streamsoup.mix_to(CountingSink, paths, rule, ledger=lambda _, it=first: it)
        half = dict(list(first.finished.items())[:3])
        second, sinks = FileOfLeaves(half), []

        def sink(planned: streamsoup.MixPlan, to: list[CountingSink] = sinks) -> CountingSink:
            to.append(CountingSink(planned))
            return to[0]

        streamsoup.mix_to(sink, paths, rule, ledger=lambda _, it=second: it)
        assert second.finished == first.finished
        assert sinks[0].n_blocks == len(first.finished) - 3


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [0, 10**9])
def test_an_iterator_yields_the_bytes_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ties: bool, batch: int
) -> None:
    """Tensor by tensor, in the order of the file, with the same bytes."""
    monkeypatch.setattr(streams, "BATCH_NBYTES", batch)
    paths = checkpoints(tmp_path)
    rule = OutsideTies(0.5) if ties else streamsoup.Linear(streamsoup.Coefficients.uniform(3))
    soup = streamsoup.apply(paths, rule, output=tmp_path / "soup")
    expected = load(Path(soup.path))
    found = list(streamsoup.stream_mix(paths, rule))
    assert [name for name, _ in found] == list(expected)
    for name, made in found:
        assert tuple(made.shape) == expected[name][1]
        assert made.numpy().tobytes() == expected[name][2]


def test_tensors_stay_the_callers_own(tmp_path: Path) -> None:
    """A state dict of the iterator holds, and may be written to, after the iterator has ended."""
    state = dict(streamsoup.stream_mix(checkpoints(tmp_path)))
    state["a"].add_(1)
    assert torch.isfinite(state["a"]).all()


def test_a_rule_of_the_whole_model_is_not_streamed(tmp_path: Path) -> None:
    """Statistics of all tensors come before the first of them: refused, with the way on."""

    class Wide(OutsideTies, tag="wide", frozen=True):
        spans_model = True

    with pytest.raises(RecipeError, match="to a folder instead"):
        next(streamsoup.stream_mix(checkpoints(tmp_path), Wide(0.5)))


def test_an_iterator_takes_one_engine_for_the_whole_soup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether compiling pays is judged by all that is read, not batch by batch."""
    sizes: list[int] = []
    engine = streams.Engine

    def counted(planned: streamsoup.MixPlan, **more: bool) -> object:
        sizes.append(planned.nbytes_read)
        return engine(planned, **more)

    monkeypatch.setattr(streams, "Engine", counted)
    monkeypatch.setattr(streams, "BATCH_NBYTES", 0)
    paths = checkpoints(tmp_path)
    assert len(list(streamsoup.stream_mix(paths))) == 4
    assert sizes == [streamsoup.plan(paths).nbytes_read]


def test_variances_below_zero_are_not_streamed(tmp_path: Path) -> None:
    """What a soup on disk is refused for, an iterator and a sink are refused for, too."""
    paths = []
    for i in range(2):
        values = tensor(np.full(3, 1.0 + i, np.float32))
        model = {"bn.running_mean": values, "bn.running_var": values}
        paths.append(str(save(tmp_path / f"m{i}", model)))
    with pytest.raises(RecipeError, match="variances below zero"):
        next(streamsoup.stream_mix(paths, [2.0, -1.5]))
    with pytest.raises(RecipeError, match="variances below zero"):
        streamsoup.mix_to(CountingSink, paths, [2.0, -1.5])
