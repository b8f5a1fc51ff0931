"""Adapters made of adapters are loaded and merged by PEFT itself: faults of its own as inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load

from streamsoup import Options, mix, uniform, verify

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of which each version has others

ADAPTER = "adapter_model.safetensors"


class Small(torch.nn.Module):
    """Every kind of module that PEFT puts factors beside, and names that end like others."""

    def __init__(self) -> None:
        super().__init__()
        self.e = torch.nn.Embedding(11, 8)
        self.q = torch.nn.Linear(8, 12)
        self.k = torch.nn.Linear(8, 8, bias=False)
        self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "k": torch.nn.Linear(8, 8)})
        self.c2 = torch.nn.Conv2d(3, 4, (3, 2))
        self.g = transformers.pytorch_utils.Conv1D(10, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        """Run the part that a forward pass needs."""
        return self.head(self.k(self.e(x)))


def model() -> Small:
    """Return the same model each time."""
    torch.manual_seed(0)
    return Small()


def tuned(folder: Path, seed: int, **config: Any) -> Path:
    """Save an adapter with random factors."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(model(), peft.LoraConfig(**config))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    made.save_pretrained(folder)
    return folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """Load an adapter with PEFT, merge it in float64, and return what it adds to the base."""
    found = peft.PeftModel.from_pretrained(model(), folder).double()
    loaded = {
        name.replace(".default", "") for name, _ in found.named_parameters() if "lora_" in name
    }
    assert loaded == {name for name in load(folder / ADAPTER) if "lora_" in name}
    tensors = found.merge_and_unload().state_dict()
    return {name: tensors[name] - each.double() for name, each in model().state_dict().items()}


def check(soup: Any, paths: list[Path], coefficients: Any) -> None:
    """Compare what PEFT adds for a soup with the weighted sum of what it adds for each."""
    found = merged(Path(soup.path))
    parts = [merged(path) for path in paths]
    for name, each in found.items():
        expected = sum(c * part[name] for c, part in zip(coefficients, parts, strict=True))
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert any(each.abs().max() > 1 for each in found.values())
    verify(soup.path)


CONFIGS: dict[str, list[dict[str, Any]]] = {
    "ranks and scales": [
        {"target_modules": ["q", "k"], "r": 2, "lora_alpha": 7},
        {"target_modules": ["q", "k"], "r": 5, "use_rslora": True},
    ],
    "other modules": [
        {"target_modules": ["k"], "r": 2},
        {"target_modules": ["head", "inner.q"], "r": 3, "alpha_pattern": {"head": 32}},
    ],
    "patterns of rank": [  # PEFT's issue 3737: they are to fit when the adapter is loaded again
        {"target_modules": ["q", "k"], "r": 4, "rank_pattern": {"^q": 2, "k": 3}},
        {"target_modules": ["q", "k"], "r": 4, "rank_pattern": {"inner.k": 1, "q": 5}},
    ],
    "an expression": [
        {"target_modules": r"(inner\.)?(q|k)", "r": 2},
        {"target_modules": ["q", "k"], "r": 2},
    ],
    "embeddings": [{"target_modules": ["e", "q"], "r": 2}, {"target_modules": ["e"], "r": 3}],
    "convolutions": [{"target_modules": ["c2"], "r": 2}, {"target_modules": ["c2", "k"], "r": 3}],
    "transposed": [
        {"target_modules": ["g"], "fan_in_fan_out": True, "r": 2},
        {"target_modules": ["g"], "fan_in_fan_out": True, "r": 3},
    ],
    "biases of factors": [
        {"target_modules": ["q", "c2"], "lora_bias": True, "r": 2},
        {"target_modules": ["q", "head"], "r": 2},
    ],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_merges_the_sum_of_the_products(tmp_path: Path, name: str) -> None:
    """Signs of any kind (PEFT's issues 3004 and 2811), on every kind of module."""
    paths = [tuned(tmp_path / f"{n}", n, **config) for n, config in enumerate(CONFIGS[name])]
    for number, coefficients in enumerate([(0.5, 0.5), (1.5, -0.75), (-1.0, -2.0)]):
        soup = mix(paths, coefficients, output=tmp_path / f"soup{number}")
        check(soup, paths, coefficients)


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_merges_the_best_approximation(tmp_path: Path, name: str) -> None:
    """With a rank, what PEFT adds is the truncated decomposition of what it adds for the sum."""
    paths = [tuned(tmp_path / f"{n}", n, **config) for n, config in enumerate(CONFIGS[name])]
    coefficients = (1.5, -0.75, -1.0)[: len(paths)]
    whole = merged(Path(mix(paths, coefficients, output=tmp_path / "whole").path))
    soup = mix(paths, coefficients, output=tmp_path / "soup", options=Options(rank=2))
    found = merged(Path(soup.path))
    for each, full in whole.items():
        # PEFT's transposed layers and embeddings are transposed products, with the same norms.
        matrix = full.reshape(len(full), -1)
        if matrix.shape[1] > 1:
            u, values, v = torch.linalg.svd(matrix, full_matrices=False)
            full = ((u[:, :2] * values[:2]) @ v[:2]).reshape(full.shape)
        torch.testing.assert_close(found[each], full, rtol=1e-5, atol=1e-5, msg=each)
    assert soup.provenance.report["rank_errors"]
    assert verify(soup.path).rederived


def test_modules_to_save_are_averaged(tmp_path: Path) -> None:
    """Tensors stored whole are those of the soup, where the coefficients sum to 1."""
    told: dict[str, Any] = {"target_modules": ["q"], "modules_to_save": ["head"]}
    paths = [tuned(tmp_path / f"{n}", n, r=n + 2, **told) for n in range(2)]
    check(mix(paths, (1.25, -0.25), output=tmp_path / "soup"), paths, (1.25, -0.25))


@pytest.mark.parametrize(
    "told", [{"use_rslora": True}, {"lora_bias": True}, {"alpha_pattern": {"k": 5}}]
)
def test_one_adapter_of_weight_1_is_itself(tmp_path: Path, told: dict[str, Any]) -> None:
    """PEFT's issue 3761: bytes of tensors and configuration, with patterns, rsLoRA and all."""
    modules = ["q", "head"] if "lora_bias" in told else ["q", "k"]
    config = {"target_modules": modules, "r": 3, **told}
    one = tuned(tmp_path / "one", 1, **config)
    soup = mix([one], [1.0], output=tmp_path / "soup")
    assert load(Path(soup.path) / ADAPTER) == load(one / ADAPTER)
    of = [
        json.loads((path / "adapter_config.json").read_text()) for path in (one, tmp_path / "soup")
    ]
    assert of[0] == of[1]
    check(soup, [one], [1.0])
    check(mix([one], [-0.5], output=tmp_path / "half"), [one], [-0.5])


def test_a_causal_model_of_transformers(tmp_path: Path) -> None:
    """Layers that differ between adapters, in the names that a language model has."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    paths, deltas = [], []

    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    before = {name: each.double() for name, each in fresh().state_dict().items()}
    for n, layers in enumerate(([0, 2], [1, 2])):
        told = peft.LoraConfig(
            target_modules=["q_proj", "down_proj"], layers_to_transform=layers, r=2 + n
        )
        made = peft.get_peft_model(fresh(), told)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape)
        made.save_pretrained(tmp_path / f"{n}")
        paths.append(tmp_path / f"{n}")
        after = made.double().merge_and_unload().state_dict()
        deltas.append({name: after[name] - before[name] for name in before})
    soup = uniform(paths, output=tmp_path / "soup")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(soup.path)
    after = loaded.double().merge_and_unload().state_dict()
    for name in before:
        expected = (deltas[0][name] + deltas[1][name]) / 2
        torch.testing.assert_close(after[name] - before[name], expected, rtol=1e-5, atol=1e-5)
