"""Models of transformers get, in place, the bits that from_pretrained reads from the soup."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_transformers as fake
import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import streamsoup
from streamsoup import LearnedSettings, Options
from streamsoup.engine import budget
from streamsoup.errors import FormatError, MismatchError
from streamsoup.formats.tracing import Trace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: these models are small, and other tests run beside."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers be the stand-in."""
    fake.install(monkeypatch)


def write(folder: Path, states: list[dict[str, Tensor]]) -> list[str]:
    """Save checkpoints as folders; give their paths."""
    for i, state in enumerate(states):
        (folder / str(i)).mkdir(parents=True)
        save_file(state, folder / str(i) / "model.safetensors")
    return [str(folder / str(i)) for i in range(len(states))]


def places(model: nn.Module) -> dict[str, int]:
    """Tell where the tensors of a model lie."""
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Name the tensors of two models that differ in a bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """List the messages of all warnings."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# What is followed


def turn(tensors: list[Tensor], step: int, pick: random.Random) -> list[Tensor]:
    """Do one of what conversions do, to some tensors."""
    first = tensors[0]
    if step == 0:
        return [
            each.contiguous() for each in torch.chunk(first, 2, dim=pick.randrange(first.dim()))
        ]
    if step == 1 and all(each.shape == first.shape for each in tensors):
        return [torch.stack(tensors, dim=pick.randrange(first.dim() + 1))]
    if step == 2 and all(each.shape == first.shape for each in tensors):
        return [torch.cat(tensors, dim=pick.randrange(first.dim()))]
    if step == 3:
        i, j = pick.randrange(first.dim()), pick.randrange(first.dim())
        return [each.transpose(i, j).contiguous() for each in tensors]
    if step == 4:
        return [each.reshape(2, -1).transpose(0, 1).reshape(each.shape) for each in tensors]
    if step == 5:
        return [each.select(0, pick.randrange(len(each))).clone() for each in tensors]
    return [each[1:] if len(each) > 2 else each for each in tensors]


def test_what_code_makes_of_tensors_is_followed() -> None:
    """Chains of what conversions do give the elements that the trace says, or it says nothing."""
    n_known = n_joined = 0
    for seed in range(150):
        real = {name: torch.arange(48).reshape(4, 6, 2) + 100 * n for n, name in enumerate("abc")}
        trace = Trace({name: (tensor.shape, tensor.dtype) for name, tensor in real.items()})
        steps = random.Random(seed).choices(range(7), k=3)

        def run(tensors: list[Tensor], seed: int = seed, steps: list[int] = steps) -> list[Tensor]:
            pick = random.Random(seed)
            for step in steps:
                if tensors[0].dim():
                    tensors = turn(tensors, step, pick)
            return tensors

        expected = run(list(real.values()))
        with trace:
            results = run(list(trace.sources.values()))
        for result, want in zip(results, expected, strict=True):
            pieces = trace.pieces(result)
            if pieces is None:
                continue
            n_known += 1
            n_joined += len(pieces) > 1
            got = torch.full(want.shape, -1)
            for piece in pieces:
                place = got[piece.box]
                values = real[piece.source].as_strided(piece.shape, piece.stride, piece.offset)
                place.copy_(values.reshape(place.shape))
            assert torch.equal(got, want), (seed, steps)
    assert n_known > 120
    assert n_joined > 20


def test_what_changes_values_is_unknown() -> None:
    """Arithmetic, changes in place and other dtypes are no moving of elements."""
    trace = Trace(dict.fromkeys("abcde", ((4, 2), torch.float32)))
    sources = trace.sources
    with trace:
        results = [
            sources["a"] * 1,
            torch.cat([sources["a"], sources["b"] + 0]),
            sources["c"].add_(1),
            sources["c"],
            sources["d"].double(),
            sources["d"].view(torch.int32),
            sources["e"][[1, 0, 2, 3]],
        ]
        known = sources["b"].T
    assert [trace.pieces(result) for result in results] == [None] * len(results)
    assert trace.pieces(known) is not None


# A family that is made up: these run without transformers


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True])
def test_a_mix_in_place_is_what_loading_the_soup_gives(
    tmp_path: Path,
    live: torch.dtype,
    stored: torch.dtype,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Renamed, stacked, cut and turned tensors get the soup's bits where they are."""
    if small:
        monkeypatch.setattr(budget, "LARGEST_BLOCK", 7)
    paths = write(tmp_path / "in", [fake.make_stored(i, stored) for i in range(3)])
    soup = streamsoup.uniform(paths, output=tmp_path / "soup")
    model, expected = fake.WithHead().to(live), fake.WithHead().to(live)
    fake.load(expected, load_file(Path(soup.path) / "model.safetensors"))
    before = places(model)
    streamsoup.mix_into(model, paths)
    assert differing(model, expected) == []
    assert places(model) == before


@pytest.mark.usefixtures("faked")
def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: gates and ups that are stacked in the other order are seen."""
    paths = write(tmp_path, [fake.make_stored(0)])
    expected, model = fake.WithHead(), fake.WithHead()
    fake.load(expected, fake.make_stored(0))
    right = fake.gates_and_ups
    monkeypatch.setattr(fake, "gates_and_ups", lambda gates, ups: right(ups, gates))
    streamsoup.mix_into(model, paths)
    assert differing(model, expected) == ["body.gate_up"]


@pytest.mark.usefixtures("faked")
def test_searches_score_in_place(tmp_path: Path) -> None:
    """Greedy, compare and interpolate score each candidate as its file would be."""
    paths = write(tmp_path / "in", [fake.make_stored(i) for i in range(3)])
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(model(x).double().square().mean())

    def score_of(members: list[str]) -> float:
        soup = streamsoup.uniform(
            members, output=tmp_path / f"check{len(list(tmp_path.iterdir()))}"
        )
        model = fake.WithHead()
        fake.load(model, load_file(Path(soup.path) / "model.safetensors"))
        return score(model)

    singles = [score_of([path]) for path in paths]
    soup = streamsoup.greedy(paths, score, model=fake.WithHead(), output=tmp_path / "soup")
    assert soup.score >= max(singles)
    assert soup.score == score_of([paths[i] for i in soup.members])


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_stored_tensors(tmp_path: Path, live: torch.dtype) -> None:
    """Learned coefficients are the same whether a checkpoint has the model's names or its own."""
    states = [fake.make_stored(i, live) for i in range(3)]
    plain = []
    for state in states:
        model = fake.WithHead().to(live)
        fake.load(model, state)
        plain.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(live)
    y = torch.arange(40) % 2

    def loss(model: nn.Module, split: str) -> Iterator[tuple[Tensor, int]]:
        for i in (0, 20):
            yield nn.functional.cross_entropy(model(x[i : i + 20]), y[i : i + 20]), 20

    task = SimpleNamespace(
        loss=loss, build=lambda: fake.WithHead().to(live), score=lambda model: 0.0, splits=["val"]
    )
    learning = LearnedSettings(evaluations=4)
    found = []
    for name, ones in (("stored", states), ("plain", plain)):
        soup = streamsoup.learned(
            write(tmp_path / name, ones),
            task,
            output=tmp_path / f"{name}-soup",
            settings=learning,
        )
        found.append(torch.tensor(soup.recipe.rule.coefficients.values, dtype=torch.float64))
    assert (found[0] - 1 / 3).abs().max() > 1e-3  # it went somewhere
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("faked")
def test_live_models_are_ingredients_as_their_checkpoints(tmp_path: Path) -> None:
    """Soups of live models, files, and both, are the same files under released names."""
    states = [fake.make_stored(i) for i in range(2)]
    paths = write(tmp_path / "in", states)
    models = [fake.WithHead() for _ in states]
    for model, state in zip(models, states, strict=True):
        fake.load(model, state)
    want = load_file(
        Path(streamsoup.uniform(paths, output=tmp_path / "f").path, "model.safetensors")
    )
    for name, ones in (("live", models), ("both", [models[0], paths[1]])):
        soup = streamsoup.uniform(ones, output=tmp_path / name)
        got = load_file(Path(soup.path) / "model.safetensors")
        assert want.keys() == got.keys()
        assert all(torch.equal(want[each], got[each]) for each in want)
        config = json.loads((Path(soup.path) / "config.json").read_text())
        assert config == {
            "model_type": "fake",
            "architectures": ["WithHead"],
            "dtype": "float32",
        }
    assert not hasattr(models[0].config, "architectures")  # the model's own is as it was
    narrow = streamsoup.uniform(models, output=tmp_path / "bf16", options=Options(dtype="bf16"))
    assert json.loads((Path(narrow.path) / "config.json").read_text())["dtype"] == "bfloat16"
    expected = fake.WithHead()
    fake.load(expected, want)
    streamsoup.mix_into(models[1], models)  # into one of them
    assert differing(models[1], expected) == []


@pytest.mark.usefixtures("faked")
def test_a_headless_model_takes_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base of a model is filled from checkpoints with a head, which is left out with a word."""
    state = fake.make_stored(0)
    model, expected = fake.Body(), fake.Body()
    streamsoup.mix_into(model, write(tmp_path, [state]))
    fake.load(expected, state)
    assert differing(model, expected) == []
    (words,) = warnings_in(caplog)
    assert "no place for 2 of the ingredients' tensors" in words
    assert "head.bias, head.weight" in words


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("prefix", ["", "body."])
def test_a_head_without_weights_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    """Checkpoints of the base alone, with its prefix or without, leave a head as it is."""
    state = fake.make_stored(0, head=False)
    named = {prefix + name.removeprefix("body."): tensor for name, tensor in state.items()}
    model, expected = fake.WithHead(), fake.WithHead()
    expected.head.load_state_dict(model.head.state_dict())
    fake.load(expected, state)
    streamsoup.mix_into(model, write(tmp_path, [named]))
    assert differing(model, expected) == []
    (words,) = warnings_in(caplog)
    assert "which stay as they are, and scores depend on them: head.weight, head.bias" in words


@pytest.mark.usefixtures("faked")
def test_what_does_not_fit_a_family_is_named() -> None:
    """Tensors within a part that both have are missed, and unknown ones refused."""
    for change, message in (
        ({"body.attention.qkv.weight": None}, r"the model has 3 that no ingredient has: body\.q"),
        ({"body.down.extra": torch.zeros(2)}, r"the model lacks 1 .*: body\.down\.extra"),
        ({"head.bias": torch.zeros(3)}, r"of shape \[2\] where the ingredients have \[3\]: head"),
        ({"body.experts.3.up": torch.zeros(5, 4)}, r"not converted by transformers .*gate"),
        (
            {"body.experts.3.down": torch.zeros(4, 5)},
            r"\[3, 5, 4\] where .* have \[4, 5, 4\]: body",
        ),
        ({"body.embedding.bias": torch.zeros(4)}, r"stored twice, for body\.embedding\.bias"),
    ):
        state = fake.make_stored(0) | change
        with pytest.raises(MismatchError, match=message):
            streamsoup.mix_into(
                fake.WithHead(), [{n: t for n, t in state.items() if t is not None}]
            )


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("operate", [lambda x: x * 1, lambda x: x.mul_(1), lambda x: x[[0, 1, 2]]])
def test_what_cannot_be_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, operate: Callable[[Tensor], Tensor]
) -> None:
    """A conversion that computes is no view: family and tensor are named, and a way on."""
    right = fake.gates_and_ups
    monkeypatch.setattr(fake, "gates_and_ups", lambda g, u: [operate(right(g, u)[0])])
    model = fake.WithHead()
    before = model.body.gate_up.detach().clone()
    with pytest.raises(MismatchError) as caught:
        streamsoup.mix_into(model, [fake.make_stored(0)])
    message = str(caught.value)
    assert "converted in a way that cannot be followed: body.gate_up" in message
    assert "transformers does not store a fake checkpoint as the model has it" in message
    assert "by a command" in message
    assert torch.equal(model.body.gate_up, before)


def test_other_versions_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without conversions names are compared; where they fail, the refusal says so."""
    native = {name: tensor.clone() for name, tensor in fake.WithHead().state_dict().items()}

    def failing(model: Any) -> Any:
        raise TypeError("another signature")

    for instead in ({"rename_source_key": None}, {"get_model_conversion_mapping": failing}):
        fake.install(monkeypatch, **instead)
        model = fake.WithHead()
        streamsoup.mix_into(model, [native])
        assert torch.equal(model.body.gate_up, native["body.gate_up"])
        with pytest.raises(MismatchError, match="the model lacks") as caught:
            streamsoup.mix_into(model, [fake.make_stored(0)])
        if "rename_source_key" not in instead:
            assert "how transformers loads fake could not be found out" in str(caught.value)
            assert "another signature" in str(caught.value)


def test_live_models_that_cannot_be_converted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ingredient whose stored form is not known is refused; without conversions it is as is."""
    fake.install(
        monkeypatch, revert_weight_conversion=lambda model, state: {"w": state["head.bias"] * 1}
    )
    with pytest.raises(FormatError, match=r"fake, a model of transformers: .*: w; save it with"):
        streamsoup.mix_into(fake.WithHead(), [fake.WithHead()])
    fake.install(monkeypatch, revert_weight_conversion=None)
    model = fake.WithHead()
    streamsoup.mix_into(fake.WithHead(), [model])


# What else makes a live model differ from its checkpoints


class Words(nn.Module):
    def __init__(self, n: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, 3)
        self.head = nn.Linear(3, n, bias=False)
        self.inner = nn.Linear(3, 3)


def weight_norm(model: Words) -> None:
    """Split a weight in magnitude and direction."""
    parametrizations.weight_norm(model.inner)


def old_weight_norm(model: Words) -> None:
    """Do so by a hook."""
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.inner)


def orthogonal(model: Words) -> None:
    """Make a weight orthogonal."""
    parametrizations.orthogonal(model.inner)


def spectral_norm(model: Words) -> None:
    """Divide a weight by its norm, by a hook."""
    nn.utils.spectral_norm(model.inner)


def pruned(model: Words) -> None:
    """Mask a weight."""
    nn.utils.prune.l1_unstructured(model.inner, "weight", 0.5)


def adapter(model: Words) -> None:
    """Wrap a layer as PEFT does."""
    kind = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    layer = kind()
    layer.base_layer, layer.lora_A = model.inner, nn.Linear(3, 1)
    model.inner = layer  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight_norm, r"WeightNorm was put on .*: inner\.weight; .*remove_parametrizations"),
        (old_weight_norm, r"WeightNorm was put on .*: inner\.weight; .*remove_weight_norm"),
        (orthogonal, r"Orthogonal was put on .*: inner\.weight"),
        (spectral_norm, r"SpectralNorm was put on .*: inner\.weight; .*remove_spectral_norm"),
        (pruned, r"is pruned .*: inner\.weight; .*prune\.remove"),
        (adapter, r"has PEFT adapters in it \(inner\)"),
    ],
)
def test_the_cause_is_named(change: Callable[[Words], None], message: str) -> None:
    """What was put on a model after its checkpoints were written is told by its traces."""
    model = Words()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(model)
    with pytest.raises(MismatchError, match=message) as caught:
        streamsoup.mix_into(model, [state])
    assert "by a command" not in str(caught.value)  # other advice than that which fits


def test_resized_embeddings_are_named() -> None:
    """A vocabulary of another size is told from other shapes that differ."""
    state = Words(9).state_dict()
    with pytest.raises(MismatchError, match=r"resized: 7 rows in the model, 9 in the ingredients"):
        streamsoup.mix_into(Words(7), [state])
    state = Words(7).state_dict() | {"inner.bias": torch.zeros(4)}
    with pytest.raises(MismatchError, match=r"of shape \[3\]") as caught:
        streamsoup.mix_into(Words(7), [state])
    assert "resized" not in str(caught.value)


# The real ones


def families() -> dict[str, Callable[[Any], nn.Module]]:
    """Make tiny models of families, by name, each by a function of transformers."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 37,
        "max_position_embeddings": 32,
    }
    encoder = {name: n for name, n in text.items() if name != "num_key_value_heads"}
    image = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    }
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0}
    moe = {"num_experts": 4, "moe_intermediate_size": 8}
    return {
        "ViT": lambda t: t.ViTForImageClassification(t.ViTConfig(**image)),
        "Mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**text, num_local_experts=4)),
        "Qwen2-MoE": lambda t: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(**text, **moe, shared_expert_intermediate_size=12)
        ),
        "Qwen3-MoE": lambda t: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**text, **moe, head_dim=4)),
        "DeepSeek-V3": lambda t: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **(text | {"num_key_value_heads": 4} | latent),
                n_routed_experts=4,
                moe_intermediate_size=8,
                first_k_dense_replace=1,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
            )
        ),
        "LLaVA": lambda t: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                text_config=t.LlamaConfig(**text),
                vision_config=t.CLIPVisionConfig(**image),
                image_token_index=36,
            )
        ),
        "Qwen2-VL": lambda t: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config=text | {"rope_parameters": rope},
                vision_config={
                    "depth": 2,
                    "embed_dim": 16,
                    "hidden_size": 16,
                    "num_heads": 4,
                    "patch_size": 4,
                    "mlp_ratio": 2,
                },
            )
        ),
        "Gemma3-VLM": lambda t: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=t.Gemma3TextConfig(**text, head_dim=4),
                vision_config=t.SiglipVisionConfig(**image),
                mm_tokens_per_image=4,
            )
        ),
        "YOLOS": lambda t: t.YolosForObjectDetection(
            t.YolosConfig(**(image | {"image_size": [8, 8]}), num_detection_tokens=3)
        ),
        "BERT": lambda t: t.BertForSequenceClassification(t.BertConfig(**encoder)),
        "Llama, tied": lambda t: t.LlamaForCausalLM(
            t.LlamaConfig(**text, tie_word_embeddings=True)
        ),
        "CLIP": lambda t: t.CLIPModel(t.CLIPConfig(text_config=encoder, vision_config=image)),
        "CLIP, vision": lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**image)),
        "NomicBERT, one for three": lambda t: t.NomicBertModel(t.NomicBertConfig(**encoder)),
        "DINOv2, one for two": lambda t: t.Dinov2ForImageClassification(
            t.Dinov2Config(**image, use_swiglu_ffn=True)
        ),
        "Qwen3-VL-MoE, turned": lambda t: t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(
                text_config=text
                | {
                    "rope_parameters": rope,
                    "num_experts": 4,
                    "moe_intermediate_size": 16,
                    "head_dim": 4,
                },
                vision_config={
                    "depth": 2,
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_heads": 4,
                    "patch_size": 4,
                    "out_hidden_size": 16,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
            )
        ),
    }


def saved(transformers: Any, family: str, folder: Path) -> list[str]:
    """Write two checkpoints of random weights; give their folders."""
    paths = []
    for seed in range(2):
        model = families()[family](transformers)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
        model.save_pretrained(folder / str(seed))
        paths.append(str(folder / str(seed)))
    return paths


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families())
def test_each_family_gets_the_bits_of_its_soup(tmp_path: Path, family: str) -> None:
    """In place, what from_pretrained reads from the soup; and live models make that soup."""
    transformers = pytest.importorskip("transformers", minversion="5")
    paths = saved(transformers, family, tmp_path)
    soup = streamsoup.uniform(paths, output=tmp_path / "soup")
    model = families()[family](transformers)
    expected = type(model).from_pretrained(soup.path)
    before = places(model)
    streamsoup.mix_into(model, paths)
    assert differing(model, expected) == []
    assert places(model) == before
    models = [type(model).from_pretrained(path) for path in paths]
    again = streamsoup.uniform(models, output=tmp_path / "again")
    want, got = (load_file(Path(each.path) / "model.safetensors") for each in (soup, again))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    models[0].save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        ours, theirs = Path(again.path) / name, tmp_path / "saved" / name
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_text() == theirs.read_text()
    streamsoup.mix_into(models[0], models)
    assert differing(models[0], expected) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["ViT", "Mixtral", "LLaVA", "BERT"])
def test_heads_come_and_go_as_in_from_pretrained(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A base model of checkpoints with a head, and the reverse, have what both have in common."""
    transformers = pytest.importorskip("transformers", minversion="5")
    whole = families()[family](transformers)
    base = type(whole.base_model)
    with_head = saved(transformers, family, tmp_path / "whole")
    without = []
    for i, path in enumerate(with_head):
        base.from_pretrained(path).save_pretrained(tmp_path / f"base{i}")
        without.append(str(tmp_path / f"base{i}"))
    for paths, kind, config in (
        (with_head, base, whole.base_model.config),
        (without, type(whole), whole.config),
    ):
        soup = streamsoup.uniform(paths, output=tmp_path / f"soup-{kind.__name__}")
        expected, found = kind.from_pretrained(soup.path, output_loading_info=True)
        model = kind(config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        caplog.clear()
        streamsoup.mix_into(model, paths)
        for name, tensor in model.state_dict().items():
            absent = name in found["missing_keys"]
            assert torch.equal(tensor, before[name] if absent else expected.state_dict()[name])
        said = " ".join(warnings_in(caplog))
        assert ("left out" in said) == bool(found["unexpected_keys"])
        assert ("stay as they are" in said) == bool(found["missing_keys"])


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_other_layers_is_refused(tmp_path: Path) -> None:
    """Where from_pretrained would leave out whole layers, or make them up, nothing is written."""
    transformers = pytest.importorskip("transformers", minversion="5")
    paths = saved(transformers, "ViT", tmp_path)
    for n, message in ((1, r"the model lacks 16 of"), (3, r"the model has 16 that no ingredient")):
        config = families()["ViT"](transformers).config
        config.num_hidden_layers = n
        with pytest.raises(MismatchError, match=message):
            streamsoup.mix_into(transformers.ViTForImageClassification(config), paths)
