"""BASE+ADAPTER: each tensor is W + s·B·A in float64, rounded once, whatever the blocks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import factors, in_order, save_adapter, scale
from checkpoints import load, load_array, save, tensor

import streamsoup
from streamsoup import Options, geometry, mix, mix_into, uniform, verify
from streamsoup.errors import (
    BudgetError,
    FormatError,
    MismatchError,
    MissingFileError,
    NonFiniteError,
    StreamsoupError,
    VerificationError,
)
from streamsoup.formats.adapters import source as adapted
from streamsoup.formats.adapters.paths import split
from streamsoup.formats.ingredients import open_ingredients

RNG = np.random.default_rng(3)
W = RNG.standard_normal((70, 90)).astype(np.float32)
BIAS = RNG.standard_normal(70).astype(np.float32)
EMBED = RNG.standard_normal((33, 20)).astype(np.float32)
CONV = RNG.standard_normal((6, 5, 3, 3)).astype(np.float32)
A, B = factors(RNG, 70, 90, 4)


def base(folder: Path, **more: Any) -> Path:
    """Save a base of several kinds of modules."""
    tensors = {"m.q.weight": W, "m.q.bias": BIAS, "m.e.weight": EMBED, "m.c.weight": CONV}
    made = {
        name: each if isinstance(each, tuple) else tensor(each)
        for name, each in (tensors | more).items()
    }
    return save(folder, made)


def q(**config: Any) -> Any:
    """Return the factors of one module."""
    return {"m.q.lora_A.weight": A, "m.q.lora_B.weight": B}


F64 = Options(dtype="f64")


@pytest.mark.parametrize("tier", ["numpy", "plain"])
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_the_product_is_added_in_float64_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: Any, tier: str
) -> None:
    """Each element is W + s·Σ B·A, the sum over the rank in order, to the last bit of float64."""
    monkeypatch.setenv("STREAMSOUP_KERNELS", tier)
    monkeypatch.setattr(adapted, "_COMPILED_FROM", 0)
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    options = Options(dtype="f64", io=io)
    soup = uniform([f"{at}+{one}"], output=tmp_path / "soup", options=options)
    expected = in_order(W, A, B, 2.0)
    assert (load_array(Path(soup.path), "m.q.weight") == expected).all()
    assert (load_array(Path(soup.path), "m.q.bias") == BIAS).all()
    backwards = in_order(W, A[::-1], B[:, ::-1], 2.0)
    assert not (expected == backwards).all(), "another order would not show"


def test_the_soup_is_rounded_once(tmp_path: Path) -> None:
    """In bfloat16 the mean of two adapters and the base is the rounded mean of exact values."""
    words = (W.view(np.uint32) >> 16).astype(np.uint16)
    wide = (words.astype(np.uint32) << 16).view(np.float32)
    at = base(tmp_path / "base", **{"m.q.weight": tensor(words, "BF16")})
    paths = []
    for i in range(2):
        a, b = factors(np.random.default_rng(i), 70, 90, 4)
        save_adapter(tmp_path / f"a{i}", {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b})
        paths.append((f"{at}+{tmp_path}/a{i}", in_order(wide, a, b, 2.0)))
    given: list[Any] = [*(path for path, _ in paths), at]
    soup = uniform(given, output=tmp_path / "soup")
    exact = (paths[0][1] + paths[1][1] + wide.astype(float)) / 3
    dtype, _, found = load(Path(soup.path))["m.q.weight"]
    bits = exact.view(np.uint64)  # rounded to nearest even at 7 bits of fraction, by hand
    rounded = (
        bits + np.uint64((1 << 44) - 1) + ((bits >> np.uint64(45)) & np.uint64(1))
    ) >> np.uint64(45)
    value = (rounded << np.uint64(45)).view(np.float64).astype(np.float32)
    assert dtype == "BF16"
    assert found == (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    verify(soup.path)


def test_blocks_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that begin and end anywhere in a row have the bytes of the whole, in both tiers."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    for tier in ("numpy", "plain"):
        monkeypatch.setenv("STREAMSOUP_KERNELS", tier)
        monkeypatch.setattr(adapted, "_COMPILED_FROM", 0)
        (opened,) = open_ingredients([f"{at}+{one}"])
        cursor = opened.source.cursor(streamsoup.Access(mapped=True))
        whole = in_order(W, A, B, 2.0).ravel()
        for begin, end in [(0, 6300), (1, 2), (89, 91), (45, 4000), (180, 360), (6299, 6300)]:
            block = memoryview(bytearray(8 * (end - begin)))
            cursor.read("m.q.weight", 8 * begin, block)
            assert np.frombuffer(block).tolist() == whole[begin:end].tolist(), (tier, begin, end)
        cursor.close()


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
def test_factors_of_any_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Factors are widened exactly; those of float64 have no fused products."""
    monkeypatch.setattr(adapted, "_COMPILED_FROM", 0)
    if dtype == "BF16":
        words = [(each.view(np.uint32) >> 16).astype(np.uint16) for each in (A, B)]
        a, b = ((each.astype(np.uint32) << 16).view(np.float32) for each in words)
        stored: list[Any] = [tensor(each, "BF16") for each in words]
    else:
        kind = {"F64": np.float64, "F16": np.float16}[dtype]
        a, b = (each.astype(kind) * kind(1.1) for each in (A, B))
        stored = [a, b]
    at = base(tmp_path / "base")
    named = dict(zip(["m.q.lora_A.weight", "m.q.lora_B.weight"], stored, strict=True))
    one = save_adapter(tmp_path / "one", named)
    soup = uniform([f"{at}+{one}"], output=tmp_path / "soup", options=F64)
    assert (load_array(Path(soup.path), "m.q.weight") == in_order(W, a, b, 2.0)).all()


def test_scales_patterns_and_rank_stabilisation(tmp_path: Path) -> None:
    """Patterns fit the end of a name, the first counts, and rsLoRA divides by the root."""
    at = base(tmp_path / "base", **{"m.k.weight": W, "m.v.weight": W})
    rng = np.random.default_rng(5)
    made = {name: factors(rng, 70, 90, rank) for name, rank in [("q", 4), ("k", 7), ("v", 2)]}
    tensors = {
        f"m.{n}.lora_{x}.weight": f for n, ab in made.items() for x, f in zip("AB", ab, strict=True)
    }
    config = {
        "use_rslora": True,
        "rank_pattern": {"k": 7, "^m.v": 2},
        "alpha_pattern": {r"m\.(k|x)": 3, "k": 100},
    }
    one = save_adapter(tmp_path / "one", tensors, **config)
    soup = uniform([f"{at}+{one}"], output=tmp_path / "soup", options=F64)
    for name, rank, alpha in [("q", 4, 8), ("k", 7, 3), ("v", 2, 8)]:
        expected = in_order(W, made[name][0], made[name][1], scale(rank, alpha, rslora=True))
        assert (load_array(Path(soup.path), f"m.{name}.weight") == expected).all()


def test_transposes_embeddings_convolutions_and_biases(tmp_path: Path) -> None:
    """Every kind of module gets the product in the shape of its weight; biases are scaled, too."""
    rng = np.random.default_rng(6)
    turned = np.ascontiguousarray(W.T)
    at = base(tmp_path / "base", **{"m.q.weight": turned})
    a, b = factors(rng, 20, 33, 4)  # of the embedding: A is rank × rows, B columns × rank
    ca, cb = factors(rng, 6, 45, 4)
    bias = rng.standard_normal(70).astype(np.float32)
    tensors = {
        **q(),
        "m.q.lora_B.bias": bias,
        "m.e.lora_embedding_A": a,
        "m.e.lora_embedding_B": b,
        "m.c.lora_A.weight": ca.reshape(4, 5, 3, 3),
        "m.c.lora_B.weight": cb.reshape(6, 4, 1, 1),
    }
    one = save_adapter(tmp_path / "one", tensors, fan_in_fan_out=True, lora_bias=True)
    soup = Path(uniform([f"{at}+{one}"], output=tmp_path / "soup", options=F64).path)
    assert (load_array(soup, "m.q.weight") == in_order(W, A, B, 2.0).T).all()
    assert (load_array(soup, "m.q.bias") == BIAS + 2.0 * bias.astype(float)).all()
    assert (load_array(soup, "m.e.weight") == in_order(EMBED.T, a, b, 2.0).T).all()
    expected = in_order(CONV.reshape(6, 45), ca, cb, 2.0).reshape(CONV.shape)
    assert (load_array(soup, "m.c.weight") == expected).all()


def test_whole_modules_replace_those_of_the_base(tmp_path: Path) -> None:
    """``modules_to_save`` and trained biases stand as they are; a head may be new."""
    at = base(tmp_path / "base")
    head = np.ones((3, 4), np.float32)
    new = {**q(), "m.e.weight": EMBED * 2, "score.weight": head}
    one = save_adapter(tmp_path / "one", new, modules_to_save=["e", "score"])
    soup = Path(uniform([f"{at}+{one}"], output=tmp_path / "soup").path)
    assert (load_array(soup, "m.e.weight") == EMBED * 2).all()
    assert (load_array(soup, "score.weight") == head).all()
    verify(soup)


def test_several_adapters_and_other_modules(tmp_path: Path) -> None:
    """Adapters of one base may cover different modules, and several are added in order."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    ca, cb = factors(np.random.default_rng(8), 6, 45, 2)
    conv = {
        "m.c.lora_A.weight": ca.reshape(2, 5, 3, 3),
        "m.c.lora_B.weight": cb.reshape(6, 2, 1, 1),
    }
    two = save_adapter(tmp_path / "two", conv, r=2)
    other = factors(np.random.default_rng(9), 70, 90, 4)
    three = save_adapter(
        tmp_path / "three",
        dict(zip(["m.q.lora_A.weight", "m.q.lora_B.weight"], other, strict=True)),
    )
    given = [f"{at}+{one}", f"{at}+{two}"]
    soup = Path(mix(given, [0.5, -1.5], output=tmp_path / "soup", options=F64).path)
    wide = W.astype(float)
    assert (load_array(soup, "m.q.weight") == 0.5 * in_order(W, A, B, 2.0) + -1.5 * wide).all()
    both = Path(uniform([f"{at}+{one}+{three}"], output=tmp_path / "both", options=F64).path)
    assert (
        load_array(both, "m.q.weight") == in_order(in_order(W, A, B, 2.0), other[0], other[1], 2.0)
    ).all()


def test_a_path_that_exists_wins(tmp_path: Path) -> None:
    """Plus signs in names are no adapters where the path exists; parts are those that exist."""
    at = base(tmp_path / "a+b")
    assert split(str(at)) is None
    one = save_adapter(tmp_path / "c+d", q())
    assert split(f"{at}+{one}") == [str(at), str(one)]
    assert split("nothing") is None
    assert split(f"{at}+") is None
    file = one / "adapter_model.safetensors"
    soup = uniform([f"{at}+{file}"], output=tmp_path / "soup", options=F64)
    assert (load_array(Path(soup.path), "m.q.weight") == in_order(W, A, B, 2.0)).all()
    with pytest.raises(MissingFileError, match=r"/none/adapter_config\.json: no such file"):
        open_ingredients([f"{at}+{tmp_path}/none"])


def test_every_verb_takes_it(tmp_path: Path) -> None:
    """Plans, measures and verifies as any ingredient; the record leads back to it."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    path = f"{at}+{one}"
    measured = geometry([at, path])
    expected = float(np.linalg.norm(2.0 * (B.astype(float) @ A)))
    assert measured.total.distances[0][1] == pytest.approx(expected, rel=1e-12)
    soup = uniform([path, at], output=tmp_path / "soup")
    assert soup.provenance.ingredients[0].path == path
    verify(soup.path)
    stored = tmp_path / "one" / "adapter_model.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(VerificationError, match="is not the one that was used"):
        verify(soup.path)


def test_the_command_line_says_what_it_is(tmp_path: Path) -> None:
    """``plan``, ``inspect`` and ``uniform`` take ``BASE+ADAPTER`` as a path."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    for words in (["inspect"], ["plan"], ["uniform", "-o", str(tmp_path / "soup")]):
        command = [sys.executable, "-m", "streamsoup", *words, f"{at}+{one}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora set: DoRA is not supported"),
    ({"kasa_config": {"x": 1}}, "KaSA is not supported"),
    ({"peft_type": "LOHA"}, "is of peft_type 'LOHA', expected 'LORA'"),
    ({"init_lora_weights": "pissa_niter_4"}, "was initialised by 'pissa_niter_4'"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ({"layer_replication": [[0, 4]]}, "replicated layers"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"use_something": True}, "has use_something set"),
    ({"r": 5}, r"expected rank 5, as .*adapter_config.json says"),
    ({"rank_pattern": {"q": 3}}, "expected rank 3"),
    ({"r": 0}, "has r 0, not a rank"),
    ({"r": 2**70}, "not a rank"),
    ({"lora_alpha": float("nan")}, "has lora_alpha nan, not a number"),
    ({"lora_alpha": "8"}, "not a number"),
    ({"rank_pattern": {"(a+)+x": 3}}, "may take very long to match"),
    ({"rank_pattern": {".*.*.*.*.*y": 3}}, "may take very long to match"),
    ({"rank_pattern": {"(": 3}}, "no expression"),
    ({"rank_pattern": [1]}, "rank_pattern that is not an object"),
    ({"modules_to_save": [3]}, "not a list of names"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_no_plain_lora_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    """Anything that is not W + s·B·A is refused by its headers, in one line that names the file."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q(), **config)
    with pytest.raises(FormatError, match=message) as raised:
        open_ingredients([f"{at}+{one}"])
    assert str(one) in str(raised.value)
    assert "\n" not in str(raised.value)


HOSTILE: list[tuple[Any, str]] = [
    ({"m.q.lora_A.weight": A}, "needs lora_B"),
    ({"m.q.lora_A.weight": A, "m.q.lora_embedding_B": B}, "needs"),
    ({**q(), "m.q.lora_magnitude_vector": B}, "is a part of DoRA"),
    ({"m.q.lora_A.weight": A, "m.q.lora_B.weight": B[:, :3]}, "expected rank 4"),
    ({"m.q.lora_A.weight": A[:, :80], "m.q.lora_B.weight": B}, "do not fit"),
    ({"m.none.lora_A.weight": A, "m.none.lora_B.weight": B}, "has no m.none.weight"),
    ({**q(), "stray.weight": B}, "has no stray.weight"),
    ({**q(), "m.e.weight": EMBED[:3]}, "resize the base"),
    ({"m.q.lora_A.weight": A.astype(np.int32), "m.q.lora_B.weight": B}, "expected a float"),
    ({"m.q.lora_A.weight": A[:, 0], "m.q.lora_B.weight": B}, "less than two sizes"),
    ({**q(), "m.q.lora_B.bias": BIAS[:3]}, "no bias of the shape"),
    ({"../../x\x1b[2J.lora_A.weight": A, "../../x\x1b[2J.lora_B.weight": B}, r"\\x1b"),
]


@pytest.mark.parametrize(("tensors", "message"), HOSTILE, ids=[f"{i}" for i in range(len(HOSTILE))])
def test_hostile_tensors_are_refused_before_reading(
    tmp_path: Path, tensors: Any, message: str
) -> None:
    """Factors without a partner, of other shapes, or of other modules are refused by name."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", tensors)
    with pytest.raises(StreamsoupError, match=message):
        open_ingredients([f"{at}+{one}"])


def test_other_hostile_files(tmp_path: Path) -> None:
    """Deep JSON, a missing file, a pickle, other names, and NaN each have a message."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    config = one / "adapter_config.json"
    kept = config.read_text()
    for text in ("[" * 100_000, "[]", "{", '{"a":' * 50_000):
        config.write_text(text)
        with pytest.raises(FormatError, match="is not a JSON object"):
            open_ingredients([f"{at}+{one}"])
    config.write_text(kept)
    weights = one / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(MissingFileError, match="the adapter is not complete"):
        open_ingredients([f"{at}+{one}"])
    (one / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="is a PyTorch pickle"):
        open_ingredients([f"{at}+{one}"])
    weights.write_bytes(content.replace(b"base_model.model.", b"base_modex.model."))
    with pytest.raises(FormatError, match=r"does not begin with base_model\.model"):
        open_ingredients([f"{at}+{one}"])
    spoiled = A.copy()
    spoiled[1, 2] = np.nan
    save_adapter(one, {"m.q.lora_A.weight": spoiled, "m.q.lora_B.weight": B})
    with pytest.raises(NonFiniteError, match=r"one.*m\.q\.weight"):
        uniform([f"{at}+{one}", at], output=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_another_base_is_refused_by_both_names(tmp_path: Path) -> None:
    """Adapters over one base have to name the same one; a path may stand for a hub id."""
    at = base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", q())
    two = save_adapter(tmp_path / "two", q(), base_model_name_or_path="org/other")
    three = save_adapter(tmp_path / "three", q(), base_model_name_or_path="/home/me/Base/")
    with pytest.raises(MismatchError, match=r"names the base org/other, and .* names org/base"):
        open_ingredients([f"{at}+{one}", f"{at}+{two}"])
    with pytest.raises(MismatchError, match="org/other"):
        open_ingredients([f"{at}+{one}+{two}"])
    open_ingredients([f"{at}+{one}", f"{at}+{three}"])


def test_a_huge_rank_is_within_the_bound_or_refused(tmp_path: Path) -> None:
    """Scratch is counted: a rank of a hundred thousand takes more than a small budget has."""
    rank = 100_000
    a, b = np.zeros((rank, 90), np.float16), np.zeros((70, rank), np.float16)
    at = base(tmp_path / "base")
    tensors = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}
    one = save_adapter(tmp_path / "one", tensors, r=rank)
    with pytest.raises(BudgetError):
        uniform([f"{at}+{one}"], output=tmp_path / "soup", options=Options(memory="60 MB"))


def test_names_may_differ_by_the_prefix_of_the_model(tmp_path: Path) -> None:
    """A base stored without the prefix of its model, or with another, is still the base."""
    for n, name in enumerate(["transformer.m.q.weight", "q.weight"]):
        at = save(tmp_path / f"base{n}", {name: tensor(W)})
        one = save_adapter(tmp_path / "one", q())
        soup = uniform([f"{at}+{one}"], output=tmp_path / f"soup{n}", options=F64)
        assert (load_array(Path(soup.path), name) == in_order(W, A, B, 2.0)).all()


KILLED = """
import os, sys
from streamsoup import uniform
from streamsoup.formats.adapters import source
read, left = source._Cursor.read, [int(sys.argv[1])]
def dying(self, tensor, begin, block):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    read(self, tensor, begin, block)
source._Cursor.read = dying
uniform(sys.argv[3:], output=sys.argv[2])
"""


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_killed_run_is_resumed(tmp_path: Path, n: int) -> None:
    """Killed at any block, the output is absent; run again, it has the bytes of one run."""
    at = base(tmp_path / "base", **{"m.k.weight": W, "m.v.weight": W})
    tensors = {f"m.{x}.{name[4:]}": each for x in "qkv" for name, each in q().items()}
    path = f"{at}+{save_adapter(tmp_path / 'one', tensors)}"
    whole = uniform([path, at], output=tmp_path / "whole")
    out = tmp_path / "soup"
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(n), str(out), path, str(at)], check=False
    )
    assert ran.returncode == 9
    assert not out.exists()
    soup = uniform([path, at], output=out)
    assert load(Path(soup.path)) == load(Path(whole.path))
    verify(out)


def test_greedy_chooses_among_adapters_of_one_base(tmp_path: Path) -> None:
    """A live model of the base is all that is loaded: candidates are made of the factors."""
    live = torch.nn.Module()
    live.m = torch.nn.Module()
    live.m.q = torch.nn.Linear(90, 70)
    at = save(tmp_path / "base", {"m.q.weight": tensor(W), "m.q.bias": tensor(BIAS)})
    one = save_adapter(tmp_path / "one", q())
    two = save_adapter(tmp_path / "two", {**q(), "m.q.lora_B.weight": -B})
    wanted = torch.from_numpy(in_order(W, A, B, 1.0).astype(np.float32))

    def score(model: Any) -> float:
        return -float((model.m.q.weight - wanted).square().sum())

    given = [f"{at}+{one}", f"{at}+{two}", at]
    found = streamsoup.greedy(given, score, model=live, output=tmp_path / "soup")
    weight = load_array(tmp_path / "soup", "m.q.weight")
    assert (weight == ((in_order(W, A, B, 2.0) + W.astype(float)) / 2).astype(np.float32)).all()
    assert found is not None
    mix_into(live, [f"{at}+{one}"])
    assert (live.m.q.weight.detach().numpy() == in_order(W, A, B, 2.0).astype(np.float32)).all()
