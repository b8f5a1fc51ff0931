"""Folders, indexes and strange files: opened by headers alone, or refused by name; never a hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    as_hub_snapshot,
    command,
    content,
    load_array,
    random_model,
    save,
    save_sharded,
    tensor,
)

import streamsoup
from streamsoup import Options, uniform, verify
from streamsoup.engine.budget import opening_nbytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    BudgetError,
    ChangedIngredientError,
    CorruptFileError,
    FormatError,
    MissingFileError,
    RecipeError,
    StreamsoupError,
    UnsafePickleError,
)
from streamsoup.formats.index import read_index
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.stored import open_stored
from streamsoup.output import make
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients

A = {"a": tensor(np.zeros(3, np.float32))}
B = {"b": tensor(np.ones((2, 2), np.float16))}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def index(folder: Path, weight_map: object, **more: object) -> None:
    """Replace the index of a folder."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))


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


def pipe_shard(folder: Path) -> None:
    """Put a FIFO in place of a shard."""
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


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


def pointer_shard(folder: Path) -> None:
    """Leave a shard unfetched by Git LFS."""
    (folder / SHARDS[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


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
    "convert them",
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
    with pytest.raises(MissingFileError, match="download it first"):
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


def test_all_layouts_open_alike(tmp_path: Path) -> None:
    """A file, a folder, shards with an index and a snapshot of links hold the same tensors."""
    model = random_model(1)
    names = list(model)
    halves = [{n: model[n] for n in names[:4]}, {n: model[n] for n in names[4:]}]
    single = save(tmp_path / "single", model)
    sharded = save_sharded(tmp_path / "sharded", halves)
    linked = as_hub_snapshot(save_sharded(tmp_path / "x", halves), tmp_path / "models--org--name")
    odd = save(tmp_path / "odd", model, name="consolidated")
    opened = open_ingredients([single / "model.safetensors", single, sharded, linked, odd])
    for ingredient in opened:
        assert list(ingredient.layout.places) == names
        found = {
            name: (spec.dtype.name, spec.shape)
            for name, (_, spec) in ingredient.layout.places.items()
        }
        assert found == {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in model.items()}
        for name, (number, spec) in ingredient.layout.places.items():
            whole = Path(ingredient.source.shards[number].path).read_bytes()
            begin = ingredient.source.shards[number].data_begin + spec.begin
            assert whole[begin : begin + spec.nbytes] == model[name][2]
    assert [each.folder is None for each in opened] == [True, False, False, False, False]


def test_an_index_is_an_ingredient_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an index stands for the checkpoint of its folder, side files and all."""
    folder = save_sharded(tmp_path / "m", [A, B])
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (whole,) = open_ingredients([folder])
    for given, at in ((folder / INDEX, tmp_path), (INDEX, folder)):
        monkeypatch.chdir(at)
        (opened,) = open_ingredients([given])
        assert opened.name == str(given)
        assert list(opened.layout.places) == list(whole.layout.places)
        assert opened.index_name == INDEX
    out = uniform([folder / INDEX], output=tmp_path / "out").path
    assert verify(out).n_files == 4
    with pytest.raises(FormatError, match=r"config\.json: is JSON text \(give the folder"):
        open_ingredients([folder / "config.json"])
    os.truncate(folder / INDEX, 5)
    with pytest.raises(CorruptFileError, match=rf"^{folder / INDEX}: is not JSON"):
        open_ingredients([folder / INDEX])


@pytest.mark.parametrize(
    "variant", ["model.safetensors.index.fp16.json", "model.safetensors.fp16.index.json"]
)
def test_an_index_of_a_variant_is_one(tmp_path: Path, variant: str) -> None:
    """An index named for a variant of the weights opens, and the soup's is named alike."""
    folder = save_sharded(tmp_path / "m", [A, B])
    (folder / INDEX).rename(folder / variant)
    for given in (folder, folder / variant):
        assert open_ingredients([given])[0].index_name == variant
    out = uniform([folder], output=tmp_path / "out").path
    assert {*os.listdir(out)} == {*SHARDS, variant, "streamsoup.json"}
    assert verify(out).n_files == 3
    save(folder, A, name="model.fp16")
    with pytest.raises(FormatError, match=r"has both model\.fp16\.safetensors and model\.saf"):
        open_ingredients([folder])


def test_an_index_may_hold_any_number(tmp_path: Path) -> None:
    """What else an index says is not read: a number of any length is no reason to refuse it."""
    folder = save_sharded(tmp_path / "m", [A, B])
    written = json.loads((folder / INDEX).read_text())["weight_map"]
    digits = "9" * 10_000
    (folder / INDEX).write_text(f'{{"n":{digits},"weight_map":{json.dumps(written)}}}')
    assert len(open_ingredients([folder])[0].layout.places) == 2
    (folder / INDEX).write_text(f'{{"weight_map":{{"a":{digits}}}}}')
    with pytest.raises(CorruptFileError, match="not the plain name") as refused:
        open_ingredients([folder])
    assert len(str(refused.value)) < 500


def test_an_index_beside_other_weights_is_preferred(tmp_path: Path) -> None:
    """Weights in another layout beside an index, as Mistral publishes them, do no harm."""
    folder = save_sharded(tmp_path / "m", [A, B])
    save(folder, A, name="consolidated")
    (opened,) = open_ingredients([folder])
    assert list(opened.layout.places) == ["a", "b"]


def test_equal_headers_are_kept_once(tmp_path: Path) -> None:
    """Fine-tunes of one model share one parsed layout; a different one has its own."""
    paths = [save_sharded(tmp_path / f"m{i}", [A, B]) for i in range(3)]
    other = save_sharded(tmp_path / "other", [A, {"b": tensor(np.ones(4, np.float16))}])
    first, second, third, fourth = open_ingredients([*paths, other])
    assert first.layout is second.layout is third.layout
    assert fourth.layout is not first.layout
    assert fourth.source.shards[0].header is first.source.shards[0].header


def test_metadata_makes_no_difference(tmp_path: Path) -> None:
    """Fine-tunes share their layout whatever their files say besides; none of it is held."""
    tensors = {"a": tensor(np.arange(5.0)), "b": tensor(np.arange(3, dtype=np.float16))}
    said = [{"step": str(10**i), "tags": "x" * 10**6 * i} for i in range(4)]
    paths = [save(tmp_path / f"m{i}", tensors, metadata) for i, metadata in enumerate(said)]
    tracemalloc.start()
    opened = open_ingredients(paths)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({id(each.layout) for each in opened}) == 1
    assert len({each.source.shards[0].data_begin for each in opened}) == 4
    assert held < 100_000
    assert peak < 4_500_000
    soup = uniform(opened, output=tmp_path / "soup")
    assert (load_array(tmp_path / "soup", "a") == np.arange(5.0)).all()
    assert verify(soup.path).rederived
    # The plan knows what was held while they were opened.
    ordered = order(paths, Linear(Coefficients.uniform(4)), method="mix", options=Options())
    assert opening_nbytes(ordered.plan) > 3_000_000
    large = save(tmp_path / "large", tensors, {"tags": "x" * 90_000_000})
    ordered = order([large], Linear(Coefficients.uniform(1)), method="mix", options=Options())
    assert ordered.memory.peak_nbytes > 110_000_000
    few = Options(memory="114MB")
    with pytest.raises(BudgetError, match="opening these ingredients takes up to 116"):
        order([large], Linear(Coefficients.uniform(1)), method="mix", options=few)
    with pytest.raises(BudgetError, match="opening these ingredients"):
        streamsoup.geometry([large, large], options=few)


def test_work_is_not_resumed_with_a_file_written_in_place(tmp_path: Path) -> None:
    """Reproducible archives give all files one time: the same size and times are not the same."""
    paths = [save(tmp_path / f"m{i}", {"a": tensor(np.arange(5.0) + i)}) for i in range(2)]
    file = paths[0] / "model.safetensors"
    os.utime(file, (1, 1))

    def fingerprint() -> str:
        coefficients = Coefficients.uniform(2)
        return make._fingerprint(
            order(paths, Linear(coefficients), method="mix", options=Options())
        )

    before = fingerprint()
    assert fingerprint() == before
    with open(file, "r+b") as opened:
        opened.write(content({"a": tensor(np.arange(5.0) + 9)}))
    os.utime(file, (1, 1))
    assert fingerprint() != before


def test_an_open_ingredient_is_checked_again(tmp_path: Path) -> None:
    """Giving an ingredient that is already open is fine, unless its file changed meanwhile."""
    path = save(tmp_path / "m", A)
    (opened,) = open_ingredients([path])
    assert open_ingredients([opened]) == [opened]
    save(path, B)
    with pytest.raises(ChangedIngredientError, match=r"model\.safetensors: changed size"):
        open_ingredients([opened])


def test_a_header_that_shrinks_while_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut between its length and its header is corrupt, and named."""
    path = save(tmp_path / "m", A) / "model.safetensors"
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CorruptFileError, match=f"^{path}: ended while"):
        open_stored(path)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that comes in single bytes is the same header."""
    path = save(tmp_path / "m", A | B)
    (whole,) = open_ingredients([path])
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:1]], at))
    (piecemeal,) = open_ingredients([path])
    assert piecemeal.layout.places == whole.layout.places


def test_a_name_that_is_not_unicode_is_refused_early(tmp_path: Path) -> None:
    """A path that no provenance could note is refused before the work, not after it."""
    folder = os.fsencode(tmp_path) + b"/m\xff"
    os.mkdir(folder)
    with open(folder + b"/model.safetensors", "wb") as file:
        file.write(content(A))
    with pytest.raises(FormatError, match=r"m\\udcff: its path is not Unicode"):
        open_ingredients([os.fsdecode(folder)])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "metadata",
    [
        {f"{i:x}": "" for i in range(50_000)},
        {"log": [[]] * 200_000},
        {"log": [1] * 200_000},
        {"log": "x" * 2_000_000},
        {"log": "\U0001f963" * 200_000},
    ],
)
def test_an_index_takes_no_more_than_is_said(tmp_path: Path, metadata: Any) -> None:
    """Whatever is in it besides the weight map."""
    path = tmp_path / "model.safetensors.index.json"
    index = {"metadata": metadata, "weight_map": {"a": "model.safetensors"}}
    path.write_text(json.dumps(index, ensure_ascii=False))
    tracemalloc.start()
    try:
        _, said = read_index(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said / 8 < peak < said + 10_000


def test_opening_leaves_no_descriptor(tmp_path: Path) -> None:
    """Neither an ingredient that opens nor one that is refused keeps a descriptor."""
    good = save_sharded(tmp_path / "good", [A, B])
    bad = save_sharded(tmp_path / "bad", [A, B])
    pointer_shard(bad)
    before = len(os.listdir("/proc/self/fd"))
    kept = open_ingredients([good] * 20)
    for _ in range(20):
        with pytest.raises(FormatError):
            open_ingredients([bad])
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 20


def test_wrong_ingredients_leave_no_output(tmp_path: Path) -> None:
    """The command line refuses with one line and status 1, and makes neither output nor staging."""
    good = save_sharded(tmp_path / "good", [A, B])
    bad = save_sharded(tmp_path / "bad", [A, B])
    pipe_shard(bad)
    ran = command("uniform", good, bad, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stdout) == (1, "")
    why = "it is not a regular file; fix that and run again"
    assert ran.stderr == f"error: {bad / SHARDS[1]}: cannot be read: {why}\n"
    assert sorted(os.listdir(tmp_path)) == ["bad", "good"]


def test_one_shard_of_several_is_no_checkpoint(tmp_path: Path) -> None:
    """A download that was interrupted before the index came is refused; the file alone is not."""
    name = "model-00001-of-00003"
    folder = save(tmp_path / "a", {"w": tensor(np.zeros(4, np.float32))}, name=name)
    with pytest.raises(FormatError, match=r"00003\.safetensors alone, one of 3 by its name"):
        open_ingredients([folder])
    (opened,) = open_ingredients([folder / f"{name}.safetensors"])
    assert list(opened.layout.places) == ["w"]


def test_an_index_that_was_never_fetched(tmp_path: Path) -> None:
    """A Git LFS pointer is named as such in the place of an index, too."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(FormatError, match="is a Git LFS pointer"):
        open_ingredients([tmp_path])


def test_a_folder_that_was_removed_under_us(tmp_path: Path) -> None:
    """Relative paths lead nowhere then, which is said; state dicts and whole paths are as ever."""
    script = """
import os, sys, streamsoup, torch
os.rmdir(os.getcwd())
states = [{"w": torch.ones(2)}, {"w": torch.zeros(2) + 3}]
print(streamsoup.uniform(states, output=sys.argv[1]).provenance.tensors.keys())
try:
    streamsoup.uniform(["a", "b"], output=sys.argv[1] + "2")
except streamsoup.errors.MissingFileError as error:
    print(error)
"""
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True)
    assert ran.stderr == ""
    assert "dict_keys(['w'])" in ran.stdout
    assert "a: cannot be found, as the folder we are in was removed" in ran.stdout


def test_an_index_that_would_take_much_memory_is_refused_unread(tmp_path: Path) -> None:
    """Millions of values in a small file are refused by their number, before any is decoded."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata":{"log":[' + "[]," * 3_000_000 + "[]]}}")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match="too large for an index, or holds far too much"):
            read_index(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size
