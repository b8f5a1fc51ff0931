"""What --overwrite may delete: a soup as it was made, or a checkpoint, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save, tensor

from streamsoup.errors import OutputExistsError
from streamsoup.methods.fixed import uniform
from streamsoup.options import Options

OVERWRITE = Options(overwrite=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a checkpoint with side files, one of them in a folder."""
    model = save(tmp_path / "model", {"t": tensor(np.ones((4, 5), "f4"))})
    (model / "config.json").write_text("{}")
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "vocab.txt").write_text("soup\n")
    return model


def refused(model: Path, output: Path) -> str:
    """Fail to replace the output, which stays as it is; return the message."""
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError) as caught:
        uniform([model], output=output, options=OVERWRITE)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not output.with_name(output.name + ".partial").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["notes.md", "eval/results.json", "README.md", ".git/config", ".env"]
)
@pytest.mark.parametrize("soup", [True, False])
def test_what_is_not_of_the_soup_is_refused_by_name(
    model: Path, tmp_path: Path, name: str, soup: bool
) -> None:
    """Notes and results put beside a soup, or beside a checkpoint of another tool, are kept."""
    output = tmp_path / "soup"
    if soup:
        uniform([model], output=output)
    else:
        save(output, {"t": tensor(np.ones(3, "f4"))})
    path = output / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    named = name.partition("/")[0] if name.startswith(".") else name
    assert f"({named})" in refused(model, output)
    path.unlink()
    if path.parent != output:
        path.parent.rmdir()
    uniform([model], output=output, options=OVERWRITE)


def test_a_file_of_the_soup_that_was_edited_is_the_users(model: Path, tmp_path: Path) -> None:
    """Told by size or digest: of side files, shards and the provenance; put back, all goes."""
    output = tmp_path / "soup"
    uniform([model], output=output)
    for name, change in (
        ("config.json", b"[]"),
        ("tokenizer/vocab.txt", b"soup\n\n"),
        ("streamsoup.json", (output / "streamsoup.json").read_bytes().replace(b"model", b"mobel")),
        ("model.safetensors", (output / "model.safetensors").read_bytes() + b"\0"),
        ("model.safetensors", (output / "model.safetensors").read_bytes().replace(b'"t"', b'"u"')),
    ):
        before = (output / name).read_bytes()
        assert change != before
        (output / name).write_bytes(change)
        message = refused(model, output)
        assert f"changed since the soup was made ({name})" in message
        (output / name).write_bytes(before)
    (output / "tokenizer" / "vocab.txt").unlink()  # what is missing is not lost
    uniform([model], output=output, options=OVERWRITE)
    assert (output / "tokenizer" / "vocab.txt").exists()


def test_a_link_in_the_place_of_a_file_is_no_file_of_the_soup(model: Path, tmp_path: Path) -> None:
    """Nor are FIFOs, which are not waited for."""
    output = tmp_path / "soup"
    uniform([model], output=output)
    config = output / "config.json"
    config.unlink()
    config.symlink_to(model / "config.json")
    assert "config.json" in refused(model, output)
    config.unlink()
    os.mkfifo(config)
    assert "config.json" in refused(model, output)


def test_shards_are_not_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing stays cheap: of shards the header alone is read."""
    from streamsoup.output import belongings

    large = save(tmp_path / "large", {"t": tensor(np.ones(1 << 20, "f4"))})
    uniform([large], output=tmp_path / "soup")
    read = []
    digest = belongings.digest_bytes
    monkeypatch.setattr(
        belongings, "digest_bytes", lambda text: read.append(len(text)) or digest(text)
    )
    with belongings.Folder.open(str(tmp_path / "soup")) as folder:
        assert belongings.strange_files(folder) == ([], [])
    assert len(read) == 1
    assert read[0] < 1000
