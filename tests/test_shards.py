"""Folders, indexes and strange files: opened by headers alone, or refused by name; never a hang."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    content,
    save,
    save_sharded,
    tensor,
)
from sharded import INDEX, SHARDS, A, B, index, pipe_shard, pointer_shard

from streamsoup.errors import (
    FormatError,
    MissingFileError,
    RecipeError,
    StreamsoupError,
    UnsafePickleError,
)
from streamsoup.formats.ingredients import open_ingredients

Breaker = Callable[[Path], None]


def text(value: str) -> Breaker:
    """Make the index this text."""
    return lambda folder: (folder / INDEX).write_text(value) and None


def placed(file: object) -> Breaker:
    """Make the index place a tensor in this file."""
    return lambda folder: index(folder, {"a": SHARDS[0], "b": file})


def pipe_index(folder: Path) -> None:
    """Put a FIFO in place of the index."""
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


def folder_index(folder: Path) -> None:
    """Put a folder in place of the index."""
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()


def huge_index(folder: Path) -> None:
    """Make the index sparse, and larger than any."""
    os.truncate(folder / INDEX, 2_000_000_000)


def dangling_index(folder: Path) -> None:
    """Put a link to nothing in place of the index."""
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("nowhere")


def folder_shard(folder: Path) -> None:
    """Put a folder in place of a shard."""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).mkdir()


def device_shard(folder: Path) -> None:
    """Put a link to a device in place of a shard."""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("/dev/zero")


def no_shard(folder: Path) -> None:
    """Remove a shard."""
    (folder / SHARDS[1]).unlink()


def dangling_shard(folder: Path) -> None:
    """Put a link to nothing in place of a shard, as a pruned download cache does."""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("../../blobs/gone")


def circular_shard(folder: Path) -> None:
    """Put a link to itself in place of a shard."""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(SHARDS[1])


def twice(folder: Path) -> None:
    """Put one tensor in two shards."""
    (folder / SHARDS[1]).write_bytes(content(A | B))


def unlisted(folder: Path) -> None:
    """Put a tensor in a shard that the index knows nothing of."""
    (folder / SHARDS[1]).write_bytes(content(B | {"c": tensor(np.zeros(1, np.float32))}))


def two_checkpoints(folder: Path) -> None:
    """Put a whole model beside a sharded one."""
    save(folder, A)


def several_indexes(folder: Path) -> None:
    """Leave two indexes, neither of the usual name."""
    (folder / INDEX).rename(folder / "x.safetensors.index.json")
    (folder / "y.safetensors.index.json").write_bytes(
        (folder / "x.safetensors.index.json").read_bytes()
    )


def several_files(folder: Path) -> None:
    """Lose the index."""
    (folder / INDEX).unlink()


def only_pickles(folder: Path) -> None:
    """Leave nothing but pickles."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def in_hub_cache(folder: Path) -> None:
    """Leave a snapshot, as the hub's cache has it."""
    for path in list(folder.iterdir()):
        path.unlink()
    save_sharded(folder / "snapshots" / "abc", [A, B])
    (folder / "blobs").mkdir()


def nothing(folder: Path) -> None:
    """Leave an empty folder."""
    for path in folder.iterdir():
        path.unlink()


HOSTILE: dict[str, tuple[Breaker, str, str]] = {
    # What is done; the file that must be named, "" for the folder; a phrase.
    "not JSON": (text("{"), INDEX, "not JSON"),
    "empty": (text(" "), INDEX, "not JSON"),
    "a number without end": (text('{"n":' + "9" * 10_000 + "}"), INDEX, "no weight_map"),
    "a list": (text("[]"), INDEX, "no weight_map"),
    "null": (text("null"), INDEX, "no weight_map"),
    "no weight_map": (text("{}"), INDEX, "no weight_map"),
    "weight_map a list": (text('{"weight_map":["a"]}'), INDEX, "no weight_map"),
    "weight_map empty": (text('{"weight_map":{}}'), INDEX, "no weight_map"),
    "nested deep": (text('{"weight_map":' + "[" * 100_000), INDEX, "not JSON"),
    "key twice": (text('{"weight_map":{"a":"x","\\u0061":"y"}}'), INDEX, "twice"),
    "weight_map twice": (text('{"weight_map":{},"weight_map":{}}'), INDEX, "twice"),
    "file null": (placed(None), INDEX, "plain name"),
    "file a number": (placed(2), INDEX, "plain name"),
    "file a list": (placed([SHARDS[1]]), INDEX, "plain name"),
    "file empty": (placed(""), INDEX, "plain name"),
    "file above": (placed(f"../{SHARDS[1]}"), INDEX, "plain name"),
    "file below": (placed(f"sub/{SHARDS[1]}"), INDEX, "plain name"),
    "file here": (placed(f"./{SHARDS[1]}"), INDEX, "plain name"),
    "file absolute": (placed(f"/tmp/{SHARDS[1]}"), INDEX, "plain name"),
    "file with a backslash": (placed(f"..\\{SHARDS[1]}"), INDEX, "plain name"),
    "file with a NUL": (placed(f"\0{SHARDS[1]}"), INDEX, "plain name"),
    "file hidden": (placed(".safetensors"), INDEX, "plain name"),
    "file dots": (placed(".."), INDEX, "plain name"),
    "file a pickle": (placed("pytorch_model.bin"), INDEX, "plain name"),
    "file with control characters": (placed("\x1b[2J.safetensors"), "", "no such file"),
    "file a lone surrogate": (placed("\ud800.safetensors"), "", "not Unicode"),
    "file a raw byte": (placed("\udcff.safetensors"), "", "not Unicode"),
    "file name too long": (placed("x" * 300 + ".safetensors"), "", "cannot be read"),
    "file misplaced": (lambda f: index(f, dict.fromkeys("ab", SHARDS[0])), INDEX, "no shard holds"),
    "files exchanged": (
        lambda f: index(f, {"a": SHARDS[1], "b": SHARDS[0]}),
        INDEX,
        f"places tensor 'a' in {SHARDS[1]}",
    ),
    "lists a tensor too many": (
        lambda f: index(f, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}),
        INDEX,
        f"lists 1 tensor that no shard holds: c ({SHARDS[1]})",
    ),
    "lists too few": (
        unlisted,
        INDEX,
        f"does not list 1 tensor that its shards hold: c ({SHARDS[1]})",
    ),
    "passes over a shard": (
        lambda f: index(f, {"a": SHARDS[0]}),
        INDEX,
        f"lists nothing of {SHARDS[1]}, by name of the same set",
    ),
    "index a FIFO": (pipe_index, INDEX, "not a regular file"),
    "index a folder": (folder_index, INDEX, "not a regular file"),
    "index huge": (huge_index, INDEX, "too large"),
    "index dangling": (dangling_index, INDEX, "cannot be read"),
    "index not UTF-8": (
        lambda f: (f / INDEX).write_bytes(b'{"weight_map":{"\xff":"x"}}') and None,
        INDEX,
        "not JSON",
    ),
    "shard a FIFO": (pipe_shard, SHARDS[1], "not a regular file"),
    "shard a folder": (folder_shard, SHARDS[1], "not a regular file"),
    "shard a device": (device_shard, SHARDS[1], "link out of the ingredient, to /dev/zero"),
    "shard missing": (no_shard, SHARDS[1], "no such file"),
    "shard dangling": (dangling_shard, SHARDS[1], "no such file"),
    "shard circular": (circular_shard, SHARDS[1], "cannot be read"),
    "shard a pointer": (pointer_shard, SHARDS[1], "git lfs pull"),
    "tensor in two shards": (twice, "", "in two shards"),
    "two checkpoints": (two_checkpoints, "", "two checkpoints in one folder"),
    "several indexes": (several_indexes, "", "several indexes"),
    "several files, no index": (several_files, "", "no index"),
    "only pickles": (only_pickles, "", "could run code"),
    "a model in the cache of the hub": (in_hub_cache, "", "(snapshots/abc); give one of those"),
    "nothing": (nothing, "", "no safetensors file"),
}

ADVICE = (
    "; download, ",
    "so download or save it again",
    "fix that and run again",
    "git lfs pull",
)
ADVICE += (
    "put the file itself there",
    "give one of those",
    "give the file you mean",
    "convert it to safetensors first",
    "give a folder",
    "rename it",
)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each wrong folder is refused at once, in one line that names the file and says what to do."""
    from streamsoup.cli import cli

    breaker, named, phrase = HOSTILE[case]
    folder = save_sharded(tmp_path / "model", [A, B])
    breaker(folder)
    with pytest.raises((FormatError, MissingFileError)) as refused:
        open_ingredients([folder])
    message = str(refused.value)
    assert message.startswith(str(folder / named))
    assert phrase in message
    assert any(each in message for each in ADVICE)
    assert message.isprintable()
    assert cli(["inspect", str(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}\n"
    assert printed.out == ""


def test_strange_files_are_refused(tmp_path: Path) -> None:
    """A FIFO, socket, device, dangling or circular link, or pickle, given by name, is refused."""
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "file").write_bytes(content(A))
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # paths of sockets are short
    listener.bind("socket")
    os.chdir(here)
    listener.close()
    for path, kind in (
        (tmp_path / "fifo.safetensors", FormatError),
        (tmp_path / "socket", FormatError),
        (Path("/dev/zero"), FormatError),
        (Path("/dev/null"), FormatError),
        (tmp_path / "loop", FormatError),
        (tmp_path / "gone", MissingFileError),
        (tmp_path / "file" / "below", FormatError),
        (tmp_path / ("x" * 300), FormatError),
        (tmp_path / "model.bin", UnsafePickleError),
        (tmp_path / "model\0.safetensors", FormatError),
        (tmp_path / "model\udcff.safetensors", FormatError),
    ):
        with pytest.raises(kind) as refused:
            open_ingredients([path])
        assert isinstance(refused.value, StreamsoupError)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 800  # the line that converts a pickle included


def test_an_unlistable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be listed is a FormatError that says why."""
    folder = save(tmp_path / "m", A)

    def deny(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(FormatError, match="cannot be listed: Permission denied"):
        open_ingredients([folder])


def test_what_holds_no_checkpoint_is_answered_with_what_it_holds(tmp_path: Path) -> None:
    """The folder of a run is answered with its checkpoints, an empty one with nothing."""
    for name in ("checkpoint-1", "checkpoint-2"):
        save(tmp_path / "run" / name, A)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x\x1b.csv").write_text("")
    for name, phrase in (
        ("run", r"in its folders \(checkpoint-1, checkpoint-2\); give one of those"),
        ("empty", "has no safetensors file, nothing at all; give a folder with a checkpoint"),
        ("data", r"has no safetensors file, only x\\x1b.csv; give"),
    ):
        with pytest.raises(FormatError, match=phrase):
            open_ingredients([tmp_path / name])


def test_a_hub_id_gets_advice() -> None:
    """A name such as org/model is answered with how to get its files."""
    with pytest.raises(MissingFileError, match="or type `hf download meta-llama/Llama-3`"):
        open_ingredients(["meta-llama/Llama-3"])


@pytest.mark.parametrize("plain", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("sharded", [False, True])
def test_variants_are_for_those_who_ask(tmp_path: Path, plain: str, sharded: bool) -> None:
    """What from_pretrained takes of a folder is taken: no variant, where there is another."""
    folder = save(tmp_path / "a", A)
    (folder / "model.safetensors").rename(folder / f"{plain}.safetensors")
    variant = f"{plain}.fp16.safetensors"
    if sharded:
        variant = f"{plain}.safetensors.index.fp16.json"
        names = [f"{plain}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for name, part in zip(names, (A, B), strict=True):
            (folder / name).write_bytes(content(part))
        places = dict.fromkeys(A, names[0]) | dict.fromkeys(B, names[1])
        (folder / variant).write_text(json.dumps({"weight_map": places}))
    else:
        (folder / variant).write_bytes(content(B))
    (both, asked) = open_ingredients([folder, folder / variant])
    assert set(both.layout.places) == set(A)
    assert set(asked.layout.places) == ({*A, *B} if sharded else set(B))


def test_one_path_is_no_list(tmp_path: Path) -> None:
    """The letters of a path are not taken for paths."""
    path = save(tmp_path / "a", A)
    for one in (path, str(path), bytes(path)):
        with pytest.raises(RecipeError, match="is one path; expected a list"):
            open_ingredients(one)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected a list of ingredients, got one"):
        open_ingredients({"a": torch.ones(1)})  # type: ignore[arg-type]
