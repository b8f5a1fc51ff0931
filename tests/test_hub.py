"""Models of the Hugging Face Hub by their ids: found in its cache, or downloaded into it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import command, content, save, tensor

import streamsoup
from streamsoup.errors import MissingFileError
from streamsoup.formats.remote.hub_cache import cache_folder, find_cached, hub_model
from streamsoup.formats.remote.snapshots import with_snapshots

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and a working folder beside it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def put(cache: Path, model: str, commit: str, value: float, revision: str = "main") -> Path:
    """Lay a model of two shards out as huggingface_hub does, with links into ``blobs``."""
    folder = cache / f"models--{model.replace('/', '--')}"
    made = cache.parent / "made" / model / commit
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    made.mkdir(parents=True)
    for n, name in enumerate(names):
        (made / name).write_bytes(content({f"w{n}": tensor(np.full(5, value + n, "f4"))}))
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    (made / "config.json").write_text('{"model_type": "plain"}')
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for file in made.iterdir():
        blob = folder / "blobs" / f"{commit[:4]}{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


def test_an_id_is_its_snapshot(cache: Path) -> None:
    """A soup of ids has the bytes of one of the folders; branches and commits choose snapshots."""
    one, two = put(cache, "org/one", FIRST, 1.0), put(cache, "org/two", SECOND, 5.0)
    other = put(cache, "org/one", SECOND, 9.0, "refs/pr/1")
    streamsoup.uniform(["org/one", "org/two@main"], output="by-id")
    streamsoup.uniform([one, two], output="by-folder")
    for name in os.listdir("by-folder"):
        assert Path("by-id", name).exists()
        if name.endswith((".safetensors", "index.json")):
            assert Path("by-id", name).read_bytes() == Path("by-folder", name).read_bytes()
    for revision in ("refs/pr/1", SECOND):
        (opened,) = streamsoup.open_ingredients([f"org/one@{revision}"])
        assert opened.path == str(other)


def test_the_commit_is_recorded(cache: Path) -> None:
    """Verify reads the commit that was averaged, when the branch has moved and the cache, too."""
    put(cache, "org/one", FIRST, 1.0)
    put(cache, "org/two", FIRST, 5.0)
    streamsoup.uniform(["org/one", "org/two"], output="soup")
    record = json.loads(Path("soup/streamsoup.json").read_text())
    assert [each["path"].endswith(f"/snapshots/{FIRST}") for each in record["ingredients"]] == [
        *(True, True)
    ]
    put(cache, "org/one", SECOND, 100.0)
    streamsoup.verify("soup")
    moved = cache.rename(cache.parent / "elsewhere")
    with pytest.raises(MissingFileError, match=f"org/one@{FIRST}"):
        streamsoup.verify("soup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(moved))
        streamsoup.verify("soup")


def test_ids_beside_adapters(cache: Path) -> None:
    """In ``BASE+ADAPTER`` either may be an id; what names nothing is left as it is."""
    base = put(cache, "org/one", FIRST, 1.0)
    Path("adapter").mkdir()
    assert with_snapshots("org/one+adapter", download=False) == f"{base}+adapter"
    assert with_snapshots("adapter+org/one@main", download=False) == f"adapter+{base}"
    for path in ("org/one", "none+adapter", "org/one+none", "adapter+adapter"):
        assert with_snapshots(path, download=False) == path
    with pytest.raises(MissingFileError, match="hf download org/two"):
        with_snapshots("org/two+adapter", download=False)


def test_a_local_folder_wins(cache: Path) -> None:
    """What exists here under a name is never looked for in the cache."""
    put(cache, "org/one", FIRST, 1.0)
    save(Path("org/one"), {"here": tensor(np.ones(1, "f4"))})
    assert list(streamsoup.open_ingredients(["org/one"])[0].layout.places) == ["here"]


def test_what_is_missing_is_named(cache: Path) -> None:
    """A shard that the index lists, a link to nothing, and a lone configuration: all refused."""
    snapshot = put(cache, "org/one", FIRST, 1.0)
    shard = snapshot / "model-00002-of-00002.safetensors"
    target = os.readlink(shard)
    for spoil in (shard.unlink, os.path.realpath):
        shard.unlink(missing_ok=True)
        if spoil is os.path.realpath:
            shard.symlink_to(f"{target}-gone")
        with pytest.raises(MissingFileError, match=r"lacks model-00002-of-00002\.safetensors"):
            streamsoup.uniform(["org/one"], output="soup")
    for file in snapshot.iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(MissingFileError, match="lacks its weights"):
        streamsoup.uniform(["org/one"], output="soup")


def test_indexes_of_other_weights_do_not_count(cache: Path) -> None:
    """Indexes of variants and pickles are often downloaded without what they list."""
    snapshot = put(cache, "org/one", FIRST, 1.0)
    for name in ("model.safetensors.index.fp16.json", "pytorch_model.bin.index.json"):
        (snapshot / name).write_text('{"weight_map": {"w": "x.safetensors"}}')
    model = hub_model("org/one")
    assert model is not None
    found = find_cached(model)
    assert found is not None
    assert not found.missing


def test_what_to_type(cache: Path) -> None:
    """Of a model that is not here, the message says how to get it, as an option and as a line."""
    ran = command("inspect", "org/one@v1")
    assert ran.returncode == 1
    assert "--download, or type `hf download org/one --revision v1`" in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path",
    [
        *("one", "a/b/c", "../one", "/a/b", "org/..", "org/one@../../x", "org/one@a/../b"),
        *("org/model.safetensors", "~/one", "org/one@", "or--g/one", "org/one.json"),
    ],
)
def test_what_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Paths that lead elsewhere, and names of files, are never looked up."""
    monkeypatch.chdir(tmp_path)
    assert hub_model(path) is None


def test_a_reference_leads_nowhere_else(cache: Path) -> None:
    """A reference that holds anything but a commit is not followed."""
    snapshot = put(cache, "org/one", FIRST, 1.0)
    (snapshot.parent.parent / "refs/main").write_text("../../../x")
    model = hub_model("org/one")
    assert model is not None
    assert find_cached(model) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/x", "HF_HOME": "/y"}, "/x"),
        ({"HF_HOME": "/y", "XDG_CACHE_HOME": "/z"}, "/y/hub"),
        ({"XDG_CACHE_HOME": "/z"}, "/z/huggingface/hub"),
        ({"HF_HOME": "$ELSEWHERE/y", "ELSEWHERE": "/e"}, "/e/y/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """The variables of huggingface_hub are gone by, in its order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected
