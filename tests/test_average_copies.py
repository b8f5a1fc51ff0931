"""Averages of models on a device: copies go on by themselves, and nothing waits for the additions.

The first half plays a device on the CPU, with events that are done when the test says so. The rest
is for `make test-cuda`, on a card or on a simulated runtime, where races are looked for as well.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_average import State, same, states
from torch import nn

from streamsoup import Average
from streamsoup.errors import RecipeError
from streamsoup.training import copies
from streamsoup.training.copies import spans, staged_nbytes

METHODS: list[dict[str, Any]] = [
    {"method": "uniform"},
    {"method": "ema", "decay": 0.75},
    {"method": "lawa", "window": 2},
    {"method": "wsm", "n": 4, "curve": "cosine"},
    {"method": "uniform", "precision": "float32"},
]


class Arrival:
    """An event that is done when `now` is set."""

    now = threading.Event()

    def synchronize(self) -> None:
        """Wait for it."""
        assert self.now.wait(5)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Play a device: all tensors but one are away, and arrive once the event is set."""
    now = threading.Event()
    monkeypatch.setattr(Arrival, "now", now)
    monkeypatch.setattr(copies, "_record", lambda device: Arrival())
    monkeypatch.setattr(copies, "_pinned", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(copies, "CHUNK", 1 << 10)  # tensors of some kilobytes are cut
    monkeypatch.setattr(
        "streamsoup.training.average.is_away", lambda tensor: tensor.dtype != torch.float16
    )
    return now


def test_tensors_are_cut_and_never_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element has one place, aligned, within a chunk; no chunk is rounded up by torch."""
    monkeypatch.setattr(copies, "CHUNK", 1 << 10)
    run = states(1)[0]
    found, sizes = spans(run)
    for name, tensor in run.items():
        mine = [span for span in found if span.name == name]
        ends = [0, *(span.end for span in mine)]
        assert [span.begin for span in mine] == ends[:-1]
        assert ends[-1] == tensor.numel()
    taken = [
        (span.chunk, span.offset, span.offset + (span.end - span.begin) * run[span.name].itemsize)
        for span in found
    ]
    assert taken == sorted(taken)
    for (chunk, _, end), (other, begin, _) in pairwise(taken):
        assert other > chunk or begin >= end
    assert all(begin % 64 == 0 and end <= sizes[chunk] for chunk, begin, end in taken)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert staged_nbytes(run) == sum(sizes)


@pytest.mark.parametrize("settings", METHODS, ids=lambda each: "-".join(map(str, each.values())))
def test_an_update_waits_for_no_arrival(played: threading.Event, settings: dict[str, Any]) -> None:
    """It returns at once, the model may change then, and the average has the bits of any other."""
    run = states(4)
    average = Average(**settings)
    for n, state in enumerate(run):
        model = {name: tensor.clone() for name, tensor in state.items()}
        played.set()  # what the update before has queued; there is one place in transit
        average._check_whole()
        played.clear()
        average.update(model)
        assert average.n_updates == n + 1
        for tensor in model.values():
            tensor.zero_()
    threading.Timer(0.05, played.set).start()
    same(average.result(), averaged_without_device(run, settings))


def averaged_without_device(run: list[State], settings: dict[str, Any]) -> State:
    """Return the average of the states as plain float64 sums on the host have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamsoup.training.average.is_away", lambda tensor: False)
        average = Average(**settings)
        for state in run:
            average.update(state)
        return average.result()


def test_what_fails_in_transit_is_raised_by_the_next_call(played: threading.Event) -> None:
    """Neither a result nor a state is given of an average that lacks a part; reset forgets it."""
    played.set()
    average = Average()

    def fail(self: object) -> None:
        raise RuntimeError("device lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrival, "synchronize", fail)
        average.update(states(1)[0])
        for call in (average.result, average.state_dict, average._check_whole):
            with pytest.raises(RuntimeError, match="device lost"):
                call()
    with pytest.raises(RuntimeError, match="device lost"):
        average.update(states(1)[0])
    average.reset()
    average.update(states(1)[0])
    same(average.result(), averaged_without_device(states(1), {}))


def test_without_pinned_memory_copies_are_waited_for(
    played: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average is the same where no page-locked memory is to be had; it is asked for once."""
    asked = []

    def refuse(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        raise RuntimeError("out of pinned memory")

    monkeypatch.setattr(copies, "_pinned", refuse)
    played.set()
    average = Average()
    for state in states(3):
        average.update(state)
    assert len(asked) == 1
    same(average.result(), averaged_without_device(states(3), {}))


def test_memory_in_transit_is_predicted(played: threading.Event) -> None:
    """It is part of what an average in host memory holds, and of no other."""
    run = states(1)[0]
    away = {name: tensor for name, tensor in run.items() if tensor.dtype != torch.float16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamsoup.training.average.is_away", lambda tensor: False)
        plain = Average().memory(run)
    held = Average().memory(run)
    assert held.host_nbytes - plain.host_nbytes == staged_nbytes(away)


def test_a_new_average_can_be_copied_and_pickled() -> None:
    """As trainers do with their callbacks; it starts no thread before its first update."""
    n_threads = threading.active_count()
    for made in (copy.deepcopy(Average("ema")), pickle.loads(pickle.dumps(Average("ema")))):
        made.update(states(1)[0])
        same(made.result(), averaged_without_device(states(1), {"method": "ema"}))
    assert threading.active_count() == n_threads


@pytest.fixture
def no_races() -> Iterator[None]:
    """Check a test for races, where that is possible."""
    try:
        import hsan
    except ImportError:  # a real device
        yield
        return
    with hsan.check():
        yield


@pytest.mark.cuda
@pytest.mark.parametrize("settings", METHODS, ids=lambda each: "-".join(map(str, each.values())))
def test_averages_of_a_model_on_a_device(no_races: None, settings: dict[str, Any]) -> None:
    """Values that the next step overwrites at once are averaged as they were, without a race."""
    # What the simulated runtime does not emulate: sums of float8, and the search for -inf.
    names = [name for name in states(1)[0] if name not in ("float8_e4m3fn", "mask")]
    run = [{name: state[name] for name in names} for state in states(4)]
    model = {name: tensor.cuda() for name, tensor in run[0].items()}
    average = Average(**settings)
    for state in run:
        for name, tensor in model.items():
            tensor.copy_(state[name])
        average.update(model)
        for tensor in model.values():
            tensor.zero_()
    assert average._copies is not None
    assert average._copies._chunks
    same(average.result(), averaged_without_device(run, settings))


@pytest.mark.cuda
def test_a_swapped_model_has_its_own_values_again(no_races: None) -> None:
    """The average goes into a model on a device while an update is in transit, and out again."""
    torch.manual_seed(0)
    host = nn.BatchNorm1d(700)
    model = nn.BatchNorm1d(700).cuda()
    model.load_state_dict(host.state_dict())
    average = Average("ema", decay=0.5)
    with torch.no_grad():
        for step in range(3):
            for tensor in (model.weight, model.bias):
                tensor.fill_(step)
            model.num_batches_tracked.fill_(step)
            average.update(model)
            with average.swap(model):
                assert model.weight.cpu()[0] == [0, 0.5, 1.25][step]
            assert model.weight.cpu()[0] == step
    assert int(average.result()["num_batches_tracked"]) == 2


@pytest.mark.cuda
@pytest.mark.parametrize(
    "step", ["cudaHostAlloc:1", "cudaMemcpyAsync:2", "cudaMemcpyAsync:9", "cudaEventRecord:2",
             "cudaEventSynchronize:1"],
)  # fmt: skip
def test_a_device_that_fails_spoils_no_average(step: str) -> None:
    """The average is right, or every call raises until it is reset: it is never a part of one."""
    simcuda = pytest.importorskip("simcuda")
    names = [name for name in states(1)[0] if name not in ("float8_e4m3fn", "mask")]
    run = [{name: state[name] for name in names} for state in states(2)]
    expected = averaged_without_device(run, {"method": "uniform"})
    models = [{name: tensor.cuda() for name, tensor in state.items()} for state in run]
    average = Average()
    failed = False
    with simcuda.settings(fail=step):
        try:
            for model in models:
                average.update(model)
            same(average.result(), expected)
        except (RuntimeError, RecipeError):
            failed = True
    if failed:
        for call in (average.result, average.state_dict):
            with pytest.raises((RuntimeError, RecipeError)):
                call()
        average.reset()
        for model in models:
            average.update(model)
    same(average.result(), expected)
