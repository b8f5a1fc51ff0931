"""Recipes of mergekit: some fifty shapes against their meaning in numpy, layers, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import load_array, save, tensor
from mergekit_cases import CASES, REFUSED
from mergekit_meaning import meaning

import streamsoup
from streamsoup import Options
from streamsoup.cli import cli
from streamsoup.errors import MismatchError, RecipeError, StreamsoupError
from streamsoup.formats.documents import read_document
from streamsoup.formats.stacked import pieces_of
from streamsoup.methods.mergekit.merging import merge

RANDOM = ["dare-ties", "dare-linear", "della", "della-linear"]
SHAPES = {
    "self_attn.o_proj.weight": (8, 12),
    "mlp.down_proj.weight": (12, 7),
    "input_layernorm.weight": (40,),
}
CONFIG = {
    "num_hidden_layers": 4,
    "layer_types": ["full", "sliding", "full", "sliding"],
    "hidden_size": 12,
    "torch_dtype": "float32",
}
Model = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Save base, A, B and C in the current folder, and return them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (9, 12)}
    for layer in range(4):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
    shapes |= {"model.norm.weight": (12,), "lm_head.weight": (9, 12)}
    base = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    common = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    found: dict[str, Model] = {}
    for name in ("base", "A", "B", "C"):
        size = 0.0 if name == "base" else 0.01
        own = {
            key: (value + size * (common[key] + rng.normal(size=value.shape))).astype("f4")
            for key, value in base.items()
        }
        save(tmp_path / name, {key: tensor(value) for key, value in own.items()})
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        found[name] = own
    return found


def make(text: str, output: str = "soup", **options: Any) -> streamsoup.Soup:
    """Make the soup of a recipe."""
    Path("r.yaml").write_text(text)
    return merge(read_document("r.yaml"), output=output, options=Options(**options))


def weights(folder: str) -> dict[str, bytes]:
    """Return the shards of a soup."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


@pytest.mark.parametrize("name", [name for name in CASES if name not in RANDOM])
def test_a_recipe_means_what_mergekit_makes_of_it(name: str, models: dict[str, Model]) -> None:
    """Every tensor is that of an independent reading of the recipe, to float32's rounding."""
    make(CASES[name])
    wanted = meaning(CASES[name], models)
    found = {key: load_array(Path("soup"), key) for key in wanted}
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=3e-7, atol=3e-7, err_msg=key)
    header = streamsoup.inspect("soup", tensors=True).tensors
    assert set(header) == set(wanted)
    n_layers = len({key.split(".")[2] for key in wanted if key.startswith("model.layers.")})
    config = json.loads(Path("soup/config.json").read_text())
    assert config["num_hidden_layers"] == n_layers == len(config["layer_types"])
    streamsoup.verify("soup")


def test_the_meaning_can_be_wrong(models: dict[str, Model]) -> None:
    """Planted fault: one gradient turned round is noticed."""
    make(CASES["linear-gradient"])
    wanted = meaning(CASES["linear-gradient"].replace("[1, 0.7, 0.3, 0]", "[1, 1]"), models)
    key = "model.layers.3.mlp.down_proj.weight"
    assert not np.allclose(load_array(Path("soup"), key), wanted[key], rtol=1e-5)


def test_random_methods_are_ours() -> None:
    """DARE and DELLA draw the masks of our own verbs, so that recipes are reproducible."""
    make(CASES["dare-ties"], "one")
    given = {"coefficients": [0.4, 0.3], "consensus": "sum"}
    streamsoup.dare(["A", "B"], 0.53, base="base", output="two", **given)
    assert weights("one") == weights("two")
    make(CASES["dare-linear"], "three")
    streamsoup.dare(["A", "B"], [0.3, 0.7], base="base", output="four", coefficients=0.5)
    assert weights("three") == weights("four")
    make(CASES["della"], "five")
    options = {"coefficients": 0.5, "epsilon": 0.4, "normalize": True}
    streamsoup.della(["A", "B"], 0.5, base="base", output="six", **options)
    assert weights("five") == weights("six")
    make(CASES["della-linear"], "seven")
    streamsoup.verify("seven")


@pytest.mark.parametrize(("lines", "message"), REFUSED.items())
def test_what_is_not_supported_is_refused_at_its_line(lines: str, message: str) -> None:
    """The message names the file, the line, the key and the reason; nothing is written."""
    recipe = "models:\n  - model: A\n  - model: B\nmerge_method: linear\nparameters: {weight: 1}\n"
    (Path("C") / "vocab.json").write_text('{"a": 1}')
    for key in yaml.safe_load(lines):
        recipe = "".join(line for line in recipe.splitlines(True) if not line.startswith(f"{key}:"))
    with pytest.raises(StreamsoupError, match=message) as refusal:
        make(f"{recipe}{lines}\n")
    assert re.match(r"r\.yaml:\d+: ", str(refusal.value))
    assert not Path("soup").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: A, layer_range: [2, 2]}]\n",
            r"r\.yaml:3: layer_range: expected two numbers",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: A, layer_range: [2, 5]}]\n",
            r"r\.yaml:3: layer_range: A has 4 layers, 0 to 3",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: A}]\n",
            r"r\.yaml:3: a source needs a layer_range",
        ),
        (
            "merge_method: linear\nslices:\n  - sources:\n      - {model: A, layer_range: [0, 2]}\n"
            "      - {model: B, layer_range: [0, 3]}\n",
            r"r\.yaml:3: sources have 2 and 3 layers",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
            "  - sources: [{model: A, layer_range: [0, 2]}]\n"
            "  - sources: [{model: A, layer_range: [2, 4]}, {model: B, layer_range: [2, 4]}]\n",
            r"r\.yaml:5: 2 sources, and the first slice has 1",
        ),
        (
            "merge_method: ties\nbase_model: base\nslices:\n"
            "  - sources: [{model: A, layer_range: [0, 4], parameters: {weight: 1}}]\n",
            r"r\.yaml:4: the base_model base is not among the sources; add it",
        ),
        ("merge_method: linear\nmodules: {a: {models: []}, b: {models: []}}\n", "by their modules"),
        ("merge_method: linear\n", r"r\.yaml:1: names neither models nor slices"),
        ("experts: []\nbase_model: A\n", r"r\.yaml:1: experts: mixtures of experts"),
        ("merge_method: linear\nmodels: [A]\n", r"r\.yaml:2: expected keys with values, got 'A'"),
    ],
)
def test_wrong_structures_are_refused(text: str, message: str) -> None:
    """Slices and models that cannot be meant are refused where they stand."""
    with pytest.raises(StreamsoupError, match=message):
        make(text)
    assert not Path("soup").exists()


def test_a_tokenizer_may_be_named_where_all_are_the_same() -> None:
    """That of another model is taken if it has the files of the first; else it is refused."""
    for model in "ABC":
        (Path(model) / "vocab.json").write_text('{"a": 0}' if model != "C" else '{"a": 1}')
    two = "merge_method: linear\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 1}\n"
    make(two + "tokenizer_source: B\n")
    assert Path("soup/vocab.json").read_text() == '{"a": 0}'
    with pytest.raises(RecipeError, match=r"r\.yaml:4: tokenizer_source: .* which differs"):
        make(two + "tokenizer_source: C\n", "other")


def test_what_mergekit_ignores_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys and parameters without effect are warnings, with what was likely meant."""
    text = (
        "name: mine\nmerge_method: linear\ndtype: float32\nmodels:\n"
        "  - model: A\n    parameters: {weight: 1, density: .5, normalize: false}\n"
        "  - {model: B, revision: v2, parameters: {weight: 1, wieght: 2}}\n"
    )
    soup = make(text)
    assert len(soup.warnings) == 5
    for expected in (
        r"^r\.yaml:1: name: is ignored, as mergekit does$",
        r"^r\.yaml:7: revision: is ignored",
        r"^r\.yaml:6: density: linear has no such parameter, and mergekit ignores it$",
        r"^r\.yaml:6: normalize: is one for all models, and mergekit ignores it here",
        r"^r\.yaml:7: wieght: .*; did you mean weight\?$",
    ):
        assert any(re.search(expected, warning) for warning in soup.warnings), expected
    stock = make(CASES["model-stock"] + "parameters: {weight: 1}\n", "stock")
    assert any("weight: model_stock has no such parameter" in w for w in stock.warnings)


def test_the_command_reads_both_formats(capsys: pytest.CaptureFixture[str]) -> None:
    """Run tells them apart; mergekit's needs -o, and --dtype counts more than the file."""
    Path("m.yml").write_text(CASES["slerp"] + "dtype: bfloat16\n")
    assert cli(["run", "m.yml"]) == 1
    assert "m.yml:2: a recipe of mergekit names no output; give -o OUT" in capsys.readouterr().err
    assert cli(["run", "m.yml", "-o", "one", "-q"]) == 0
    assert cli(["run", "m.yml", "-o", "two", "-q", "--dtype", "f16"]) == 0
    assert streamsoup.inspect("one").dtypes.keys() == {"BF16"}
    assert streamsoup.inspect("two").dtypes.keys() == {"F16"}
    assert json.loads(Path("one/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["ties-gradients", "slerp-card", "nearswap-gradient"])
def test_recipes_are_shared_out_in_parts(name: str) -> None:
    """Two processes that make a part each write the bytes of one."""
    make(CASES[name], "whole")
    make(CASES[name], "parts", part="1/2")
    make(CASES[name], "parts", part="2/2", commit=True)
    assert weights("parts") == weights("whole")


def test_out_dtype_is_that_of_the_file() -> None:
    """Dtype is what mergekit works in; ours works in float64, and out_dtype is written."""
    make(CASES["linear"] + "dtype: float32\nout_dtype: bfloat16\n")
    assert streamsoup.inspect("soup").dtypes.keys() == {"BF16"}


def test_models_may_be_tables() -> None:
    """A model as a table has a path, a revision, and an adapter, which become one path."""
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: "
    make(text + "{model: {path: A}}\n")
    assert weights("soup") != {}
    with pytest.raises(StreamsoupError, match=r"A@v1\+L@v2"):
        make(text + "{model: {path: A, revision: v1}, lora: {path: L, revision: v2}}\n", "other")


def test_layers_are_an_ingredient_of_their_own(models: dict[str, Model]) -> None:
    """A[0:2],B[1:3] can be given to any verb; mapped or read, the bytes are the same."""
    path = "A[0:2],B[1:3]"
    streamsoup.uniform([path, "C"], output="one")
    streamsoup.uniform([path, "C"], output="two", options=Options(io="read", threads=1))
    assert weights("one") == weights("two")
    key = "model.layers.3.mlp.down_proj.weight"
    there = "model.layers.2.mlp.down_proj.weight"
    mean = (models["B"][there].astype("f8") + models["C"][key].astype("f8")) / 2
    assert (load_array(Path("one"), key) == mean.astype("f4")).all()
    recorded = json.loads(Path("one/streamsoup.json").read_text())["ingredients"][0]["path"]
    assert recorded == f"{Path('A').resolve()}[0:2],{Path('B').resolve()}[1:3]"
    streamsoup.verify("one")
    changed = dict(models["B"]) | {there: models["B"][there] + 1}
    save(Path("B"), {name: tensor(value) for name, value in changed.items()})
    with pytest.raises(streamsoup.errors.VerificationError, match="is not the one that was used"):
        streamsoup.verify("one")


def test_a_folder_whose_name_looks_like_layers_is_a_folder() -> None:
    """What exists is a path, whatever it is called."""
    Path("A").rename("A[0:2]")
    assert pieces_of("A[0:2]") is None
    assert streamsoup.inspect("A[0:2]").n_tensors == 15
    for text in ("A[0:2", "A[0:]", "[0:2]", "A[0:2]x", "A[0:2],"):
        assert pieces_of(text) is None, text


def test_only_one_stack_of_layers_is_cut() -> None:
    """An encoder and a decoder, or no layers at all, are refused by name."""
    weight = {"w": tensor(np.zeros(3, "f4"))}
    both = {f"{part}.block.{i}.w": weight["w"] for part in ("encoder", "decoder") for i in (0, 1)}
    save(Path("T5"), both)
    save(Path("flat"), weight)
    with pytest.raises(MismatchError, match=r"T5: has layers under encoder\.block\. and decoder"):
        streamsoup.inspect("T5[0:1]")
    with pytest.raises(MismatchError, match="flat: has no layers"):
        streamsoup.inspect("flat[0:1]")
    with pytest.raises(RecipeError, match=r"A\[3:9\]: there are 4 layers"):
        streamsoup.inspect("A[3:9]")


def test_a_stack_of_many_shards_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large stacks are cut into files; the soup has the same tensors, and an index."""
    make(CASES["frankenmerge"], "one")
    monkeypatch.setattr("streamsoup.formats.stacked.SHARD", 2000)
    make(CASES["frankenmerge"], "many")
    assert len(weights("many")) > 3
    assert Path("many/model.safetensors.index.json").exists()
    names = streamsoup.inspect("one", tensors=True).tensors
    assert set(names) == set(streamsoup.inspect("many", tensors=True).tensors)
    streamsoup.verify("many")
