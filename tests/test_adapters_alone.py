"""Adapters alone make one adapter, which adds what all of them add, exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import PREFIX, factors, save_adapter
from checkpoints import load, load_array

from streamsoup import (
    Options,
    arithmetic,
    ema,
    geometry,
    interpolate,
    lawa,
    mix,
    slerp,
    uniform,
    verify,
)
from streamsoup.errors import (
    FormatError,
    MismatchError,
    NonFiniteError,
    RecipeError,
    StreamsoupError,
)
from streamsoup.formats.adapters.config import read_adapter_config

RNG = np.random.default_rng(7)


def adapter(folder: Path, ranks: dict[str, int], **config: Any) -> Path:
    """Save an adapter of 30 × 20 modules with these ranks."""
    tensors: dict[str, Any] = {}
    for module, rank in ranks.items():
        a, b = factors(RNG, 30, 20, rank)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return save_adapter(folder, tensors, **config)


def delta(folder: Path, module: str) -> Any:
    """Return s·B·A of a module in float64; 0 for a module without factors."""
    names = load(folder / "adapter_model.safetensors")
    if f"{PREFIX}{module}.lora_A.weight" not in names:
        return np.zeros((30, 20))
    a, b = (
        load_array(folder / "adapter_model.safetensors", f"{PREFIX}{module}.lora_{x}.weight")
        for x in "AB"
    )
    config = read_adapter_config(str(folder))
    rank = config.rank_of(module)
    assert a.shape[0] == b.shape[1] == rank
    return config.scale_of(module, rank) * (b.astype(np.float64) @ a.astype(np.float64))


def check(soup: Any, adapters: list[Path], coefficients: Any, *modules: str) -> None:
    """Compare the deltas of a soup with the weighted sums of those of its ingredients."""
    for module in modules:
        expected = sum(
            c * delta(path, module) for c, path in zip(coefficients, adapters, strict=True)
        )
        found = delta(Path(soup.path), module)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=module)
        assert np.abs(expected).max() > 1
    assert verify(soup.path).rederived


def three(tmp_path: Path) -> list[Path]:
    """Save adapters that differ in everything that a configuration can say."""
    return [
        adapter(tmp_path / "a", {"m.q": 4, "m.k": 2}, rank_pattern={"k": 2}),
        adapter(tmp_path / "b", {"m.k": 3, "m.v": 3}, r=3, use_rslora=True, lora_alpha=5),
        adapter(tmp_path / "c", {"m.q": 4, "m.v": 4}, alpha_pattern={"v": -3}),
    ]


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_the_mean_of_adapters_adds_the_mean_of_their_products(tmp_path: Path, io: Any) -> None:
    """Different ranks, scales and modules; the products are the mean to float32 of the factors."""
    paths = three(tmp_path)
    soup = uniform(paths, output=tmp_path / "soup", options=Options(io=io))
    check(soup, paths, [1 / 3] * 3, "m.q", "m.k", "m.v")
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == ["m.k", "m.q", "m.v"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^m\.k": 5, r"^m\.v": 7}
    with pytest.raises(AssertionError):
        check(soup, paths, [1 / 3, 1 / 3, 1 / 2], "m.q")


def test_runs_of_adapters_are_averaged(tmp_path: Path) -> None:
    """EMA, LAWA and task arithmetic of adapters are the weighted sums of their products."""
    paths = three(tmp_path)
    averaged = ema(paths, 0.5, output=tmp_path / "ema")
    check(averaged, paths, [0.25, 0.25, 0.5], "m.q", "m.k", "m.v")
    latest = lawa(paths, 2, output=tmp_path / "lawa")
    check(latest, paths[1:], [0.5, 0.5], "m.q", "m.k", "m.v")
    added = arithmetic(paths[1:], [0.3, 0.2], base=paths[0], output=tmp_path / "sum")
    check(added, paths, [0.5, 0.3, 0.2], "m.q", "m.k", "m.v")


@pytest.mark.parametrize("given", [(2.5, -1.0, 0.75), (-1.0, -1.0, -2.0), (0.0, 1.0, 0.0)])
def test_coefficients_of_any_sign_stand_on_one_side(tmp_path: Path, given: Any) -> None:
    """Products are multiplied by c, whatever its sign, and A is that of the ingredients."""
    paths = three(tmp_path)
    soup = mix(paths, given, output=tmp_path / "soup")
    check(soup, paths, given, "m.q", "m.k", "m.v") if all(given) else None
    name = f"{PREFIX}m.q.lora_A.weight"
    owns = [load_array(path / "adapter_model.safetensors", name) for path in (paths[0], paths[2])]
    found = load_array(tmp_path / "soup" / "adapter_model.safetensors", name)
    assert (found == np.concatenate(owns)).all()


def test_factors_are_rounded_once(tmp_path: Path) -> None:
    """B is c·s·B in float64, rounded to float32 once, to the last bit."""
    paths = three(tmp_path)
    mix(paths, (0.3, 0.3, 0.4), output=tmp_path / "soup")
    name = f"{PREFIX}m.q.lora_B.weight"
    blocks = [
        c * (s * load_array(path / "adapter_model.safetensors", name).astype(np.float64))
        for c, s, path in [(0.3, 2.0, paths[0]), (0.4, 2.0, paths[2])]
    ]
    found = load_array(tmp_path / "soup" / "adapter_model.safetensors", name)
    assert (found == np.concatenate(blocks, axis=1).astype(np.float32)).all()


def test_interpolation_and_its_ends(tmp_path: Path) -> None:
    """(1-α) of one and α of the other; at an end, the other adds nothing."""
    a, b, _ = three(tmp_path)
    soup = interpolate(a, b, 0.25, output=tmp_path / "soup")
    check(soup, [a, b], (0.75, 0.25), "m.q", "m.k", "m.v")
    soup = interpolate(a, b, 0.0, output=tmp_path / "end")
    check(soup, [a, b], (1.0, 0.0), "m.q", "m.k")


def test_one_adapter_is_itself(tmp_path: Path) -> None:
    """One adapter with coefficient 1 has the same tensors, and the same configuration."""
    one = adapter(tmp_path / "one", {"m.q": 4}, use_rslora=True)
    uniform([one], output=tmp_path / "uniform")
    mix([one], [1.0], output=tmp_path / "mix")
    for out in (tmp_path / "uniform", tmp_path / "mix"):
        config, file = "adapter_config.json", "adapter_model.safetensors"
        assert (out / config).read_bytes() == (one / config).read_bytes()
        assert load(out / file) == load(one / file)
        verify(out)


def test_one_adapter_is_scaled_on_one_side(tmp_path: Path) -> None:
    """One adapter times a negative number: B alone is multiplied, and the rest stays."""
    one = adapter(tmp_path / "one", {"m.q": 4}, use_rslora=True)
    soup = mix([one], [-0.5], output=tmp_path / "soup")
    check(soup, [one], [-0.5], "m.q")


def test_a_soup_of_adapters_is_an_ingredient(tmp_path: Path) -> None:
    """What was made is an adapter as any other: alone, and over a base."""
    paths = three(tmp_path)
    first = uniform(paths[:2], output=tmp_path / "first")
    again = mix([first.path, paths[2]], (2.0, 1.0), output=tmp_path / "again")
    check(again, paths, (1.0, 1.0, 1.0), "m.q", "m.k", "m.v")


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    """Embeddings, convolutions, biases of factors where only one has them, whole tensors."""
    made = []
    for n, rank in enumerate((2, 3)):
        rng = np.random.default_rng(n)
        shapes = {
            "e.lora_embedding_A": (rank, 11),
            "e.lora_embedding_B": (6, rank),
            "c.lora_A.weight": (rank, 5, 3, 2),
            "c.lora_B.weight": (4, rank, 1, 1),
            "head.weight": (2, 6),
            **({"c.lora_B.bias": (4,)} if n else {}),
        }
        tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
        config = {"r": rank, "modules_to_save": ["head"], "lora_bias": bool(n)}
        made.append((save_adapter(tmp_path / f"{n}", tensors, **config), tensors, 8 / rank))
    soup = mix([path for path, _, _ in made], (-0.5, 1.5), output=tmp_path / "soup")
    file = Path(soup.path) / "adapter_model.safetensors"
    found = {name.removeprefix(PREFIX): load_array(file, name) for name in load(file)}
    one, two = (tensors for _, tensors, _ in made)
    weights = [c * s for c, (_, _, s) in zip((-0.5, 1.5), made, strict=True)]

    def product(t: Any, a: str, b: str) -> Any:
        return np.tensordot(t[b].astype(float).reshape(len(t[b]), -1), t[a].astype(float), 1)

    for a, b in [
        ("e.lora_embedding_A", "e.lora_embedding_B"),
        ("c.lora_A.weight", "c.lora_B.weight"),
    ]:
        expected = sum(w * product(t, a, b) for w, t in zip(weights, (one, two), strict=True))
        assert found[a].shape[0] == 5
        assert found[b].shape[1:] == (5, *two[b].shape[2:])
        np.testing.assert_allclose(product(found, a, b), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["c.lora_B.bias"], weights[1] * two["c.lora_B.bias"], 1e-6)
    whole = -0.5 * one["head.weight"].astype(float) + 1.5 * two["head.weight"].astype(float)
    assert (found["head.weight"] == whole.astype(np.float32)).all()
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (5, 5, True)
    with pytest.raises(RecipeError, match=r"head\.weight stored whole, so coefficients have to"):
        mix([path for path, _, _ in made], (1, 1), output=tmp_path / "no")


def test_adapters_of_narrow_dtypes_are_written_in_float32(tmp_path: Path) -> None:
    """Whatever they came in; another dtype may be asked for."""
    a, b = (each.astype(np.float16) for each in factors(RNG, 30, 20, 4))
    made = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}
    one, two = (save_adapter(tmp_path / name, made) for name in "ab")
    for n, (paths, told, dtype) in enumerate(
        [([one, two], "same", "F32"), ([one], "same", "F32"), ([one, two], "bf16", "BF16")]
    ):
        out = tmp_path / f"soup{n}"
        mix(paths, [0.3] * len(paths), output=out, options=Options(dtype=told))
        assert {each[0] for each in load(out / "adapter_model.safetensors").values()} == {dtype}
        verify(out)


def test_names_that_end_like_others_keep_their_ranks(tmp_path: Path) -> None:
    """A pattern fits the end of a name for PEFT: those that are written fit whole names alone."""
    paths = [
        adapter(tmp_path / "a", {"fc": 2, "m.fc": 2, "n.fc": 2}, r=2),
        adapter(tmp_path / "b", {"fc": 2}, r=2),
    ]
    soup = uniform(paths, output=tmp_path / "soup")
    check(soup, paths, (0.5, 0.5), "fc", "m.fc", "n.fc")


def test_blocks_of_any_length_have_the_same_elements(tmp_path: Path) -> None:
    """Ranges that begin and end anywhere are those of the whole tensor."""
    import streamsoup
    from streamsoup.formats.ingredients import open_ingredients

    opened = open_ingredients(three(tmp_path))
    for each in opened:
        cursor = each.source.cursor(streamsoup.Access(mapped=True))
        for name, place in each.source.places.items():  # type: ignore[attr-defined]
            n = int(np.prod(each.source.tensors[name].shape))
            whole = memoryview(bytearray(8 * n))
            cursor.read(name, 0, whole)
            values = np.frombuffer(whole)
            assert np.count_nonzero(values) == (place.own is not None) * (
                n // place.columns * place.width
            )
            for begin in range(0, n, 37):
                end = min(begin + 41, n)
                block = memoryview(bytearray(8 * (end - begin)))
                cursor.read(name, 8 * begin, block)
                assert (np.frombuffer(block) == values[begin:end]).all(), (name, begin)
        cursor.close()


def test_what_is_refused(tmp_path: Path) -> None:
    """Other kinds, bases and shapes, whole tensors of some, and methods that are not linear."""
    one = adapter(tmp_path / "one", {"m.q": 4})
    two = adapter(tmp_path / "two", {"m.q": 4})
    out = tmp_path / "out"
    dora = adapter(tmp_path / "dora", {"m.q": 4}, use_dora=True)
    other = adapter(tmp_path / "other", {"m.q": 4}, base_model_name_or_path="org/other")
    a, b = factors(RNG, 31, 20, 4)
    wide = save_adapter(tmp_path / "wide", {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b})
    a, b = factors(RNG, 30, 20, 4)
    q = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}
    e = {"m.q.lora_embedding_A": a, "m.q.lora_embedding_B": b}
    word = save_adapter(tmp_path / "word", e)
    head = save_adapter(tmp_path / "head", q | {"head.weight": a}, modules_to_save=["head"])
    inner = adapter(tmp_path / "inner", {"model.m.q": 4, "model.m.k": 4})
    refusals: list[tuple[Any, list[Path], str]] = [
        (FormatError, [one, dora], "DoRA is not supported"),
        (MismatchError, [one, other], "names the base org/other"),
        (MismatchError, [one, wide], r"has the shape \[31, 20\], and \[30, 20\]"),
        (MismatchError, [one, word], "is an embedding here or in .*, but not in both"),
        (MismatchError, [one, inner], r"inner has model\. before the names of all these modules"),
        (MismatchError, [inner, one], r"inner has model\. before the names of all these modules"),
        (MismatchError, [one, head], "is stored whole, and .*one has none"),
    ]
    for error, paths, match in refusals:
        with pytest.raises(error, match=match):
            uniform(paths, output=out)
    with pytest.raises(FormatError, match="DoRA"):
        mix([dora], [0.5], output=out)
    with pytest.raises(RecipeError, match="stored whole, so coefficients have to sum to 1"):
        mix([head], [0.5], output=out)
    with pytest.raises(RecipeError, match="1 coefficient for 2 ingredients"):
        mix([one, two], [0.5], output=out)
    for make in (
        lambda: slerp([one, two], [0.5, 0.5], output=out),
        lambda: geometry([one, two]),
    ):
        with pytest.raises(StreamsoupError, match=r"belongs to an adapter.*as BASE\+"):
            make()
    for chosen in (Options(include=("*.q.*",)), Options(rename=("base_model.=>",))):
        for paths in ([one, two], [one]):
            with pytest.raises(MismatchError, match=r"belongs to an adapter.*as BASE\+"):
                mix(paths, [0.5] * len(paths), output=out, options=chosen)
    assert not out.exists()


def test_hostile_and_empty_adapters(tmp_path: Path) -> None:
    """Names that no encoding has are kept as they were, and empty factors are joined."""
    empty = {
        "m.q.lora_A.weight": np.zeros((4, 0), np.float32),
        "m.q.lora_B.weight": np.zeros((3, 4), np.float32),
    }
    paths = [save_adapter(tmp_path / n, empty, task_type="\ud800\u00e9") for n in "ab"]
    soup = uniform(paths, output=tmp_path / "soup")
    verify(soup.path)
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert config["task_type"] == "\ud800\u00e9"
    found = load(tmp_path / "soup" / "adapter_model.safetensors")
    assert [list(each[1]) for each in found.values()] == [[8, 0], [3, 8]]


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("c.lora_B.bias", (5,), r"has the shape \[5\], expected \[4\]"),
        ("c.lora_B.bias", (), r"has the shape \[\], expected \[4\]"),
        ("c.lora_B.weight", (4, 2, 3), "expected sizes of 1 after the rank"),
    ],
)
def test_odd_shapes_are_refused(tmp_path: Path, name: str, shape: Any, match: str) -> None:
    """What no base shows to be wrong is found in the headers."""
    shapes = {"c.lora_A.weight": (2, 5, 3), "c.lora_B.weight": (4, 2, 1), name: shape}
    tensors = {each: np.zeros(size, np.float32) for each, size in shapes.items()}
    one = save_adapter(tmp_path / "one", tensors, r=2, lora_bias=True)
    with pytest.raises(FormatError, match=match):
        uniform([one, one], output=tmp_path / "soup")


def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    """A sum that float32 or float64 does not hold is refused, as in any soup."""
    one = adapter(tmp_path / "one", {"m.q": 4})
    a, b = (np.full((4, 4), 1e200) for _ in "AB")
    wide = {"m.q.lora_A.weight": a[:, :1].repeat(20, 1), "m.q.lora_B.weight": b.repeat(8, 0)[:30]}
    two = save_adapter(tmp_path / "two", wide, lora_alpha=1e299)
    with pytest.raises(NonFiniteError, match=r"m\.q\.lora_"):
        uniform([one, two], output=tmp_path / "soup")


def test_a_changed_configuration_is_found(tmp_path: Path) -> None:
    """The scale is part of what is read, so another alpha is another adapter."""
    paths = three(tmp_path)
    uniform(paths, output=tmp_path / "soup")
    file = paths[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 9}))
    with pytest.raises(StreamsoupError, match="is not what its provenance says"):
        verify(tmp_path / "soup")


KILLED = """
import os, sys
from streamsoup import uniform
from streamsoup.formats.adapters import joined
read, left = joined._Cursor.read, [7]
def dying(self, tensor, begin, block):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    read(self, tensor, begin, block)
joined._Cursor.read = dying
uniform(sys.argv[2:], output=sys.argv[1])
"""


def test_a_killed_run_is_resumed_and_a_changed_adapter_is_found(tmp_path: Path) -> None:
    """Killed in the middle, the same command ends in the same bytes; verify reads factors again."""
    paths = three(tmp_path)
    whole = uniform(paths, output=tmp_path / "whole")
    program = [sys.executable, "-c", KILLED, str(tmp_path / "soup"), *map(str, paths)]
    ran = subprocess.run(program, check=False, capture_output=True)
    assert ran.returncode == 9, ran.stderr
    assert not (tmp_path / "soup").exists()
    uniform(paths, output=tmp_path / "soup")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "soup" / name).read_bytes() == (Path(whole.path) / name).read_bytes()
    file = paths[0] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StreamsoupError, match="is not the one that was used"):
        verify(tmp_path / "soup")


def test_the_card_has_the_coefficients_of_the_products(tmp_path: Path) -> None:
    """Not those of every A, which are 1 for all adapters."""
    paths = three(tmp_path)
    mix(paths, (2.5, -1.0, 0.75), output=tmp_path / "soup")
    card = (tmp_path / "soup" / "README.md").read_text()
    for row in ("| 1 | a | 2.5 |", "| 2 | b | -1 |", "| 3 | c | 0.75 |"):
        assert row in card
    assert "coefficients of their own" not in card
    assert "factors of these adapters are joined" in card


def test_on_the_command_line(tmp_path: Path) -> None:
    """uniform, plan and verify take adapters; one given by its file has a configuration, too."""
    paths = three(tmp_path)
    given = [str(paths[0] / "adapter_model.safetensors"), *map(str, paths[1:])]
    for arguments in (
        ["plan", *given],
        ["plan", "mix", "-c", "1,-1,.5", *given],
        ["mix", "-c", "1,-1,.5", *given, "-o", str(tmp_path / "soup")],
        ["verify", str(tmp_path / "soup")],
    ):
        ran = subprocess.run(
            [sys.executable, "-m", "streamsoup", *arguments], check=False, capture_output=True
        )
        assert ran.returncode == 0, ran.stderr.decode()
        assert b"warning" not in ran.stderr.lower(), ran.stderr.decode()
    assert (tmp_path / "soup" / "adapter_config.json").exists()
