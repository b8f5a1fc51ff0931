"""Folders of torch.distributed.checkpoint as ingredients: chunks of any ranks, put together."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import command, load

import streamsoup
from streamsoup import Options
from streamsoup.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    StreamsoupError,
    UnsafePickleError,
)
from streamsoup.formats.files import Access
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.reading import Reading

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore")


def opened(path: Path, key: str | None = None) -> Any:
    """Open one checkpoint."""
    return open_ingredients([path], Reading(key=key))[0]


def trained(seed: int) -> tuple[Any, Any]:
    """Return a small network and an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 40)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_model_is_found_and_the_optimizer_is_left_out(tmp_path: Path) -> None:
    """A soup of DCP folders is that of the same safetensors; what is left out is said."""
    folders, twins = [], []
    for seed in range(3):
        model, optimizer = trained(seed)
        folders.append(tmp_path / f"step-{seed}")
        whole = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": seed}
        dcp.save(whole, checkpoint_id=folders[-1])
        (folders[-1] / "config.json").write_text("{}")
        twins.append(tmp_path / f"{seed}.safetensors")
        safetensors_torch.save_file(model.state_dict(), twins[-1])
    for io in ("mmap", "read"):
        options = Options(io=io, overwrite=True)
        ours = streamsoup.uniform(folders, output=tmp_path / "ours", options=options)
        streamsoup.uniform(twins, output=tmp_path / "theirs", options=options)
        both = [load(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
        assert both[0] == both[1]
        assert any("'model' alone is read" in str(each) for each in ours.warnings)
        assert sorted(os.listdir(ours.path)) == [
            *("README.md", "config.json", "model.safetensors", "streamsoup.json"),
        ]
    streamsoup.verify(tmp_path / "ours")
    assert command("inspect", folders[0]).returncode == 0
    one, other = open_ingredients(folders[:2])
    assert one.layout is other.layout
    with pytest.raises(FormatError, match="no mapping of tensors at the key 'ema'"):
        opened(folders[0], "ema")


def test_a_flat_state_dict_is_read_whole(tmp_path: Path) -> None:
    """`dcp.save(model.state_dict())` has its tensors at the top; all dtypes and shapes are read."""
    state = {
        "a.b": torch.randn(7, 5).bfloat16(),
        "across": torch.randn(40, 50).t(),
        "part": torch.randn(40, 50)[3:9, 2:7],
        "n": torch.tensor(3),
        "i": torch.arange(7),
        "f8": torch.randn(6).to(torch.float8_e4m3fn),
        "no elements": torch.zeros(0, 3),
    }
    dcp.save(state, checkpoint_id=tmp_path / "m")
    source = opened(tmp_path / "m").source
    assert {*source.tensors} == {*state}
    assert_reads(source, state)


def test_members_of_enumerations_are_read_as_older_pythons_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.0 to 3.11.3 pickles a member of an enumeration as a call of getattr."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    def by_name(self: Any, protocol: int) -> Any:
        return getattr, (type(self), self.name)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    state = {"w": torch.arange(12.0).reshape(3, 4)}
    dcp.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    assert b"getattr" in (tmp_path / "c" / ".metadata").read_bytes()
    assert_reads(opened(tmp_path / "c").source, state)


def assert_reads(source: Any, state: dict[str, Any]) -> None:
    """Assert that random ranges of all tensors hold their bytes."""
    rng = np.random.default_rng(0)
    for mapped in (True, False):
        access = Access(mapped=mapped, window_nbytes=1 << 12)
        cursor = source.cursor(access)
        for name, each in state.items():
            flat = each.detach().contiguous().reshape(-1)
            raw = flat.view(torch.uint8).numpy().tobytes() if each.numel() else b""
            unit = each.element_size() if each.is_floating_point() else 1
            for _ in range(20):
                begin, end = sorted(rng.integers(0, len(raw) // unit + 1, 2) * unit)
                block = memoryview(bytearray(end - begin))
                cursor.read(name, int(begin), block)
                assert block == raw[begin:end], name
        cursor.close()
        access.close()
    source.check_unchanged()
    assert source.suspects(strict=True) is None


# -- tensors that several ranks have saved --------------------------------------------------------


def sharded(folder: Path, tensors: dict[str, Any], cuts: dict[str, list[Any]]) -> Path:
    """Write what ranks would have saved of tensors cut into boxes of slices, file by file."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    described, places = {}, {}
    for name, whole in tensors.items():
        chunks = []
        for rank, box in enumerate(cuts[name]):
            part = whole[box].clone()
            offsets = torch.Size(each.start for each in box)
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            with open(folder / f"__{rank}_0.distcp", "ab") as file:
                begin = file.tell()
                torch.save(part, file)
                info = _StorageInfo(f"__{rank}_0.distcp", begin, file.tell() - begin)
            places[MetadataIndex(name, offsets)] = info
        random.Random(0).shuffle(chunks)
        properties = TensorProperties.create_from_tensor(whole)
        described[name] = TensorStorageMetadata(properties, whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, None, places)))
    return folder


def cut(*edges: list[int]) -> list[Any]:
    """Return the boxes between edges in each dimension."""
    import itertools

    spans = [[slice(a, b) for a, b in itertools.pairwise(each)] for each in edges]
    return [*itertools.product(*spans)]


TENSORS = {
    "rows": torch.randn(37, 11),
    "columns": torch.randn(12, 37).bfloat16(),
    "both": torch.randn(20, 30),
    "deep": torch.randn(4, 5, 6),
    "ints": torch.arange(60).reshape(6, 10),
}
CUTS = {
    "rows": cut([0, 10, 20, 30, 37], [0, 11]),
    "columns": cut([0, 12], [0, 9, 18, 27, 37]),
    "both": cut([0, 7, 20], [0, 13, 30]),
    "deep": cut([0, 1, 4], [0, 2, 5], [0, 6]),
    "ints": cut([0, 3, 6], [0, 4, 10]),
}


def test_chunks_of_ranks_are_put_together(tmp_path: Path) -> None:
    """Rows, columns and boxes that ranks have saved are read as the tensor they were cut from."""
    folder = sharded(tmp_path / "m", TENSORS, CUTS)
    assert dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.keys() == {*TENSORS}
    assert_reads(opened(folder).source, TENSORS)
    safetensors_torch.save_file(TENSORS, tmp_path / "m.safetensors")
    for io in ("mmap", "read"):
        for given, name in ((folder, "ours"), (tmp_path / "m.safetensors", "theirs")):
            options = Options(dtype="f16", io=io, overwrite=True)
            streamsoup.uniform([given, given], output=tmp_path / name, options=options)
        both = [load(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
        assert both[0] == both[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sharded checkpoint, to be copied."""
    return sharded(tmp_path_factory.mktemp("dcp") / "m", TENSORS, CUTS)


def test_a_flipped_bit_in_a_chunk_is_found(tmp_path: Path, made: Path) -> None:
    """A chunk with another CRC than was written is refused at the end of the pass, or before."""
    folder = shutil.copytree(made, tmp_path / "m")
    chunk = opened(folder).source._contents.places["columns"].chunks[1]
    path = folder / "__1_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[chunk.begin + 3] ^= 1
    path.write_bytes(raw)
    for io in ("mmap", "read"):
        with pytest.raises(CorruptFileError, match=r"__1_0.distcp: its member .* is damaged"):
            streamsoup.uniform([folder] * 2, output=tmp_path / "out", options=Options(io=io))
        assert not (tmp_path / "out").exists()


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the metadata of a checkpoint."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first_place(metadata: Any, **changes: Any) -> None:
    """Change where the first chunk lies."""
    info = next(iter(metadata.storage_data.values()))
    for name, value in changes.items():
        setattr(info, name, value)


def chunk_of(metadata: Any, name: str = "rows") -> Any:
    """Return the first chunk of a tensor."""
    return min(metadata.state_dict_metadata[name].chunks, key=lambda each: each.offsets)


LIES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a chunk is missing": (
        lambda m: m.state_dict_metadata["rows"].chunks.pop(),
        "cut into 3 chunks, but 4 places",
    ),
    "a place is missing": (
        lambda m: m.storage_data.pop(next(iter(m.storage_data))),
        "cut into 4 chunks, but 3 places",
    ),
    "a larger tensor": (
        lambda m: setattr(m.state_dict_metadata["rows"], "size", torch.Size([40, 11])),
        "407 elements in all, expected 440",
    ),
    "a smaller tensor": (
        lambda m: setattr(m.state_dict_metadata["rows"], "size", torch.Size([30, 11])),
        "reaches out of it",
    ),
    "a chunk of another size": (
        lambda m: setattr(chunk_of(m), "sizes", torch.Size([9, 11])),
        "396 elements in all, expected 407",
    ),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["rows"].properties, "dtype", torch.float64),
        "has dtype F32, expected F64",
    ),
    "another file": (lambda m: first_place(m, relative_path="../x.distcp"), "plain name"),
    "a hidden file": (lambda m: first_place(m, relative_path=".metadata"), "plain name"),
    "no such file": (lambda m: first_place(m, relative_path="__9_0.distcp"), "no such file"),
    "another offset": (lambda m: first_place(m, offset=1), "over those of|not"),
    "a negative offset": (lambda m: first_place(m, offset=-1), "not a list of sizes"),
    "beyond the file": (lambda m: first_place(m, length=1 << 40), "over those of others|truncated"),
    "compressed": (
        lambda m: first_place(m, transform_descriptors=["zstd"]),
        "compressed or otherwise changed",
    ),
    "no places": (lambda m: setattr(m, "storage_data", None), "no mapping of places"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", 3), "no mapping of tensors"),
    "a tensor itself": (
        lambda m: m.state_dict_metadata.update(rows=torch.eye(2).to_sparse()),
        "neither tensor nor bytes|could run code",
    ),
    "a mapping": (
        lambda m: m.state_dict_metadata.update(rows={"w": 3}),
        "neither tensor nor bytes",
    ),
    "a name that is a list": (
        lambda m: object.__setattr__(next(iter(m.storage_data)), "fqn", []),
        "but 3 places",
    ),
    "keys that are none": (lambda m: setattr(m, "planner_data", {"rows": 5}), "no keys for"),
    "keys twice": (
        lambda m: setattr(m, "planner_data", {"rows": ("a",), "both": ("a",)}),
        "two values at the keys",
    ),
    "keys through a tensor": (
        lambda m: setattr(m, "planner_data", {"rows": ("a",), "both": ("a", "b")}),
        "two values at the keys",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies_is_refused(tmp_path: Path, made: Path, name: str) -> None:
    """Metadata that the files, or its own numbers, contradict is refused by name."""
    folder = shutil.copytree(made, tmp_path / "m")
    change, phrase = LIES[name]
    rewrite(folder, change)
    with pytest.raises((FormatError, MissingFileError), match=phrase) as refused:
        opened(folder)
    assert str(refused.value).startswith(f"{folder}/")
    assert str(refused.value).isprintable()


def test_chunks_over_one_another_are_refused(tmp_path: Path) -> None:
    """Chunks that fill as many elements as there are, but overlap, leave others out: refused."""
    boxes = [(slice(0, 2),), (slice(1, 3),)]
    folder = sharded(tmp_path / "m", {"w": torch.arange(4.0)}, {"w": boxes})
    with pytest.raises(CorruptFileError, match="has chunks that overlap"):
        opened(folder)


class Attack:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_metadata_is_refused_and_not_run(tmp_path: Path, made: Path) -> None:
    """The metadata is a pickle as any other: what is not listed is named, and not called."""
    folder = shutil.copytree(made, tmp_path / "m")
    rewrite(folder, lambda m: setattr(m, "planner_data", Attack(tmp_path / "mark")))
    with pytest.raises(
        UnsafePickleError, match=r"posix.mkdir.*make it whole first: .*dcp_to_torch"
    ):
        opened(folder)
    assert not (tmp_path / "mark").exists()


def test_links_out_of_the_folder_are_refused(tmp_path: Path, made: Path) -> None:
    """A file of a rank that is a link elsewhere is not followed."""
    folder = shutil.copytree(made, tmp_path / "m")
    shutil.move(folder / "__1_0.distcp", tmp_path / "elsewhere")
    (folder / "__1_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is a link out of the ingredient"):
        opened(folder)


def test_noise_is_refused_or_read(tmp_path: Path, made: Path) -> None:
    """Bytes flipped anywhere: an error of ours, or tensors; never anything else."""
    folder = shutil.copytree(made, tmp_path / "m")
    rng = random.Random(3)
    refused = 0
    for _ in range(150):
        path = folder / rng.choice([".metadata", ".metadata", "__0_0.distcp"])
        raw = path.read_bytes()
        noisy = bytearray(raw)
        for _ in range(rng.choice([1, 3])):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        path.write_bytes(bytes(noisy))
        try:
            source = opened(folder).source
            access = Access(mapped=False)
            cursor = source.cursor(access)
            for name in source.tensors:
                nbytes = opened(folder).layout.places[name][1].nbytes
                cursor.read(name, 0, memoryview(bytearray(nbytes)))
            access.close()
            source.check_read([*source.tensors])
            source.suspects(strict=True)
        except StreamsoupError as error:
            refused += str(error).isprintable()
        path.write_bytes(raw)
    assert refused > 30


def test_a_folder_without_metadata_is_refused_with_advice(tmp_path: Path, made: Path) -> None:
    """The files of ranks alone say nothing: what makes the checkpoint whole is said."""
    folder = shutil.copytree(made, tmp_path / "m")
    (folder / ".metadata").unlink()
    with pytest.raises(FormatError, match="dcp_to_torch"):
        opened(folder)
