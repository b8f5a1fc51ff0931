"""Pickles and archives that lie: refused by name, in bounded memory, and nothing of them is run."""

from __future__ import annotations

import argparse
import collections
import copyreg
import io
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamsoup.errors import CorruptFileError, FormatError, StreamsoupError, UnsafePickleError
from streamsoup.formats.files import Access
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.pickled import opcodes
from streamsoup.formats.pickled.opcodes import interpret

torch = pytest.importorskip("torch")


def opened(path: Path) -> Any:
    """Open one checkpoint."""
    return open_ingredients([path])[0]


def read_all(path: Path) -> None:
    """Open a checkpoint, read every byte of its tensors, and end the pass."""
    source = opened(path).source
    for mapped in (True, False):
        access = Access(mapped=mapped)
        cursor = source.cursor(access)
        for name, tensor in source.tensors.items():
            nbytes = opened(path).layout.places[name][1].nbytes
            assert nbytes < 1 << 20, tensor
            cursor.read(name, 0, memoryview(bytearray(nbytes)))
        cursor.close()
        access.close()
    source.check_unchanged()
    source.check_read([*source.tensors])
    source.suspects(strict=True)


def saved(path: Path, **tensors: Any) -> bytes:
    """Save tensors; return the bytes of the file."""
    torch.save(tensors, path)
    return path.read_bytes()


def with_pickle(path: Path, text: bytes) -> Path:
    """Make an archive of torch.save with a pickle of one's own, and one storage of 24 bytes."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("m/data.pkl", text)
        made.writestr("m/data/0", bytes(24))
    return path


# -- code -----------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "attack",
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (exec, "open('{}', 'w')"),
        (open, "{}", "w"),
        (getattr, 1, "real"),
        (__import__, "os"),
        (os.mkdir, "{}"),
        (pickle.loads, b"."),
        (torch.load, "{}"),
    ],
    ids=lambda attack: attack[0].__name__,
)
def test_code_is_refused_and_not_run(tmp_path: Path, attack: Any, protocol: int) -> None:
    """Whatever a pickle calls that is not listed is named, at any protocol, and not called."""
    mark = tmp_path / "mark"
    args = [each.format(mark) if isinstance(each, str) else each for each in attack[1:]]
    text = pickle.dumps({"w": Calls(attack[0], *args)}, protocol)
    with pytest.raises(UnsafePickleError, match=r"which is not on the list|calls"):
        opened(with_pickle(tmp_path / "m.pt", text))
    assert not mark.exists()


BY_HAND: dict[str, tuple[bytes, type[FormatError]]] = {
    "INST": (b"(S'true'\nios\nsystem\n.", UnsafePickleError),
    "OBJ": (b"(cos\nsystem\nS'true'\no.", UnsafePickleError),
    "names in names": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", UnsafePickleError),
    "a module that is listed, another name": (b"ccollections\nnamedtuple\n.", UnsafePickleError),
    "a dtype is called": (b"ctorch\nfloat32\n(tR.", UnsafePickleError),
    "a storage type is called": (b"ctorch\nFloatStorage\n(tR.", UnsafePickleError),
    "a number is called": (b"K\x01(tR.", UnsafePickleError),
    "a description is called": (b"}(tR.", UnsafePickleError),
    "a result is called": (b"cargparse\nNamespace\n(tR(tR.", UnsafePickleError),
    "state for a list": (b"]}b.", UnsafePickleError),
    "state for a name": (b"ctorch\nSize\n}b.", UnsafePickleError),
    "state for a number": (b"K\x01}b.", UnsafePickleError),
    "extension 1": (b"\x80\x02\x82\xf0.", UnsafePickleError),
    "extension 2": (b"\x80\x02\x83\xf0\x00.", UnsafePickleError),
    "extension 4": (b"\x80\x02\x84\xf0\x00\x00\x00.", UnsafePickleError),
    "a persistent id that is text": (b"P(0, 0)\n.", UnsafePickleError),
    "a buffer": (b"\x80\x05\x97.", UnsafePickleError),
    "a read-only buffer": (b"\x80\x05]\x98.", UnsafePickleError),
    "arguments by name": (
        b"\x80\x04cargparse\nNamespace\n)}\x8c\x01aK\x01s\x92.",
        UnsafePickleError,
    ),
    "a tensor of a class of its own": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nctorch\nfloat32\n)NtR.",
        UnsafePickleError,
    ),
    "a tensor made of itself": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\n"
        b"ctorch\nTensor\n)NtR.",
        UnsafePickleError,
    ),
    "an id that is no storage": (b"\x80\x02K\x01Q.", CorruptFileError),
    "a storage of os": (
        b"\x80\x02(X\x07\0\0\0storagecargparse\nNamespace\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ.",
        CorruptFileError,
    ),
    "no stack": (b"R.", CorruptFileError),
    "nothing to stop with": (b".", CorruptFileError),
    "no stop": (b"}", CorruptFileError),
    "no mark": (b"t.", CorruptFileError),
    "no target": (b"(K\x01u.", CorruptFileError),
    "a key without a value": (b"}(K\x01u.", CorruptFileError),
    "appends to a tuple": (b")K\x01a.", CorruptFileError),
    "items of a list": (b"]K\x01K\x02s.", CorruptFileError),
    "recalls nothing": (b"h\x01.", CorruptFileError),
    "remembers nothing": (b"q\x01.", CorruptFileError),
    "an unknown opcode": (b"\xff.", CorruptFileError),
    "protocol 6": (b"\x80\x06}.", CorruptFileError),
    "text beyond the end": (b"X\xff\xff\xff\x7fa.", CorruptFileError),
    "text of 2^63 bytes": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.", CorruptFileError),
    "bytes of 2^64": (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffa.", CorruptFileError),
    "a bytearray of 2^64": (b"\x96\xff\xff\xff\xff\xff\xff\xff\xffa.", CorruptFileError),
    "a frame of 2^64": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff}.", CorruptFileError),
    "a number of 2^31 bytes": (b"\x8b\xff\xff\xff\x7f1.", CorruptFileError),
    "a number of 3,000 digits": (b"I" + b"9" * 3000 + b"\n.", CorruptFileError),
    "a long of 3,000 digits": (b"L" + b"9" * 3000 + b"L\n.", CorruptFileError),
    "an endless line": (b"V" + b"a" * 10_000 + b"\n.", CorruptFileError),
    "no number": (b"Iabc\n.", CorruptFileError),
    "no float": (b"Fabc\n.", CorruptFileError),
    "text that is not UTF-8": (b"X\x01\0\0\0\xff.", CorruptFileError),
    "a negative memo": (b"}p-1\n.", CorruptFileError),
    "a huge memo": (b"}p99999999999999\n.", CorruptFileError),
    "a wrong escape": (b"S'\\x'\n.", CorruptFileError),
    "a size of nothing": (b"ctorch\nSize\n(tR.", CorruptFileError),
    "a size that is negative": (b"ctorch\nSize\n((I-1\nttR.", CorruptFileError),
    "a size of 1,000 dimensions": (
        b"ctorch\nSize\n((" + b"K\x01" * 1000 + b"ttR.",
        CorruptFileError,
    ),
    "a tensor of nothing": (b"ctorch._utils\n_rebuild_tensor_v2\n(tR.", CorruptFileError),
    "a bit of a million levels": (
        b"}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
        b"K\x00(K\x06t(K\x01t\x89)}(" + b"]" * 200_000 + b"a" * 199_999 + b"\x88utRu.",
        FormatError,
    ),
    "pairs that are none": (b"ccollections\nOrderedDict\n(](K\x01)etR.", CorruptFileError),
    "a name that is not text": (b"\x80\x04K\x01K\x02\x93.", CorruptFileError),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_pickles_made_by_hand_are_refused(tmp_path: Path, name: str) -> None:
    """An opcode that is misused, or reaches outside, ends in an error that names the file."""
    text, kind = BY_HAND[name]
    with pytest.raises(kind) as refused:
        opened(with_pickle(tmp_path / "m.pt", text))
    assert str(refused.value).startswith(str(tmp_path / "m.pt"))
    assert str(refused.value).isprintable()
    assert type(refused.value) is kind


def test_what_is_listed_is_only_described() -> None:
    """Planted fault: a class that is listed is not instantiated, and its state is not set."""
    text = pickle.dumps(argparse.Namespace(a=1), 4)
    found, _ = interpret(text)
    assert not isinstance(found, argparse.Namespace)
    assert type(found).__module__ == "streamsoup.formats.pickled.descriptions"
    copyreg.add_extension("collections", "OrderedDict", 240)
    try:
        text = pickle.dumps(collections.OrderedDict, 2)
        assert text[2:3] == b"\x82"
        with pytest.raises(UnsafePickleError):
            interpret(text)
    finally:
        copyreg.remove_extension("collections", "OrderedDict", 240)


# -- bombs ----------------------------------------------------------------------------------------

BOMBS: dict[str, Callable[[int], bytes]] = {
    "numbers": lambda n: b"(" + b"J\xff\xff\xff\x7f" * n + b"l.",
    "long numbers": lambda n: b"(" + (b"\x8a\xff" + b"\x7f" * 255) * (n // 200) + b"l.",
    "floats": lambda n: b"(" + (b"G" + struct.pack(">d", 1.5)) * n + b"l.",
    "texts": lambda n: b"(" + b"\x8c\x01a" * n + b"l.",
    "different texts": lambda n: b"(" + b"".join(b"\x8c\x06%06d" % i for i in range(n)) + b"l.",
    "wide texts": lambda n: b"\x8d" + struct.pack("<Q", n + 4) + b"a" * n + b"\xf0\x9f\x8d\xb2.",
    "old lines": lambda n: b"(" + b"V\\U0001f372\n" * n + b"l.",
    "quoted lines": lambda n: b"(" + b"S'aaa'\n" * n + b"l.",
    "bytes": lambda n: b"\x8e" + struct.pack("<Q", n) + b"a" * n + b".",
    "mappings": lambda n: b"(" + b"}" * n + b"l.",
    "lists": lambda n: b"(" + b"]" * n + b"l.",
    "lists of one": lambda n: b"(" + b"]K\x01a" * n + b"l.",
    "tuples": lambda n: b"(" + b"K\x01\x85" * n + b"l.",
    "tuples of three": lambda n: b"(" + b"NNN\x87" * n + b"l.",
    "sets": lambda n: b"(" + b"\x8f" * n + b"l.",
    "marks": lambda n: b"(" * n,
    "duplicates": lambda n: b"(}" + b"2" * n + b"l.",
    "items": lambda n: b"}(" + b"NN" * n + b"u.",
    "items one by one": lambda n: b"}" + b"NNs" * n + b".",
    "a memo": lambda n: b"}" + b"\x94" * n + b".",
    "a memo by numbers": lambda n: (
        b"}" + b"".join(b"r%b" % struct.pack("<I", i) for i in range(n)) + b"."
    ),
    "records": lambda n: b"cargparse\nNamespace\n\x94(" + b"h\x00)R" * n + b"l.",
    "names": lambda n: b"(" + b"ctorch\nSize\n" * n + b"l.",
    "copies of a mapping": lambda n: (
        b"}("
        + b"NN" * n
        + b"u\x940ccollections\nOrderedDict\n\x940("
        + b"h\x01h\x00\x85R" * n
        + b"l."
    ),
    "copies of pairs": lambda n: (
        b"]\x94("
        + b"NN\x86" * n
        + b"e0ccollections\nOrderedDict\n\x940("
        + b"h\x01h\x00\x85R" * n
        + b"l."
    ),
    "copies of sizes": lambda n: (
        b"(" + b"K\x01" * 64 + b"l\x940ctorch\nSize\n\x940(" + b"h\x01h\x00\x85R" * n + b"l."
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_held_is_counted_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes charged bound the bytes held, and no pickle holds more than the limit."""
    limit = 4_000_000
    monkeypatch.setattr(opcodes, "LARGEST", limit)
    for n in (100, 10_000, 1_000_000):
        text = BOMBS[name](n)
        tracemalloc.start()
        try:
            found, charged = interpret(text)
        except CorruptFileError:
            found, charged = None, limit
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held < 1.2 * charged + 200_000, (n, held, charged)
        del found


def test_laughter_and_depth_cost_nothing(tmp_path: Path) -> None:
    """Values that hold themselves a billion times, and a million levels, take what they say."""
    laughs = b"]\x940" + b"".join(
        b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"e\x940" for i in range(200)
    )
    began = time.monotonic()
    interpret(laughs + b"h\xc8.")
    interpret(b"]" * 500_000 + b"a" * 499_999 + b".")
    interpret(b")" + b"\x85" * 500_000 + b".")
    interpret(b"}\x94(\x8c\x01ah\x00u.")  # a mapping that holds itself
    with pytest.raises(FormatError, match="holds no weights"):
        opened(with_pickle(tmp_path / "m.pt", b"}\x94(\x8c\x01ah\x00\x8c\x01bh\x00u."))
    assert time.monotonic() - began < 60


# -- tensors that lie -----------------------------------------------------------------------------


def tensor_pickle(key: str, n: int, offset: int, shape: Any, strides: Any) -> bytes:
    """Return the pickle of ``{"w": tensor}``, with whatever is said of it."""

    def number(value: int) -> bytes:
        return b"L%dL\n" % value

    def sizes(values: Any) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n"
    storage += b"X" + struct.pack("<I", len(key)) + key.encode()
    storage += b"X\x03\0\0\0cpu" + number(n) + b"tQ"
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(offset)
        + sizes(shape)
        + sizes(strides)
        + b"\x89ccollections\nOrderedDict\n(tRtRs."
    )


LIES = {
    "a shape beyond the storage": ("0", 6, 0, (7,), (1,)),
    "an offset beyond the storage": ("0", 6, 5, (2,), (1,)),
    "strides beyond the storage": ("0", 6, 0, (2, 3), (4, 1)),
    "a shape of 2^62": ("0", 6, 0, (1 << 62,), (1,)),
    "an offset of 2^62": ("0", 6, 1 << 62, (1,), (1,)),
    "strides of 2^62": ("0", 6, 0, (3,), (1 << 62,)),
    "a negative offset": ("0", 6, -1, (1,), (1,)),
    "a negative stride": ("0", 6, 5, (6,), (-1,)),
    "a negative size": ("0", 6, 0, (-6,), (1,)),
    "a storage larger than its member": ("0", 7, 0, (7,), (1,)),
    "a storage smaller than its member": ("0", 5, 0, (5,), (1,)),
    "a storage of 2^61": ("0", 1 << 61, 0, (1 << 61,), (1,)),
    "no such storage": ("1", 6, 0, (6,), (1,)),
    "a storage elsewhere": ("../data.pkl", 6, 0, (6,), (1,)),
    "fewer strides": ("0", 6, 0, (2, 3), (1,)),
    "a size beyond 2^63 elements": ("0", 6, 0, (1 << 40, 1 << 40), (0, 0)),
}


@pytest.mark.parametrize("name", LIES)
def test_tensors_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    """A tensor that its storage does not hold is refused when it is opened, by its file."""
    with pytest.raises(FormatError) as refused:
        opened(with_pickle(tmp_path / "m.pt", tensor_pickle(*LIES[name])))
    assert str(refused.value).startswith(str(tmp_path / "m.pt"))
    good = with_pickle(tmp_path / "good.pt", tensor_pickle("0", 6, 0, (2, 3), (3, 1)))
    read_all(good)


# -- archives that lie ----------------------------------------------------------------------------


def entries(raw: bytes) -> list[int]:
    """Return the offsets of the entries of an archive's directory."""
    at = raw.rindex(b"PK\x05\x06")
    n, _, offset = struct.unpack_from("<HLL", raw, at + 10)
    found = []
    at = offset
    for _ in range(n):
        found.append(at)
        at += 46 + sum(struct.unpack_from("<3H", raw, at + 28))
    return found


def changed(raw: bytes, at: int, form: str, *values: int) -> bytes:
    """Put numbers into bytes."""
    made = bytearray(raw)
    struct.pack_into(form, made, at, *values)
    return bytes(made)


def rezipped(raw: bytes, method: int = 0, **more: Any) -> bytes:
    """Write the archive anew, with `method`, and more members."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w", method) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
        for name, content in more.items():
            new.writestr(name.replace("_", "/"), content)
    return made.getvalue()


def twice(raw: bytes) -> bytes:
    """Give the second tensor's member the name of the first."""
    return raw.replace(b"m/data/1", b"m/data/0")


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "0 bytes, too few"),
    "the first byte": (lambda raw: raw[:1], "too few"),
    "half of it": (lambda raw: raw[: len(raw) // 2], "does not end as a zip archive"),
    "without its last byte": (lambda raw: raw[:-1], "does not end as a zip archive"),
    "something after it": (lambda raw: raw + b"x", "does not end as a zip archive"),
    "two after each other": (lambda raw: raw + raw, "not where its locator says"),
    "something before it": (lambda raw: b"PK\x03\x04" + raw, "expected it to end at|not where"),
    "a comment": (lambda raw: changed(raw, len(raw) - 2, "<H", 1) + b"x", "does not end|comment"),
    "several disks": (lambda raw: changed(raw, len(raw) - 18, "<H", 1), "several parts"),
    "fewer members": (lambda raw: changed(raw, len(raw) - 14, "<2H", 2, 2), "contradict"),
    "a directory elsewhere": (lambda raw: changed(raw, len(raw) - 6, "<L", 5), "contradict"),
    "a damaged entry": (lambda raw: changed(raw, entries(raw)[1], "<L", 0), "damaged entry"),
    "a name longer than the directory": (
        lambda raw: changed(raw, entries(raw)[1] + 28, "<H", 65000),
        "damaged entry",
    ),
    "a member over another": (
        lambda raw: changed(
            raw, entries(raw)[-3] + 42, "<L", struct.unpack_from("<L", raw, entries(raw)[1] + 42)[0]
        ),
        "overlapping zip members|where its directory|another member",
    ),
    "a member beyond the directory": (
        lambda raw: changed(raw, entries(raw)[1] + 42, "<L", len(raw) - 30),
        "overlapping zip members",
    ),
    "a larger size": (
        lambda raw: changed(raw, entries(raw)[-3] + 20, "<2L", 1 << 20, 1 << 20),
        "overlapping zip members",
    ),
    "two sizes": (lambda raw: changed(raw, entries(raw)[0] + 24, "<L", 5), "contradicts itself"),
    "compressed": (lambda raw: rezipped(raw, zipfile.ZIP_DEFLATED), "compressed, .*zip -0 -r"),
    "encrypted": (lambda raw: changed(raw, entries(raw)[0] + 8, "<H", 1), "encrypted"),
    "a name twice": (twice, "m/data/0' twice"),
    "a name that escapes": (
        lambda raw: raw.replace(b"m/version", b"../ersion"),
        "the name '../ersion'",
    ),
    "a name from the root": (lambda raw: raw.replace(b"m/version", b"//version"), "with the name"),
    "a name with a NUL": (lambda raw: raw.replace(b"m/version", b"m/versi\0n"), "with the name"),
    "a name of Windows": (lambda raw: raw.replace(b"m/version", b"m\\version"), "with the name"),
    "a name that is not UTF-8": (lambda raw: raw.replace(b"m/version", b"m/\xffersion"), "UTF-8"),
    "another local name": (
        lambda raw: raw.replace(b"m/data/1", b"m/data/9", 1),
        "another member where",
    ),
    "a wrong CRC of the pickle": (
        lambda raw: changed(raw, entries(raw)[0] + 16, "<L", 12345),
        "two CRCs|another CRC-32",
    ),
    "a damaged pickle": (lambda raw: raw.replace(b"storageq", b"storagfq", 1), "another CRC-32"),
    "code of TorchScript": (
        lambda raw: rezipped(raw, m_constants=b"").replace(b"m/constants", b"m/code/x.py"),
        "TorchScript archive, .*torch.jit.load",
    ),
    "big-endian": (
        lambda raw: rezipped(raw).replace(b"little", b"bigger"),
        "'bigger'-endian byte order",
    ),
    "no pickle": (lambda raw: raw.replace(b"data.pkl", b"data.PKL"), "expected one NAME/data.pkl"),
    "a legacy pickle": (lambda raw: b"\x80\x02}q\x00.", "could run code"),
    "a web page": (lambda raw: b"<html><body>not found</body></html>", "web page"),
    "a Git LFS pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    """An archive that contradicts itself, or is not one of torch.save, is refused by name."""
    change, phrase = ARCHIVES[name]
    path = tmp_path / "m.pt"
    raw = saved(path, w=torch.arange(6.0), v=torch.ones(6))
    read_all(path)
    path.write_bytes(change(raw))
    with pytest.raises(FormatError, match=phrase) as refused:
        read_all(path)
    assert str(refused.value).startswith(str(path))
    assert str(refused.value).isprintable()


def zip64_of(raw: bytes) -> int:
    """Return where the zip64 end record is."""
    return raw.rindex(b"PK\x06\x06")


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        *((24, "<Q", 1 << 40), (32, "<Q", 1 << 40), (40, "<Q", 1 << 40), (48, "<Q", 1 << 62)),
        *((4, "<Q", 45), (0, "<L", 0), (16, "<L", 1), (24, "<Q", 1), (40, "<Q", 1)),
        *((56, "<L", 0), (64, "<Q", 3), (72, "<L", 2)),
    ],
)
def test_zip64_records_that_lie_are_refused(tmp_path: Path, at: int, form: str, value: int) -> None:
    """The 64-bit end record and its locator agree with all else, or the file is refused."""
    path = tmp_path / "m.pt"
    raw = saved(path, w=torch.arange(6.0))
    path.write_bytes(changed(raw, zip64_of(raw) + at, form, value))
    with pytest.raises(CorruptFileError):
        opened(path)


def test_a_directory_of_two_million_members_is_refused(tmp_path: Path) -> None:
    """A directory beyond the limit is refused before it is read."""
    entry = b"PK\x01\x02" + bytes(42)
    n = 1_500_000
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, n, n, 46 * n, 4)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4 + 46 * n, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "m.pt"
    path.write_bytes(b"PK\x03\x04" + entry * n + end64 + locator + end)
    with pytest.raises(CorruptFileError, match="claims a zip directory of 1500000 members"):
        opened(path)


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_refused_or_read(tmp_path: Path, seed: int) -> None:
    """Bytes flipped, cut or put in anywhere: an error of ours, or tensors; never anything else."""
    rng = random.Random(seed)
    path = tmp_path / "m.pt"
    torch.save(
        {"m": {"w": torch.ones(3, 4).t(), "v": torch.nn.Parameter(torch.ones(2))}, "n": {1, 2}},
        path,
        pickle_protocol=rng.choice([2, 4]),
    )
    raw = path.read_bytes()
    outcomes = collections.Counter()
    for _ in range(400):
        made = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(made))
            if rng.random() < 0.7:
                made[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del made[at : at + rng.choice([1, 4, 100])]
            else:
                made[at:at] = rng.randbytes(rng.choice([1, 4]))
        path.write_bytes(bytes(made))
        try:
            read_all(path)
        except StreamsoupError as error:
            outcomes["refused" if str(error).isprintable() else "ugly"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["read"] > 0
    assert outcomes["ugly"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_noise_in_a_pickle_is_refused_or_described(tmp_path: Path, seed: int) -> None:
    """The interpreter alone, without the CRC before it: any bytes are described or refused."""
    rng = random.Random(seed)
    path = tmp_path / "m.pt"
    things = {"w": torch.ones(3, 4).t(), "a": argparse.Namespace(x=1), "s": {1, "b"}, "t": (1, [2])}
    torch.save(things, path, pickle_protocol=rng.choice([2, 3, 4, 5]))
    with zipfile.ZipFile(path) as archive:
        text = archive.read("m/data.pkl")
    for _ in range(3000):
        made = bytearray(text)
        for _ in range(rng.choice([1, 2, 5])):
            made[rng.randrange(len(made))] = rng.randrange(256)
        try:
            interpret(bytes(made))
        except (CorruptFileError, UnsafePickleError):
            pass
        try:
            interpret(rng.randbytes(rng.randrange(40)) + b".")
        except (CorruptFileError, UnsafePickleError):
            pass


def test_crcs_are_of_the_bytes(tmp_path: Path) -> None:
    """What is written into an archive by hand above has the CRC that zlib gives."""
    raw = saved(tmp_path / "m.pt", w=torch.arange(6.0))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for item in archive.infolist():
            assert zlib.crc32(archive.read(item)) == item.CRC
