"""Pipelines that are hostile or damaged, in the place of others, and runs that are killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import command, load, save, save_sharded
from crash import Machine
from pipelines import TEXT, UNET, VAE, diffusers, random, sentences, tree

from streamsoup import Options, uniform
from streamsoup.errors import (
    ChangedIngredientError,
    FormatError,
    MissingFileError,
    OutputExistsError,
)
from streamsoup.formats import listings
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.listings import read_listing

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
    (a / VAE).unlink()
    save(tmp_path / "elsewhere" / "inner", random(1, "w"))
    (a / "deep").symlink_to(tmp_path / "elsewhere")
    (a / "model_index.json").write_text(json.dumps({"deep/inner": ["x", "X"]}))
    with pytest.raises(FormatError, match=r"deep: is a link"):
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
