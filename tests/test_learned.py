"""Learned soups: slopes against autograd through an in-memory sum, and what a search comes to."""

from __future__ import annotations

import contextlib
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import nn

import streamsoup
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, ResumeError, TaskError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.live.model import ModelSink
from streamsoup.options import Options
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients
from streamsoup.search.learned import learned
from streamsoup.search.learning.backward import _vector
from streamsoup.search.learning.descent import AdamW, lbfgs
from streamsoup.search.learning.journal import LearningJournal
from streamsoup.search.learning.parametrisation import parametrise
from streamsoup.search.learning.search import Losses
from streamsoup.search.learning.settings import LearnedSettings
from streamsoup.search.learning.slopes import Slopes, find_equal
from streamsoup.study.plot import plot_coefficients
from streamsoup.task import load_task

K = 4


class Net(nn.Module):
    """Two blocks, tied embedding and head, a norm with buffers, and a frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.table = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).mean(1) + self.table
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def make_state(seed: int, *, tied_name: bool = True) -> dict[str, torch.Tensor]:
    """Weights of one fine-tune: near to a common base; the norms' weights never moved."""
    base = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(100 + seed)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in Net().double().state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
            continue
        start = torch.randn(tensor.shape, generator=base, dtype=torch.float64)
        moved = 0.3 * torch.randn(tensor.shape, generator=own, dtype=torch.float64)
        state[name] = start.abs() + 0.5 if "running_var" in name else start
        if not name.endswith("1.weight"):
            state[name] = state[name] + (moved.abs() if "running_var" in name else moved)
    state["head.weight"] = state["embed.weight"].clone()
    if not tied_name:
        del state["head.weight"]
    return state


def make_batches(n: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Held-out batches of different sizes."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5 + i % 3 for i in range(n)]
    return [
        (
            torch.randint(0, 11, (size, 3), generator=generator),
            torch.randint(0, 11, (size,), generator=generator),
        )
        for size in sizes
    ]


def task_of(batches: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The task of classifying them, weighed by examples."""

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in batches:
            yield nn.functional.cross_entropy(model(x), y), len(y)

    def build() -> nn.Module:
        return Net().to(dtype)

    def score(model: nn.Module) -> float:
        return 0.0

    return SimpleNamespace(loss=loss, build=build, score=score, splits=["val"])


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Keep torch to one thread: these models are small, and other tests run beside."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of all ingredients."""
    folder = tmp_path_factory.mktemp("learned")
    for i in range(K):
        save_file(make_state(i), folder / f"{i}.safetensors")
    return [str(folder / f"{i}.safetensors") for i in range(K)]


def make_slopes(
    paths: list[str], task: Any, mixture_kind: dict[str, Any], guard_every: int = 0, **options: Any
) -> Slopes:
    """Plan the passes of a search."""
    opts = Options(non_float="first", **options)
    plan = order(
        open_ingredients(paths),
        Linear(Coefficients.uniform(len(paths))),
        method="learned",
        options=opts,
    ).plan
    loaded = load_task(task)
    sink = ModelSink(loaded.build(), plan)
    mapped = opts.io != "read"
    equal, _ = find_equal(plan, mapped=mapped, options=opts)
    assert equal["blocks.0.1.weight"] == equal["blocks.1.1.weight"] == (0,) * len(paths)
    names = [tensor.name for tensor in plan.tensors if tensor.operation == "mix"]
    mixture = parametrise(names, sink.tied, len(paths), **mixture_kind)
    return Slopes(
        loaded,
        sink,
        mixture,
        equal,
        split="val",
        guard_split=None,
        guard_every=guard_every,
        mapped=mapped,
        options=opts,
    )


class InMemory:
    """The learned soup as the paper's code has it: all in memory, autograd through the sum."""

    def __init__(self, paths: list[str], mixture: Any) -> None:
        self.states = [load_file(path) for path in paths]
        self.mixture = mixture
        self.model = Net().double().eval()

    def coefficients(self, raw: torch.Tensor) -> torch.Tensor:
        k = len(self.states)
        n = len(self.mixture.groups) * k
        z = raw[:n].reshape(-1, k)
        if self.mixture.constraint == "softmax":
            return torch.softmax(z, dim=1)
        if self.mixture.constraint == "affine":
            return z - z.mean(dim=1, keepdim=True) + 1 / k
        return z

    def loss(self, raw: torch.Tensor, batches: Any) -> torch.Tensor:
        rows = self.coefficients(raw)
        mixed = {}
        for name, group in self.mixture.group_of.items():
            stacked = torch.stack([state[name] for state in self.states])
            mixed[name] = torch.tensordot(rows[group], stacked, dims=1)
            if "running" in name:
                mixed[name] = mixed[name].detach()
        mixed["head.weight"] = mixed["embed.weight"]
        beta = raw[-1] if self.mixture.temperature else 1.0
        total, n = torch.zeros((), dtype=torch.float64), 0
        for x, y in batches:
            logits = torch.func.functional_call(self.model, mixed, (x,), tie_weights=False)
            total = total + nn.functional.cross_entropy(beta * logits, y) * len(y)
            n += len(y)
        return total / n

    def gradient(self, raw: np.ndarray, batches: Any) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(raw, requires_grad=True)
        loss = self.loss(leaf, batches)
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad.numpy()


KINDS = [
    {"granularity": g, "constraint": c, "temperature": t}
    for g in ("global", "layer", "tensor")
    for c in ("softmax", "affine", "free")
    for t in ((False, True) if g == "layer" else (False,))
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_slopes_are_those_of_autograd(paths: list[str], kind: dict[str, Any]) -> None:
    """Streamed gradients equal autograd through the in-memory sum, to float64 accuracy."""
    batches = make_batches()
    slopes = make_slopes(paths, task_of(batches), kind)
    mixture = slopes._parametrisation
    reference = InMemory(paths, mixture)
    raw = mixture.start() + 0.1 * np.random.default_rng(1).normal(size=mixture.n_raw)
    for _ in range(2):  # the second time, gradients are taken as they become ready
        seen = slopes.evaluate(raw, backward=True)
        loss, gradient = reference.gradient(raw, batches)
        assert seen.loss == pytest.approx(loss, rel=1e-13)
        ours = mixture.gradient(raw, seen.slopes, seen.beta_slope)
        np.testing.assert_allclose(ours, gradient, rtol=1e-11, atol=1e-14)


def test_a_wrong_slope_is_seen(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: a tensor whose products are dropped does not pass for autograd's."""
    kind = {"granularity": "global", "constraint": "softmax", "temperature": False}
    slopes = make_slopes(paths, task_of(make_batches()), kind)
    products = slopes.products
    monkeypatch.setattr(
        slopes, "products", lambda v: (p for p in products(v) if p[0] != "blocks.0.0.bias")
    )
    raw = slopes._parametrisation.start()
    seen = slopes.evaluate(raw, backward=True)
    _, gradient = InMemory(paths, slopes._parametrisation).gradient(raw, make_batches())
    ours = slopes._parametrisation.gradient(raw, seen.slopes, 0.0)
    assert not np.allclose(ours, gradient, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_batches_of_a_narrow_model_add_up(tmp_path: Path, dtype: torch.dtype) -> None:
    """Slopes of one batch, seen 600 times, are those of seeing it once."""
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(K)]
    for i, path in enumerate(paths):
        state = make_state(i)
        save_file({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, path)
    (batch,) = make_batches(1)
    kind = {"granularity": "tensor", "constraint": "free", "temperature": False}
    found = []
    for n in (1, 600):
        slopes = make_slopes(paths, task_of([batch] * n, dtype), kind)
        raw = slopes._parametrisation.start()
        found += [slopes.evaluate(raw, backward=True).slopes for _ in range(2)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"io": "read"}], ids=str)
def test_slopes_do_not_depend_on_how_they_are_read(
    paths: list[str], options: dict[str, Any]
) -> None:
    """Threads and the way of reading leave every bit of the slopes as it is."""
    kind = {"granularity": "tensor", "constraint": "free", "temperature": False}
    first = make_slopes(paths, task_of(make_batches()), kind)
    other = make_slopes(paths, task_of(make_batches()), kind, **options)
    raw = first._parametrisation.start()
    ours, theirs = first.evaluate(raw, backward=True), other.evaluate(raw, backward=True)
    assert np.array_equal(ours.slopes, theirs.slopes)
    again = first.evaluate(raw, backward=True)
    assert np.array_equal(ours.slopes, again.slopes)


def test_what_is_common_is_read_once(paths: list[str]) -> None:
    """Bytes read are those predicted; tensors that all share are not among them."""
    kind = {"granularity": "global", "constraint": "softmax", "temperature": False}
    slopes = make_slopes(paths, task_of(make_batches()), kind)
    raw = slopes._parametrisation.start()
    slopes.evaluate(raw, backward=True)
    first = slopes.nbytes_read
    slopes.evaluate(raw, backward=True)
    state = make_state(0)
    learned = {n: t for n, t in state.items() if "running" not in n and t.is_floating_point()}
    moved = sum(
        t.nbytes for n, t in state.items() if not n.endswith("1.weight") and t.is_floating_point()
    )
    multiplied = sum(
        t.nbytes for n, t in learned.items() if not n.endswith("1.weight") and n != "head.weight"
    )
    assert slopes.nbytes_read - first == K * (moved + multiplied)
    assert slopes.nbytes_read - first <= slopes.nbytes_of_mix + slopes.nbytes_of_products
    assert first - (slopes.nbytes_read - first) == slopes.nbytes_once


@pytest.mark.parametrize("constraint", ["softmax", "affine", "free"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_what_some_share_is_multiplied_once(
    constraint: str, granularity: str, tmp_path: Path
) -> None:
    """Where runs froze a layer, or are copies, slopes are autograd's, from fewer bytes."""
    states = [make_state(i) for i in range(K)]
    frozen = [name for name in states[0] if name.startswith("blocks.0.")]
    for name in frozen:
        states[3][name] = states[1][name].clone()
    states[2]["embed.weight"] = states[0]["embed.weight"].clone()
    states[2]["head.weight"] = states[0]["head.weight"].clone()
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(K)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    batches = make_batches()
    kind = {"granularity": granularity, "constraint": constraint, "temperature": False}
    slopes = make_slopes(paths, task_of(batches), kind)
    mixture = slopes._parametrisation
    raw = mixture.start() + 0.1 * np.random.default_rng(1).normal(size=mixture.n_raw)
    slopes.evaluate(raw, backward=True)
    before = slopes.nbytes_read
    seen = slopes.evaluate(raw, backward=True)
    loss, gradient = InMemory(paths, mixture).gradient(raw, batches)
    assert seen.loss == pytest.approx(loss, rel=1e-13)
    ours = mixture.gradient(raw, seen.slopes, seen.beta_slope)
    np.testing.assert_allclose(ours, gradient, rtol=1e-11, atol=1e-14)
    once = {name: state.nbytes for name, state in states[0].items() if state.is_floating_point()}
    common = {name for name in once if name.endswith("1.weight")}
    n_read = {name: 1 if name in common else 3 if name in frozen else K for name in once}
    n_read["embed.weight"] = 3
    times_common = 2 if constraint == "free" else 0
    expected = sum((times_common if name in common else K) * n for name, n in once.items())
    expected += sum(
        n * n_read[name]
        for name, n in once.items()
        if name not in common and "running" not in name and name != "head.weight"
    )
    assert slopes.nbytes_read - before == expected


def test_equal_tensors_are_found(tmp_path: Path) -> None:
    """Each is led back to the first that has its bits; −0 and 0 are not the same, NaNs may be."""
    values = [[1.0, 0.0], [1.0, -0.0], [1.0, 0.0], [2.0, math.nan], [2.0, math.nan]]
    for i, value in enumerate(values):
        own = np.arange(2.0) + i
        tensors = {"own": own, "some": np.array(value), "all": np.ones(3), "none": np.ones((0, 2))}
        save_numpy(tensors, tmp_path / f"{i}.safetensors")
    opened = open_ingredients([str(tmp_path / f"{i}.safetensors") for i in range(5)])
    plan = order(opened, Linear(Coefficients.uniform(5)), method="learned", options=Options()).plan
    equal, nbytes = find_equal(plan, mapped=True, options=Options())
    assert equal == {"some": (0, 1, 0, 3, 3), "all": (0,) * 5, "none": (0,) * 5}
    assert nbytes == 5 * 7 * 8


def test_the_model_is_left_as_it_was(paths: list[str]) -> None:
    """Flags, modes, gradients and hooks are as before; only weights are the mixture's."""
    kind = {"granularity": "tensor", "constraint": "free", "temperature": True}
    slopes = make_slopes(paths, task_of(make_batches()), kind)
    model = slopes._sink.model
    model.train()
    mark = torch.ones_like(model.embed.weight)
    model.embed.weight.grad = mark
    slopes.evaluate(slopes._parametrisation.start(), backward=True)
    assert model.training
    assert model.blocks[0].training
    assert not model.table.requires_grad
    assert model.embed.weight.requires_grad
    assert model.embed.weight.grad is mark
    assert model.blocks[0][0].weight.grad is None
    assert not model._forward_hooks
    assert not model.embed.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("constraint", ["softmax", "affine"])
def test_adamw_goes_where_the_in_memory_one_goes(paths: list[str], constraint: str) -> None:
    """After the same minibatch steps, the coefficients are those of the paper's code."""
    kind = {"granularity": "tensor", "constraint": constraint, "temperature": True}
    batches = make_batches()
    slopes = make_slopes(paths, task_of(batches), kind)
    mixture = slopes._parametrisation
    slopes.evaluate(mixture.start(), backward=False)
    state, raw = AdamW(0.05), mixture.start()

    def advance(raw: np.ndarray, seen: Any) -> np.ndarray:
        return state.step(raw, mixture.gradient(raw, seen.slopes, seen.beta_slope))

    for epoch in range(2):
        raw = slopes.epoch(raw, epoch, 0, advance)
    reference = InMemory(paths, mixture)
    leaf = torch.tensor(mixture.start(), requires_grad=True)
    optimizer = torch.optim.AdamW([leaf], lr=0.05, weight_decay=0.0)
    for batch in batches * 2:
        optimizer.zero_grad()
        reference.loss(leaf, [batch]).backward()
        optimizer.step()
    # Where a slope is zero but for rounding, Adam turns it into a full step: the tied head and
    # the buffers have none, what never moved has none either.
    ours, theirs = mixture.rows(raw), reference.coefficients(leaf.detach()).numpy()
    moving = [g for g, n in enumerate(mixture.groups) if "running" not in n and "1.weight" not in n]
    np.testing.assert_allclose(ours[moving], theirs[moving], rtol=1e-7, atol=1e-9)
    assert mixture.beta(raw) == pytest.approx(leaf[-1].item(), rel=1e-9)


def test_lbfgs_finds_the_bottom() -> None:
    """On a quadratic and on Rosenbrock's valley, the gradient at the end is zero."""

    def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        slope = [-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)]
        return float(loss), np.array(slope)

    scales = np.array([1.0, 30.0, 900.0])

    def quadratic(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float((scales * (x - 1) ** 2).sum()), 2 * scales * (x - 1)

    for function, start in ((rosenbrock, [-1.2, 1.0]), (quadratic, [4.0, -2.0, 7.0])):
        way = lbfgs(np.array(start), 0.5, 2.0, 1e-14)
        point, n = next(way), 0
        with contextlib.suppress(StopIteration):
            while n < 100:
                n, best = n + 1, point
                point = way.send(function(point))
        assert n < 100
        np.testing.assert_allclose(best, np.ones(len(start)), atol=1e-5)


def learn(paths: list[str], output: Path, task: Any = None, **learning: Any) -> Any:
    """Learn a soup of all."""
    options = Options(non_float="first", threads=1)
    return learned(
        paths,
        task or task_of(make_batches(10)),
        output=output,
        settings=LearnedSettings(**learning),
        options=options,
    )


@pytest.mark.parametrize("granularity", ["global", "layer", "tensor"])
@pytest.mark.parametrize("constraint", ["softmax", "affine"])
def test_a_learned_soup_is_better_where_it_learned(
    paths: list[str], tmp_path: Path, granularity: str, constraint: str
) -> None:
    """The watched loss never rises above the uniform soup's; the soup verifies; it is a recipe."""
    soup = learn(
        paths, tmp_path / "soup", granularity=granularity, constraint=constraint, evaluations=12
    )
    assert soup.evaluations[soup.best].guard <= soup.evaluations[0].guard
    assert min(each.loss for each in soup.evaluations) < soup.evaluations[0].loss
    assert soup.recipe.method == "learned"
    assert streamsoup.verify(soup.path).rederived
    rows = np.array(soup.rows)
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, atol=1e-12)
    report = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["report"]
    assert report["nbytes_read"] <= report["predicted"]["nbytes_read"]
    assert report["n_passes"] <= report["predicted"]["passes"]
    assert not (tmp_path / "soup.search").exists()


def test_quasi_newton_reaches_the_in_memory_minimum(paths: list[str], tmp_path: Path) -> None:
    """Global affine coefficients: the loss of an in-memory L-BFGS, within 1e-7."""
    batches = make_batches(10)
    # Statistics of norms have no slopes, so where they differ neither search is exact.
    states = [load_file(path) for path in paths]
    still = {name: tensor for name, tensor in states[0].items() if "running" in name}
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(K)]
    for state, path in zip(states, paths, strict=True):
        save_file(state | still, path)
    soup = learn(
        paths,
        tmp_path / "soup",
        task_of(batches),
        constraint="affine",
        guard_every=0,
        tolerance=1e-10,
        evaluations=80,
    )
    reference = InMemory(paths, make_slopes(paths, task_of(batches), KINDS[1])._parametrisation)
    leaf = torch.full((K,), 1 / K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([leaf], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = reference.loss(leaf, batches)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert soup.evaluations[soup.best].loss == pytest.approx(closure().item(), abs=1e-7)
    assert len(soup.evaluations) < 40


class Stop(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
def test_a_search_that_was_stopped_goes_on(
    paths: list[str], tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any number of batches, the same call ends with the same bits."""
    monkeypatch.setattr("streamsoup.search.learning.search.NOTE_S", 0.0)
    settings = {"optimizer": optimizer, "epochs": 2, "evaluations": 5, "granularity": "layer"}
    batches = make_batches(10)
    whole = learn(paths, tmp_path / "whole", task_of(batches), **settings)
    left = [0]

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in batches:
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            yield nn.functional.cross_entropy(model(x), y), len(y)

    task = task_of(batches)
    task.loss = loss
    n_stops = 0
    for budget in [3, 14, 14, 25, 25, 10_000]:
        left[0] = budget
        try:
            soup = learn(paths, tmp_path / "soup", task, **settings)
            break
        except TaskError:
            n_stops += 1
    assert n_stops >= 2
    assert soup.rows == whole.rows
    assert [(a.loss, a.guard) for a in soup.evaluations] == [
        (a.loss, a.guard) for a in whole.evaluations
    ]
    assert soup.provenance.tensors == whole.provenance.tensors
    # All that led to a note is counted, in whichever run; each run reads some things anew.
    report, expected = soup.report, whole.report
    assert (expected["n_runs"], report["n_runs"]) == (1, 1 + n_stops)
    assert report["n_passes"] == expected["n_passes"]
    assert report["nbytes_read"] >= expected["nbytes_read"]
    assert report["elapsed_s"] > report["reading_s"] > 0
    left[0] = 3
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "other", task, **settings)
    with pytest.raises(ResumeError, match="granularity"):
        learn(paths, tmp_path / "other", task, **settings | {"granularity": "global"})


def test_a_kill_while_tidying_up_is_mended(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the soup in place, and a trace of its making left, the same call finds it finished."""

    def finish(self: LearningJournal) -> None:
        raise Stop

    task = task_of(make_batches(4))
    settings = {"evaluations": 3}
    with monkeypatch.context() as patch:
        patch.setattr(LearningJournal, "finish", finish)
        with pytest.raises(Stop):
            learn(paths, tmp_path / "soup", task, **settings)
    (tmp_path / "soup.partial").mkdir()
    before = (tmp_path / "soup" / "streamsoup.json").read_bytes()
    assert learn(paths, tmp_path / "soup", task, **settings).finished
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]
    assert (tmp_path / "soup" / "streamsoup.json").read_bytes() == before


def test_a_finished_soup_in_other_shards_is_not_taken_for_this_one(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the soup was in place, and asked for smaller shards: those are made."""

    def search(**options: Any) -> Any:
        return learned(
            paths,
            task_of(make_batches(4)),
            output=tmp_path / "soup",
            settings=LearnedSettings(evaluations=3),
            options=Options(non_float="first", overwrite=True, **options),
        )

    def finish(self: LearningJournal) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LearningJournal, "finish", finish)
        with pytest.raises(Stop):
            search()
    assert not search(shard_size=300).finished
    assert len(list((tmp_path / "soup").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
def test_a_batch_of_nothing_teaches_nothing(
    paths: list[str], tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without examples, whose loss is a NaN, is passed over, after a kill as well."""
    monkeypatch.setattr("streamsoup.search.learning.search.NOTE_S", 0.0)
    settings = {"optimizer": optimizer, "epochs": 2, "evaluations": 4, "guard_every": 0}
    batches = make_batches(4)
    none = batches[0][0][:0], batches[0][1][:0]
    whole = learn(paths, tmp_path / "whole", task_of(batches), **settings)
    seen = [0]

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in [none, *batches[:2], none, *batches[2:]]:
            seen[0] += 1
            if seen[0] == 6 + 5:  # of the first look, and of the first epoch
                raise Stop
            yield nn.functional.cross_entropy(model(x), y), len(y)

    task = task_of(batches)
    task.loss = loss
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "soup", task, **settings)
    soup = learn(paths, tmp_path / "soup", task, **settings)
    assert soup.rows == whole.rows
    assert [each.loss for each in soup.evaluations] == [each.loss for each in whole.evaluations]


def test_the_guard_stops_a_search_that_overfits(paths: list[str], tmp_path: Path) -> None:
    """Where learning hurts what watches, the uniform soup is made, bit for bit."""
    batches = make_batches(10)

    def loss(model: nn.Module, split: str) -> Any:
        x, y = batches[0]
        for index in range(10):
            value = nn.functional.cross_entropy(model(x), y)
            yield value if index % 5 < 4 else 20 - 10 * value, 1

    task = task_of(batches)
    task.loss = loss
    soup = learn(paths, tmp_path / "soup", task, patience=3, constraint="affine")
    assert soup.report["ended"].startswith("the validation loss has not fallen")
    assert soup.best == 0
    assert len(soup.evaluations) == 4
    uniform = streamsoup.uniform(paths, output=tmp_path / "u", options=Options(non_float="first"))
    assert soup.provenance.tensors == uniform.provenance.tensors


def test_what_a_loss_changes_is_put_back(paths: list[str], tmp_path: Path) -> None:
    """Statistics and weights that all share are those of the soup at each look, and in the end."""

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in make_batches(10):
            with torch.no_grad():
                model.get_parameter("blocks.0.1.weight").mul_(1.5)
                model.get_buffer("blocks.0.1.num_batches_tracked").add_(7)
            yield nn.functional.cross_entropy(model(x), y), len(y)

    def search(name: str, **learning: Any) -> Any:
        task = task_of(make_batches())
        task.loss = loss
        model = Net().double()
        soup = learned(
            paths,
            task,
            model=model,
            output=tmp_path / name,
            settings=LearnedSettings(evaluations=3, epochs=1, **learning),
            options=Options(non_float="first", threads=1),
        )
        made = load_file(tmp_path / name / "model.safetensors")
        live = model.state_dict()
        assert [k for k, v in made.items() if not torch.equal(live[k], v)] == []
        return soup

    soup = search("lbfgs")
    again = search("once", optimizer="adamw")
    assert again.evaluations[0].loss == soup.evaluations[0].loss
    assert again.report["ended"] == "1 epochs"


class _Named(NamedTuple):
    hidden: Any
    logits: Any


@dataclass(frozen=True)
class _Frozen:
    logits: Any


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: _Named(None, y),
        lambda y: _Frozen(y),
        lambda y: SimpleNamespace(logits=y),
        lambda y: {"logits": y},
        lambda y: (y, None),
    ],
)
def test_logits_are_heated_wherever_they_are(
    paths: list[str], tmp_path: Path, wrap: Callable[[Any], Any]
) -> None:
    """Whatever a model gives its logits in, the same β is learned."""

    class Wrapping(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(super().forward(x))

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in make_batches():
            out = model(x)
            logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
            if logits is None:
                logits = out["logits"] if isinstance(out, dict) else out[0]
            yield nn.functional.cross_entropy(logits, y), len(y)

    settings = {"temperature": True, "evaluations": 4}
    plain = learn(paths, tmp_path / "plain", task_of(make_batches()), **settings)
    task = task_of(make_batches())
    task.loss, task.build = loss, lambda: Wrapping().double()
    soup = learn(paths, tmp_path / "soup", task, **settings)
    assert soup.beta == plain.beta != 1.0


def test_the_grad_mode_does_not_matter(paths: list[str], tmp_path: Path) -> None:
    """Under `no_grad` the same soup is learned; inference mode is refused, and has made nothing."""
    found = [learn(paths, tmp_path / "plain", evaluations=3)]
    with torch.no_grad():
        found.append(learn(paths, tmp_path / "no_grad", evaluations=3))
    assert found[0].rows == found[1].rows
    with torch.inference_mode(), pytest.raises(RecipeError, match="learn outside of it"):
        learn(paths, tmp_path / "inference")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "no_grad"}


def test_a_mixture_that_cannot_be_watched_is_no_better() -> None:
    """NaN and ∞ where others watched beat nothing; where nothing watches, the loss decides."""
    nan, inf = math.nan, math.inf
    watched = Losses(1.0, 1.1)
    for other in (Losses(0.9, nan), Losses(0.9, inf), Losses(nan, 1.0), Losses(0.9, 1.2), watched):
        assert not other.beats(watched)
    assert Losses(0.9, 1.0).beats(watched)
    assert Losses(0.9, nan).beats(Losses(1.0, nan))
    assert not Losses(nan, nan).beats(Losses(1.0, nan))


def test_looks_come_back_from_the_notes_as_they_were(paths: list[str], tmp_path: Path) -> None:
    """Also where a watched loss was infinite: the search that goes on is the same."""
    number = [0]  # of the look; the sixth is stopped, once

    def loss(model: nn.Module, split: str) -> Any:
        number[0] += 1
        if number[0] == number[-1]:
            raise Stop
        for n, (x, y) in enumerate(make_batches(5)):
            far = n == 4 and number[0] == 3
            yield nn.functional.cross_entropy(model(x), y) * (math.inf if far else 1), len(y)

    task = task_of([])
    task.loss = loss
    number[:] = [0, -1]
    whole = learn(paths, tmp_path / "whole", task, evaluations=8)
    assert not math.isfinite(whole.evaluations[2].guard)
    number[:] = [0, 6]
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "soup", task, evaluations=8)
    number[:] = [5, -1]
    soup = learn(paths, tmp_path / "soup", task, evaluations=8)
    assert (soup.rows, soup.best) == (whole.rows, whole.best)


def test_what_watches_is_never_learned_from(paths: list[str], tmp_path: Path) -> None:
    """A loss that shuffles has the same order in each epoch as where its mixtures are looked at."""
    orders = []

    def loss(model: nn.Module, split: str) -> Any:
        batches = make_batches(5)
        orders.append(torch.randperm(5).tolist())
        for i in orders[-1]:
            x, y = batches[i]
            yield nn.functional.cross_entropy(model(x), y), len(y)

    task = task_of([])
    task.loss = loss
    learn(paths, tmp_path / "watched", task, optimizer="adamw", epochs=3)
    assert len(set(map(tuple, orders))) == 1
    orders.clear()
    learn(paths, tmp_path / "unwatched", task, optimizer="adamw", epochs=3, guard_every=0)
    assert len(set(map(tuple, orders))) == 3


def test_an_older_soup_of_the_same_is_not_the_one_under_way(
    paths: list[str], tmp_path: Path
) -> None:
    """A search to replace it that was stopped goes on: its data may have changed meanwhile."""
    batches, left = make_batches(4), [0]

    def loss(model: nn.Module, split: str) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Stop
        for x, y in batches:
            yield nn.functional.cross_entropy(model(x), y), len(y)

    def search() -> Any:
        return learned(
            paths,
            task,
            output=tmp_path / "soup",
            settings=LearnedSettings(evaluations=4),
            options=Options(non_float="first", overwrite=True),
        )

    task = task_of([])
    task.loss = loss
    before = search()
    batches[:], left[0] = make_batches(8)[4:], 2
    with pytest.raises(TaskError):
        search()
    after = search()
    assert not after.finished
    assert after.rows != before.rows
    assert not (tmp_path / "soup.search").exists()


def test_refusals(paths: list[str], tmp_path: Path) -> None:
    """Tasks and options that make no sense are refused in words."""
    task = task_of(make_batches())
    del task.loss
    with pytest.raises(TaskError, match="yield"):
        learn(paths, tmp_path / "a", task)
    with pytest.raises(RecipeError, match="less than two"):
        learn(paths[:1], tmp_path / "b")
    with pytest.raises(RecipeError, match="guard_every"):
        learn(paths, tmp_path / "c", guard_every=1)
    with pytest.raises(RecipeError, match="softmax, affine, free"):
        learn(paths, tmp_path / "d", constraint="simplex")
    with pytest.raises(RecipeError, match="granularity must be one of global"):
        learn(paths, tmp_path / "e", granularity="block")


def ce(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


ODD: list[tuple[str, Any, str]] = [
    ("a float", lambda m, b: [(1.0, 1)], "gave a float where .* scalar tensor"),
    ("a row", lambda m, b: [ce(m, b[0]).repeat(3)], r"Tensor of shape \[3\] where"),
    ("one loss", lambda m, b: ce(m, b[0]), "returned one Tensor; yield"),
    ("nothing", lambda m, b: None, "returned one NoneType; yield"),
    ("no batch", lambda m, b: [], "no batch to learn from"),
    ("a triple", lambda m, b: [(ce(m, b[0]), 1, 2)], "or a pair of it"),
    ("no number", lambda m, b: [(ce(m, b[0]), None)], "or a pair of it"),
    ("less than none", lambda m, b: [(ce(m, b[0]), -1)], "or a pair of it"),
    ("no examples", lambda m, b: [(ce(m, b[0]), 0)], "no batch to learn from"),
    ("no gradient", lambda m, b: [ce(m, b[0]).detach()], "without a gradient; .* detach"),
    ("another model", lambda m, b: [ce(Net().double(), b[0])], "depends on no parameter"),
    ("a NaN", lambda m, b: [ce(m, x) * math.nan for x in b], "uniform soup is nan"),
    ("an infinity", lambda m, b: (ce(m, x) * math.inf for x in b), "uniform soup is inf"),
    (
        "a NaN that watches",
        lambda m, b: [ce(m, x) * (math.nan if i == 4 else 1) for i, x in enumerate(b)],
        "validation loss of the uniform soup is nan",
    ),
    (
        "a slope that is none",
        lambda m, b: [torch.where(m.table[0] > 99, m.table.sqrt().sum(), ce(m, x)) for x in b],
        "gradient of table holds a NaN",
    ),
]


@pytest.mark.parametrize(("loss", "message"), [odd[1:] for odd in ODD], ids=[o[0] for o in ODD])
def test_answers_that_are_no_losses(
    paths: list[str], tmp_path: Path, loss: Any, message: str
) -> None:
    """Each is refused in words that say what to give instead."""
    batches = make_batches(10)
    task = task_of(batches)
    task.loss = lambda model, split: loss(model, batches)
    with pytest.raises(TaskError, match=message):
        learn(paths, tmp_path / "soup", task)


def test_an_empty_batch_weighs_nothing(paths: list[str], tmp_path: Path) -> None:
    """Though the mean loss over no example is a NaN."""
    batches = make_batches(6)
    empty = (batches[0][0][:0], batches[0][1][:0])
    softly = {"evaluations": 2, "guard_every": 0}
    soup = learn(paths, tmp_path / "soup", task_of([empty, *batches, empty]), **softly)
    without = learn(paths, tmp_path / "without", task_of(batches), **softly)
    assert [each.loss for each in soup.evaluations] == pytest.approx(
        [each.loss for each in without.evaluations]
    )


def test_a_step_too_far_is_taken_back(paths: list[str], tmp_path: Path) -> None:
    """Where a look's loss is no number, a shorter step follows, also after a resume."""
    batches = make_batches(10)
    task, n_looks = task_of(batches), [0]

    def loss(model: nn.Module, split: str) -> Any:
        n_looks[0] += 1
        for number, (x, y) in enumerate(batches):
            if n_looks[0] == 4:
                raise Stop
            value = nn.functional.cross_entropy(model(x), y)
            yield value * math.nan if n_looks[0] == 2 and number == 3 else value, len(y)

    task.loss = loss
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "soup", task, constraint="affine", evaluations=8)
    soup = learn(paths, tmp_path / "soup", task, constraint="affine", evaluations=8)
    assert math.isnan(soup.evaluations[1].loss)
    assert soup.best > 1


def test_nothing_to_learn_is_the_uniform_soup(paths: list[str], tmp_path: Path) -> None:
    """Equal ingredients, and a task that gives sparse gradients for those that are not."""
    soup = learn([paths[0]] * 2, tmp_path / "soup")
    assert soup.report["ended"] == "the gradient is zero"
    assert soup.rows == ((0.5, 0.5),)
    batches = make_batches(6)

    def build() -> nn.Module:
        net = Net().double()
        net.embed.sparse = True
        net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
        return net

    task, net = task_of(batches), build()
    net.embed.sparse = False
    task.build = lambda: net
    dense = learn(paths, tmp_path / "untied", task, evaluations=2)
    task.build = build
    sparse = learn(paths, tmp_path / "sparse", task, evaluations=2)
    np.testing.assert_allclose(sparse.rows, dense.rows, rtol=1e-12)


def test_notes_are_kept_on_disk_alone(tmp_path: Path) -> None:
    """A long search takes notes every ten seconds, each as large as all it learns."""
    target = str(tmp_path / "soup")
    tracemalloc.start()
    with LearningJournal(target, {"of": "this"}, restart=False) as notebook:
        for number in range(200):
            notebook.put({"adamw": 0, "done": number, "raw": [0.1 + number] * 1000})
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 300_000
    with LearningJournal(target, {"of": "this"}, restart=False) as notebook:
        found = notebook.find("adamw")
    assert found is not None
    assert found["done"] == 199


def test_layers_are_drawn_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 2 above layer 10, each with its own coefficients."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr("streamsoup.study.plot._save", lambda figure, path: drawn.append(figure))
    layers = ["layers.0", "layers.10", "layers.2", "norm"]
    rows = np.arange(8.0).reshape(4, 2)
    plot_coefficients(rows, layers, ["a", "b"], str(tmp_path / "x.png"))
    axes = drawn[0].axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [layers[i] for i in (0, 2, 1, 3)]
    assert np.array_equal(axes.images[0].get_array(), rows[[0, 2, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused(dtype: torch.dtype, bad: float) -> None:
    """Wherever it is; the largest finite value passes, and so does nothing at all."""
    largest = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert _vector(largest, "w").data.tobytes() == largest.view(torch.uint8).numpy().tobytes()
    assert len(_vector(torch.empty(0, 7, dtype=dtype), "w").data) == 0
    for place in (0, 1234, 2999):
        gradient = largest.clone()
        gradient.view(-1)[place] = bad
        with pytest.raises(TaskError, match="the gradient of w holds a NaN or an Inf"):
            _vector(gradient, "w")
