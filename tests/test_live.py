"""The live-model sink puts exactly what loading the soup would, where it is, or refuses by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import streamsoup
from streamsoup import Options
from streamsoup.engine import budget, reduce
from streamsoup.engine.read import open_reader
from streamsoup.engine.reduce import Engine, Mix
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import run
from streamsoup.errors import ChangedIngredientError, MismatchError, RecipeError, TaskError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.live import model as live
from streamsoup.live.model import ModelSink, tensors_of
from streamsoup.live.recalibration import recalibrate
from streamsoup.output.make import Order, order
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import address_of


def ordered(paths: list[str]) -> Order:
    """Plan the mean of checkpoints."""
    return order(
        paths, Linear(Coefficients.uniform(len(paths))), method="uniform", options=Options()
    )


def mix_into(model: nn.Module, paths: list[str], *, apart: bool = False) -> ModelSink:
    """Put the mean of checkpoints into a model; there at once, if they are known to be `apart`."""
    planned = ordered(paths)
    sink = ModelSink(model, planned.plan)
    if apart:
        sink.check_apart()
    reader = open_reader(planned.plan, planned.memory, mapped=True)
    mix = Mix(planned.plan, planned.memory, Engine(planned.plan))
    run(planned.plan, planned.memory, reader, mix, sink)
    return sink


def save(folder: Path, states: list[dict[str, torch.Tensor]]) -> list[str]:
    """Save states as files; give their paths."""
    paths = []
    for i, state in enumerate(states):
        path = folder / f"{i}.safetensors"
        save_file(state, path)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True])
def test_a_mix_in_place_is_what_loading_the_soup_gives(
    tmp_path: Path,
    dtype: torch.dtype,
    live: torch.dtype,
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every parameter and buffer has the bits that load_state_dict gives it from the soup.

    Blocks are much smaller than tensors.
    """
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 64)
    paths = networks.ingredients(tmp_path, 3, dtype)
    soup = streamsoup.uniform(paths, output=tmp_path / "soup")
    expected, model = networks.build().to(live), networks.build().to(live)
    expected.load_state_dict(load_file(Path(soup.path) / "model.safetensors"))
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(model).items()}
    mix_into(model, paths, apart=apart)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert places == {name: tensor.data_ptr() for name, tensor in tensors_of(model).items()}


def test_results_are_made_where_they_belong(tmp_path: Path) -> None:
    """Once no ingredient can be in the way, a parameter's own memory is where its blocks are made.

    Not where the model is of another dtype, or keeps its elements in another order.
    """
    planned = ordered(networks.ingredients(tmp_path, 2)).plan
    plain, narrow, turned = networks.build(), networks.build().bfloat16(), networks.build()
    turned[0].weight.data = turned[0].weight.data.T.contiguous().T
    for model, has_room in ((plain, True), (narrow, False), (turned, False)):
        sink = ModelSink(model, planned)
        (leaf,) = (x for x in planned.leaves() if planned.tensors[x.tensor].name == "0.weight")
        assert sink.room(leaf, 5, 40) is None
        sink.check_apart()
        room = sink.room(leaf, 5, 40)
        assert (room is not None) == has_room
        if room is not None:
            assert (address_of(room), len(room)) == (model[0].weight.data_ptr() + 20, 40)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Planted fault: one element changed after the mix is seen."""
    paths = networks.ingredients(tmp_path, 2)
    model = networks.build()
    mix_into(model, paths)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[3, 2] += 1e-7
    assert not torch.equal(before, model[0].weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.full((3,), 9.0), persistent=False)


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_tied_weights_are_written_once_under_any_name(tmp_path: Path, names: list[str]) -> None:
    """Ties stay ties, whichever of the names the checkpoints use; other buffers are left alone."""
    weights = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    paths = save(tmp_path, [{name: w.clone() for name in names} for w in weights])
    model = Tied()
    sink = mix_into(model, paths)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, ((weights[0].double() + weights[1]) / 2).float())
    assert torch.equal(model.cache, torch.full((3,), 9.0))
    assert len(sink.targets) == 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_tied_weights_that_differ_in_a_checkpoint_are_refused(
    tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two values would be dropped, so the checkpoint that holds them is named."""
    monkeypatch.setattr("streamsoup.live.model._PIECE", 64)
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    states = [{"embed.weight": weights.clone(), "head.weight": weights.clone()} for _ in range(3)]
    states[1]["head.weight"][6, 4] += 1
    ingredients = states if in_memory else save(tmp_path, states)
    with pytest.raises(MismatchError, match=r"two that differ in .*: embed\.weight, head\.weight"):
        streamsoup.mix_into(Tied(), ingredients)
    if not in_memory:
        with pytest.raises(MismatchError, match=r"differ in \S*1\.safetensors: "):
            streamsoup.mix_into(Tied(), ingredients)
    wide = {"embed.weight": weights, "head.weight": weights.double()}
    with pytest.raises(MismatchError, match="two that differ"):
        streamsoup.mix_into(Tied(), [wide])


class Thrice(nn.Module):
    """One tensor under three names, the first of which no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = self.c = nn.Parameter(torch.zeros(4))


def test_a_tensor_of_three_names_has_one_value() -> None:
    """Those that a checkpoint has are compared, and one of them is written."""
    with pytest.raises(MismatchError, match="two that differ"):
        streamsoup.mix_into(Thrice(), [{"b": torch.ones(4), "c": 2 * torch.ones(4)}])
    model = Thrice()
    streamsoup.mix_into(model, [{"b": torch.ones(4), "c": torch.ones(4)}])
    assert model.a.tolist() == [1.0] * 4


def test_ties_are_compared_without_a_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that shrinks kills no process that only reads; there may be no mapping for that."""

    def mapped(*arguments: object) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr("streamsoup.formats.files.Window.__init__", mapped)
    weights = torch.randn(7, 5)
    paths = save(tmp_path, [{"embed.weight": weights, "head.weight": weights.clone()}])
    model = Tied()
    streamsoup.mix_into(model, paths, options=Options(io="read"))
    assert torch.equal(model.state_dict()["head.weight"], weights)


class Pair(nn.Module):
    """Two parameters, wherever they lie."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


def test_parameters_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    """What is put into one would change the other, or itself: they are named."""
    flat = torch.zeros(64)
    shared = flat.view(8, 8)
    wrong = [
        ((flat[:20], flat[19:39]), r"in the memory of a, without being the same tensor: b"),
        ((flat[:20], flat[19:39].view(torch.int32).view(torch.float32)), "in the memory of a"),
        ((shared, shared.T), "without being the same tensor"),
        ((shared[:, :5], shared[:, 4:]), "in the memory of a"),
        ((shared[:, 2], flat[16:20]), "in the memory of a"),
        ((flat[:17].as_strided((3, 9), (4, 1)), flat[40:]), "its elements share memory: a"),
        ((flat[:4].expand(3, 4), flat[40:]), "its elements share memory: a"),
    ]
    for (a, b), message in wrong:
        states = [{"a": torch.ones(a.shape), "b": torch.ones(b.shape)}]
        with pytest.raises(MismatchError, match=message):
            streamsoup.mix_into(Pair(a, b), states)
    assert not flat.any()


def test_parameters_side_by_side_in_one_storage_are_apart() -> None:
    """Neighbours, columns and rows that are woven into each other each get their own values."""
    flat = torch.zeros(64)
    shared = flat.view(8, 8)
    for a, b in (
        (flat[:20], flat[20:]),
        (shared[:, :5], shared[:, 5:]),
        (shared[:, 2], shared[:, 3]),
        (flat.as_strided((2, 2), (3, 2)), flat[20:]),
    ):
        flat.zero_()
        states = [{"a": torch.full(a.shape, 2.0), "b": torch.full(b.shape, 3.0)}]
        model = Pair(a, b)
        streamsoup.mix_into(model, states)
        assert model.a.data_ptr() == a.data_ptr()
        assert (torch.unique(a), torch.unique(b)) == (torch.tensor([2.0]), torch.tensor([3.0]))


def test_sparse_parameters_are_named() -> None:
    """A tensor without a memory of its own is refused as others are."""
    model = nn.Module()
    model.register_buffer("a", torch.eye(3).to_sparse())
    with pytest.raises(MismatchError, match=r"not dense .*: a"):
        streamsoup.mix_into(model, [{"a": torch.eye(3)}])


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_may_be_mixed_into_itself(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is an ingredient, no element is lost that compiled loops look at twice."""
    if not compiled:
        monkeypatch.setattr(reduce, "find_mixer", lambda source, output: None)
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 1 if compiled else math.inf)
    models = [nn.Linear(100, 100, bias=False).bfloat16() for _ in range(3)]
    with torch.no_grad():
        # Here and there too far apart for float32, where 256 + x - 256 would be 0.
        for model, value in zip(models, (256.0, 2.0**-14 + 2.0**-21, -256.0), strict=True):
            model.weight.view(-1)[::53] = value
    states = [{"weight": model.weight.detach().clone()} for model in models]
    expected = nn.Linear(100, 100, bias=False).bfloat16()
    streamsoup.mix_into(expected, states)
    streamsoup.mix_into(models[0], [models[0], *states[1:]])
    assert torch.equal(models[0].weight, expected.weight)
    assert expected.weight[0, 0] != 0


@pytest.mark.parametrize("kind", ["channels last", "narrower", "wider", "transposed"])
def test_a_model_of_any_layout_may_be_mixed_into_itself(kind: str) -> None:
    """What is written element by element, or by torch, is no change by somebody else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    if kind == "channels last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind == "transposed":
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        for layer in model:
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    dtype = {"narrower": "bf16", "wider": "f64"}.get(kind, "same")
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    expected = {name: t.clone() + 0.25 for name, t in model.state_dict().items()}
    streamsoup.mix_into(model, [model, other], [0.75, 0.25], options=Options(dtype=dtype))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0.01, rtol=0.01)


def test_what_lies_elsewhere_in_the_model_is_refused() -> None:
    """A model may be mixed into itself, tensor by tensor; not into another place of itself."""
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
    before = [layer.weight.detach().clone() for layer in model]
    state = model.state_dict()
    shifted = {f"{i}.weight": state[f"{max(i - 1, 0)}.weight"] for i in range(3)}
    turned = {name: tensor.t() for name, tensor in state.items()}
    memory = torch.zeros(40)
    model[0].weight.data = memory[:16].view(4, 4)
    beside = {"0.weight": memory[16:32].view(4, 4)} | {f"{i}.weight": before[i] for i in (1, 2)}
    over = {"0.weight": memory[2:18].view(4, 4)} | {f"{i}.weight": before[i] for i in (1, 2)}
    memory[:16] = before[0].flatten()
    for wrong in (shifted, turned, over):
        with pytest.raises(
            MismatchError, match=r"\d\.weight lies in the memory of \d.*give a copy"
        ):
            streamsoup.mix_into(model, [model, wrong])
    assert all(torch.equal(layer.weight, was) for layer, was in zip(model, before, strict=True))
    streamsoup.mix_into(model, [model, beside])
    assert torch.equal(model[0].weight, before[0] / 2)


def test_torch_knows_that_a_mix_changed_its_tensors(tmp_path: Path) -> None:
    """It refuses to go backward through them, and an ingredient that was open has changed."""
    model, other = networks.build(), networks.build()
    (opened,) = open_ingredients([model])
    loss = model(networks.INPUTS).square().mean()
    streamsoup.mix_into(model, [other])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ChangedIngredientError):
        streamsoup.uniform([opened], output=tmp_path / "out")


def test_what_is_no_model_is_named() -> None:
    """In words, before anything is looked at; a lazy one too."""
    state = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    with pytest.raises(MismatchError, match=r"5 is not a torch\.nn\.Module"):
        streamsoup.mix_into(5, [state])  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="not yet initialised"):
        streamsoup.mix_into(nn.LazyLinear(2), [state])


def test_statistics_survive_a_batch_that_fails() -> None:
    """What could not be measured is as it was."""
    model = nn.Sequential(nn.BatchNorm1d(12))
    recalibrate(model, [torch.randn(16, 12) + 3])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError)):
        recalibrate(model, [torch.randn(16, 12), torch.randn(16, 7)])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_order_of_elements_hooks_and_wrappers_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels-last weights, hooked modules and names of torch.compile get the same values."""
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 64)
    states = [nn.Conv2d(3, 4, 3).state_dict() for _ in range(2)]
    paths = save(tmp_path, states)
    expected = ((states[0]["weight"].double() + states[1]["weight"]) / 2).float()
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    mix_into(model, paths)
    assert torch.equal(model.weight, expected)
    assert not model.weight.is_contiguous()

    class OptimizedModule(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    inner = nn.Conv2d(3, 4, 3)
    mix_into(OptimizedModule(inner), paths)
    assert torch.equal(inner.weight, expected)
    inner = nn.Conv2d(3, 4, 3)
    mix_into(nn.DataParallel(inner), paths)
    assert torch.equal(inner.weight, expected)


def test_what_cannot_be_put_in_place_is_named(tmp_path: Path) -> None:
    """Missing, unexpected, misshapen and absent parameters are all named, before a byte is read."""
    (path,) = save(tmp_path, [{"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}])
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(4))
    model.b = nn.Parameter(torch.zeros(2, device="meta"))
    model.d = nn.Parameter(torch.zeros(2))
    with pytest.raises(MismatchError) as caught:
        ModelSink(model, ordered([path]).plan)
    message = str(caught.value)
    assert "the model has 1 that no ingredient has: d" in message
    assert "the model lacks 1 of the ingredients: c" in message
    assert "of shape [4] where the ingredients have [3]: a" in message
    assert "meta device" in message
    assert "by a command" in message


def test_a_model_that_was_changed_under_us_is_named(tmp_path: Path) -> None:
    """A parameter that the task replaced would no longer get the mix: the sink says so."""
    paths = networks.ingredients(tmp_path, 2)
    model = networks.build()
    sink = mix_into(model, paths)
    sink.check()
    model[0].weight = nn.Parameter(torch.zeros(24, 12))
    with pytest.raises(TaskError, match=r"0\.weight"):
        sink.check()


def test_a_model_that_was_converted_and_back_is_named(tmp_path: Path) -> None:
    """Its parameters are the same, but their elements lie elsewhere: a mix would miss them."""
    model = networks.build()
    sink = mix_into(model, networks.ingredients(tmp_path, 2))
    model.double().float()
    with pytest.raises(TaskError, match=r"0\.weight"):
        sink.check()


def test_statistics_are_measured_as_torch_does() -> None:
    """Running means and variances equal those of torch's update_bn; modes and counters stay."""
    ours, theirs = networks.build(), networks.build()
    theirs.load_state_dict(ours.state_dict())
    batches = [torch.randn(16, 12) for _ in range(3)]
    ours[1].train()
    ours[3].eval()
    counter = int(ours[1].num_batches_tracked)
    assert recalibrate(ours, batches) == 1
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert torch.allclose(ours[1].running_mean, theirs[1].running_mean)
    assert torch.allclose(ours[1].running_var, theirs[1].running_var)
    assert ours[1].training
    assert not ours[3].training
    assert ours[1].momentum == 0.1
    assert int(ours[1].num_batches_tracked) == counter


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batch_measures_nothing(batches: Iterable[torch.Tensor]) -> None:
    """Without a batch, statistics stay as they are and that is said: 0 and 1 belong to nothing."""
    model = networks.build()
    recalibrate(model, [torch.randn(16, 12) + 3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].eval()
    with pytest.raises(TaskError, match="there is no batch"):
        recalibrate(model, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[0].training
    assert not model[1].training


def test_batches_that_were_used_up_end_a_search(tmp_path: Path) -> None:
    """A task that gives the same generator twice is told so, rather than scored on nothing."""

    class Once:
        def __init__(self) -> None:
            self.batches = iter([networks.INPUTS])

        def build(self) -> nn.Module:
            return networks.build()

        def score(self, model: nn.Module, split: str) -> float:
            return networks.score(model)

        def recalibration(self) -> Iterable[torch.Tensor]:
            return self.batches

    with pytest.raises(TaskError, match="a generator that was used up has no more"):
        streamsoup.greedy(
            networks.ingredients(tmp_path / "in", 3),
            Once(),
            output=tmp_path / "soup",
            settings=streamsoup.GreedySettings(recalibrate=True),
        )


def test_tensors_shared_with_the_model_cost_a_look_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what lies in the model's storages is set against all of the model."""
    calls = 0
    found = live.overlaps

    def counted(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
        nonlocal calls
        calls += 1
        return found(tensors)

    monkeypatch.setattr(live, "overlaps", counted)
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state["0.weight"] = model[0].weight.detach()
    streamsoup.mix_into(model, [state, state])
    assert calls <= 2
    state["1.weight"] = model[0].weight.detach()
    with pytest.raises(MismatchError, match=r"1\.weight lies in the memory of 0\.weight"):
        streamsoup.mix_into(model, [state, state])


def test_autocast_around_all_sees_each_mixture() -> None:
    """Autocast keeps narrow copies of parameters until its context ends: not over a mix."""
    states = [{"weight": torch.full((2, 2), float(n)), "bias": torch.zeros(2)} for n in (1, 3)]
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        for state, expected in zip(states, (2.0, 6.0), strict=True):
            streamsoup.mix_into(model, [state])
            assert model(x)[0, 0] == expected


def test_only_a_list_is_normalized() -> None:
    """Coefficients of their own are refused as by `mix`."""
    model = nn.Linear(1, 1)
    states = [model.state_dict()] * 2
    with pytest.raises(RecipeError, match="only a list of factors can be normalized"):
        streamsoup.mix_into(model, states, Coefficients((2.0, 1.0)), normalize=True)
