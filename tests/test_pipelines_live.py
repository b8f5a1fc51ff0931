"""Pipelines in live models, and in the searches and studies that score them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, load, save, tensor
from torch import nn

import streamsoup
from streamsoup import LearnedSettings, Options, geometry, greedy, learned, mix_into
from streamsoup.errors import MismatchError
from streamsoup.study.comparison.table import compare

TASK = """
import torch
from torch import nn


class Pipe(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet, self.vae = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.vae(self.unet(x).tanh())


torch.manual_seed(0)
X, Y = torch.randn(24, 3), torch.randint(0, 2, (24,))
splits = ["val", "test"]


def build():
    return Pipe()


def score(model, split):
    return -nn.functional.cross_entropy(model(X), Y).item()


def loss(model, split):
    yield nn.functional.cross_entropy(model(X), Y)


def predictions(model, split):
    yield model(X), Y
"""


class Pipe(nn.Module):
    """Two components, as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.vae = nn.Linear(3, 4), nn.Linear(4, 2)


def pipeline(folder: Path, seed: int) -> Path:
    """Make a pipeline of two components."""
    rng = np.random.default_rng(seed)
    for part, shape in (("unet", (4, 3)), ("vae", (2, 4))):
        weights = rng.standard_normal(shape).astype("f4")
        bias = rng.standard_normal(shape[0]).astype("f4")
        save(folder / part, {"weight": tensor(weights), "bias": tensor(bias)})
    listing = {"unet": ["x", "Unet"], "vae": ["x", "Vae"]}
    (folder / "model_index.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return three pipelines."""
    return [pipeline(tmp_path / f"in-{seed}", seed) for seed in range(3)]


def mean(paths: list[Path], file: str, name: str) -> Any:
    """Average a tensor of several files with numpy."""
    rows = [np.frombuffer(load(path / file)[name][2], "<f4").astype("f8") for path in paths]
    return np.mean(rows, 0).astype("<f4")


def test_components_go_into_the_attributes_they_are_named_after(paths: list[Path]) -> None:
    """Each component of a mix is put into the module of its name."""
    model = Pipe()
    mix_into(model, paths)
    for part in ("unet", "vae"):
        for name, value in getattr(model, part).named_parameters():
            expected = mean(paths, f"{part}/model.safetensors", name)
            assert np.array_equal(value.detach().numpy().ravel(), expected)


def test_a_lone_component_is_the_whole_model(paths: list[Path]) -> None:
    """With one component chosen, a model that is that component takes it."""
    model = nn.Linear(3, 4)
    mix_into(model, paths, options=Options(components=("unet",)))
    expected = mean(paths, "unet/model.safetensors", "weight")
    assert np.array_equal(model.weight.detach().numpy().ravel(), expected)


def test_modules_of_sentence_transformers_are_found_by_number(tmp_path: Path) -> None:
    """The folder itself is the first module, and ``2_Dense`` that of its number."""
    paths = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        folder = save(tmp_path / str(seed), {"weight": tensor(rng.standard_normal((4, 3)))})
        save(folder / "2_Dense", {"linear.weight": tensor(rng.standard_normal((2, 4)))})
        modules = [{"path": "", "type": "x"}, {"path": "2_Dense", "type": "x"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        paths.append(folder)
    dense = nn.Module()
    dense.linear = nn.Linear(4, 2, bias=False)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), dense).double()
    mix_into(model, paths)
    loaded = [load(path / "2_Dense")["linear.weight"][2] for path in paths]
    expected = (np.frombuffer(loaded[0], "<f8") + np.frombuffer(loaded[1], "<f8")) / 2
    assert np.array_equal(dense.linear.weight.detach().numpy().ravel(), expected)


def test_a_model_without_a_component_is_refused(paths: list[Path]) -> None:
    """What only one of the two has is named, and the model stays as it was."""
    model = Pipe()
    model.extra = nn.Linear(2, 2)
    before = model.unet.weight.clone()
    with pytest.raises(MismatchError, match=r"the model has 2 that no ingredient has: extra\.w"):
        mix_into(model, paths)
    del model.extra, model.vae
    with pytest.raises(MismatchError, match=r"the model lacks 4 of the ingredients"):
        mix_into(model, paths)
    assert torch.equal(model.unet.weight, before)


def test_searches_and_studies_take_pipelines(tmp_path: Path, paths: list[Path]) -> None:
    """Greedy and learned soups of pipelines verify; they are compared and measured as others."""
    task = tmp_path / "task.py"
    task.write_text(TASK)
    found = greedy(paths, task, output=tmp_path / "greedy")
    assert found.provenance.shards[0].name == "unet/model.safetensors"
    model = Pipe()
    mix_into(model, [tmp_path / "greedy"])
    quick = LearnedSettings(evaluations=2, guard_every=0)
    learned(paths, task, output=tmp_path / "learned", settings=quick)
    assert "\n| equal coefficients | " in (tmp_path / "learned" / "README.md").read_text()
    for name in ("greedy", "learned"):
        assert streamsoup.verify(tmp_path / name).rederived
    compare(paths, task, output=tmp_path / "comparison")
    angles = geometry(paths, base=paths[0])
    assert {place.name for place in angles.tensors} >= {"unet/weight", "vae/weight"}


def test_a_command_scores_candidates_that_are_whole_pipelines(
    tmp_path: Path, paths: list[Path]
) -> None:
    """Each candidate that a command is given has all components and their listing."""
    script = tmp_path / "score.py"
    script.write_text(
        "import json, os, sys\n"
        "at = sys.argv[1]\n"
        "parts = [p for p in json.load(open(os.path.join(at, 'model_index.json')))]\n"
        "files = [os.path.join(at, p, 'model.safetensors') for p in parts]\n"
        "print(sum(open(f, 'rb').read()[-1] for f in files))\n"
    )
    words = ["greedy", *paths, "--command", f"{sys.executable} {script} {{checkpoint}}"]
    found = command(*words, "-o", tmp_path / "soup")
    assert found.returncode == 0, found.stderr
    assert streamsoup.verify(tmp_path / "soup").rederived
