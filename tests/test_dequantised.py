"""Quantised weights are read as codes times scales: exact, bounded, refused where in doubt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, load, save, save_sharded, tensor
from crash import Machine
from numpy.typing import NDArray
from test_memory import SCRIPT, sparse

from streamsoup import Options, geometry, mix, uniform, verify
from streamsoup.errors import CorruptFileError, FormatError, MismatchError, NonFiniteError
from streamsoup.formats.files import Access
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.kernels import decoding
from streamsoup.kernels.codes import scale_values, values_of
from streamsoup.kernels.coding import Coding
from streamsoup.reading import Reading

Model = dict[str, Any]
Floats = NDArray[np.float64]

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
"""The table of OCP's Microscaling Formats, copied by hand."""

EXACT = Options(dequantize=True, dtype="f64")


# -- an independent dequantisation, by torch's own dtypes and numpy's repeat -----------------------


def as_torch(raw: NDArray[np.uint8], dtype: str) -> Floats:
    """Return the values of bytes as torch reads them."""
    names = {
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U8": torch.float8_e8m0fnu,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
    }
    flat = torch.from_numpy(raw.reshape(-1).copy()).view(names[dtype])
    return flat.to(torch.float32).to(torch.float64).numpy()


def halves(raw: NDArray[np.uint8]) -> Floats:
    """Return the values of two codes in each byte, the lower half first, in the last dimension."""
    both = np.stack([np.take(E2M1, raw & 15), np.take(E2M1, raw >> 4)], axis=-1)
    return both.reshape(*raw.shape[:-1], 2 * raw.shape[-1])


def spread(scales: Floats, shape: tuple[int, ...], block: tuple[int, int]) -> Floats:
    """Repeat scales over the blocks of rows and columns that they are of."""
    wide = np.repeat(np.repeat(scales, block[0], axis=-2), block[1], axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


# -- models in each layout, with the values that they stand for -----------------------------------


def layout(kind: str, seed: int) -> tuple[Model, str, Floats]:
    """Return what is stored in a layout, the name of the weight, and its values."""
    rng = np.random.default_rng(seed)

    def codes(*shape: int, fp8: bool = True) -> NDArray[np.uint8]:
        made = rng.integers(0, 256, shape, dtype=np.uint8)
        return np.where(made & 0x7F >= 0x7C, made & 0x83, made) if fp8 else made

    def floats(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.01).astype(np.float32)

    def powers(*shape: int) -> NDArray[np.uint8]:
        return rng.integers(100, 150, shape, dtype=np.uint8)

    if kind in ("blocks", "blocks of bf16", "experts in blocks"):
        shape = (2, 130, 200) if kind == "experts in blocks" else (300, 260)
        x = codes(*shape)
        grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        scale = tensor(floats(*grid))
        if kind == "blocks of bf16":
            bits = (floats(*grid).view(np.uint32) >> 16).astype(np.uint16)
            scale = ("BF16", grid, bits.tobytes())
        s = as_torch(np.frombuffer(scale[2], np.uint8), scale[0]).reshape(grid)
        value = as_torch(x, "F8_E4M3").reshape(shape) * spread(s, shape, (128, 128))
        stored = {"w": ("F8_E4M3", shape, x.tobytes()), "w_scale_inv": scale}
        return stored, "w", value
    if kind in ("tensor", "channel", "group", "e5m2", "experts"):
        shape = (3, 20, 48) if kind == "experts" else (60, 96)
        dtype = "F8_E5M2" if kind == "e5m2" else "F8_E4M3"
        sizes = {"tensor": (1,), "channel": (60, 1), "group": (60, 3), "e5m2": (), "experts": (3,)}
        x, s = codes(*shape), floats(*sizes[kind])
        blocks = {"channel": s, "group": np.repeat(s, 32, axis=-1) if kind == "group" else s}
        wide = blocks.get(kind, s.reshape(-1, 1, 1) if kind == "experts" else s)
        value = as_torch(x, dtype).reshape(shape) * wide.astype(np.float64)
        stored = {"m.weight": (dtype, shape, x.tobytes()), "m.weight_scale": tensor(s)}
        return stored, "m.weight", value
    if kind in ("mxfp8", "mxfp8 as e8m0"):
        x, s = codes(40, 64), powers(40, 2)
        named = "U8" if kind == "mxfp8" else "F8_E8M0"
        value = as_torch(x, "F8_E4M3").reshape(40, 64)
        value = value * spread(as_torch(s, "U8").reshape(40, 2), (40, 64), (1, 32))
        stored = {
            "m.weight": ("F8_E4M3", (40, 64), x.tobytes()),
            "m.weight_scale": (named, (40, 2), s.tobytes()),
        }
        return stored, "m.weight", value
    if kind == "gpt-oss":
        x, s = codes(3, 10, 4, 16, fp8=False), powers(3, 10, 4)
        value = halves(x) * as_torch(s, "U8").reshape(3, 10, 4, 1)
        value = np.swapaxes(value.reshape(3, 10, 128), 1, 2)
        stored = {
            "e.gate_up_proj_blocks": ("U8", x.shape, x.tobytes()),
            "e.gate_up_proj_scales": ("U8", s.shape, s.tobytes()),
            "e.gate_up_proj_bias": tensor(floats(3, 10)),
        }
        return stored, "e.gate_up_proj", value
    if kind == "mxfp4, packed":
        x, s = codes(7, 48, fp8=False), powers(7, 3)
        value = halves(x) * np.repeat(as_torch(s, "U8").reshape(7, 3), 32, axis=-1)
        stored = {
            "m.weight_packed": ("U8", (7, 48), x.tobytes()),
            "m.weight_scale": ("U8", (7, 3), s.tobytes()),
        }
        return stored, "m.weight", value
    x, s, second = codes(9, 24, fp8=False), codes(9, 3), floats(1) ** 2 + np.float32(0.003)
    products = halves(x) * np.repeat(as_torch(s, "F8_E4M3").reshape(9, 3), 16, axis=-1)
    scale = ("F8_E4M3", (9, 3), s.tobytes())
    if kind == "nvfp4, ModelOpt":
        stored = {
            "m.weight": ("U8", (9, 24), x.tobytes()),
            "m.weight_scale": scale,
            "m.weight_scale_2": tensor(second.reshape(())),
        }
        return stored, "m.weight", products * np.float64(second[0])
    assert kind == "nvfp4, compressed-tensors"
    stored = {
        "m.weight_packed": ("U8", (9, 24), x.tobytes()),
        "m.weight_scale": scale,
        "m.weight_global_scale": tensor(second),
    }
    return stored, "m.weight", products / np.float64(second[0])


LAYOUTS = (
    *("blocks", "blocks of bf16", "experts in blocks", "tensor", "channel", "group", "e5m2"),
    *("experts", "mxfp8", "mxfp8 as e8m0", "gpt-oss", "mxfp4, packed"),
    *("nvfp4, ModelOpt", "nvfp4, compressed-tensors"),
)


def made(folder: Path, name: str) -> Floats:
    """Read a float64 tensor of a soup."""
    dtype, shape, data = load(folder)[name]
    assert dtype == "F64"
    return np.frombuffer(data, np.float64).reshape(shape)


def configure(folder: Path, **says: Any) -> Path:
    """Write a configuration that says how the weights are quantised."""
    config = {"hidden_size": 8, "torch_dtype": "float16", "quantization_config": says}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_code_has_the_value_that_torch_gives_it(dtype: str) -> None:
    """All 256 codes of either kind, NaN, infinity and the sign of zero included."""
    expected = as_torch(np.arange(256, dtype=np.uint8), dtype)
    found = values_of(dtype)
    assert np.array_equal(found, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_every_code_of_four_bits_has_the_value_of_the_standard() -> None:
    """All 16 codes of E2M1, zeros with their signs."""
    assert np.array_equal(values_of("E2M1"), E2M1)
    assert np.array_equal(np.signbit(values_of("E2M1")), np.signbit(E2M1))


def test_every_power_of_two_is_exact() -> None:
    """All 256 scales of E8M0: 2^-127 to 2^127, and NaN."""
    raw = np.arange(256, dtype=np.uint8)
    expected = np.array([2.0 ** (int(n) - 127) for n in raw[:255]])
    for dtype in ("U8", "F8_E8M0"):
        found = scale_values(raw, dtype)
        assert np.array_equal(found[:255], expected)
        assert np.isnan(found[255])


@pytest.fixture(scope="module")
def compiled() -> decoding.Decoder:
    """Return compiled loops."""
    found = decoding.decoder(decoding.COMPILE_CODES, compiles=True)
    assert found._rows is not None
    return found


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "E2M1"])
@pytest.mark.parametrize("block", [(1, 32), (128, 128), (3, 7), (50, 500)])
def test_compiled_loops_have_the_bits_of_numpy(
    kind: Any, block: tuple[int, int], compiled: decoding.Decoder
) -> None:
    """Of any range of any blocks: codes and scales that are NaN, infinite and zero among them."""
    rng = np.random.default_rng(0)
    coding = Coding(kind, 50, 173, block)
    scales = rng.standard_normal((4 * coding.scale_rows, coding.scale_columns))
    scales[0, 0], scales[-1, -1], scales[1 % len(scales), 0] = np.nan, np.inf, 0.0
    codes = rng.integers(0, 256, coding.nbytes(4 * 50 * 173) + 1, dtype=np.uint8)
    for first, n, divisor in [(0, 34600, 1.0), (8649, 8652, 3.0), (17, 1, 1.0), (8651, 5000, 0.0)]:
        if kind != "E2M1" and divisor != 1.0:
            divisor = 1.0
        per_code = 2 if kind == "E2M1" else 1
        content = memoryview(bytearray(codes[first // per_code : -(-(first + n) // per_code)]))
        rows = scales[coding.scale_row(first) :].copy()
        one, other = memoryview(bytearray(8 * n)), memoryview(bytearray(8 * n))
        decoding.Decoder().decode(coding, content, first, rows, divisor, one)
        compiled.decode(coding, content, first, rows, divisor, other)
        assert one == other
        assert np.isfinite(np.frombuffer(one, np.float64)).any() or divisor == 0.0 or n == 1


def test_compiled_loops_transpose_as_numpy_does(compiled: decoding.Decoder) -> None:
    """Of any range of a matrix, from any column on."""
    rng = np.random.default_rng(1)
    coding = Coding("E2M1", 37, 96, (1, 32))
    codes = rng.integers(0, 256, (37, 48), dtype=np.uint8)
    scales = rng.standard_normal((37, 3))
    scales[5, 1] = np.nan
    for first, n in [(0, 37 * 96), (41, 1000), (37 * 95 + 3, 34), (37 * 40, 1)]:
        column = first // 37 // 16 * 16
        part = memoryview(bytearray(codes[:, column // 2 :].tobytes()))
        own = scales[:, first // 37 // 32 :].copy()
        one, other = memoryview(bytearray(8 * n)), memoryview(bytearray(8 * n))
        given = coding, part, 48 - column // 2, column, first, own
        decoding.Decoder().decode_transposed(*given, one)
        compiled.decode_transposed(*given, other)
        assert one == other
        whole = (halves(codes) * np.repeat(scales, 32, axis=1)).T.reshape(-1)
        found = np.frombuffer(one, np.float64)
        assert np.array_equal(found, whole[first : first + n], equal_nan=True)


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_element_is_its_code_times_its_scale(kind: str, io: Any, tmp_path: Path) -> None:
    """In float64, each layout gives every element of an independent dequantisation, bit for bit."""
    stored, name, expected = layout(kind, 0)
    folder = save(tmp_path / "m", stored)
    uniform([folder], output=tmp_path / "out", options=Options(dequantize=True, dtype="f64", io=io))
    found = made(tmp_path / "out", name)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_any_range_of_a_weight_is_the_same(kind: str, tmp_path: Path) -> None:
    """A cursor that is asked for a range gives the range of the whole, mapped or read."""
    stored, name, expected = layout(kind, 1)
    (ingredient,) = open_ingredients([save(tmp_path / "m", stored)], Reading(dequantize=True))
    flat = expected.reshape(-1)
    for mapped in (True, False):
        access = Access(mapped=mapped)
        cursor = ingredient.source.cursor(access)
        rng = np.random.default_rng(2)
        for begin, end in np.sort(rng.integers(0, flat.size + 1, (20, 2)), axis=1).tolist():
            block = memoryview(bytearray(8 * (end - begin)))
            if end > begin:
                cursor.read(name, 8 * begin, block)
            assert np.array_equal(np.frombuffer(block, np.float64), flat[begin:end])
        cursor.close()
        access.close()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_soup_is_rounded_once(kind: str, tmp_path: Path) -> None:
    """The bfloat16 soup of two is the mean of exact values, rounded once; and verifies."""
    models = [layout(kind, seed) for seed in (3, 4)]
    paths = [save(tmp_path / f"m{i}", models[i][0]) for i in (0, 1)]
    uniform(paths, output=tmp_path / "out", options=Options(dequantize=True))
    name, mean = models[0][1], (models[0][2] + models[1][2]) / 2
    dtype, shape, data = load(tmp_path / "out")[name]
    assert (dtype, shape) == ("BF16", mean.shape)
    assert data == rounded(mean)
    assert verify(tmp_path / "out").rederived


def rounded(values: Floats) -> bytes:
    """Return float64 rounded to bfloat16, half to even, without torch, which rounds twice."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    keep = np.uint64(45)  # 52 - 7 fraction bits
    half = (np.uint64(1) << (keep - np.uint64(1))) - np.uint64(1)
    up = bits + half + ((bits >> keep) & np.uint64(1))
    kept = (up >> keep << keep).view(np.float64)
    return (kept.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_equal_ingredients_stay_as_they_are(tmp_path: Path) -> None:
    """The mean of nine equal quantised models is that model: their sums are exact."""
    for kind in ("blocks", "nvfp4, compressed-tensors"):
        stored, name, expected = layout(kind, 5)
        folder = save(tmp_path / kind, stored)
        uniform([folder] * 9, output=tmp_path / f"{kind} out", options=EXACT)
        assert np.array_equal(made(tmp_path / f"{kind} out", name), expected)


# -- soups of them --------------------------------------------------------------------------------


def test_quantised_and_plain_ingredients_mix(tmp_path: Path) -> None:
    """An ingredient that is not quantised is averaged with one that is, whichever comes first."""
    stored, name, values = layout("channel", 6)
    plain = (np.random.default_rng(7).standard_normal(values.shape) * 0.01).astype(np.float32)
    bits = (plain.view(np.uint32) >> 16).astype(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    a = configure(save(tmp_path / "a", stored), quant_method="compressed-tensors")
    b = save(tmp_path / "b", {name: ("BF16", values.shape, bits.tobytes())})
    (b / "config.json").write_text('{"hidden_size": 8, "torch_dtype": "bfloat16"}')
    for order, factors in (([a, b], [0.25, 0.75]), ([b, a], [0.75, 0.25])):
        mix(order, factors, output=tmp_path / "out", options=Options(dequantize=True))
        assert load(tmp_path / "out")[name][2] == rounded(0.25 * values + 0.75 * exact)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config == {"hidden_size": 8, "torch_dtype": "bfloat16"}
        verify(tmp_path / "out")
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


def test_the_soup_says_nothing_of_quantisation(tmp_path: Path) -> None:
    """At whatever depth, and in whatever file: its weights are not quantised any more."""
    stored, _, _ = layout("nvfp4, ModelOpt", 8)
    folder = save(tmp_path / "m", stored)
    says = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config = {"text_config": {"quantization_config": says, "dtype": None}, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": says}))
    (folder / "tokenizer.json").write_text("{}")
    uniform([folder], output=tmp_path / "out", options=Options(dequantize=True))
    beside = sorted(os.listdir(tmp_path / "out"))
    ours = ["README.md", "config.json", "model.safetensors", "streamsoup.json"]
    assert beside == [*ours, "tokenizer.json"]
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made == {"text_config": {"dtype": None}, "dtype": "bfloat16"}


def test_scales_of_activations_are_left_out_and_named(tmp_path: Path) -> None:
    """What acts at run time alone has no part in a weight; it is not lost in silence."""
    stored, name, _ = layout("tensor", 9)
    more = {"m.input_scale": tensor(np.float32(2)), "a.k_scale": tensor(np.float32(3))}
    soup = uniform([save(tmp_path / "m", stored | more)], output=tmp_path / "out", options=EXACT)
    assert list(load(tmp_path / "out")) == [name]
    (said,) = [text for text in soup.warnings if "left out" in text]
    assert "2 scales of activations" in said
    assert "a.k_scale, m.input_scale" in said


def test_shards_without_weights_are_not_made(tmp_path: Path) -> None:
    """Scales in a shard of their own leave no empty shard, and the index names those that are."""
    stored, name, values = layout("blocks", 10)
    folder = save_sharded(
        tmp_path / "m", [{"w_scale_inv": stored["w_scale_inv"]}, {"w": stored["w"]}]
    )
    uniform([folder], output=tmp_path / "out", options=EXACT)
    assert np.array_equal(made(tmp_path / "out", name), values)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"w": "model-00002-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == 8 * values.size
    verify(tmp_path / "out")


def test_pickled_codes_and_those_of_a_component_are_read(tmp_path: Path) -> None:
    """The same values, whatever the codes lie in."""
    stored, name, values = layout("channel", 15)
    x = torch.frombuffer(bytearray(stored[name][2]), dtype=torch.uint8).reshape(values.shape)
    s = torch.frombuffer(bytearray(stored[f"{name}_scale"][2]), dtype=torch.float32)
    pickled = {name: x.view(torch.float8_e4m3fn), f"{name}_scale": s.reshape(-1, 1)}
    torch.save(pickled, tmp_path / "model.pt")
    uniform([tmp_path / "model.pt"], output=tmp_path / "out", options=EXACT)
    assert np.array_equal(made(tmp_path / "out", name), values)
    assert verify(tmp_path / "out").rederived
    parts = tmp_path / "pipeline"
    stored["m.input_scale"] = tensor(np.float32(1))
    configure(save(parts / "transformer", stored), quant_method="compressed-tensors")
    index = {"_class_name": "P", "transformer": ["diffusers", "T"]}
    (parts / "model_index.json").write_text(json.dumps(index))
    soup = uniform([parts], output=tmp_path / "piped", options=EXACT)
    assert any("1 scale of activations" in text for text in soup.warnings)
    assert np.array_equal(made(tmp_path / "piped" / "transformer", name), values)
    config = json.loads((tmp_path / "piped" / "transformer" / "config.json").read_text())
    assert "quantization_config" not in config
    assert verify(tmp_path / "piped").rederived


def test_damaged_pickles_are_found_below_other_readers(tmp_path: Path) -> None:
    """A checksum that a pickle holds is looked at whatever its tensors are made into."""
    values = np.arange(4000, dtype=np.float32)
    torch.save({"module.w": torch.from_numpy(values)}, tmp_path / "model.pt")
    options = Options(rename="module.=>")
    uniform([tmp_path / "model.pt"], output=tmp_path / "out", options=options)
    assert load(tmp_path / "out")["w"][2] == values.tobytes()
    whole = bytearray((tmp_path / "model.pt").read_bytes())
    at = whole.index(values[1000:1010].tobytes())
    whole[at] ^= 1
    (tmp_path / "model.pt").write_bytes(whole)
    with pytest.raises(CorruptFileError, match="CRC"):
        uniform([tmp_path / "model.pt"], output=tmp_path / "no", options=options)
    assert not (tmp_path / "no").exists()


def test_what_only_measures_reads_them_too(tmp_path: Path) -> None:
    """Distances between quantised models are those between their values."""
    models = [layout("mxfp8", seed) for seed in (11, 12)]
    paths = [save(tmp_path / f"m{i}", models[i][0]) for i in (0, 1)]
    with pytest.raises(MismatchError, match="read it with dequantize=True"):
        geometry(paths)
    found = geometry(paths, base=paths[0], options=Options(dequantize=True))
    expected = np.linalg.norm(models[0][2] - models[1][2])
    assert found.total.norms[1] == pytest.approx(expected, rel=1e-9)


# -- refusals -------------------------------------------------------------------------------------

SCALE = tensor(np.ones((2, 2), np.float32))
CODES = ("F8_E4M3", (200, 200), bytes(200 * 200))
PACKED = ("U8", (4, 16), bytes(64))
EIGHTS = ("F8_E4M3", (4, 2), bytes(8))

REFUSED: dict[str, tuple[Model, dict[str, Any], str]] = {
    "scales that do not fit": (
        {"w": CODES, "w_scale_inv": tensor(np.ones((2, 3), np.float32))},
        {},
        r"w: has scales w_scale_inv of F32 \[2, 3\], expected .*\[2, 2\]",
    ),
    "another block than the configuration says": (
        {"w": CODES, "w_scale_inv": SCALE},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        r"w: has scales w_scale_inv of F32 \[2, 2\], expected \[4, 4\]",
    ),
    "codes without a scale among others": (
        {"w": CODES, "w_scale_inv": SCALE, "v": CODES},
        {},
        "v: is F8_E4M3 and has no scale beside it",
    ),
    "scales without codes": (
        {"w": CODES, "w_scale_inv": SCALE, "u_scale_inv": SCALE},
        {},
        "u_scale_inv: belongs to quantised weights in a way that is not known",
    ),
    "scales of integers": (
        {"w": CODES, "w_scale_inv": tensor(np.ones((2, 2), np.int32))},
        {},
        "w: has scales w_scale_inv of I32, which are not known",
    ),
    "zero points": (
        {"w": CODES, "w_scale": SCALE, "w_zero_point": tensor(np.ones((2, 2), np.int32))},
        {},
        "w_zero_point: belongs to quantised weights in a way that is not known",
    ),
    "scales folded into inputs": (
        {
            "m.weight": PACKED,
            "m.weight_scale": EIGHTS,
            "m.weight_scale_2": tensor(np.float32(1)),
            "m.pre_quant_scale": tensor(np.ones(32, np.float32)),
        },
        {},
        "pre_quant_scale: belongs to quantised weights in a way that is not known",
    ),
    "no elements": (
        {"w": ("F8_E4M3", (0, 8), b""), "w_scale": tensor(np.ones(1, np.float32))},
        {},
        "w: has no elements",
    ),
    "no second scale": (
        {"m.weight": PACKED, "m.weight_scale": EIGHTS},
        {},
        "m.weight: lacks its second scale, m.weight_scale_2",
    ),
    "two second scales": (
        {
            "m.weight_packed": PACKED,
            "m.weight_scale": EIGHTS,
            "m.weight_global_scale": tensor(np.ones(2, np.float32)),
        },
        {},
        r"second scale m.weight_global_scale of F32 \[2\], expected one F32",
    ),
    "the same weight twice": (
        {
            "e.down_proj_blocks": ("U8", (1, 2, 1, 16), bytes(32)),
            "e.down_proj_scales": ("U8", (1, 2, 1), bytes(2)),
            "e.down_proj": tensor(np.ones((1, 32, 2), np.float32)),
        },
        {},
        "stands for e.down_proj, which is stored as well",
    ),
    "plain weights that a configuration calls quantised": (
        {"w": tensor(np.ones((2, 2), np.float32))},
        {"quant_method": "fp8"},
        "has quantization_config, so the model is quantised, but no tensor has codes and scales",
    ),
    "rotated weights": (
        {"w": CODES, "w_scale": SCALE},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        "says transform_config, which changes what codes mean",
    ),
    "bitsandbytes": (
        {"m.weight": ("U8", (8, 1), bytes(8)), "m.weight.absmax": tensor(np.ones(1, np.float32))},
        {"quant_method": "bitsandbytes"},
        r"says bitsandbytes, whose codes are not read here; use .*its dequantize\(\)",
    ),
    "GPTQ": (
        {"m.qweight": tensor(np.ones((2, 2), np.int32)), "m.scales": SCALE},
        {"quant_method": "gptq", "bits": 4},
        "says GPTQ, whose codes are not read here; use the checkpoint that it was quantised from$",
    ),
    "AWQ": (
        {"m.qweight": tensor(np.ones((2, 2), np.int32)), "m.scales": SCALE},
        {"quant_method": "awq", "bits": 4},
        "says AWQ, whose codes are not read here; use the checkpoint that it was quantised from$",
    ),
    "AWQ that says nothing": (
        {"m.qweight": tensor(np.ones((2, 2), np.int32)), "m.scales": SCALE, "z": SCALE},
        {},
        "is a code that a scale stands beside; .*; use the checkpoint that it was quantised from$",
    ),
    "integers of 8 bits": (
        {"m.weight": ("I8", (2, 2), bytes(4)), "m.weight_scale": SCALE},
        {},
        "is a code that a scale stands beside; .*; use the checkpoint that it was quantised from$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    """By name, from the headers, with advice for that cause alone, and nothing is written."""
    stored, says, message = REFUSED[case]
    folder = save(tmp_path / "m", stored)
    if says:
        configure(folder, **says)
    options = Options(dequantize=True)
    with pytest.raises((FormatError, MismatchError), match=message) as refused:
        mix([folder, folder], [1.0, 1.0], output=tmp_path / "out", options=options)
    assert str(folder) in str(refused.value)
    assert "dequantize=True" not in str(refused.value)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_without_the_option_it_is_named(kind: str, tmp_path: Path) -> None:
    """Codes that could be read are refused as before, and the refusal says how."""
    paths = [save(tmp_path / f"m{i}", layout(kind, i)[0]) for i in (0, 1)]
    with pytest.raises(MismatchError, match=r"read it with dequantize=True$"):
        mix(paths, [1.0, 1.0], output=tmp_path / "out")
    with pytest.raises(MismatchError, match=r"read it with dequantize=True$"):
        uniform(paths, output=tmp_path / "out")
    said = command("uniform", *paths, "-o", tmp_path / "out")
    assert (said.returncode, said.stdout) == (1, "")
    assert "read it with --dequantize" in said.stderr


@pytest.mark.parametrize("kind", ["blocks", "mxfp8", "gpt-oss", "nvfp4, compressed-tensors"])
def test_a_scale_that_is_not_a_number_stops_the_run(kind: str, tmp_path: Path) -> None:
    """Its weight and place are named, and `non_finite` lets it pass as for any NaN."""
    stored, name, _ = layout(kind, 13)
    scales = next(each for each in stored if "scale" in each)
    if kind.startswith("nvfp4"):
        scales = "m.weight_global_scale"
    dtype, shape, data = stored[scales]
    bad = b"\xff" if dtype == "U8" else np.float32(np.nan).tobytes()
    stored[scales] = (dtype, shape, bad + data[len(bad) :])
    folder = save(tmp_path / "m", stored)
    codes = next(each for each in stored if each.startswith(name))
    with pytest.raises(NonFiniteError, match=f"model.safetensors: {codes}: holds nan at"):
        uniform([folder], output=tmp_path / "out", options=EXACT)
    passing = Options(dequantize=True, dtype="f64", non_finite="propagate")
    uniform([folder], output=tmp_path / "out", options=passing)
    assert np.isnan(made(tmp_path / "out", name)).any()
    verify(tmp_path / "out")


def test_damaged_configurations_do_no_harm(tmp_path: Path) -> None:
    """What a configuration says in another form than libraries write is passed over, or refused."""
    stored, name, values = layout("blocks", 14)
    folder = save(tmp_path / "m", stored)
    for says in (
        {"weight_block_size": [0, 0]},
        {"weight_block_size": "128"},
        {"weight_block_size": [True, 128]},
        {"config_groups": [1, 2]},
        {"config_groups": {"group_0": None}},
        {"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}},
        {"sparsity_config": {"format": "dense"}},
        {"quant_method": ["fp8"]},
        {"quant_method": "fp8" * 1000},
    ):
        configure(folder, **says)
        if says.get("quant_method"):
            with pytest.raises(FormatError, match="whose codes are not read here") as refused:
                uniform([folder], output=tmp_path / "out", options=EXACT)
            assert len(str(refused.value)) < 500
            continue
        uniform([folder], output=tmp_path / "out", options=EXACT)
        assert np.array_equal(made(tmp_path / "out", name), values)
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


# -- kills and memory -----------------------------------------------------------------------------


def test_a_killed_soup_is_resumed(tmp_path: Path) -> None:
    """Killed at any call that writes, the same command ends in the bytes of an undisturbed run."""
    paths = [save(tmp_path / f"m{i}", layout("mxfp8", i)[0]) for i in (0, 1)]
    arguments = ["uniform", *map(str, paths), "--dequantize", "-o"]
    command(*arguments, tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    stage = tmp_path / "stage"
    stage.mkdir()
    with closing(Machine()) as machine:
        n_calls = machine.run(*arguments, stage / "count", stage=stage).n_calls
        assert n_calls > 12
        for at in range(1, n_calls, n_calls // 12):
            out = stage / f"out{at}"
            machine.run(*arguments, out, stage=stage, at=at)
            if not out.exists():
                assert machine.run(*arguments, out, stage=stage).status == 0
            assert (out / "model.safetensors").read_bytes() == expected


COMPILED = "from streamsoup.kernels import decoding\ndecoding.COMPILE_CODES = 0\n"


@pytest.mark.parametrize(("k", "io"), [(2, "mmap"), (8, "mmap"), (8, "read")])
def test_memory_is_planned(tmp_path: Path, k: int, io: str) -> None:
    """The measured peak is below the planned one, with all that is compiled in it."""
    n = 3_000_000
    folder = sparse(
        tmp_path / "m",
        {
            "a.weight": ("F8_E4M3", (1000, 3000), n),
            "a.weight_scale_inv": ("F32", (8, 24), 4 * 8 * 24),
            "b.weight": ("F8_E4M3", (1000, 3200), 3_200_000),
            "b.weight_scale": ("U8", (1000, 100), 100_000),
            "e.down_proj_blocks": ("U8", (2, 1000, 60, 16), 1_920_000),
            "e.down_proj_scales": ("U8", (2, 1000, 60), 120_000),
        },
    )
    paths = []
    for i in range(k):
        (tmp_path / f"link{i}").symlink_to(folder)
        paths.append(str(tmp_path / f"link{i}"))
    settings = {"coefficients": None, "in_numpy": False, "compile_nbytes": 0, "threads": 2}
    settings |= {"memory": "180MB", "io": io, "dequantize": True}
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            COMPILED + SCRIPT,
            json.dumps(settings),
            str(tmp_path / "out"),
            *paths,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert ran.returncode == 0, ran.stderr
    peak, planned = map(int, ran.stdout.split())
    assert 20_000_000 < peak <= planned <= 180_000_000
