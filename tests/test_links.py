"""Links inside an ingredient: followed within it and into its own cache, nowhere else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import as_hub_snapshot, command, save, save_sharded, tensor

from streamsoup import Options, uniform
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import FormatError
from streamsoup.formats import side_files
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.links import real_inside
from streamsoup.output.make import make, order
from streamsoup.recipe import Coefficients

MODEL = {"w": tensor(np.arange(4.0))}
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def contents(folder: Path) -> bytes:
    """Return all that is in the files of a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_secret_ends_in_a_soup(tmp_path: Path) -> None:
    """Links to keys, devices and the environment are left out, each by name, in every spelling."""
    secret = tmp_path / "home" / "id_ed25519"
    secret.parent.mkdir()
    secret.write_text(SECRET)
    a = save(tmp_path / "a", MODEL)
    (a / "sub").mkdir()
    (tmp_path / "link").symlink_to(secret.parent)
    links = {
        "absolute.txt": str(secret),
        "relative.json": "../home/id_ed25519",
        "sub/deep.txt": "../../home/id_ed25519",
        "by_a_link.txt": "../link/id_ed25519",
        "by_itself.txt": "../a/../home/id_ed25519",
        "chain.txt": "absolute.txt",
        "config.json": "../home/id_ed25519",
        "environ.txt": "/proc/self/environ",
        "like_it.txt": f"{tmp_path}/ab/key",
    }
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "key").write_text(SECRET)
    for name, target in links.items():
        (a / name).symlink_to(target)
    ran = command("uniform", a, "-o", tmp_path / "out", env={"TOKEN": SECRET})
    assert ran.returncode == 0
    assert SECRET.encode() not in contents(tmp_path / "out")
    made = ["README.md", "model.safetensors", "streamsoup.json"]
    assert sorted(os.listdir(tmp_path / "out")) == made
    assert "left out what is neither a plain file nor a link to one in this folder" in ran.stderr
    (first,) = open_ingredients([a])
    _, warnings = side_files.gather_side_files([first], None)
    names = warnings[0].split("copy it there: ")[1]
    assert all(name in names for name in links) or "more" in names


def test_without_the_check_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: with the check taken out, the key is copied."""
    (tmp_path / "key").write_text(SECRET)
    a = save(tmp_path / "a", MODEL)
    (a / "note.txt").symlink_to("../key")
    monkeypatch.setattr(side_files, "real_inside", lambda path, folder: path)
    uniform([a], output=tmp_path / "out")
    assert SECRET.encode() in contents(tmp_path / "out")


def test_links_that_stay_are_followed(tmp_path: Path) -> None:
    """Within the folder, through any path to it, and into the blobs of its own cache."""
    a = save(tmp_path / "a", MODEL)
    (a / "tokenizer.json").write_text("{}")
    (a / "sub").mkdir()
    (a / "sub" / "tokenizer.json").symlink_to("../tokenizer.json")
    (tmp_path / "link").symlink_to(a)
    uniform([tmp_path / "link"], output=tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "tokenizer.json").read_text() == "{}"
    snapshot = as_hub_snapshot(save_sharded(tmp_path / "b", [MODEL]), tmp_path / "models--o--n")
    blob = tmp_path / "models--o--n" / "blobs" / "0"
    blob.write_text("{}")
    (snapshot / "unet").mkdir()
    (snapshot / "unet" / "config.json").symlink_to("../../../blobs/0")
    assert real_inside(str(snapshot / "unet" / "config.json"), str(snapshot)) == str(blob)
    within = str(snapshot / "unet")
    assert real_inside(str(snapshot / "unet" / "config.json"), within) == str(blob)
    uniform([snapshot], output=tmp_path / "hub")
    assert (tmp_path / "hub" / "unet" / "config.json").read_text() == "{}"


def test_a_cache_that_leads_out_is_none(tmp_path: Path) -> None:
    """Neither a blob that is a link, nor a folder of blobs that is one, opens a way out."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text(SECRET)
    cache = tmp_path / "models--o--n"
    snapshot = as_hub_snapshot(save(tmp_path / "b", MODEL), cache)
    (cache / "blobs" / "key").symlink_to("../../home/key")
    (snapshot / "a.txt").symlink_to("../../blobs/key")
    assert real_inside(str(snapshot / "a.txt"), str(snapshot)) is None
    other = tmp_path / "other" / "snapshots" / "1"
    other.parent.mkdir(parents=True)
    save(other, MODEL)
    (tmp_path / "other" / "blobs").symlink_to("../home")
    (other / "a.txt").symlink_to("../../blobs/key")
    assert real_inside(str(other / "a.txt"), str(other)) is None
    (other / "b.txt").symlink_to(f"{cache}/blobs/key")
    assert real_inside(str(other / "b.txt"), str(other)) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_weights_behind_a_link_are_refused(tmp_path: Path, name: str) -> None:
    """A shard or an index that is a link out of its folder is refused, with where it leads."""
    a = save_sharded(tmp_path / "a", [MODEL, {"v": MODEL["w"]}])
    shutil.move(a / name, tmp_path / name)
    (a / name).symlink_to(f"../{name}")
    with pytest.raises(FormatError) as refused:
        open_ingredients([a])
    assert str(refused.value) == (
        f"{a / name}: is a link out of the ingredient, to {tmp_path / name}; put the file itself "
        "there, or give the path of the file or folder you mean"
    )
    shutil.move(tmp_path / name, a / "sub")
    (a / name).unlink()
    (a / name).symlink_to("sub")
    assert len(open_ingredients([a])[0].layout.places) == 2


def test_a_path_that_was_given_is_followed(tmp_path: Path) -> None:
    """What the user names is meant, be it a link to a file or to a folder."""
    a = save(tmp_path / "a", MODEL)
    (tmp_path / "b.safetensors").symlink_to(a / "model.safetensors")
    (tmp_path / "b").symlink_to(a)
    opened = open_ingredients([tmp_path / "b.safetensors", tmp_path / "b"])
    assert [list(each.layout.places) for each in opened] == [["w"], ["w"]]


def test_a_link_put_there_later_is_not_followed(tmp_path: Path) -> None:
    """Between the plan and the copy, a file that becomes a link is an error, not a copy."""
    (tmp_path / "key").write_text(SECRET)
    a = save(tmp_path / "a", MODEL)
    (a / "note.txt").write_text("plain")
    options = Options()
    equal = Linear(Coefficients.uniform(1))
    ordered = order([a], equal, method="uniform", options=options)
    (a / "note.txt").unlink()
    (a / "note.txt").symlink_to("../key")
    with pytest.raises(FormatError, match=r"note\.txt: cannot be copied"):
        make(ordered, output=tmp_path / "out", options=options)
