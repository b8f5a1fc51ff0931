"""Adapters that PEFT itself wrote, compared with its own merge in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_array
from safetensors.torch import save_file

from streamsoup import Options, uniform
from streamsoup.errors import FormatError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of which each version has others


class Small(torch.nn.Module):
    """Every kind of module that PEFT puts factors beside."""

    def __init__(self) -> None:
        super().__init__()
        self.e = torch.nn.Embedding(11, 8)
        self.q = torch.nn.Linear(8, 12)
        self.k = torch.nn.Linear(8, 8, bias=False)
        self.c1 = torch.nn.Conv1d(3, 4, 3)
        self.c2 = torch.nn.Conv2d(3, 4, (3, 2))
        self.c3 = torch.nn.Conv3d(3, 4, 2)
        self.one = torch.nn.Conv2d(3, 4, 1)
        self.g = transformers.pytorch_utils.Conv1D(10, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        """Run the part that a forward pass needs."""
        return self.head(self.k(self.e(x)))


def tuned(tmp_path: Path, name: str, model: torch.nn.Module, **config: Any) -> tuple[Path, Any]:
    """Save a model's adapter with random factors; return its folder and the merged tensors."""
    torch.manual_seed(len(name) + sum(map(ord, name)))
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    made.save_pretrained(tmp_path / name)
    return tmp_path / name, made.double().merge_and_unload().state_dict()


def stored(tmp_path: Path, model: torch.nn.Module) -> Path:
    """Save a model as a checkpoint."""
    folder = tmp_path / "base"
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q", "k"]},
    "rslora": {"target_modules": ["q", "k"], "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q", "k", "head"],
        "rank_pattern": {"q": 2, "^k": 5},
        "alpha_pattern": {"head": 32, "k": 3},
    },
    "embedding": {"target_modules": ["e", "q"]},
    "convolutions": {"target_modules": ["c1", "c2", "c3", "one"]},
    "conv1d": {"target_modules": ["g"], "fan_in_fan_out": True},
    "bias": {"target_modules": ["q", "c2"], "lora_bias": True},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "trained-biases": {"target_modules": ["q"], "bias": "all"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_as_merge_and_unload_in_float64(tmp_path: Path, name: str) -> None:
    """What PEFT merges in float64, we deliver, to the rounding of its order of sums."""
    torch.manual_seed(0)
    model = Small()
    at = stored(tmp_path, model)
    one, merged = tuned(tmp_path, name, model, **CONFIGS[name])
    soup = uniform([f"{at}+{one}"], output=tmp_path / "soup", options=Options(dtype="f64"))
    for tensor, expected in merged.items():
        found = load_array(Path(soup.path), tensor)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-13, atol=1e-13, err_msg=tensor)
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t.double(), merged[n])]
    assert changed, "the adapter changes nothing, so that nothing was shown"


def test_two_layers_of_a_transformers_model(tmp_path: Path) -> None:
    """``layers_to_transform`` and a causal language model, by the names that it is saved with."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    made = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}
    one, merged = tuned(tmp_path, "one", model, **made)
    options = Options(dtype="f64")
    soup = uniform([f"{tmp_path}/base+{one}"], output=tmp_path / "soup", options=options)
    name = "model.layers.2.mlp.down_proj.weight"
    expected = merged[name].numpy()
    np.testing.assert_allclose(load_array(Path(soup.path), name), expected, rtol=1e-13, atol=1e-13)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(soup.path, dtype=torch.float64)
    assert torch.equal(
        loaded.state_dict()[name], torch.from_numpy(load_array(Path(soup.path), name).copy())
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q", "k"], "init_lora_weights": "olora"}, "olora"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, config: Any, message: str) -> None:
    """What PEFT writes for adapters that are not W + s·B·A is refused."""
    model = Small()
    at = stored(tmp_path, model)
    peft.get_peft_model(model, peft.LoraConfig(**config)).save_pretrained(tmp_path / "one")
    with pytest.raises(FormatError, match=message):
        uniform([f"{at}+{tmp_path}/one"], output=tmp_path / "soup")


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    """IA3 is another type of adapter, and says so in its configuration."""
    model = Small()
    at = stored(tmp_path, model)
    config = peft.LoHaConfig(target_modules=["q"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "one")
    with pytest.raises(FormatError, match="peft_type 'LOHA'"):
        uniform([f"{at}+{tmp_path}/one"], output=tmp_path / "soup")


def test_a_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT's factors of a grouped convolution make a matrix that its weight has no room for."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    at = stored(tmp_path, model)
    config = peft.LoraConfig(target_modules=["0"], r=4)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "one")
    with pytest.raises(FormatError, match="grouped convolution"):
        uniform([f"{at}+{tmp_path}/one"], output=tmp_path / "soup")
