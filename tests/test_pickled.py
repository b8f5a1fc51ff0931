"""Files of torch.save as ingredients: the same soups, byte for byte, as of the same safetensors."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import command, load
from crash import Machine

import streamsoup
from streamsoup import Options
from streamsoup.errors import (
    ChangedIngredientError,
    CorruptFileError,
    FormatError,
    MissingFileError,
    StreamsoupError,
    UnsupportedDtypeError,
)
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.pickled.checksums import Checked, Checksums, Running, joined
from streamsoup.formats.pickled.strided import boxes
from streamsoup.reading import Reading

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

State = dict[str, Any]


def state(seed: int) -> State:
    """Return tensors of every kind of layout and of many dtypes, of which some share storages."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=made)

    base, tied = normal(40, 30), normal(300, 70)
    return {
        "bf16": normal(3, 4).bfloat16(),
        "f16": normal(4).half(),
        "f64": normal(3).double(),
        "f8": normal(6, 6).to(torch.float8_e4m3fn),
        "f8 across": normal(6, 6).to(torch.float8_e5m2).t(),
        "across": normal(40, 50).t(),
        "large across": normal(300, 200).t(),
        "channels last": normal(8, 3, 5, 5).to(memory_format=torch.channels_last),
        "rows": base[3:20],
        "part": base[3:20, 2:9],
        "whole": base,
        "tied": tied,
        "tied to it": tied,
        "each third": normal(20)[::3],
        "repeated": normal(7, 1).expand(7, 9),
        "parameter": torch.nn.Parameter(normal(5)),
        "number": normal(1)[0],
        "i64 across": torch.arange(30).reshape(5, 6).t(),
        "i32": torch.arange(7, dtype=torch.int32)[1:],
        "bool": torch.tensor([True, False, True]),
        "c64": torch.ones(3, 2, dtype=torch.complex64).t(),
        "u16": torch.arange(9).to(torch.uint16),
        "no elements": torch.zeros(0, 3),
    }


def plain(tensors: Mapping[str, Any]) -> State:
    """Return copies that safetensors can store: in order, and none with the memory of another."""
    return {name: t.detach().clone().contiguous() for name, t in tensors.items()}


def pairs(folder: Path, n: int = 3, **saving: Any) -> tuple[list[Path], list[Path]]:
    """Save `n` state dicts both ways; return the pickles and the safetensors."""
    pickles, twins = [], []
    folder.mkdir(exist_ok=True)
    for seed in range(n):
        tensors = state(seed)
        pickles.append(folder / f"{seed}.pt")
        torch.save(tensors, pickles[-1], **saving)
        twins.append(folder / f"{seed}.safetensors")
        safetensors_torch.save_file(plain(tensors), twins[-1])
    return pickles, twins


def opened(path: Path, key: str | None = None) -> Any:
    """Open one checkpoint."""
    return open_ingredients([path], Reading(key=key))[0]


def soup_of(paths: Any, output: Path, **options: Any) -> dict[str, Any]:
    """Average, and return the tensors of the soup as they lie in its file."""
    streamsoup.uniform(paths, output=output, options=Options(**options))
    return load(output / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_the_soup_is_that_of_safetensors(tmp_path: Path, protocol: int, io: str) -> None:
    """Views, ties, all dtypes, any protocol: the tensors of the soup have the same bytes."""
    pickles, twins = pairs(tmp_path / "in", pickle_protocol=protocol)
    ours = soup_of(pickles, tmp_path / "ours", io=io)
    assert ours == soup_of(twins, tmp_path / "theirs", io=io)
    streamsoup.verify(tmp_path / "ours")
    mixed = soup_of([pickles[0], twins[1], pickles[2]], tmp_path / "mixed", io=io)
    assert mixed == ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_small_blocks_and_several_passes_give_the_same_bytes(
    tmp_path: Path, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However tensors are cut, and however often they are read, bytes are those of safetensors."""
    monkeypatch.setattr("streamsoup.engine.budget.LARGEST_BLOCK", 1 << 12)
    monkeypatch.setattr("streamsoup.formats.pickled.source._PIECE", 1 << 12)
    pickles, twins = pairs(tmp_path / "in")
    base = {"dtype": "f32", "io": io}
    made = []
    for name, paths in (("ours", pickles), ("theirs", twins)):
        streamsoup.ties(
            paths[1:], base=paths[0], density=0.3, output=tmp_path / name, options=Options(**base)
        )
        made.append(load(tmp_path / name / "model.safetensors"))
    assert made[0] == made[1]


def test_ranges_of_a_view_are_those_of_its_copy(tmp_path: Path) -> None:
    """Any range of any tensor, read or viewed, holds the bytes of the tensor in order."""
    from streamsoup.formats.files import Access

    tensors = state(7)
    torch.save(tensors, tmp_path / "m.pt")
    source = opened(tmp_path / "m.pt").source
    rng = np.random.default_rng(0)
    for mapped in (True, False):
        access = Access(mapped=mapped)
        cursor = source.cursor(access)
        for name, each in plain(tensors).items():
            raw = each.reshape(-1).view(torch.uint8).numpy().tobytes() if each.numel() else b""
            unit = each.element_size() if each.is_floating_point() else 1
            for _ in range(20):
                begin, end = sorted(rng.integers(0, len(raw) // unit + 1, 2) * unit)
                block = memoryview(bytearray(end - begin))
                cursor.read(name, int(begin), block)
                assert block == raw[begin:end], name
                viewed = cursor.view(name, int(begin), int(end))
                assert viewed is None or viewed == raw[begin:end]
        cursor.close()
        access.close()


def test_boxes_hold_their_range_in_order() -> None:
    """The boxes of a range are its elements, each once, in order."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape = tuple(int(n) for n in rng.integers(1, 5, rng.integers(0, 5)))
        whole = np.arange(int(np.prod(shape))).reshape(shape)
        first, last = sorted(int(n) for n in rng.integers(0, whole.size + 1, 2))
        found: list[int] = []
        for starts, sizes in boxes(shape, first, last):
            part = whole[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))]
            found += part.reshape(-1).tolist()
        assert found == list(range(first, last))


# -- finding the weights --------------------------------------------------------------------------


def test_weights_are_found_where_trainers_put_them(tmp_path: Path) -> None:
    """The one mapping with tensors of floats is taken, and what is left out is said."""
    weights = {"w": torch.ones(3), "n": torch.tensor(4)}
    optimizer = {
        "state": {0: {"exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    beside = {
        "epoch": 3,
        "optimizer": optimizer,
        "any name": optimizer,
        "rng": torch.get_rng_state(),
        "best": torch.tensor(0.5),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/x")),
        "seen": {1, 2},
        "when": datetime.datetime(2026, 1, 2),
        "numpy": np.float64(3.5),
        "array": np.arange(3),
        "counts": collections.Counter("abc"),
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "defaults": collections.defaultdict(list, a=[1]),
        "history": [1.5, None, True, (1, "two", b"three")],
    }
    for protocol in (2, 5):
        for key in ("state_dict", "model", "module", "model_state_dict", "ema", "net"):
            path = tmp_path / "m.ckpt"
            torch.save({**beside, key: weights}, path, pickle_protocol=protocol)
            found = opened(path)
            assert [*found.layout.places] == ["w", "n"]
            (note,) = found.source.notes
            assert f"'{key}' alone" in note
            assert "epoch" in note
    torch.save({**weights, "epoch": 3}, tmp_path / "m.ckpt")
    assert "epoch" in opened(tmp_path / "m.ckpt").source.notes[0]
    torch.save({"trainer": {"net": weights, "optim": {"a": weights}}}, tmp_path / "m.ckpt")
    assert [*opened(tmp_path / "m.ckpt").layout.places] == ["w", "n"]


def test_a_key_chooses_among_several(tmp_path: Path) -> None:
    """Of several sets of weights none is taken unasked; `key` is recorded, and `verify` uses it."""
    paths = []
    for n in (1.0, 2.0):
        one, other = torch.full((3,), n), torch.full((3,), 10 * n)
        deep = {"a.b": {"c": {"w": torch.full((3,), 100 * n)}}}
        paths.append(tmp_path / f"{n}.pth")
        torch.save({"state_dict": {"w": one}, "state_dict_ema": {"w": other}, **deep}, paths[-1])
    with pytest.raises(FormatError, match=r"holds several sets of weights: 'state_dict' .1 tensor"):
        opened(paths[0])
    for key, value in (("state_dict", 1.5), ("state_dict_ema", 15.0), ("a.b.c", 150.0)):
        soup = streamsoup.uniform(paths, output=tmp_path / key, options=Options(key=key))
        assert soup.recipe.reading == Reading(key=key)
        assert np.frombuffer(load(tmp_path / key / "model.safetensors")["w"][2], "<f4")[0] == value
        streamsoup.verify(tmp_path / key)
    assert opened(paths[0], "state_dict").fingerprint != opened(paths[0], "a.b.c").fingerprint
    for key in ("nothing", "state_dict.w", "state_dict.", ""):
        with pytest.raises(FormatError, match="has no mapping of tensors at the key"):
            opened(paths[0], key)
    with pytest.raises(FormatError, match=r"holds no tensors at the key 'a.b'"):
        opened(paths[0], "a.b")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="holds list, not a mapping"):
        opened(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(FormatError, match="holds no weights, as far as can be seen"):
        opened(tmp_path / "none.pt")


def test_the_command_line_takes_a_key(tmp_path: Path) -> None:
    """`--key` is the option of every command, and messages name it."""
    torch.save({"a": {"w": torch.ones(3)}, "b": {"w": torch.zeros(3)}}, tmp_path / "m.pt")
    refused = command("inspect", tmp_path / "m.pt")
    assert "say which with --key a" in refused.stderr
    assert refused.returncode == 1
    assert command("inspect", tmp_path / "m.pt", "--key", "b").returncode == 0
    made = command("uniform", tmp_path / "m.pt", "--key", "b", "-o", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert command("verify", tmp_path / "out").returncode == 0
    assert "'b' alone is read" in made.stderr
    planned = command("plan", tmp_path / "m.pt", "--key", "b")
    assert planned.returncode == 0, planned.stderr


def test_all_studies_and_searches_take_pickles(tmp_path: Path) -> None:
    """Geometry and compare read pickles as they read safetensors."""
    pickles, twins = [], []
    for seed in range(3):
        tensors = {"a": torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).t()}
        pickles.append(tmp_path / f"{seed}.pt")
        twins.append(tmp_path / f"{seed}.safetensors")
        torch.save(tensors, pickles[-1])
        safetensors_torch.save_file(plain(tensors), twins[-1])
    one = command("geometry", *pickles, "--json")
    other = command("geometry", *twins, "--json")
    assert one.returncode == 0, one.stderr
    told = [json.loads(each.stdout) for each in (one, other)]
    assert told[0].get("cosines", told[0].get("gram")) == told[1].get(
        "cosines", told[1].get("gram")
    )


class Table(streamsoup.Scorer):
    """Scores candidates by the names of their ingredients."""

    name, split, n_at_once, fingerprint = "table", "val", 1, "table"

    def prepare(self, recipe: Any) -> None:
        """Need nothing."""

    def score(self, candidate: Any) -> float:
        """Return more for each ingredient but the last one given."""
        names = candidate.recipe.ingredients
        return sum(-9 if Path(name).name.startswith("2") else 1 for name in names)

    def close(self) -> None:
        """Hold nothing."""


def test_greedy_takes_pickles(tmp_path: Path) -> None:
    """A greedy soup of pickles has the bytes of that of the same safetensors, and is verified."""
    pickles, twins = [], []
    for seed in range(3):
        tensors = {"a": torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).t()}
        pickles.append(tmp_path / f"{seed}.pt")
        twins.append(tmp_path / f"{seed}.safetensors")
        torch.save({"ema": tensors, "model": {"b": torch.ones(3)}}, pickles[-1])
        safetensors_torch.save_file(plain(tensors), twins[-1])
    options = Options(key="ema")
    streamsoup.greedy(pickles, Table(), output=tmp_path / "ours", options=options)
    streamsoup.greedy(twins, Table(), output=tmp_path / "theirs")
    both = [load(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert both[0] == both[1]
    streamsoup.verify(tmp_path / "ours")


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_memory_is_as_planned(tmp_path: Path, io: str) -> None:
    """Tensors that lie across their storages are read within the memory that `plan` says."""
    paths = []
    for seed in range(3):
        made = torch.Generator().manual_seed(seed)
        tensors = {"a": torch.randn(3000, 2000, generator=made).t(), "b": torch.ones(1 << 22)}
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(tensors, paths[-1])
    planned = command("plan", *paths, "--io", io, "--json")
    soup = command("uniform", *paths, "--io", io, "--json", "-o", tmp_path / "out")
    assert soup.returncode == 0, soup.stderr
    peak = json.loads(soup.stdout)["peak_nbytes"]
    assert peak <= json.loads(planned.stdout)["peak_nbytes"] <= 150_000_000


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_dense_ones_are_refused(tmp_path: Path) -> None:
    """Sparse, quantised, conjugated and complex128 tensors are refused by name."""
    strange = {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "on the meta device": torch.ones(3, device="meta"),
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
    }
    for what, each in strange.items():
        torch.save({"w": torch.ones(2), "x": each}, tmp_path / "m.pt")
        with pytest.raises(FormatError, match=f"tensor 'x' is .*{what}"):
            opened(tmp_path / "m.pt")
    wide = torch.ones(3, dtype=torch.complex128)
    torch.save({"w": torch.ones(2), "x": wide}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedDtypeError, match="'x' has dtype complex128"):
        opened(tmp_path / "m.pt")


# -- folders --------------------------------------------------------------------------------------


def sharded(folder: Path, seed: int) -> State:
    """Save a state dict in two files with an index, as transformers did."""
    folder.mkdir()
    tensors = {
        f"{n}.w": torch.randn(9, 7, generator=torch.Generator().manual_seed(seed + n))
        for n in range(4)
    }
    weight_map = {}
    for n in (1, 2):
        name = f"pytorch_model-0000{n}-of-00002.bin"
        part = dict([*tensors.items()][2 * n - 2 : 2 * n])
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 4 * 9 * 7 * 4}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return tensors


def test_shards_with_an_index_become_shards_of_safetensors(tmp_path: Path) -> None:
    """`pytorch_model.bin.index.json` is mirrored under the names that loaders look for."""
    both = [sharded(tmp_path / str(seed), seed) for seed in (0, 10)]
    soup = streamsoup.uniform([tmp_path / "0", tmp_path / "10"], output=tmp_path / "out")
    assert sorted(os.listdir(soup.path)) == [
        *("README.md", "config.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "streamsoup.json"),
    ]
    for n, name in enumerate(both[0]):
        file = tmp_path / "out" / f"model-0000{n // 2 + 1}-of-00002.safetensors"
        mean = (both[0][name].double() + both[1][name].double()) / 2
        assert load(file)[name][2] == mean.float().numpy().tobytes()
    index = opened(tmp_path / "0" / "pytorch_model.bin.index.json")
    assert len(index.layout.places) == 4
    (tmp_path / "0" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(MissingFileError, match=r"00002-of-00002.bin: no such file"):
        opened(tmp_path / "0")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    """An index names its tensors' files, all of them, and none elsewhere."""
    sharded(tmp_path / "m", 0)
    path = tmp_path / "m" / "pytorch_model.bin.index.json"
    good = json.loads(path.read_text())

    def refused(change: Mapping[str, str], match: str) -> None:
        path.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], **change}}))
        with pytest.raises(StreamsoupError, match=match):
            opened(tmp_path / "m")

    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    refused({"0.w": "../elsewhere.bin"}, "plain name")
    refused({"0.w": "model.safetensors"}, "plain name")
    refused({"0.w": second}, "but it is in pytorch_model-00001")
    refused({"more": first}, "no shard holds")
    torch.save({"0.w": torch.ones(2)}, tmp_path / "m" / second)
    refused({}, "is in two shards")


def test_the_weights_of_a_folder_are_chosen_as_loaders_do(tmp_path: Path) -> None:
    """The state of training is passed over, safetensors win, and of several files none is taken."""
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"w": torch.ones(9)}, folder / name)
    assert opened(folder).layout.places["w"][1].shape == (3,)
    assert opened(folder).file_names == ("model.safetensors",)
    soup = streamsoup.uniform([folder], output=tmp_path / "out")
    assert sorted(os.listdir(soup.path)) == ["README.md", "model.safetensors", "streamsoup.json"]
    assert soup.warnings == ()
    (folder / "pytorch_model.bin").rename(folder / "last.ckpt")
    assert opened(folder).layout.places["w"][1].shape == (3,)
    torch.save({"w": torch.ones(4)}, folder / "best.ckpt")
    with pytest.raises(FormatError, match=r"several files that may hold weights .best.ckpt, last"):
        opened(folder)
    safetensors_torch.save_file({"w": torch.ones(5)}, folder / "model.safetensors")
    assert opened(folder).layout.places["w"][1].shape == (5,)
    (folder / "last.ckpt").rename(folder / "pytorch_model.bin")
    soup = streamsoup.uniform([folder], output=tmp_path / "other")
    assert any("left out pytorch_model.bin, as there is model" in str(w) for w in soup.warnings)


def test_a_run_of_pickles_is_averaged_by_step(tmp_path: Path) -> None:
    """The checkpoints of a run may be pickled: lawa takes the last ones, whatever they are."""
    for step in (5, 10, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        at = tmp_path / "run" / f"checkpoint-{step}" / "pytorch_model.bin"
        torch.save({"w": torch.full((2,), float(step))}, at)
    streamsoup.lawa(tmp_path / "run", last=2, output=tmp_path / "out")
    assert np.frombuffer(load(tmp_path / "out" / "model.safetensors")["w"][2], "<f4")[0] == 15


# -- checksums ------------------------------------------------------------------------------------


def flipped(path: Path, name: str) -> None:
    """Flip a bit amid a tensor, in the file."""
    place = opened(path).source._contents.places[name]
    raw = bytearray(path.read_bytes())
    raw[place.chunks[0].begin + 1] ^= 4
    path.write_bytes(raw)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tied", "rows", "part", "across", "i32", "bool"])
def test_a_flipped_bit_is_found_in_the_pass(tmp_path: Path, name: str) -> None:
    """A tensor whose bytes have another CRC than was written is refused, and nothing is written."""
    pickles, _ = pairs(tmp_path / "in")
    flipped(pickles[0], name)
    assert torch.load(pickles[0], weights_only=True)  # which does not look
    for io in ("mmap", "read"):
        with pytest.raises(CorruptFileError, match=r"0.pt: its member .* is damaged"):
            streamsoup.uniform([pickles[0]] * 2, output=tmp_path / "out", options=Options(io=io))
        assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found_again_after_a_kill(tmp_path: Path, machine: Machine) -> None:
    """Leaves that an earlier run had made of damaged bytes are not put in place by a later one."""
    folder = tmp_path / "stage"
    (folder / "in").mkdir(parents=True)
    for n in range(2):
        torch.save({"w": torch.full((600, 600), n + 1.0)}, folder / "in" / f"{n}.pt")
    flipped(folder / "in" / "0.pt", "w")
    argv = ["uniform", folder / "in" / "0.pt", folder / "in" / "1.pt", "-o", folder / "out"]
    for at in range(3, 200, 1 if "EVERY_CALL" in os.environ else 31):
        ended = machine.run(*argv, stage=folder, at=at, action="kill")
        if ended.n_calls < at:
            break
        again = machine.run(*argv, stage=folder)
        assert again.status == 1, again.stderr
        assert "is damaged" in again.stderr
        assert not (folder / "out").exists()


def test_a_pass_checks_the_members_of_its_own_tensors(tmp_path: Path) -> None:
    """A pass over some tensors reads no others for their CRCs; one over all finds each."""
    tensors = {name: torch.arange(100.0) + n for n, name in enumerate(["a", "b", "c"])}
    torch.save(tensors, tmp_path / "m.pt")
    flipped(tmp_path / "m.pt", "b")
    source = opened(tmp_path / "m.pt").source
    source.check_read(["a", "c"])
    assert [*source._checksums.done] == [
        source._contents.members[n].name != "data/1" for n in range(3)
    ]
    with pytest.raises(CorruptFileError, match="data/1 is damaged"):
        source.check_read(["b"])


def test_a_derived_source_checks_what_it_is_made_of(tmp_path: Path) -> None:
    """With other names, too, a member of which only a view is read is checked by its old name."""
    whole = torch.arange(3000.0).reshape(50, 60)
    torch.save({"module.w": whole[:, 3:5]}, tmp_path / "m.pt")
    options = Options(rename=("module.=>",))
    soup = streamsoup.uniform([tmp_path / "m.pt"], output=tmp_path / "out", options=options)
    made = load(tmp_path / "out" / "model.safetensors")
    assert made["w"][2] == whole[:, 3:5].contiguous().numpy().tobytes()
    assert soup.recipe.reading.rename == ("module.=>",)
    flipped(tmp_path / "m.pt", "module.w")
    with pytest.raises(CorruptFileError, match="data/0 is damaged"):
        streamsoup.uniform([tmp_path / "m.pt"], output=tmp_path / "other", options=options)


def test_a_pickled_component_of_a_pipeline_is_checked(tmp_path: Path) -> None:
    """A pipeline may have components in pickles, and a flipped bit in one of them is found."""
    (tmp_path / "m" / "unet").mkdir(parents=True)
    index = {"_class_name": "Any", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"w": torch.arange(300.0).reshape(20, 15)[:, 3:5]}, file)
    streamsoup.uniform([tmp_path / "m"], output=tmp_path / "out")
    made = load(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert made["w"][1] == (20, 2)
    flipped(file, "w")
    with pytest.raises(CorruptFileError, match="data/0 is damaged"):
        streamsoup.uniform([tmp_path / "m"], output=tmp_path / "other")


def test_parts_find_a_flipped_bit(tmp_path: Path) -> None:
    """The part that a damaged tensor falls to is refused, so the soup is never put in place."""
    for n in range(2):
        tensors = {name: torch.full((700, 3000), float(n)) for name in "abcd"}
        torch.save(tensors, tmp_path / f"{n}.pt")
    flipped(tmp_path / "1.pt", "c")
    given = [tmp_path / "0.pt", tmp_path / "1.pt", "-o", tmp_path / "out"]
    ended = [command("uniform", *given, "--part", f"{n}/2") for n in (1, 2)]
    assert sorted(each.returncode for each in ended) == [0, 1]
    assert any("data/2 is damaged" in each.stderr for each in ended)
    assert command("uniform", *given, "--commit").returncode != 0
    assert not (tmp_path / "out").exists()


def test_members_without_a_crc_are_read(tmp_path: Path) -> None:
    """`set_crc32_options(False)` writes 0 for every CRC, which says nothing."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(30)}, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert soup_of([tmp_path / "m.pt"], tmp_path / "out")["w"][2] == b"\0\0\x80?" * 30


def test_checksums_of_ranges_join_in_any_order() -> None:
    """A member read in ranges, in any order, by several threads, has the CRC of the whole."""
    rng = np.random.default_rng(5)
    for _ in range(100):
        raw = rng.integers(0, 256, int(rng.integers(1, 3000)), dtype=np.uint8).tobytes()
        cuts = sorted({0, len(raw), *map(int, rng.integers(0, len(raw) + 1, 9))})
        ranges = [*pairwise(cuts)]
        rng.shuffle(ranges)
        for crc, is_right in ((zlib.crc32(raw), True), (zlib.crc32(raw) ^ 1, False)):
            checksums = Checksums([], [Checked("m", 0, 0, len(raw))], [crc])
            runs = [Running(checksums, zlib.crc32) for _ in range(3)]
            for begin, end in ranges:
                runs[int(rng.integers(3))]._checksums.note(
                    0, int(begin), int(end), zlib.crc32(raw[begin:end])
                )
            assert checksums.done[0]
            assert (not checksums._wrong) == is_right
    assert joined(zlib.crc32(b"a"), zlib.crc32(b""), 0) == zlib.crc32(b"a")


def test_the_compiled_crc_is_that_of_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the fast tier gives zlib's numbers, for any range, length and beginning."""
    from streamsoup.kernels import crc
    from streamsoup.system.buffers import buffer

    monkeypatch.setenv("STREAMSOUP_KERNELS", "plain")
    assert crc.fastest_crc32(compiles=True) is zlib.crc32
    monkeypatch.setenv("STREAMSOUP_KERNELS", "fast")
    if not crc.has_folding():
        pytest.skip("no carry-less products here")
    monkeypatch.setattr(crc, "_LEAST", 128)
    folded = crc.fastest_crc32(compiles=True)
    assert isinstance(folded, crc.FoldedCrc32)
    rng = np.random.default_rng(0)
    block = buffer(20_000)
    block[:] = rng.bytes(20_000)
    for _ in range(500):
        begin, end = sorted(int(n) for n in rng.integers(0, 20_001, 2))
        before = int(rng.integers(1 << 32))
        assert folded(block[begin:end], before) == zlib.crc32(block[begin:end], before)
    for n in (0, 1, 127, 128, 129, 255, 256, 257, 384):
        assert folded(block[:n], 0) == zlib.crc32(block[:n])


def test_archives_of_other_writers_are_read(tmp_path: Path) -> None:
    """Stored members by `zipfile`, unaligned and with data descriptors, are ranges all the same."""
    torch.save({"w": torch.arange(9.0), "v": torch.ones(5, dtype=torch.float16)}, tmp_path / "m.pt")
    for seekable in (True, False):
        made = tmp_path / "other.pt"
        with zipfile.ZipFile(tmp_path / "m.pt") as old, open(made, "wb") as file:
            if not seekable:
                file.seekable = lambda: False  # type: ignore[method-assign]
            with zipfile.ZipFile(file, "w") as new:
                for item in old.infolist():
                    new.writestr(item.filename, old.read(item))
        found = soup_of([made], tmp_path / f"out{seekable}")
        assert found["w"][2] == np.arange(9, dtype="<f4").tobytes()


# -- the laws -------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that can be killed."""
    machine = Machine()
    yield machine
    machine.close()


def test_a_kill_at_any_call_leaves_nothing_or_the_whole_soup(
    tmp_path: Path, machine: Machine
) -> None:
    """Killed at calls all through, the same command finishes, with the bytes of safetensors."""
    folder = tmp_path / "stage"
    (folder / "in").mkdir(parents=True)
    for seed in range(2):
        tensors = {n: t for n, t in state(seed).items() if n not in ("no elements", "number")}
        torch.save({"model": tensors}, folder / "in" / f"{seed}.pt")
        safetensors_torch.save_file(plain(tensors), folder / "in" / f"{seed}.safetensors")
    streamsoup.uniform(
        [folder / "in" / f"{n}.safetensors" for n in range(2)], output=tmp_path / "right"
    )
    right = load(tmp_path / "right" / "model.safetensors")
    argv = ["uniform", folder / "in" / "0.pt", folder / "in" / "1.pt", "-o", folder / "out"]
    for at in range(2, 200, 1 if "EVERY_CALL" in os.environ else 9):
        ended = machine.run(*argv, stage=folder, at=at, action="kill")
        if ended.n_calls < at:
            break
        if (folder / "out").exists():
            assert load(folder / "out" / "model.safetensors") == right
        again = machine.run(*argv, stage=folder)
        assert again.status == 0, again.stderr
        assert load(folder / "out" / "model.safetensors") == right
        for each in (folder / "out").iterdir():
            each.unlink()
        (folder / "out").rmdir()


def test_a_changed_file_stops_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that is replaced under a run is noticed, as a safetensors file is."""
    torch.save({"w": torch.ones(9)}, tmp_path / "m.pt")
    ingredient = opened(tmp_path / "m.pt")
    torch.save({"w": torch.ones(8)}, tmp_path / "m.pt")
    with pytest.raises(ChangedIngredientError):
        streamsoup.uniform([ingredient], output=tmp_path / "out")


def test_ingredients_that_agree_share_what_was_read(tmp_path: Path) -> None:
    """The contents of 64 fine-tunes are held once, so memory does not grow with their number."""
    for seed in range(3):
        torch.save({"w": torch.full((3,), float(seed))}, tmp_path / f"{seed}.pt")
    found = open_ingredients([tmp_path / f"{seed}.pt" for seed in range(3)])
    assert len({id(each.source._contents) for each in found}) == 1  # type: ignore[attr-defined]
    assert len({id(each.layout) for each in found}) == 1
