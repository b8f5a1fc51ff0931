"""Pipelines: folders of components are one ingredient, and a soup of them loads as they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import command, load, save, save_sharded
from pipelines import TEXT, UNET, VAE, WEIGHTS, diffusers, held, mean, random, sentences, tree

import streamsoup
from streamsoup import Options, inspect, plan, uniform, verify
from streamsoup.errors import (
    FormatError,
    MismatchError,
    MissingFileError,
    VerificationError,
)


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


def test_one_file_has_no_components(tmp_path: Path) -> None:
    """Components that are chosen of a lone file are refused, not passed over."""
    a = save(tmp_path / "a", random(1, "w"))
    with pytest.raises(FormatError, match="is one file, with no components"):
        uniform(
            [a / "model.safetensors"], output=tmp_path / "o", options=Options(components=("x",))
        )


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
    with pytest.raises(MismatchError, match=r"has no component vae, which .* has; name those"):
        uniform([a, b], output=tmp_path / "soup")
    with pytest.raises(MismatchError, match=r"has no component vae, which .* has; name those"):
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
