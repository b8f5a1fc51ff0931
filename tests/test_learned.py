"""Learned soups: slopes against autograd through an in-memory sum, and what a search comes to."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from learning import InMemory, K, Net, Stop, files, learn, make_batches, make_slopes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

import streamsoup
from streamsoup.errors import RecipeError, TaskError
from streamsoup.options import Options
from streamsoup.search.learned import learned
from streamsoup.search.learning.backward import _vector
from streamsoup.search.learning.descent import AdamW, lbfgs
from streamsoup.search.learning.search import Losses
from streamsoup.search.learning.settings import LearnedSettings
from streamsoup.study.plot import plot_coefficients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of the ingredients."""
    return files(tmp_path_factory.mktemp("learned"))


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
    kind = {"granularity": "global", "constraint": "affine", "temperature": False}
    reference = InMemory(paths, make_slopes(paths, task_of(batches), kind)._parametrisation)
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
