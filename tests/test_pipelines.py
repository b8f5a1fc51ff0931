"""Pipelines: folders of components are one ingredient, and a soup of them loads as they do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, command, load, save, save_sharded, tensor
from crash import Machine

import streamsoup
from streamsoup import Options, inspect, plan, uniform, verify
from streamsoup.errors import (
    ChangedIngredientError,
    FormatError,
    MismatchError,
    MissingFileError,
    OutputExistsError,
    VerificationError,
)
from streamsoup.formats import listings
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.listings import read_listing

UNET, VAE, TEXT = "unet", "vae", "text_encoder"
WEIGHTS = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model"}


def random(seed: int, *names: str) -> dict[str, Tensor]:
    """Make tensors of these names."""
    rng = np.random.default_rng(seed)
    return {name: tensor(rng.standard_normal((5, 3)).astype("f4")) for name in names}


def diffusers(folder: Path, seed: int) -> Path:
    """Make a pipeline as diffusers saves it: three components with weights, two without."""
    classes: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None] * 2,
    }
    for i, (part, stem) in enumerate(WEIGHTS.items()):
        save(folder / part, random(10 * seed + i, "w", "x.weight"), name=stem)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": part, "width": 3}))
        classes[part] = ["diffusers", part.title()]
    for part in ("scheduler", "tokenizer"):
        (folder / part).mkdir()
        classes[part] = ["diffusers", part.title()]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta": 0.1}))
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    classes["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(classes))
    return folder


def sentences(folder: Path, seed: int) -> Path:
    """Make a model as sentence-transformers saves it: weights in the folder, and in 2_Dense."""
    save(folder, random(seed, "embeddings.weight"))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3}))
    save(folder / "2_Dense", random(seed + 7, "linear.weight"))
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 3}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]  # the last has no folder
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"x.{p}"} for i, p in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def mean(a: Path, b: Path) -> dict[str, Any]:
    """Average two safetensors files with numpy."""
    one, two = load(a), load(b)
    return {
        name: (
            (np.frombuffer(one[name][2], "<f4").astype("f8") + np.frombuffer(two[name][2], "<f4"))
            / 2
        )
        .astype("<f4")
        .tobytes()
        for name in one
    }


def held(path: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor in a file."""
    return {name: data for name, (_, _, data) in load(path).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder but the provenance, which has a date."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.name != "streamsoup.json"
    }


def test_every_component_is_averaged_and_its_files_go_along(tmp_path: Path) -> None:
    """Each component has the mean of its own files, under their own names, and its side files."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    soup = uniform([a, b], output=tmp_path / "soup")
    assert set(tree(tmp_path / "soup")) - {"README.md"} == set(tree(a))
    for part, stem in WEIGHTS.items():
        file = f"{part}/{stem}.safetensors"
        assert held(tmp_path / "soup" / file) == mean(a / file, b / file)
    assert {f"{part}/x.weight" for part in WEIGHTS} < set(soup.provenance.tensors)
    assert verify(tmp_path / "soup").rederived


def test_modules_with_weights_are_never_left_out(tmp_path: Path) -> None:
    """A soup of sentence-transformers has its Dense layer, and names of the model as they were."""
    a, b = sentences(tmp_path / "a", 1), sentences(tmp_path / "b", 2)
    soup = uniform([a, b], output=tmp_path / "soup")
    assert set(soup.provenance.tensors) == {"embeddings.weight", "2_Dense/linear.weight"}
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        assert held(tmp_path / "soup" / file) == mean(a / file, b / file)
    assert verify(tmp_path / "soup").rederived


def test_a_router_lists_modules_of_its_own(tmp_path: Path) -> None:
    """The modules that a Router has in folders of its own are components, too."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        save(folder / "query_0_Dense", random(seed, "linear.weight"))
        save(folder / "document_0_Dense", random(seed + 5, "linear.weight"))
        modules = [{"idx": 0, "name": "0", "path": "", "type": "x.Router"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        types = {"query_0_Dense": "x.Dense", "document_0_Dense": "x.Dense"}
        (folder / "router_config.json").write_text(json.dumps({"types": types}))
    uniform([tmp_path / "a", tmp_path / "b"], output=tmp_path / "soup")
    for file in ("query_0_Dense/model.safetensors", "document_0_Dense/model.safetensors"):
        assert held(tmp_path / "soup" / file) == mean(tmp_path / "a" / file, tmp_path / "b" / file)


def test_chosen_components_are_averaged_and_the_others_come_from_the_first(tmp_path: Path) -> None:
    """With components named, the others are the first's, byte for byte."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    shutil.rmtree(b / VAE)  # not needed, and so not missed
    (b / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 1, "b": 0}))
    options = Options(components=("unet",))
    soup = uniform([a, b], output=tmp_path / "soup", options=options)
    file = f"{UNET}/{WEIGHTS[UNET]}.safetensors"
    made = tree(tmp_path / "soup")
    assert held(tmp_path / "soup" / file) == mean(a / file, b / file)
    first = tree(a)
    assert {name: made[name] for name in first if name != file} == {
        name: content for name, content in first.items() if name != file
    }
    assert soup.recipe.reading.components == ("unet",)
    (warning,) = soup.warnings
    assert warning.endswith("which are used: tokenizer/vocab.json (a 1 and 0, b 0 and 1)")
    assert verify(tmp_path / "soup").rederived
    (tmp_path / "soup" / VAE / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"vae/diffusion_pytorch_model.safetensors has cha"):
        verify(tmp_path / "soup")


def test_a_component_to_copy_has_to_be_complete(tmp_path: Path) -> None:
    """Where the first lacks a shard of a component that is copied, the soup would not load."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    (a / TEXT / "model.safetensors").unlink()
    save_sharded(a / TEXT, [random(1, "w"), random(4, "x.weight")])
    (a / TEXT / "model-00002-of-00002.safetensors").unlink()
    options = Options(components=("unet",))
    with pytest.raises(MissingFileError, match=r"model-00002-of-00002.safetensors: no such file"):
        uniform([a, b], output=tmp_path / "soup", options=options)
    uniform([b, a], output=tmp_path / "soup", options=options)  # of the second it is not needed


def test_the_folder_itself_is_chosen_with_a_dot(tmp_path: Path) -> None:
    """The module without a folder of its own is named ``.``."""
    a, b = sentences(tmp_path / "a", 1), sentences(tmp_path / "b", 2)
    uniform([a, b], output=tmp_path / "soup", options=Options(components=(".",)))
    made = tree(tmp_path / "soup")
    assert held(tmp_path / "soup" / "model.safetensors") == mean(
        a / "model.safetensors", b / "model.safetensors"
    )
    assert made["2_Dense/model.safetensors"] == (a / "2_Dense/model.safetensors").read_bytes()


def test_folders_of_a_training_run_need_no_listing(tmp_path: Path) -> None:
    """With components named, folders that hold only those are ingredients beside a pipeline."""
    a = diffusers(tmp_path / "a", 1)
    save(tmp_path / "checkpoint-5" / UNET, random(3, "w", "x.weight"), name=WEIGHTS[UNET])
    options = Options(components=("unet",))
    uniform([a, tmp_path / "checkpoint-5"], output=tmp_path / "soup", options=options)
    file = f"{UNET}/{WEIGHTS[UNET]}.safetensors"
    assert held(tmp_path / "soup" / file) == mean(a / file, tmp_path / "checkpoint-5" / file)


def test_checkpoints_of_a_run_may_be_pipelines(tmp_path: Path) -> None:
    """A run's checkpoints are found where they are pipelines, or folders of components."""
    run = tmp_path / "run"
    paths = [diffusers(run / f"checkpoint-{n}", n) for n in (5, 10, 15)]
    file = f"{UNET}/{WEIGHTS[UNET]}.safetensors"
    soup = streamsoup.lawa(run, last=2, output=tmp_path / "one")
    assert soup.recipe.ingredients == (str(paths[1]), str(paths[2]))
    assert held(tmp_path / "one" / file) == mean(paths[1] / file, paths[2] / file)
    for path in paths:
        (path / "model_index.json").unlink()
        shutil.rmtree(path / VAE)
    options = Options(components=("unet",))
    streamsoup.lawa(run, last=2, output=tmp_path / "two", options=options)
    assert held(tmp_path / "two" / file) == held(tmp_path / "one" / file)
    with pytest.raises(FormatError, match=r"\(text_encoder, unet\); give one of those, or name"):
        streamsoup.lawa(run, last=2, output=tmp_path / "three")


def test_a_model_with_numbered_modules_is_no_run(tmp_path: Path) -> None:
    """The folders of modules are not taken for checkpoints, and checkpoints beside them are."""
    a = sentences(tmp_path / "a", 1)
    for n in (10, 20):
        sentences(a / f"checkpoint-{n}", n)
    soup = uniform([a], output=tmp_path / "one")
    assert len(soup.recipe.ingredients) == 1
    found = streamsoup.lawa(a, last=2, output=tmp_path / "two").recipe.ingredients
    assert found == (str(a / "checkpoint-10"), str(a / "checkpoint-20"))


@pytest.mark.parametrize("size", [None, 60, 1000])
def test_each_component_has_its_own_shards_and_index(tmp_path: Path, size: int | None) -> None:
    """Shards are those of the first, or cut anew within each component, with an index of each."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = diffusers(tmp_path / name, seed)
        (folder / TEXT / "model.safetensors").unlink()
        save_sharded(folder / TEXT, [random(seed, "w"), random(seed + 3, "x.weight")])
    soup = tmp_path / "soup"
    uniform([tmp_path / "a", tmp_path / "b"], output=soup, options=Options(shard_size=size))
    n_text = len(list((soup / TEXT).glob("*.safetensors")))
    assert n_text == (1 if size == 1000 else 2)
    assert len(list((soup / UNET).glob("*.safetensors"))) == (2 if size == 60 else 1)
    for part in WEIGHTS:
        indexes = list((soup / part).glob("*.index.json"))
        files = {path.name for path in (soup / part).glob("*.safetensors")}
        assert len(indexes) == (len(files) > 1)
        for index in indexes:
            found = json.loads(index.read_text())
            assert set(found["weight_map"].values()) == files
            assert set(found["weight_map"]) == {"w", "x.weight"}
            assert found["metadata"] == {"total_parameters": 30, "total_size": 120}
        assert set(load(soup / part)) == {"w", "x.weight"}
    assert verify(soup).rederived


def test_variants_of_a_component_are_those_that_a_loader_takes(tmp_path: Path) -> None:
    """A lone variant is read and written under its name; beside plain weights it is left out."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = diffusers(tmp_path / name, seed)
        plain = folder / UNET / "diffusion_pytorch_model.safetensors"
        plain.rename(folder / UNET / "diffusion_pytorch_model.fp16.safetensors")
        save(folder / VAE, random(9, "other"), name="diffusion_pytorch_model.fp16")
    soup = uniform([tmp_path / "a", tmp_path / "b"], output=tmp_path / "soup")
    (warning,) = soup.warnings
    assert "left out weights that are not part of the components" in warning
    assert f"{VAE}/diffusion_pytorch_model.fp16.safetensors" in warning
    files = {path.relative_to(tmp_path / "soup").as_posix() for path in tmp_path.glob("soup/*/*")}
    assert f"{UNET}/diffusion_pytorch_model.fp16.safetensors" in files
    assert f"{VAE}/diffusion_pytorch_model.fp16.safetensors" not in files


def test_schedulers_that_differ_are_taken_from_the_first_and_named(tmp_path: Path) -> None:
    """A component without weights that differs is copied from the first, with a warning."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    (b / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta": 0.2}))
    soup = uniform([a, b], output=tmp_path / "soup")
    assert ["scheduler/scheduler_config.json (beta 0.2 and 0.1)" in w for w in soup.warnings] == [1]
    assert json.loads((tmp_path / "soup/scheduler/scheduler_config.json").read_text()) == {
        "beta": 0.1
    }


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("unet/config.json", {"_class_name": "unet", "width": 4}, "unet/config.json differ in 1"),
        ("tokenizer/vocab.json", {"a": 1, "b": 0}, "tokenizer/vocab.json have other token ids"),
    ],
)
def test_components_have_to_mean_the_same(
    tmp_path: Path, name: str, content: dict[str, Any], found: str
) -> None:
    """Configurations and token ids are compared in each component, before a weight is read."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    (b / name).write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=found):
        uniform([a, b], output=tmp_path / "soup")
    chosen = Options(components=("vae",))  # which has another configuration, and no tokens
    uniform([a, b], output=tmp_path / "soup", options=chosen)


def test_a_component_that_another_lacks_is_named(tmp_path: Path) -> None:
    """An ingredient without one of the components is refused, with what to do."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    index = json.loads((b / "model_index.json").read_text())
    index[VAE] = [None, None]
    (b / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MismatchError, match=r"b has no component vae, which .*a has; name those"):
        uniform([a, b], output=tmp_path / "soup")
    with pytest.raises(MismatchError, match=r"b has no component vae, which .*a has; name those"):
        uniform([b, a], output=tmp_path / "soup")
    save(b / UNET, random(3, "w", "other"), name=WEIGHTS[UNET])  # more than components differ
    with pytest.raises(MismatchError, match=r"lacks 3 tensors of .*unet/x.weight"):
        uniform([a, b], output=tmp_path / "soup")


def test_plan_and_inspect_show_components(tmp_path: Path) -> None:
    """What would be read, written and copied is listed with the folders it lies in."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    found = inspect(a, tensors=True)
    assert found.n_tensors == 6
    assert found.tensors["vae/w"].file == "vae/diffusion_pytorch_model.safetensors"
    planned = plan([a, b], options=Options(components=("vae",)))
    assert list(planned.files) == ["vae/diffusion_pytorch_model.safetensors"]
    assert "text_encoder/model.safetensors" in planned.side_files
    status = command("inspect", a, "--components", "vae,unet", "--json")
    assert json.loads(status.stdout)["n_tensors"] == 4


def test_the_dtype_is_said_in_each_configuration(tmp_path: Path) -> None:
    """The configuration of each component names the dtype that its weights were written in."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = diffusers(tmp_path / name, seed)
        (folder / TEXT / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    options = Options(dtype="bf16")
    uniform([tmp_path / "a", tmp_path / "b"], output=tmp_path / "soup", options=options)
    config = json.loads((tmp_path / "soup" / TEXT / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_bytes_do_not_depend_on_how_components_are_read(tmp_path: Path, io: Any) -> None:
    """Mapped or read, with one thread or several, a pipeline's soup has the same bytes."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    uniform([a, b], output=tmp_path / "one", options=Options(io="mmap", threads=1))
    uniform([a, b], output=tmp_path / "two", options=Options(io=io, threads=3))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_change_of_any_component_is_found(tmp_path: Path) -> None:
    """Verification names the file of the component whose bytes are not those that were made."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    soup = tmp_path / "soup"
    uniform([a, b], output=soup)
    file = soup / VAE / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=r"vae/x.weight in vae/diffusion_pytorch_model"):
        verify(soup, quick=True)
    save(soup / VAE, random(1, "w"), name="extra")
    with pytest.raises(VerificationError, match=r"vae"):
        verify(soup, quick=True)


def test_parts_of_a_pipeline_make_the_same_bytes(tmp_path: Path) -> None:
    """Made in three parts and committed, a pipeline has the bytes of a single run."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    chosen = ("unet", "text_encoder")
    uniform([a, b], output=tmp_path / "whole", options=Options(components=chosen, card=False))
    for i in (2, 1, 3):
        options = Options(components=chosen, card=False, part=f"{i}/3")
        assert not (tmp_path / "soup").exists()
        uniform([a, b], output=tmp_path / "soup", options=options)
    streamsoup.commit(tmp_path / "soup")
    assert tree(tmp_path / "soup") == tree(tmp_path / "whole")
    assert not (tmp_path / "soup.parts").exists()
    assert verify(tmp_path / "soup").rederived


# -- what may be replaced -------------------------------------------------------------------------


def test_a_soup_of_pipelines_is_replaced_and_nothing_else_in_it(tmp_path: Path) -> None:
    """An unchanged soup is replaced; with a file in a component that no run made, it is not."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    replaces = Options(overwrite=True)
    uniform([a, b], output=tmp_path / "soup", options=Options(components=("unet",)))
    uniform([a, b], output=tmp_path / "soup", options=replaces)
    save(tmp_path / "soup" / UNET, random(1, "w"), name="mine")
    with pytest.raises(OutputExistsError, match=r"unet/mine\.safetensors"):
        uniform([b, a], output=tmp_path / "soup", options=replaces)
    (tmp_path / "soup" / UNET / "mine.safetensors").unlink()
    save(tmp_path / "soup" / "mine", random(1, "w"))
    with pytest.raises(OutputExistsError, match=r"more than one checkpoint \(mine\)"):
        uniform([b, a], output=tmp_path / "soup", options=replaces)


def test_a_pipeline_of_another_tool_is_replaced_if_it_is_one(tmp_path: Path) -> None:
    """A pipeline with the files of one is replaced; with a folder it does not list, it is not."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    other = diffusers(tmp_path / "other", 3)
    uniform([a, b], output=other, options=Options(overwrite=True))
    other = diffusers(tmp_path / "another", 3)
    save(other / "lora", random(1, "w"))
    with pytest.raises(OutputExistsError, match=r"more than one checkpoint \(lora\)"):
        uniform([a, b], output=other, options=Options(overwrite=True))


# -- hostile folders ------------------------------------------------------------------------------

OUT_OF_IT = (
    *("..", "../b", "/etc", "unet/../../b", ".", "./unet", "a//b", "a/", "\\b", "a\\..\\..\\b"),
    *(".git", "unet/.hidden", "a\0b", "x" * 300, "/".join("abcdefghi"), "\ud800"),
    *("streamsoup.json", "README.md", "model.safetensors", "unet/x.index.json"),
)


@pytest.mark.parametrize("path", OUT_OF_IT, ids=ascii)
def test_paths_that_lead_out_of_a_pipeline_are_refused(tmp_path: Path, path: str) -> None:
    """A listing can name no folder outside of its own, nor one that has the name of a file."""
    save(tmp_path / "b", random(1, "w"))
    for name, listing in (
        ("model_index.json", {path: ["diffusers", "X"]}),
        ("modules.json", [{"idx": 0, "name": "0", "path": path, "type": "X"}]),
    ):
        if name == "model_index.json" and path.startswith("_"):
            continue
        folder = save(tmp_path / name.removesuffix(".json"), random(2, "w"))
        (folder / name).write_text(json.dumps(listing))
        with pytest.raises(FormatError, match=rf"{name}: lists the component .* not a plain path"):
            open_ingredients([folder])


def test_a_listing_that_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    """What is not JSON, too large, a FIFO or a link out of the folder is refused, not read."""
    folder = save(tmp_path / "a", random(1, "w"))
    listing = folder / "model_index.json"
    listing.write_text("{")
    with pytest.raises(FormatError, match=r"model_index.json: is not JSON"):
        open_ingredients([folder])
    listing.write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"model_index.json: is not JSON"):
        open_ingredients([folder])
    listing.write_text(" " * (listings._LIMIT + 1))
    with pytest.raises(FormatError, match=r"model_index.json: cannot be read: it is too large"):
        open_ingredients([folder])
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(FormatError, match=r"model_index.json: cannot be read"):
        open_ingredients([folder])
    listing.unlink()
    (tmp_path / "secret").write_text('{"../x": ["a", "b"]}')
    listing.symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"is a link out of the ingredient"):
        open_ingredients([folder])
    listing.unlink()
    listing.write_text(json.dumps({f"c{i}": ["a", "b"] for i in range(1001)}))
    with pytest.raises(FormatError, match=r"lists more than 1000 components"):
        open_ingredients([folder])


def test_a_router_that_lists_itself_ends(tmp_path: Path) -> None:
    """Routers within routers are followed as far as a path may be long, and no further."""
    save(tmp_path, random(1, "w"))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "x"}]))
    deep = tmp_path
    for _ in range(12):
        (deep / "router_config.json").write_text(json.dumps({"types": {"a": "x", "b": "x"}}))
        deep = deep / "a"
        deep.mkdir()
    with pytest.raises(FormatError, match=r"not a plain path within the folder"):
        read_listing(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", []),
        ("model_index.json", {"_class_name": "X", "a": "b", "c": [None, None], "d": [1, 2]}),
        ("modules.json", {"path": "x"}),
        ("modules.json", []),
        ("modules.json", [{"path": 3}]),
    ],
)
def test_json_that_means_something_else_makes_no_pipeline(
    tmp_path: Path, name: str, content: Any
) -> None:
    """A folder with a file of such a name that lists no components is a plain checkpoint."""
    a = save(tmp_path / "a", random(1, "w"))
    (a / name).write_text(json.dumps(content))
    uniform([a, a], output=tmp_path / "soup")
    assert set(load(tmp_path / "soup")) == {"w"}


def test_linked_components_are_refused(tmp_path: Path) -> None:
    """A component that is a link could lead anywhere, and its side files are not followed."""
    a = diffusers(tmp_path / "a", 1)
    (a / VAE).rename(tmp_path / "elsewhere")
    (a / VAE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"vae: is a link"):
        open_ingredients([a])


def test_components_that_cannot_be_read_come_with_advice(tmp_path: Path) -> None:
    """Missing folders and pickles are refused, and what to choose instead is said."""
    a = diffusers(tmp_path / "a", 1)
    weights = a / VAE / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".onnx"))
    with pytest.raises(FormatError, match=r"vae: has no .*components='unet,text_encoder'"):
        open_ingredients([a])
    shutil.rmtree(a / VAE)
    with pytest.raises(MissingFileError, match=r"lists the component vae, which has no folder"):
        open_ingredients([a])


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (("vea",), "lists no component vea; choose components from unet, vae"),
        (("scheduler",), "scheduler: has no weights; choose other components"),
        (("../b",), "not a plain path within the folder"),
    ],
)
def test_components_that_are_not_there_are_refused(
    tmp_path: Path, components: tuple[str, ...], message: str
) -> None:
    """An unknown component is refused, with those that there are."""
    a = diffusers(tmp_path / "a", 1)
    diffusers(tmp_path / "b", 2)
    with pytest.raises(FormatError, match=message):
        uniform([a, a], output=tmp_path / "soup", options=Options(components=components))


def test_components_of_a_plain_checkpoint_are_refused(tmp_path: Path) -> None:
    """A checkpoint that is no pipeline has no components to choose from."""
    save(tmp_path / "a", random(1, "w"))
    with pytest.raises(FormatError, match=r"a: is no pipeline, as it has neither model_index.json"):
        uniform([tmp_path / "a"], output=tmp_path / "s", options=Options(components=("unet",)))
    found = command("inspect", tmp_path / "a", "--components", "unet,,vae")
    assert found.returncode == 2
    assert "is not a list of names such as unet,vae" in found.stderr


def test_a_name_that_belongs_to_two_components_is_refused(tmp_path: Path) -> None:
    """A tensor of the folder itself that is named after a component could not be told from it."""
    a = sentences(tmp_path / "a", 1)
    save(a, random(1, "2_Dense/linear.weight"))
    with pytest.raises(FormatError, match=r"has the name of a tensor in the component '2_Dense'"):
        open_ingredients([a])


def test_pipelines_in_the_cache_of_the_hub_are_read(tmp_path: Path) -> None:
    """A snapshot, whose files are links to blobs, makes the same soup as plain folders."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    options = Options(components=("vae",), card=False)
    uniform([a, b], output=tmp_path / "plain", options=options)
    blobs = tmp_path / "models--org--a" / "blobs"
    snapshot = tmp_path / "models--org--a" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(path for path in a.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(a)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{i:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{i:040x}", link.parent))
    uniform([snapshot, b], output=tmp_path / "cached", options=options)
    assert tree(tmp_path / "cached") == tree(tmp_path / "plain")
    (snapshot / UNET / "diffusion_pytorch_model.safetensors").unlink()
    secret = save(tmp_path / "secret", random(1, "w"))
    (snapshot / UNET / "diffusion_pytorch_model.safetensors").symlink_to(
        secret / "model.safetensors"
    )
    with pytest.raises(FormatError, match=r"is a link out of the ingredient"):
        uniform([snapshot, b], output=tmp_path / "hostile", options=options)
    with pytest.raises(FormatError, match=r"is a link out of the ingredient"):
        open_ingredients([snapshot])


def test_what_may_have_changed_is_told_by_its_component(tmp_path: Path) -> None:
    """A file rewritten in place with its old time stamp is suspected, under its full names."""
    (ingredient,) = open_ingredients([diffusers(tmp_path / "a", 1)])
    source = ingredient.source
    file = tmp_path / "a" / VAE / "diffusion_pytorch_model.safetensors"
    status = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    suspects = source.suspects(strict=True)
    assert suspects is not None
    assert sorted(suspects.tensors) == ["vae/w", "vae/x.weight"]
    source.settle(suspects)
    assert source.suspects(strict=True) is None
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ChangedIngredientError, match=r"vae/diffusion_pytorch_model"):
        source.check_unchanged("vae/w")
    source.check_unchanged("unet/w")


# -- kills ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Start a machine that can be told to fail."""
    found = Machine()
    yield found
    found.close()


@pytest.mark.parametrize("action", ["kill", "power", "ENOSPC"])
def test_a_failure_at_any_call_leaves_all_components_or_none(
    tmp_path: Path, machine: Machine, action: str
) -> None:
    """Stopped at any call, the output is absent or whole, and the same command finishes it."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    (a / TEXT / "model.safetensors").unlink()
    save_sharded(a / TEXT, [random(1, "w"), random(4, "x.weight")])
    stage = tmp_path / "stage"
    stage.mkdir()
    argv = ["uniform", a, b, "--components", "unet,text_encoder", "--threads", "1", "-o"]
    assert machine.run(*argv, stage / "soup", stage=stage).status == 0
    whole = tree(stage / "soup")
    n_calls = 10**6
    at = 0
    while at < n_calls:
        at += 1 + at // (25 if action == "kill" else 5)
        shutil.rmtree(stage)
        stage.mkdir()
        found = machine.run(*argv, stage / "soup", stage=stage, at=at, action=action)
        n_calls = found.n_calls
        if (stage / "soup").exists():
            assert tree(stage / "soup") == whole
        again = machine.run(*argv, stage / "soup", stage=stage)
        made_before = "This very recipe made it" in again.stderr
        assert again.status == 0 or made_before, again.stderr
        assert tree(stage / "soup") == whole
        assert [path.name for path in stage.iterdir()] == ["soup"]


def test_finished_leaves_of_a_component_are_not_made_again(
    tmp_path: Path, machine: Machine
) -> None:
    """Work of a killed run is taken over out of folders too: what is noted is not read again."""
    a, b = diffusers(tmp_path / "a", 1), diffusers(tmp_path / "b", 2)
    stage = tmp_path / "stage"
    stage.mkdir()
    argv = ["uniform", a, b, "--threads", "1", "-o", stage / "soup"]
    n_calls = machine.run(*argv, stage=stage).n_calls
    whole = tree(stage / "soup")
    for at in range(n_calls // 2, n_calls):
        shutil.rmtree(stage)
        stage.mkdir()
        machine.run(*argv, stage=stage, at=at)
        journals = [*stage.glob("soup.partial/work-*/journal")]
        if journals and journals[0].read_text().count('{"leaves"'):
            break
    else:
        raise AssertionError("no run was killed after its first note")
    inodes = _inodes(next(stage.glob("soup.partial/work-*/soup")))
    assert machine.run(*argv, stage=stage).status == 0
    assert tree(stage / "soup") == whole
    kept = {n: i for n, i in _inodes(stage / "soup").items() if n.endswith(".safetensors")}
    assert kept == {name: inodes[name] for name in kept}


def _inodes(folder: Path) -> Mapping[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_ino
        for path in folder.rglob("*")
        if path.is_file()
    }
