"""State dicts and modules are ingredients like files: the same bits, nothing copied."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import streamsoup
from streamsoup import Options, SearchOptions
from streamsoup.errors import ChangedIngredientError, FormatError, RecipeError
from streamsoup.formats.memory import MemoryShard
from streamsoup.formats.shards import open_ingredients


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


def test_memory_may_be_shared_from_the_middle_on() -> None:
    """What overwrites a byte of an ingredient shares memory with it, wherever its own begins."""
    memory = np.arange(24, dtype=np.float32)
    (opened,) = open_ingredients([{"w": torch.from_numpy(memory[8:16])}])
    (shard,) = opened.shards
    assert isinstance(shard, MemoryShard)
    for begin, end, shares in [(0, 8, False), (16, 24, False), (15, 24, True), (0, 9, True)]:
        others = [torch.zeros(0), torch.zeros(100), torch.from_numpy(memory[begin:end])]
        assert shard.memory.shares_with(others) is shares
    assert shard.memory.shares_with([torch.from_numpy(memory)])
    assert shard.memory.shares_with([torch.from_numpy(memory[10:12])])
    assert not shard.memory.shares_with([])


def test_greedy_over_state_dicts(tmp_path: Path) -> None:
    """A search over state dicts finds what one over files finds; changed ones are not trusted."""
    paths = networks.ingredients(tmp_path / "in", 4)
    states = [load_file(Path(path) / "model.safetensors") for path in paths]
    files = streamsoup.greedy_soup(
        paths, networks.score, model=networks.build(), output=tmp_path / "files"
    )
    soup = streamsoup.greedy_soup(
        states, networks.score, model=networks.build(), output=tmp_path / "states"
    )
    assert (soup.members, soup.score) == (files.members, files.score)
    search = SearchOptions(scores=soup.report)
    again = streamsoup.greedy_soup(
        states, networks.score, model=networks.build(), output=tmp_path / "again", search=search
    )
    assert again.members == soup.members
    states[2]["0.bias"] += 1
    with pytest.raises(RecipeError, match="changed since"):
        streamsoup.greedy_soup(
            states, networks.score, model=networks.build(), output=tmp_path / "x", search=search
        )
