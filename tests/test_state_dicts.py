"""State dicts and modules are ingredients like files: the same bits, nothing copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import safetensors
import torch
from checkpoints import needs
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

import streamsoup
from streamsoup import GreedySettings, Options
from streamsoup.errors import ChangedIngredientError, FormatError, RecipeError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.memory import _elements, _version, sharing


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_soup_as_from_files(tmp_path: Path, dtype: torch.dtype, io: str) -> None:
    """Files, state dicts and modules, mixed as one likes, give the same weights."""
    paths = networks.ingredients(tmp_path / "in", 3, dtype)
    options = Options(io=io)  # type: ignore[arg-type]
    expected = streamsoup.uniform(paths, output=tmp_path / "files", options=options)
    states = [load_file(Path(path) / "model.safetensors") for path in paths]
    module = networks.build().to(dtype)
    module.load_state_dict(states[1])
    mixed = [states[0], module, paths[2]]
    soup = streamsoup.uniform(mixed, output=tmp_path / "memory", options=options)
    want = load_file(Path(expected.path) / "model.safetensors")
    got = load_file(Path(soup.path) / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch, of its own parts
def test_what_wraps_a_module_is_left_out(tmp_path: Path) -> None:
    """The soup of compiled, parallel and averaged modules has the names of plain ones."""
    plain = [networks.build() for _ in range(5)]
    inner = networks.build()
    inner.load_state_dict(plain[4].state_dict())
    inner[0] = torch.compile(inner[0], backend="eager")
    wrapped: list[Any] = [
        torch.compile(plain[0], backend="eager"),
        torch.nn.DataParallel(plain[1]),
        torch.compile(torch.nn.DataParallel(plain[2]), backend="eager"),
        AveragedModel(plain[3]),
        inner,
    ]
    soups = [
        streamsoup.uniform(some, output=tmp_path / name)
        for name, some in (("plain", plain), ("wrapped", wrapped))
    ]
    want, got = (load_file(Path(soup.path) / "model.safetensors") for soup in soups)
    assert list(want) == list(got)
    assert all(torch.equal(want[name], got[name]) for name in want)
    state = {"module._orig_mod.w": torch.zeros(1)}  # as it is, where it was given like that
    (opened,) = open_ingredients([state])
    assert set(opened.layout.places) == set(state)


def test_tied_names_are_left_out_as_transformers_does(tmp_path: Path) -> None:
    """A live module fits its own saved checkpoint, which holds one of the names."""

    class Tied(torch.nn.Module):
        _tied_weights_keys = ("head.weight",)

        def __init__(self, value: float) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            torch.nn.init.constant_(self.embed.weight, value)
            self.head.weight = self.embed.weight

    saved = {"embed.weight": torch.full((5, 3), 1.0)}
    soup = streamsoup.uniform([saved, Tied(3.0)], output=tmp_path / "out")
    assert load_file(Path(soup.path) / "model.safetensors").keys() == saved.keys()
    model = Tied(5.0)
    streamsoup.mix_into(model, [model, saved])
    assert torch.equal(model.head.weight, torch.full((5, 3), 3.0))
    apart = Tied(3.0)
    apart.head.weight = torch.nn.Parameter(torch.zeros(5, 3))  # not tied after all: it counts
    (opened,) = open_ingredients([apart])
    assert set(opened.layout.places) == {"embed.weight", "head.weight"}


def test_transposed_and_scalar_tensors(tmp_path: Path) -> None:
    """Elements are read in their logical order, whatever their strides; 0-d and empty ones too."""
    a = {"t": torch.arange(6.0).reshape(2, 3).t(), "s": torch.tensor(2.0), "e": torch.zeros(0, 3)}
    b = {name: value + 2 for name, value in a.items()}
    soup = streamsoup.uniform([a, b], output=tmp_path / "out")
    found = load_file(Path(soup.path) / "model.safetensors")
    assert torch.equal(found["t"], a["t"] + 1)
    assert found["s"] == 3
    assert found["e"].shape == (0, 3)


def test_changes_and_strangers_are_refused() -> None:
    """A tensor changed after it was opened is noticed; what is no dense tensor is named."""
    state = {"w": torch.zeros(3)}
    (opened,) = open_ingredients([state])
    state["w"] += 1
    with pytest.raises(ChangedIngredientError, match=r"state dict .* changed"):
        open_ingredients([opened])
    with pytest.raises(FormatError, match="epoch"):
        open_ingredients([{"w": torch.zeros(1), "epoch": 3}])
    strangers: list[Any] = [
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"\ud800": torch.zeros(1)},
        {"w": torch.nn.UninitializedParameter()},
        {"w": torch.zeros(1).as_subclass(type("Sharded", (torch.Tensor,), {}))},
    ]
    for stranger in strangers:
        with pytest.raises(FormatError, match="plain dense tensors were expected"):
            open_ingredients([stranger])


def test_what_a_module_raises_is_told() -> None:
    """A class has no tensors; a module whose `state_dict` fails is not said to hold nothing."""

    class Broken(torch.nn.Linear):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            raise TypeError("made up for this test")

    with pytest.raises(TypeError, match="made up"):
        open_ingredients([Broken(1, 1)])
    with pytest.raises(FormatError, match="holds nothing"):
        open_ingredients([torch.nn.Linear])


@needs(safetensors, 0, 8)  # which reads complex numbers
def test_conjugates_that_were_put_off_are_taken(tmp_path: Path) -> None:
    """What torch has noted, and not computed yet, is in the bytes."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    paths = [{"z": z.conj(), "y": z.conj().imag}, {"z": z.conj().clone(), "y": -z.imag}]
    soup = streamsoup.uniform(paths, output=tmp_path / "out")
    found = load_file(Path(soup.path) / "model.safetensors")
    assert torch.equal(found["z"], z.conj().resolve_conj())
    assert torch.equal(found["y"], -z.imag)


def test_memory_may_be_shared_from_the_middle_on() -> None:
    """What overwrites a byte of an ingredient shares memory with it, wherever its own begins."""
    memory = np.arange(24, dtype=np.float32)
    (opened,) = open_ingredients([{"w": torch.from_numpy(memory[8:16])}])
    tensors = opened.source.memory
    for begin, end, shares in [(0, 8, False), (16, 24, False), (15, 24, True), (0, 9, True)]:
        others = [torch.zeros(0), torch.zeros(100), torch.from_numpy(memory[begin:end])]
        assert sharing(tensors, others) == (["w"] if shares else [])
    assert sharing(tensors, [torch.from_numpy(memory)])
    assert sharing(tensors, [torch.from_numpy(memory[10:12])])
    assert not sharing(tensors, [])


def test_little_is_copied_of_what_does_not_lie_in_order() -> None:
    """Any part of a tensor of any strides is what flattening gives, from a few of its rows."""
    whole = torch.arange(4 * 60 * 50, dtype=torch.int32).reshape(4, 60, 50)
    for strange in (whole.permute(1, 2, 0), whole.transpose(1, 2), whole[:, ::3], whole[1:2].mT):
        n = strange.numel()
        row = strange[0].numel() if len(strange) > 1 else strange[0, 0].numel()
        for first, last in ((0, n), (0, 1), (n - 1, n), (row - 1, row + 1), (37, 38), (n // 3, n)):
            part = _elements(strange, first, last)
            assert torch.equal(part, strange.reshape(-1)[first:last])
            if last - first <= 2:
                assert not part.is_set_to(whole)
                copied = part.untyped_storage()
                own = copied.data_ptr() != whole.untyped_storage().data_ptr()
                assert not own or copied.nbytes() <= 2 * 4 * row


def test_a_base_may_be_a_state_dict(tmp_path: Path) -> None:
    """Soups of task vectors name their base, whatever it is; they have the same bits as of files.

    What lies in memory has no path: whoever verifies such a soup gives its tensors again.
    """
    paths = networks.ingredients(tmp_path / "in", 3)
    states = [load_file(Path(path) / "model.safetensors") for path in paths]

    def soups(base: Any, rest: Any, name: str) -> list[Any]:
        return [
            streamsoup.stock(rest, base=base, output=tmp_path / name / "stock"),
            streamsoup.slerp(rest, [0.3, 0.7], base=base, output=tmp_path / name / "slerp"),
            streamsoup.arithmetic(rest, 0.4, base=base, output=tmp_path / name / "arithmetic"),
        ]

    made = soups(paths[0], paths[1:], "files"), soups(states[0], states[1:], "memory")
    for files, memory in zip(*made, strict=True):
        assert files.provenance.tensors == memory.provenance.tensors
        assert files.provenance.report["base"] == paths[0]
        record = memory.provenance.ingredients[0]
        assert memory.provenance.report["base"] == record.path
        assert record.path.startswith("state dict ")
        with pytest.raises(RecipeError, match=r"made of tensors in memory \(state dict"):
            streamsoup.verify(memory.path)
        assert streamsoup.verify(memory.path, ingredients=states).rederived
        assert streamsoup.verify(files.path).rederived


def test_greedy_over_state_dicts(tmp_path: Path) -> None:
    """A search over state dicts finds what one over files finds; changed ones are not trusted."""
    paths = networks.ingredients(tmp_path / "in", 4)
    states = [load_file(Path(path) / "model.safetensors") for path in paths]
    files = streamsoup.greedy(
        paths, networks.score, model=networks.build(), output=tmp_path / "files"
    )
    soup = streamsoup.greedy(
        states, networks.score, model=networks.build(), output=tmp_path / "states"
    )
    assert (soup.members, soup.score) == (files.members, files.score)
    search = GreedySettings(scores=soup.report)
    again = streamsoup.greedy(
        states, networks.score, model=networks.build(), output=tmp_path / "again", settings=search
    )
    assert again.members == soup.members
    states[2]["0.bias"] += 1
    with pytest.raises(RecipeError, match="changed since"):
        streamsoup.greedy(
            states, networks.score, model=networks.build(), output=tmp_path / "x", settings=search
        )


def test_each_leaf_looks_at_its_own_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of many tensors does not ask all of them at each: that took time in the square."""
    looks = 0

    def counted(tensor: torch.Tensor) -> int:
        nonlocal looks
        looks += 1
        return _version(tensor)

    monkeypatch.setattr("streamsoup.formats.memory._version", counted)
    states = [{f"{i:03}": torch.full((3,), float(n)) for i in range(300)} for n in range(2)]
    streamsoup.uniform(states, output=tmp_path / "out")
    assert looks <= 5 * 600


def test_a_change_is_seen_at_its_tensor_and_at_the_end() -> None:
    """A look at one tensor sees its own change only; a look at all sees any."""
    state = {name: torch.zeros(2) for name in "abc"}
    (opened,) = open_ingredients([state])
    state["b"].add_(1)
    for name in ("a", "c"):
        opened.check_unchanged(name)
    for at in ("b", None):
        with pytest.raises(ChangedIngredientError):
            opened.check_unchanged(at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_element_has_any_stride(tmp_path: Path, dtype: torch.dtype) -> None:
    """Torch calls a column of one row contiguous, and does not view it as bytes."""
    column = torch.tensor([[1, 2, 3]], dtype=dtype)[:, 2]
    assert column.stride() == (3,)
    soup = streamsoup.uniform([{"w": column}, {"w": column + 2}], output=tmp_path / "out")
    assert load_file(Path(soup.path) / "model.safetensors")["w"].tolist() == [4]
    model = torch.nn.Module()
    model.register_buffer("w", torch.zeros(1, 3, dtype=dtype)[:, 1])
    streamsoup.mix_into(model, [{"w": column}, {"w": column + 2}])
    assert model.get_buffer("w").tolist() == [4]


def test_wherever_tensors_are_made_by_default() -> None:
    """A caller's default device is for the caller's tensors."""
    model = torch.nn.Module()
    model.register_buffer("w", torch.zeros(3, 2).T)
    with torch.device("meta"):
        streamsoup.mix_into(model, [{"w": torch.ones(2, 3, device="cpu")}])
    assert model.get_buffer("w").tolist() == [[1.0] * 3] * 2


def test_coefficients_that_require_a_gradient(tmp_path: Path) -> None:
    """They are taken as numbers, without a warning."""
    factors = torch.tensor([0.25, 0.75], requires_grad=True)
    states = [{"w": torch.zeros(1)}, {"w": torch.ones(1)}]
    soup = streamsoup.mix(states, factors, output=tmp_path / "out")
    assert soup.recipe.rule.coefficients.values == (0.25, 0.75)
    assert soup.provenance.intact
