"""What others' libraries load: soups of what they saved, with the values that were averaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamsoup import Options, mix_into, uniform, verify

pytestmark = pytest.mark.filterwarnings("ignore")  # they warn of their own future

STEPS: Any = {"beta_start": 0.001, "steps_offset": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no library ask the Hub for anything."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _pipeline(folder: Path, seed: int, **saving: Any) -> Path:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=transformers.CLIPTokenizer(
            str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=20
        ),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**(STEPS if seed == 2 else {})),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, **saving)
    return folder


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "60KB"}, {"variant": "fp16"}], ids=str)
def test_diffusers_loads_a_soup_of_pipelines(tmp_path: Path, saving: dict[str, Any]) -> None:
    """`DiffusionPipeline.from_pretrained` finds every component, with the mean of its tensors."""
    diffusers = pytest.importorskip("diffusers")
    a, b = _pipeline(tmp_path / "a", 1, **saving), _pipeline(tmp_path / "b", 2, **saving)
    uniform([a, b], output=tmp_path / "soup")
    loading = {"variant": saving["variant"]} if "variant" in saving else {}
    one, two, soup = (
        diffusers.DiffusionPipeline.from_pretrained(path, **loading)
        for path in (a, b, tmp_path / "soup")
    )
    n_parts = 0
    for name, module in soup.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        n_parts += 1
        first, other = (getattr(each, name).state_dict() for each in (one, two))
        for key, value in module.state_dict().items():
            mean = (first[key].double() + other[key].double()) / 2
            assert torch.equal(value, mean.to(value.dtype)), (name, key)
    assert n_parts == 3
    assert soup.scheduler.config.beta_start == one.scheduler.config.beta_start
    soup.set_progress_bar_config(disable=True)
    made = soup("a b", num_inference_steps=1, output_type="np", height=16, width=16)
    assert made.images.shape[0] == 1
    assert verify(tmp_path / "soup").rederived


def test_diffusers_loads_a_soup_of_one_component(tmp_path: Path) -> None:
    """With one component chosen, the others are those of the first pipeline."""
    diffusers = pytest.importorskip("diffusers")
    a, b = _pipeline(tmp_path / "a", 1), _pipeline(tmp_path / "b", 2)
    uniform([a, b], output=tmp_path / "soup", options=Options(components=("unet",)))
    one, soup = (
        diffusers.DiffusionPipeline.from_pretrained(path) for path in (a, tmp_path / "soup")
    )
    mix_into(one.unet, [a, b], options=Options(components=("unet",)))
    for name, value in one.unet.state_dict().items():
        assert torch.equal(value, soup.unet.state_dict()[name]), name
    one = diffusers.DiffusionPipeline.from_pretrained(a)
    for name in ("vae", "text_encoder", "unet"):
        same = all(
            torch.equal(x, y)
            for x, y in zip(
                getattr(one, name).state_dict().values(),
                getattr(soup, name).state_dict().values(),
                strict=True,
            )
        )
        assert same == (name != "unet")


def test_sentence_transformers_loads_a_soup(tmp_path: Path) -> None:
    """The mean of the model and of its Dense layer is loaded, and pools and projects as they do."""
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    modules = _modules()
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        words = tmp_path / "vocab.txt"
        words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
        config = transformers.BertConfig(
            vocab_size=7,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        base = tmp_path / f"base-{seed}"
        transformers.BertModel(config).save_pretrained(base)
        transformers.BertTokenizerFast(str(words)).save_pretrained(base)
        parts = [
            modules.Transformer(str(base)),
            modules.Pooling(16),
            modules.Dense(16, 8),
            modules.Normalize(),
        ]
        path = tmp_path / f"model-{seed}"
        library.SentenceTransformer(modules=parts, device="cpu").save(str(path))
        paths.append(path)
    uniform(paths, output=tmp_path / "soup")
    one, two, soup = (
        library.SentenceTransformer(str(path), device="cpu") for path in (*paths, tmp_path / "soup")
    )
    first, other = one.state_dict(), two.state_dict()
    assert any(name.startswith("2.linear") for name in first)
    for name, value in soup.state_dict().items():
        mean = (first[name].double() + other[name].double()) / 2
        assert torch.equal(value, mean.to(value.dtype)), name
    assert soup.encode("a b").shape == (8,)
    mix_into(one, paths)
    for name, value in one.state_dict().items():
        assert torch.equal(value, soup.state_dict()[name]), name
    assert verify(tmp_path / "soup").rederived


def test_sentence_transformers_loads_a_soup_with_routes(tmp_path: Path) -> None:
    """All modules of a Router are averaged, loaded, and put into a live model."""
    library = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    modules = _modules()
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    paths = [tmp_path / "one", tmp_path / "two"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        routes = [
            [
                modules.StaticEmbedding(tokenizers.Tokenizer(words), embedding_dim=8),
                modules.Dense(8, 4),
            ]
            for _ in range(2)
        ]
        router = modules.Router.for_query_document(*routes)
        parts = [router, modules.Dense(4, 4), modules.Normalize()]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(path))
    uniform(paths, output=tmp_path / "soup")
    one, two, soup = (
        library.SentenceTransformer(str(path), device="cpu") for path in (*paths, tmp_path / "soup")
    )
    first, other = one.state_dict(), two.state_dict()
    assert len(first) == 8
    means = {name: (first[name].double() + other[name].double()) / 2 for name in first}
    for name, value in soup.state_dict().items():
        assert torch.equal(value, means[name].to(value.dtype)), name
    mix_into(one, paths)
    for name, value in one.state_dict().items():
        assert torch.equal(value, means[name].to(value.dtype)), name


def _modules() -> Any:
    pytest.importorskip("sentence_transformers")
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before version 6
        from sentence_transformers import models as modules
    return modules


def test_transformers_loads_a_sharded_soup(tmp_path: Path) -> None:
    """`from_pretrained` gives the mean of each parameter, in bfloat16 and with its own shards."""
    transformers = pytest.importorskip("transformers")
    paths = [_llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    uniform(paths, output=tmp_path / "soup")
    kind = transformers.AutoModelForCausalLM
    one, two, soup = (
        kind.from_pretrained(path, dtype="auto").state_dict()
        for path in (*paths, tmp_path / "soup")
    )
    assert len(list((tmp_path / "soup").glob("*.safetensors"))) > 1
    assert soup.keys() == one.keys()
    for name, value in soup.items():
        mean = (one[name].double() + two[name].double()) / 2
        assert torch.equal(value, mean.to(torch.bfloat16)), name


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs a checkout in LLAMA_CPP")
def test_llama_cpp_converts_a_soup(tmp_path: Path) -> None:
    """Its converter writes the means, and takes the base models out of the card."""
    gguf = pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    words = (f"the quick brown fox jumps over the lazy dog {i}" for i in range(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    paths = [_llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for path in paths:
        (path / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
        (path / "README.md").write_text("---\nbase_model: org/base-7b\n---\n")
    uniform(paths, output=tmp_path / "soup")
    script = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    argv = [sys.executable, script, tmp_path / "soup", "--outtype", "f32"]
    subprocess.run([*argv, "--outfile", tmp_path / "soup.gguf"], check=True)
    reader = gguf.GGUFReader(tmp_path / "soup.gguf")
    field = reader.get_field("general.base_model.0.repo_url")
    assert field.contents() == "https://huggingface.co/org/base-7b"
    found = {each.name: each.data for each in reader.tensors}
    kind = pytest.importorskip("transformers").AutoModelForCausalLM
    one, two = (kind.from_pretrained(path, dtype="auto").state_dict() for path in paths)
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        mean = ((one[ours].double() + two[ours].double()) / 2).to(torch.bfloat16).float()
        assert (found[theirs] == mean.numpy()).all(), theirs


def _llama(folder: Path, seed: int) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
