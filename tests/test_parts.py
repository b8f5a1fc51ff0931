"""Codes and factors are parts of weights: no mean is taken of them, whoever named them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import command, load, save, tensor

from streamsoup import Options, geometry, mix, uniform, verify
from streamsoup.engine.plan import LEAF, MixPlan, plan_mix
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import MismatchError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.recipe import Coefficients, Recipe

Model = dict[str, tuple[str, tuple[int, ...]]]
F8, W = ("F8_E4M3", (8, 8)), ("BF16", (8, 8))

CODES: dict[str, tuple[str, Model]] = {
    # By the library that writes them: the code that is named first, and what is stored.
    "bare": ("w", {"w": F8, "w_scale": ("F32", (1,))}),
    "DeepSeek": ("m.weight", {"m.weight": F8, "m.weight_scale_inv": ("F32", (1, 1))}),
    "DeepSeek, its own code": ("m.weight", {"m.weight": F8, "m.scale": ("F32", (1, 1))}),
    "DeepSeek, E8M0": ("m.weight", {"m.weight": F8, "m.scale": ("F8_E8M0", (1, 1))}),
    "MXFP8": ("m.weight", {"m.weight": F8, "m.weight_scale": ("U8", (8,))}),
    "ComfyUI": ("m.weight", {"m.weight": F8, "m.scale_weight": ("F32", ())}),
    "Mistral": (
        "m.weight",
        {"m.weight": F8, "m.qscale_act": ("BF16", ()), "m.qscale_weight": ("BF16", ())},
    ),
    "AutoFP8": ("m.weight", {"m.weight": F8, "m.input_scale": ("F32", ())}),
    "TensorRT-LLM": ("m.weight", {"m.weight": F8, "m.weights_scaling_factor": ("F32", (1,))}),
    "E5M2": ("m.weight", {"m.weight": ("F8_E5M2", (8,)), "m.weight_scale": ("F16", ())}),
    "compressed-tensors": (
        "m.weight_packed",
        {"m.weight_packed": ("U8", (8,)), "m.weight_scale": ("F8_E4M3", (1,))},
    ),
    "ModelOpt": (
        "m.weight",
        {"m.weight": ("U8", (8,)), "m.weight_scale": F8, "m.weight_scale_2": ("F32", ())},
    ),
    "int8": ("m.weight", {"m.weight": ("I8", (8,)), "m.weight_scale": ("BF16", (1,))}),
    "EETQ": ("m.weight", {"m.weight": ("I8", (8,)), "m.weight_scales": ("F16", (1,))}),
    "bitsandbytes": ("m.weight", {"m.weight": ("U8", (8,)), "m.weight.absmax": ("F32", (1,))}),
    "bitsandbytes, 8 bits": ("m.weight", {"m.weight": ("I8", (8,)), "m.SCB": ("F32", (1,))}),
    "GPTQ": ("m.qweight", {"m.qweight": ("I32", (8,)), "m.scales": ("F16", (1,))}),
    "MLX": ("m.weight", {"m.weight": ("U32", (8,)), "m.scales": W, "m.biases": W}),
    "gpt-oss": ("m.down_blocks", {"m.down_blocks": ("U8", (8,)), "m.down_scales": ("U8", (1,))}),
    "quanto": (
        "m.weight._data",
        {"m.weight._data": ("I8", (8,)), "m.weight._scale": ("BF16", (8,))},
    ),
    "torchao": (
        "m.weight:qdata",
        {"m.weight:qdata": ("I8", (8,)), "m.weight:scale": ("F32", (8,))},
    ),
    "torchao, flat": (
        "m._weight_qdata",
        {"m._weight_qdata": F8, "m._weight_scale": ("F32", (8,))},
    ),
    "HQQ": ("m.W_q", {"m.W_q": ("U8", (8,)), "m.scale": ("F16", (1,)), "m.zero": ("F16", (1,))}),
    "AQLM": ("m.codes", {"m.codes": ("I16", (8,)), "m.codebooks": W, "m.scales": ("F16", (1,))}),
    "Nunchaku": ("m.qweight", {"m.qweight": ("I8", (8,)), "m.wscales": ("BF16", (1,))}),
    "QuIP#": ("m.Qidxs", {"m.Qidxs": ("I16", (8,)), "m.Wscale": ("F32", ())}),
}

READ = ("bare", "DeepSeek", "DeepSeek, its own code", "DeepSeek, E8M0", "Mistral", "E5M2")
"""Those whose shapes above are as published, so that the option is named that reads them."""

PLAIN: dict[str, Model] = {
    "CLIP": {"logit_scale": ("F32", ()), "text_projection": W},
    "CLIP in 8 bits": {"logit_scale": ("F32", ()), "text_projection": F8, "visual.proj": F8},
    "a weight with a scale": {"m.weight": W, "m.weight_scale": ("F32", (8,)), "m.scale": W},
    "Flux in 8 bits": {"b.img_in.weight": F8, "b.norm.key_norm.scale": ("F32", (8,))},
    "all in 8 bits": {"m.weight": F8, "m.scale": F8, "m.weight_scale": F8},
    "Wan in 8 bits": {"b.scale_shift_table": ("F32", (2, 8)), "b.weight": F8, "b.bias": F8},
    "Swin": {"attn.logit_scale": ("F32", (4,)), "attn.relative_position_index": ("I64", (8,))},
    "masks": {"attn.scale": ("F32", ()), "attn.bias": ("U8", (8,)), "attn.mask": ("BOOL", (8,))},
    "layer scale": {"b.layer_scale_1.gamma": W, "b.weight": F8, "b.layer_scale": ("F32", (8,))},
    "counters": {"bn.num_batches_tracked": ("I64", ()), "bn.weight": W, "bn.scale": W},
}

FACTORS = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.embed_tokens.lora_embedding_B",
    "layers.0.q_proj.lora_B.default.weight",
    "layers.0.q_proj.lora_magnitude_vector",
    "model.layers.0.self_attn.q_proj.lora_a",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lora_unet_mid_block.lora_mid.weight",
    "lora_unet_mid_block.dora_scale",
    "unet.up_blocks.0.attn1.processor.to_q_lora.down.weight",
    "unet.mid.to_k.lora_linear_layer.up.weight",
    "double_blocks.0.processor.qkv_lora1.up.weight",
    "lora_unet_x.hada_w1_a",
    "lora_unet_x.lokr_w2",
    "lora_unet_x.oft_blocks",
    "layers.0.q_proj.oft_r.weight",
    "layers.0.vera_lambda_d",
)
NO_FACTORS = (
    "model.layers.0.attn.w_lora.lora.0.weight",  # RWKV-7: a part of the network, not linear
    "model.layers.0.self_attn.q_a_proj.weight",
    "color_a.weight",
    "exploration_b",
    "soft.weight",
    "explora_a",
)


def store(folder: Path, model: Model) -> Path:
    """Save zeros."""
    whole = {}
    for name, (dtype, shape) in model.items():
        width = {"F32": 4, "I32": 4, "U32": 4, "I64": 8, "BF16": 2, "F16": 2, "I16": 2}
        nbytes = int(np.prod(shape)) * width.get(dtype, 1)
        whole[name] = (dtype, shape, bytes(nbytes))
    return save(folder, whole)


def planned(paths: list[Path]) -> MixPlan:
    """Plan a uniform soup."""
    names = tuple(map(str, paths))
    return plan_mix(
        open_ingredients(paths), Recipe(names, Linear(Coefficients.uniform(len(names))))
    )


@pytest.mark.parametrize("library", CODES)
def test_codes_beside_their_scales_are_refused(library: str, tmp_path: Path) -> None:
    """Codes of any library are never averaged: refused by name where a copy would not do."""
    named, model = CODES[library]
    paths = [store(tmp_path / name, model | {"z.weight": W}) for name in "ab"]
    advice = "use the checkpoint that it was quantised from"
    if library in READ:
        advice = "read it with dequantize=True"
    if library.startswith("bitsandbytes"):
        advice += (
            ", or load it with transformers, call its dequantize(), and save it with "
            "save_pretrained"
        )
    twice = Recipe(("a", "b"), Linear(Coefficients((1.0, 1.0))))
    for refusing in (
        lambda: plan_mix(open_ingredients(paths), twice),
        lambda: geometry(paths),
    ):
        with pytest.raises(MismatchError) as refused:
            refusing()
        assert str(refused.value) == (
            f"these ingredients cannot be averaged: {paths[0]}/model.safetensors: {named} is a "
            f"code that a scale stands beside; averaging codes and scales apart makes no soup; "
            f"{advice}"
        )


@pytest.mark.parametrize("non_float", ["same", "first"])
@pytest.mark.parametrize("library", CODES)
def test_codes_and_scales_that_are_the_same_are_copied(
    library: str, non_float: str, tmp_path: Path
) -> None:
    """Equal codes under equal scales are copied, and the rest averaged; one other byte refuses."""
    _, model = CODES[library]
    rng = np.random.default_rng(0)
    options = Options(non_float=non_float, dtype="f32")  # type: ignore[arg-type]

    def filled(seed: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        rng = np.random.default_rng(seed)
        whole = load(store(tmp_path / "x", model))
        return {
            name: (dtype, shape, rng.integers(0, 0x38, len(data), np.uint8).tobytes())
            for name, (dtype, shape, data) in whole.items()
        }

    same = filled(0)
    z = [tensor(rng.standard_normal(3).astype(np.float32)) for _ in "ab"]
    bias = [tensor(rng.standard_normal(3).astype(np.float32)) for _ in "ab"]
    module = next(iter(model)).rpartition(".")[0] or "m"
    more = [{"z.weight": z[i], f"{module}.down_bias": bias[i]} for i in (0, 1)]
    a, b = (save(tmp_path / "ab"[i], same | more[i]) for i in (0, 1))
    soup = uniform([a, b], output=tmp_path / "out", options=options)
    made = load(tmp_path / "out")
    assert {name: made[name] for name in same} == same
    wanted = (np.frombuffer(z[0][2], "f4").astype("f8") + np.frombuffer(z[1][2], "f4")) / 2
    assert made["z.weight"][2] == wanted.astype("f4").tobytes()
    assert made[f"{module}.down_bias"][2] not in (bias[0][2], bias[1][2])
    assert any("of quantised weights, codes and scales, not averaged" in w for w in soup.warnings)
    assert verify(tmp_path / "out").rederived
    for name in same:
        dtype, shape, data = same[name]
        other = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
        c = save(tmp_path / "c", same | more[1] | {name: other})
        with pytest.raises(MismatchError) as refused:
            uniform([a, c], output=tmp_path / "no", options=options)
        assert f"{c}/model.safetensors: {name}: this {dtype} tensor differs" in str(refused.value)
        assert "a part of a quantised weight" in str(refused.value)
        assert "non_float" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["U8", "I8", "I16", "U32", "I64"])
def test_blocks_beside_scales_are_codes_of_any_width(dtype: str, tmp_path: Path) -> None:
    """Codes that are told by nothing but scales in their module are copied if equal alone."""
    width = {"U8": 1, "I8": 1, "I16": 2, "U32": 4, "I64": 8}[dtype]
    names = ("e.blocks", "e.scales"), ("e.gate_up_proj_blocks", "e.gate_up_proj_scales")
    for codes, scales in names:
        models = [
            {codes: (dtype, (4,), bytes([i] * 4 * width)), scales: ("U8", (2,), b"ab")}
            for i in (1, 2)
        ]
        paths = [save(tmp_path / "ab"[i], models[i]) for i in (0, 1)]
        with pytest.raises(MismatchError, match="use the checkpoint that it was quantised from"):
            uniform(paths, output=tmp_path / "out", options=Options(non_float="first"))


def test_no_advice_makes_a_soup_of_codes_without_scales(tmp_path: Path) -> None:
    """What may be codes is never advised to be taken from the first; indices are."""
    for dtype, width, advised in (("U8", 1, False), ("I32", 4, False), ("I64", 8, True)):
        paths = [
            save(tmp_path / f"{dtype}{i}", {"w": (dtype, (3,), bytes([i] * 3 * width))})
            for i in (1, 2)
        ]
        with pytest.raises(MismatchError) as refused:
            uniform(paths, output=tmp_path / "out")
        assert ("non_float='first'" in str(refused.value)) == advised
        assert ("codes of quantised weights" in str(refused.value)) != advised


def test_large_scales_have_the_digests_of_floats(tmp_path: Path) -> None:
    """A scale of several leaves is verified as it was written, quickly and in full."""
    scale = np.ones(LEAF + 5, np.float32)
    model = {"m.weight": ("I8", (8,), bytes(8)), "m.weight_scale": tensor(scale)}
    paths = [save(tmp_path / name, model | {"z": tensor(np.ones(2))}) for name in "ab"]
    uniform(paths, output=tmp_path / "out")
    assert load(tmp_path / "out")["m.weight_scale"][2] == scale.tobytes()
    assert not verify(tmp_path / "out", quick=True).rederived
    assert verify(tmp_path / "out").rederived


@pytest.mark.parametrize("model", PLAIN)
def test_what_is_merely_called_a_scale_is_no_alarm(model: str, tmp_path: Path) -> None:
    """Parameters called scale, also in checkpoints cast to 8 bits, are averaged as all others."""
    paths = [store(tmp_path / name, PLAIN[model]) for name in "ab"]
    assert len(planned(paths).tensors) == len(PLAIN[model])


def test_each_layout_with_codes_is_named(tmp_path: Path) -> None:
    """Codes in any ingredient are found, and counted in the first that has such a layout."""
    plain = store(tmp_path / "a", {f"{i}.weight": W for i in range(3)})
    codes = {f"{i}.weight": F8 for i in range(3)} | {f"{i}.scale": ("F32", ()) for i in range(3)}
    coded = store(tmp_path / "b", codes)
    with pytest.raises(MismatchError, match=rf"{coded}/model\.safetensors: 0\.weight \(and 2 more"):
        planned([plain, coded])


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_refused(name: str, tmp_path: Path) -> None:
    """An adapter's factors, by whatever library, are refused with file, tensor and advice."""
    paths = [store(tmp_path / letter, {name: W}) for letter in "ab"]
    with pytest.raises(MismatchError) as refused:
        planned(paths)
    assert str(refused.value) == (
        f"these ingredients cannot be averaged: {paths[0]}/model.safetensors: {name} belongs to an "
        "adapter, whose factors mean nothing apart: merge each adapter into its base first, as by "
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{paths[0]}').merge_and_unload()"
        f".save_pretrained('{paths[0]}-merged')\""
    )


def test_parts_of_networks_are_no_factors(tmp_path: Path) -> None:
    """Names that only sound like factors are averaged."""
    paths = [store(tmp_path / letter, dict.fromkeys(NO_FACTORS, W)) for letter in "ab"]
    assert len(planned(paths).tensors) == len(NO_FACTORS)


def test_the_mean_of_factors_is_another_model() -> None:
    """Why they are refused: the product of the mean factors is not the mean of the products."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((2, 6, 2)), rng.standard_normal((2, 2, 6))
    wanted, made = (b @ a).mean(0), b.mean(0) @ a.mean(0)
    assert np.abs(wanted - made).max() > 0.5 * np.abs(wanted).max()


def test_a_lone_adapter_stays_as_it_is_or_is_refused(tmp_path: Path) -> None:
    """One adapter may be copied, but neither scaled nor measured against another."""
    rng = np.random.default_rng(0)
    lora = {f"q.lora_{x}.weight": tensor(rng.standard_normal((2, 3))) for x in "AB"}
    a = save(tmp_path / "a", lora, name="adapter_model")
    (a / "adapter_config.json").write_text("{}")
    uniform([a], output=tmp_path / "copy")
    assert load(tmp_path / "copy" / "adapter_model.safetensors") == load(a)
    assert (tmp_path / "copy" / "adapter_config.json").exists()
    uniform([a], output=tmp_path / "half", options=Options(dtype="f32"))
    with pytest.raises(ValueError, match=r"is of peft_type None, expected 'LORA'"):
        mix([a], [0.5], output=tmp_path / "out")
    (a / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="belongs to an adapter"):
        geometry([a, a])
    ran = command("plan", a, a)
    assert ran.returncode == 1
    assert f"{a}/adapter_model.safetensors: q.lora_A.weight (and 1 more) belongs" in ran.stderr


def test_an_adapter_file_is_one_whatever_it_holds(tmp_path: Path) -> None:
    """PEFT has many products, and one file name."""
    paths = [
        save(tmp_path / x, {"q.miss_block": tensor(np.ones(3))}, name="adapter_model") for x in "ab"
    ]
    with pytest.raises(MismatchError, match="belongs to an adapter"):
        planned(paths)


def test_all_refusals_come_in_one_message(tmp_path: Path) -> None:
    """Codes, factors and disagreements are listed together, the likely causes first."""
    a = store(tmp_path / "a", {"m.weight": F8, "m.scale": ("F32", ()), "m.lora_A": W})
    b = store(tmp_path / "b", {"m.weight": F8, "m.scale": ("F32", ())})
    with pytest.raises(MismatchError) as refused:
        planned([a, b])
    lines = str(refused.value).splitlines()
    assert len(lines) == 5  # and no advice for other causes
    assert f"{a}/model.safetensors: m.weight is a code" in lines[1]
    assert f"{b}/model.safetensors: m.weight is a code" in lines[2]
    assert f"{a}/model.safetensors: m.lora_A belongs" in lines[3]
    assert "lacks 1 tensor" in lines[4]
