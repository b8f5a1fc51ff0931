"""The slopes of the loss by the coefficients, against autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import InMemory, K, files, make_batches, make_slopes, make_state, task_of
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from streamsoup.engine.rules.linear import Linear
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.options import Options
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients
from streamsoup.search.learning.slopes import find_equal

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS = [
    {"granularity": g, "constraint": c, "temperature": t}
    for g in ("global", "layer", "tensor")
    for c in ("softmax", "affine", "free")
    for t in ((False, True) if g == "layer" else (False,))
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of the ingredients."""
    return files(tmp_path_factory.mktemp("learned"))


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
