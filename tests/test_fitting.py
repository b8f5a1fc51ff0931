"""Ingredients made to fit: renamed, chosen, tied once, and of one vocabulary; each verifies."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import command, load, load_array, save, save_sharded, tensor
from crash import Machine
from numpy.typing import NDArray

from streamsoup import GreedySettings, Options, geometry, greedy, mix, ties, uniform, verify
from streamsoup.errors import MismatchError, RecipeError, StreamsoupError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.reading import Reading

Model = dict[str, Any]
Floats = NDArray[Any]


def values(seed: int, *shape: int) -> NDArray[np.float32]:
    """Return random numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(seed: int, prefix: str = "", **more: Any) -> Model:
    """Return a model of three tensors, and more."""
    arrays = {"embed_tokens.weight": values(seed, 6, 4), "layers.0.weight": values(seed + 50, 4, 4)}
    arrays |= {"head.weight": values(seed + 90, 3, 4)} | more
    return {f"{prefix}{name}": tensor(array) for name, array in arrays.items()}


def folder(path: Path, tensors: Model, **config: Any) -> Path:
    """Save a model with a configuration."""
    save(path, tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


def mean(*arrays: Floats) -> bytes:
    """Return the mean, rounded once."""
    return (sum(a.astype(np.float64) for a in arrays) / len(arrays)).astype(np.float32).tobytes()


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_a_prefix_is_replaced_in_all_ingredients(shards: int, tmp_path: Path) -> None:
    """The soup of wrapped and plain models has the plain names, and verifies."""
    a, b = save(tmp_path / "a", model(0)), tmp_path / "b"
    wrapped = list(model(1, "module.").items())
    if shards == 1:
        save(b, dict(wrapped))
    else:
        save_sharded(b, [dict(wrapped[:1]), dict(wrapped[1:])])
    for order in ([a, b], [b, a]):
        out = tmp_path / f"out{order[0].name}"
        uniform(order, output=out, options=Options(rename=("module.=>",)))
        found = load(out)
        assert found.keys() == model(0).keys()
        for name, (_, _, data) in found.items():
            arrays = [load_array(a, name), load_array(b, f"module.{name}")]
            assert data == mean(*arrays)
        assert verify(out).rederived
        recipe = json.loads((out / "streamsoup.json").read_text())["recipe"]
        assert recipe["reading"] == {"rename": ["module.=>"]}


def test_a_head_of_another_shape_is_named(tmp_path: Path) -> None:
    """Where one part has another shape, the refusal has the option that leaves it alone."""
    a, b = (
        save(
            tmp_path / name,
            model(n) | {f"classifier.{part}": tensor(values(n, n)) for part in ("bias", "scale")},
        )
        for name, n in (("a", 3), ("b", 5))
    )
    out = tmp_path / "out"
    refused = command("uniform", a, b, "-o", out)
    assert "come from the first, with --exclude 'classifier.*'; or leave out" in refused.stderr
    assert command("uniform", a, b, "-o", out, "--exclude", "classifier.*").returncode == 0
    with pytest.raises(MismatchError, match=r"exclude='classifier\.\*'"):
        uniform([a, b], output=out)


@pytest.mark.parametrize(
    ("prefix", "plain", "option"),
    [
        ("module.", "", "'module.=>'"),
        ("_orig_mod.", "", "'_orig_mod.=>'"),
        ("_fsdp_wrapped_module.", "", "'_fsdp_wrapped_module.=>'"),
        ("model.", "", "'model.=>'"),
        ("model.model.", "model.", "'model.model.=>model.'"),
    ],
)
def test_the_refusal_spells_the_option_out(
    prefix: str, plain: str, option: str, tmp_path: Path
) -> None:
    """Names that differ by a prefix are refused with an option that makes the soup."""
    a, b = save(tmp_path / "a", model(0, plain)), save(tmp_path / "b", model(1, prefix))
    out = tmp_path / "out"
    refused = command("uniform", a, b, "-o", out)
    assert refused.returncode == 1
    assert f"rename it with --rename {option}" in refused.stderr
    assert "another architecture" not in refused.stderr
    with pytest.raises(MismatchError, match=f"rename={option}"):
        uniform([a, b], output=out)
    assert command("uniform", a, b, "-o", out, "--rename", option.strip("'")).returncode == 0
    assert load(out).keys() == model(0, plain).keys()
    assert command("verify", out).returncode == 0


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (("modul.=>",), "'?modul.=>'? fits no tensor"),
        (("layers.0.=>", "head.=>"), "gives it the name of layers.0.weight, weight"),
        (("layers.0.weight=>",), "leaves nothing of its name"),
        (("module.",), "is not a prefix and its replacement"),
        (("=>module.",), "is not a prefix and its replacement"),
        (("a=>b=>c",), "is not a prefix and its replacement"),
        ((1,), "is not a list of texts"),
        (7, "is not a list of texts"),
        (("",), "is not a list of texts"),
    ],
)
def test_renaming_that_cannot_be_meant_is_refused(
    rename: Any, message: str, tmp_path: Path
) -> None:
    """A prefix that is nowhere, or that makes two names one, is refused and nothing is written."""
    a = save(tmp_path / "a", model(0))
    with pytest.raises(RecipeError, match=message):
        uniform([a, a], output=tmp_path / "out", options=Options(rename=rename))
    assert os.listdir(tmp_path) == ["a"]


# -- choices --------------------------------------------------------------------------------------


def test_what_is_not_included_is_copied_from_the_first(tmp_path: Path) -> None:
    """With coefficients that do not sum to 1 and with a merge rule too: bit for bit."""
    a, b = save(tmp_path / "a", model(0)), save(tmp_path / "b", model(1))
    options = Options(include="layers.*")
    for make in (
        lambda out: mix([a, b], [0.3, 3.0], output=out, options=options),
        lambda out: ties([a, b], base=a, density=0.5, output=out, options=options),
    ):
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        make(out)
        for name in ("embed_tokens.weight", "head.weight"):
            assert load(out)[name] == load(a)[name]
        assert load(out)["layers.0.weight"] not in (
            load(a)["layers.0.weight"],
            load(b)["layers.0.weight"],
        )
        assert verify(out).rederived


def test_the_rest_may_be_missing_or_of_another_shape(tmp_path: Path) -> None:
    """What is excluded need not fit: the first ingredient alone has to have it."""
    a = save(tmp_path / "a", model(0))
    others = model(1) | {"head.weight": tensor(values(2, 7, 7)), "extra": tensor(values(3, 2))}
    del others["embed_tokens.weight"]
    b = save(tmp_path / "b", others)
    with pytest.raises(MismatchError):
        uniform([a, b], output=tmp_path / "out")
    options = Options(exclude=["head.*", "embed_tokens.*", "extra"])
    uniform([a, b], output=tmp_path / "out", options=options)
    found = load(tmp_path / "out")
    assert found.keys() == model(0).keys()
    assert found["head.weight"] == load(a)["head.weight"]
    assert found["embed_tokens.weight"] == load(a)["embed_tokens.weight"]
    arrays = [load_array(path, "layers.0.weight") for path in (a, b)]
    assert found["layers.0.weight"][2] == mean(*arrays)
    assert verify(tmp_path / "out").rederived
    with pytest.raises(StreamsoupError):
        verify(tmp_path / "out", ingredients=[b, a])


def test_the_rest_may_be_left_out(tmp_path: Path) -> None:
    """With `drop` the soup has what is averaged, and no empty shard."""
    parts = list(model(0).items())
    a = save_sharded(tmp_path / "a", [dict(parts[:1]), dict(parts[1:])])
    b = save(tmp_path / "b", model(1))
    options = Options(exclude=("embed_tokens.*",), drop=True)
    uniform([a, b], output=tmp_path / "out", options=options)
    found = load(tmp_path / "out")
    assert list(found) == ["layers.0.weight", "head.weight"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert verify(tmp_path / "out").rederived


def test_excluding_wins_over_including(tmp_path: Path) -> None:
    """Patterns are those of a shell, and cases count."""
    reading = Reading(include=("*.weight",), exclude=("layers.[1-9]*",))
    names = ("layers.0.weight", "layers.1.weight", "layers.0.bias", "LAYERS.1.weight")
    assert [reading.takes(name) for name in names] == [True, False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ("layer.*",)}, r"'layer\.\*' fits no tensor"),
        ({"exclude": ("bias",)}, "'bias' fits no tensor"),
        ({"exclude": ("*",)}, "leave no tensor to average"),
        ({"drop": True}, "drop=True leaves out what include or exclude choose"),
        ({"include": {"a": 1}}, "is not a list of texts"),
        ({"embeddings": "all"}, "embeddings"),
        ({"dequantize": "yes"}, "truth values"),
    ],
)
def test_choices_that_cannot_be_meant_are_refused(
    settings: Any, message: str, tmp_path: Path
) -> None:
    """A pattern without effect is a mistake, and is told."""
    a, b = save(tmp_path / "a", model(0)), save(tmp_path / "b", model(1))
    with pytest.raises(RecipeError, match=message):
        uniform([a, b], output=tmp_path / "out", options=Options(**settings))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_quantised_tensors_that_are_excluded_are_copied(tmp_path: Path) -> None:
    """Codes that differ do not stand in the way of a soup of the rest, nor does dequantising."""
    codes = [np.arange(4 * 8, dtype=np.uint8) + i for i in (0, 1)]
    quantised = [
        {
            "e.weight": ("F8_E4M3", (4, 8), codes[i].tobytes()),
            "e.weight_scale": tensor(np.float32(2 + i)),
        }
        for i in (0, 1)
    ]
    paths = [save(tmp_path / f"m{i}", model(i) | quantised[i]) for i in (0, 1)]
    with pytest.raises(MismatchError):
        uniform(paths, output=tmp_path / "no")
    uniform(paths, output=tmp_path / "out", options=Options(exclude="e.*", dtype="f32"))
    found = load(tmp_path / "out")
    assert {name: found[name] for name in quantised[0]} == quantised[0]
    verify(tmp_path / "out")
    options = Options(exclude="e.*", dequantize=True)
    uniform(paths, output=tmp_path / "plain", options=options)
    dtype, shape, data = load(tmp_path / "plain")["e.weight"]
    found_values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    magnitude = codes[0]  # below 64: exact in bfloat16
    expected = np.where(
        magnitude < 8,
        magnitude / 8 * 2.0**-6,
        (1 + (magnitude & 7) / 8) * 2.0 ** ((magnitude >> 3).astype(int) - 7),
    )
    assert (dtype, shape) == ("BF16", (4, 8))
    assert np.array_equal(found_values, expected * 2)
    verify(tmp_path / "plain")


# -- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("told", [True, None])
def test_a_tied_copy_is_stored_once(first: str, told: bool | None, tmp_path: Path) -> None:
    """A head that is its embedding, bit for bit, is left out where others lack it, and named."""
    config = {} if told is None else {"tie_word_embeddings": told}
    plain = model(0)
    copied = model(1)
    copied["lm_head.weight"] = copied["embed_tokens.weight"]
    paths = [folder(tmp_path / "a", plain, **config), folder(tmp_path / "b", copied, **config)]
    paths.sort(key=lambda path: path.name != first)
    soup = uniform(paths, output=tmp_path / "out")
    assert load(tmp_path / "out").keys() == plain.keys()
    (said,) = [text for text in soup.warnings if "left out lm_head.weight" in text]
    assert "the same as embed_tokens.weight bit for bit" in said
    assert verify(tmp_path / "out").rederived


def test_heads_that_differ_are_not_left_out(tmp_path: Path) -> None:
    """By one bit, or where a configuration says that they are apart, the soup is refused."""
    copied = model(1)
    dtype, shape, data = copied["embed_tokens.weight"]
    copied["lm_head.weight"] = (dtype, shape, data)
    a = folder(tmp_path / "a", model(0), tie_word_embeddings=False)
    b = folder(tmp_path / "b", copied, tie_word_embeddings=False)
    with pytest.raises(MismatchError, match="likely a tied copy"):
        uniform([a, b], output=tmp_path / "out")
    copied["lm_head.weight"] = (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))
    a = folder(tmp_path / "a", model(0), tie_word_embeddings=True)
    b = folder(tmp_path / "b", copied, tie_word_embeddings=True)
    with pytest.raises(MismatchError, match=r"lm_head\.weight: differs from embed_tokens\.weight"):
        uniform([a, b], output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# -- vocabularies ---------------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]


def speaking(path: Path, seed: int, n_rows: int, words: list[str] | None, **config: Any) -> Path:
    """Save a model with embeddings and a head of a row for each word."""
    tensors = model(seed) | {
        "embed_tokens.weight": tensor(values(seed, n_rows, 4)),
        "lm_head.weight": tensor(values(seed + 30, n_rows, 4)),
        "lm_head.bias": tensor(values(seed + 31, n_rows)),
    }
    folder(path, tensors, vocab_size=n_rows, **config)
    if words is not None:
        text = json.dumps({word: i for i, word in enumerate(words)})
        (path / "vocab.json").write_text(text)
        (path / "tokenizer_config.json").write_text(json.dumps({"n": len(words)}))
    return path


COMMON = Options(embeddings="common")
OF_WORDS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_rows_that_some_have_are_the_mean_of_theirs(
    order: tuple[int, ...], io: Any, tmp_path: Path
) -> None:
    """Common rows are averaged over all, further rows over those that have them."""
    sizes = (6, 8, 9)
    paths = [speaking(tmp_path / f"m{n}", n, sizes[n], WORDS[: sizes[n]]) for n in range(3)]
    given = [paths[n] for n in order]
    with pytest.raises(MismatchError, match="embeddings='common'"):
        uniform(given, output=tmp_path / "no", options=Options(config="first"))
    soup = uniform(given, output=tmp_path / "out", options=Options(embeddings="common", io=io))
    assert order[0] == 2 or soup.warnings == ()
    for name in OF_WORDS:
        arrays = [load_array(path, name).astype(np.float64) for path in given]
        found = load_array(tmp_path / "out", name)
        assert len(found) == 9
        for row in range(9):
            having = [array[row] for array in arrays if len(array) > row]
            expected = (sum(having) / len(having)).astype(np.float32)
            if len(having) < 2 or len(having) == 3:
                assert np.array_equal(found[row], expected)
            np.testing.assert_allclose(found[row], expected, rtol=2e-7)
    arrays = [load_array(path, "layers.0.weight") for path in given]
    assert load(tmp_path / "out")["layers.0.weight"][2] == mean(*arrays)
    assert verify(tmp_path / "out").rederived
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 9
    assert json.loads((tmp_path / "out" / "vocab.json").read_text())["i"] == 8
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"n": 9}


def test_a_row_that_one_has_is_that_row_in_every_rule(tmp_path: Path) -> None:
    """Whatever the coefficients, if they sum to 1, and in a merge over the base."""
    a = speaking(tmp_path / "a", 0, 6, WORDS[:6])
    b = speaking(tmp_path / "b", 1, 8, WORDS[:8])
    mix([a, b], [0.5, 0.5], output=tmp_path / "mixed", options=COMMON)
    ties([b, a], base=a, density=1.0, output=tmp_path / "merged", options=COMMON)
    for out in (tmp_path / "mixed", tmp_path / "merged"):
        for name in OF_WORDS:
            assert np.array_equal(load_array(out, name)[6:], load_array(b, name)[6:])
        assert verify(out).rederived


def test_a_word_with_another_id_is_named(tmp_path: Path) -> None:
    """Where vocabularies disagree on an id that both have, the first one is named."""
    a = speaking(tmp_path / "a", 0, 6, WORDS[:6])
    moved = ["a", "c", "b", *WORDS[3:8]]
    b = speaking(tmp_path / "b", 1, 8, moved)
    with pytest.raises(MismatchError, match=r"do not agree on the ids.*'[bc]' has id"):
        uniform([a, b], output=tmp_path / "out", options=COMMON)
    b = speaking(tmp_path / "b", 1, 8, [*WORDS[:2], "x", "d", "y", *WORDS[5:8]])
    with pytest.raises(MismatchError, match=r"do not agree on the ids.*id 2 is"):
        uniform([a, b], output=tmp_path / "out", options=Options(embeddings="common"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_without_a_tokenizer_it_is_said(tmp_path: Path) -> None:
    """Nothing can be compared then: the rows are taken for the same words, with a warning."""
    paths = [speaking(tmp_path / f"m{n}", n, 6 + n, None) for n in range(2)]
    soup = uniform(paths, output=tmp_path / "out", options=COMMON)
    assert any("no tokenizer beside" in text for text in soup.warnings)


def test_padding_that_one_has_no_token_for_comes_with_the_vocabulary(tmp_path: Path) -> None:
    """The longest vocabulary brings its padding; two that differ are refused as before."""
    a = speaking(tmp_path / "a", 0, 6, WORDS[:6], pad_token_id=None)
    b = speaking(tmp_path / "b", 1, 8, WORDS[:8], pad_token_id=7)
    uniform([a, b], output=tmp_path / "out", options=COMMON)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"vocab_size": 8, "pad_token_id": 7}
    a = speaking(tmp_path / "a", 0, 6, WORDS[:6], pad_token_id=2)
    with pytest.raises(MismatchError, match="pad_token_id"):
        uniform([a, b], output=tmp_path / "no", options=COMMON)


def test_what_has_other_columns_is_still_refused(tmp_path: Path) -> None:
    """Only the number of rows of embeddings and heads may differ."""
    a = speaking(tmp_path / "a", 0, 6, None)
    for name, shape in (("embed_tokens.weight", (8, 5)), ("layers.0.weight", (5, 4))):
        tensors = load(speaking(tmp_path / "b", 1, 8, None)) | {name: tensor(values(1, *shape))}
        save(tmp_path / "b", tensors)
        with pytest.raises(MismatchError, match="differ in the shape"):
            uniform([a, tmp_path / "b"], output=tmp_path / "out", options=COMMON)
    tensors = load(speaking(tmp_path / "b", 1, 8, None))
    save(tmp_path / "b", tensors | {"lm_head.weight": tensor(values(1, 5, 4))})
    with pytest.raises(MismatchError, match="no ingredient has the most rows of all"):
        uniform([a, tmp_path / "b"], output=tmp_path / "out", options=COMMON)


def test_a_search_that_tries_some_refuses_rows_of_others(tmp_path: Path) -> None:
    """A candidate would have rows of ingredients that are not in it."""
    paths = [speaking(tmp_path / f"m{n}", n, 6 + n, WORDS[: 6 + n]) for n in range(2)]
    with pytest.raises(RecipeError, match="has tensors or rows of other ingredients"):
        greedy(paths, lambda model: 0.0, output=tmp_path / "out", options=COMMON)


def test_a_search_of_other_tensors_believes_no_scores(tmp_path: Path) -> None:
    """A choice of tensors is part of what scores are about: a report of another is refused."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))

    paths = [
        save(tmp_path / f"m{n}", {"w": tensor(values(n, 3)), "v": tensor(values(n + 9, 3))})
        for n in range(2)
    ]

    def score(net: Net) -> float:
        return float(net.w.sum() - net.v.sum())

    chosen = Options(exclude="v")
    found = greedy(paths, score, model=Net(), output=tmp_path / "some", options=chosen)
    assert verify(tmp_path / "some").rederived
    for options, is_known in ((chosen, True), (Options(), False)):
        settings = GreedySettings(scores=found.report)
        out = tmp_path / f"again{is_known}"
        if is_known:
            greedy(paths, score, model=Net(), output=out, settings=settings, options=options)
        else:
            with pytest.raises(RecipeError, match="scores are of another search: reading"):
                greedy(paths, score, model=Net(), output=out, settings=settings, options=options)


def test_fewer_ingredients_are_fitted_anew(tmp_path: Path) -> None:
    """What was opened with others is made to fit those it is given with."""
    paths = [speaking(tmp_path / f"m{n}", n, 6 + n, WORDS[: 6 + n]) for n in range(3)]
    opened = open_ingredients(paths, Reading(embeddings="common"))
    uniform(opened[:2], output=tmp_path / "out", options=COMMON)
    assert len(load_array(tmp_path / "out", "lm_head.bias")) == 7
    assert verify(tmp_path / "out").rederived
    found = geometry(opened, base=opened[0], options=COMMON)
    assert found.total.norms[0] == 0


def test_a_killed_soup_of_common_rows_is_resumed(tmp_path: Path) -> None:
    """Killed at any call that writes, the same command ends in the same bytes."""
    paths = [speaking(tmp_path / f"m{n}", n, 6 + n, WORDS[: 6 + n]) for n in range(2)]
    options = ["--embeddings", "common", "--exclude", "head.*", "--rename", "layers.=>blocks."]
    arguments = ["uniform", *map(str, paths), *options, "-o"]
    assert command(*arguments, tmp_path / "whole").returncode == 0
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    stage = tmp_path / "stage"
    stage.mkdir()
    with closing(Machine()) as machine:
        n_calls = machine.run(*arguments, stage / "count", stage=stage).n_calls
        for at in range(1, n_calls, n_calls // 8):
            out = stage / f"out{at}"
            machine.run(*arguments, out, stage=stage, at=at)
            if not out.exists():
                assert machine.run(*arguments, out, stage=stage).status == 0
            assert (out / "model.safetensors").read_bytes() == expected
            assert command("verify", out).returncode == 0
