"""Opening ingredients: all layouts alike, bounded memory, no descriptor left, changes noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from sharded import INDEX, SHARDS, A, B, pipe_shard, pointer_shard

import streamsoup
from streamsoup import Options, uniform, verify
from streamsoup.engine.budget import opening_nbytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    BudgetError,
    ChangedIngredientError,
    CorruptFileError,
    FormatError,
)
from streamsoup.formats.index import read_index
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.stored import open_stored
from streamsoup.output import make
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients


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
    assert verify(out).n_files == 5
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
    assert {*os.listdir(out)} == {*SHARDS, variant, "README.md", "streamsoup.json"}
    assert verify(out).n_files == 4
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
