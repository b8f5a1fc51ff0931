"""The header parser believes nothing: over a hundred hostile files, one clear error each."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from checkpoints import content, header_text, needs, raw, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from streamsoup.cli import cli
from streamsoup.errors import CorruptFileError, FormatError, UnsupportedDtypeError
from streamsoup.formats import header
from streamsoup.formats.header import make_header, parse_header
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.tensors import DTYPES

GOOD = {"a": tensor(np.arange(4, dtype=np.float32)), "b": tensor(np.arange(6, dtype=np.float16))}
ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    """Return a header of one tensor with anything in its fields."""
    return json.dumps(
        {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, allow_nan=True
    ).encode()


def one(text: bytes, nbytes: int = 4) -> bytes:
    """Return a file of this header, and as many data bytes."""
    return raw(text, bytes(nbytes))


def literal(shape: str = "[1]", offsets: str = "[0,4]", dtype: str = '"F32"') -> bytes:
    """Return a file whose fields are spelled out."""
    text = f'{{"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'
    return one(text.encode())


def two(a: tuple[int, int], b: tuple[int, int], nbytes: int) -> bytes:
    """Return a file of two U8 tensors with these offsets."""
    fields = {
        name: {"dtype": "U8", "shape": [max(0, e - s)], "data_offsets": [s, e]}
        for name, (s, e) in {"a": a, "b": b}.items()
    }
    return one(json.dumps(fields).encode(), nbytes)


HOSTILE: dict[str, tuple[bytes, str]] = {
    # Too short, too long, cut, padded.
    "empty file": (b"", "too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too few"),
    "length only": (struct.pack("<Q", 2), "truncated"),
    "length zero": (struct.pack("<Q", 0), "'{'"),
    "length above the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "length 100 MB and one": (struct.pack("<Q", 100_000_001) + b"{}", "limit"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "limit"),
    "length 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", "limit"),
    "data cut by one": (content(GOOD)[:-1], "truncated"),
    "data cut to none": (raw(header_text(GOOD)), "truncated"),
    "one byte too many": (content(GOOD) + b"\0", "after its last tensor"),
    "bytes and no tensor": (raw(b"{}", b"\0\0"), "after its last tensor"),
    # Not JSON, or not quite.
    "starts with a space": (one(b' {"t":' + ENTRY + b"}"), "'{'"),
    "starts with a BOM": (one(b'\xef\xbb\xbf{"t":' + ENTRY + b"}"), "'{'"),
    "a list": (one(b"[1]"), "'{'"),
    "a string": (one(b'"x"'), "'{'"),
    "unclosed": (one(b'{"t":' + ENTRY), "not JSON"),
    "two objects": (one(b'{"t":' + ENTRY + b"}{}"), "not JSON"),
    "trailing comma": (one(b'{"t":' + ENTRY + b",}"), "not JSON"),
    "trailing NUL": (one(b'{"t":' + ENTRY + b"}\0"), "not JSON"),
    "single quotes": (one(b"{'t':" + ENTRY + b"}"), "not JSON"),
    "comment": (one(b'{/* */"t":' + ENTRY + b"}"), "not JSON"),
    "raw newline in a name": (one(b'{"a\nb":' + ENTRY + b"}"), "not JSON"),
    "raw escape in a name": (one(b'{"a\x1b[2J":' + ENTRY + b"}"), "not JSON"),
    "invalid UTF-8": (one(b'{"\xff":' + ENTRY + b"}"), "UTF-8"),
    "overlong UTF-8": (one(b'{"\xc0\xaf":' + ENTRY + b"}"), "UTF-8"),
    "surrogate in UTF-8": (one(b'{"\xed\xa0\x80":' + ENTRY + b"}"), "UTF-8"),
    "UTF-16": (one('{"t":1}'.encode("utf-16-le")), "not JSON"),
    "nested a hundred thousand deep": (one(b'{"t":' + b"[" * 100_000), "nested"),
    "objects nested deep": (one(b'{"t":' * 100_000), "nested"),
    # Names.
    "same name twice": (one(b'{"t":' + ENTRY + b',"t":' + ENTRY + b"}"), "twice"),
    "same name, escaped": (one(b'{"t":' + ENTRY + b',"\\u0074":' + ENTRY + b"}"), "twice"),
    "same field twice": (
        one(b'{"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "twice",
    ),
    "same field, escaped": (
        one(b'{"t":{"dtype":"F32","sh\\u0061pe":[2],"shape":[1],"data_offsets":[0,4]}}'),
        "twice",
    ),
    "metadata twice": (one(b'{"__metadata__":{},"__metadata__":{},"t":' + ENTRY + b"}"), "twice"),
    "metadata key twice": (one(b'{"__metadata__":{"a":"1","a":"2"},"t":' + ENTRY + b"}"), "twice"),
    "lone surrogate": (one(b'{"\\ud800":' + ENTRY + b"}"), "not Unicode"),
    "lone low surrogate": (one(b'{"a\\udc80":' + ENTRY + b"}"), "not Unicode"),
    "surrogate in a metadata key": (
        one(b'{"__metadata__":{"\\ud800":"x"},"t":' + ENTRY + b"}"),
        "not Unicode",
    ),
    "surrogate in a metadata value": (
        one(b'{"__metadata__":{"x":"\\ud800"},"t":' + ENTRY + b"}"),
        "not Unicode",
    ),
    # Metadata.
    "metadata null": (one(b'{"__metadata__":null,"t":' + ENTRY + b"}"), "__metadata__"),
    "metadata a list": (one(b'{"__metadata__":[],"t":' + ENTRY + b"}"), "__metadata__"),
    "metadata a number": (one(b'{"__metadata__":1,"t":' + ENTRY + b"}"), "__metadata__"),
    "metadata value a number": (one(b'{"__metadata__":{"a":1},"t":' + ENTRY + b"}"), "string"),
    "metadata value null": (one(b'{"__metadata__":{"a":null},"t":' + ENTRY + b"}"), "string"),
    "metadata value an object": (one(b'{"__metadata__":{"a":{}},"t":' + ENTRY + b"}"), "string"),
    "metadata looks like a tensor": (one(b'{"__metadata__":' + ENTRY + b"}"), "string"),
    # Entries.
    "entry null": (one(b'{"t":null}'), "exactly"),
    "entry a list": (one(b'{"t":["F32",[1],[0,4]]}'), "exactly"),
    "no dtype": (one(b'{"t":{"shape":[1],"data_offsets":[0,4]}}'), "exactly"),
    "no shape": (one(b'{"t":{"dtype":"F32","data_offsets":[0,4]}}'), "exactly"),
    "no offsets": (one(b'{"t":{"dtype":"F32","shape":[1]}}'), "exactly"),
    "a field more": (one(entry()[:-2] + b',"x":1}}'), "exactly"),
    "dtype unknown": (one(entry("F31")), "F31"),
    "dtype in lower case": (one(entry("f32")), "f32"),
    "dtype empty": (one(entry("")), "none of"),
    "dtype of control characters": (one(entry("\x1b[2J")), "x1b"),
    "dtype a number": (one(entry(32)), "not a string"),
    "dtype null": (one(entry(None)), "not a string"),
    "dtype a list": (one(entry(["F32"])), "not a string"),
    "shape null": (one(entry(shape=None)), "shape"),
    "shape a number": (one(entry(shape=1)), "shape"),
    "shape a string": (one(entry(shape="1")), "shape"),
    "shape of strings": (one(entry(shape=["1"])), "shape"),
    "shape of true": (one(entry(shape=[True])), "shape"),
    "shape of null": (one(entry(shape=[None])), "shape"),
    "shape nested": (one(entry(shape=[[1]])), "shape"),
    "shape 1.0": (literal("[1.0]"), "1.0"),
    "shape 1e0": (literal("[1e0]"), "1e0"),
    "shape 1E3": (literal("[1E3]"), "1E3"),
    "shape NaN": (literal("[NaN]"), "NaN"),
    "shape Infinity": (literal("[Infinity]"), "Infinity"),
    "shape -Infinity": (literal("[-Infinity]"), "Infinity"),
    "shape -1": (literal("[-1]"), "-1"),
    "shape -0": (literal("[-0]"), "-0"),
    "shape -1 x -1": (literal("[-1,-1]"), "-1"),
    "shape 01": (literal("[01]"), "not JSON"),
    "shape +1": (literal("[+1]"), "not JSON"),
    "shape 0x1": (literal("[0x1]"), "not JSON"),
    "shape 2^63": (literal(f"[{2**63}]"), "no size"),
    "shape 2^64+1": (literal(f"[{2**64 + 1}]"), "no size"),
    "shape of 10000 digits": (literal("[" + "9" * 10_000 + "]"), "no size"),
    "shape overflows to 1": (literal(f"[{2**32},{2**32},1]"), "too large"),
    "shape overflows to 4 bytes": (literal(f"[{2**62},4]", "[0,4]"), "too large"),
    "bits overflow": (literal(f"[{2**60}]"), "too large"),
    "shape overflows before a zero": (literal(f"[{2**40},{2**40},0]", "[0,0]"), "too large"),
    "shape too large for the data": (literal("[2]"), "shape and dtype take 8"),
    "shape too small for the data": (literal("[0]"), "shape and dtype take 0"),
    "0-d with 8 bytes": (literal("[]", "[0,8]"), "take 4"),
    "half a byte": (literal("[1]", "[0,1]", '"F4"'), "whole bytes"),
    "three fourths of a byte": (literal("[3]", "[0,2]", '"F6_E2M3"'), "whole bytes"),
    # Offsets.
    "offsets null": (literal(offsets="null"), "data_offsets"),
    "offsets empty": (literal(offsets="[]"), "two offsets"),
    "one offset": (literal(offsets="[4]"), "two offsets"),
    "three offsets": (literal(offsets="[0,4,4]"), "two offsets"),
    "offsets of strings": (literal(offsets='["0","4"]'), "two offsets"),
    "offsets of booleans": (literal(offsets="[false,4]"), "two offsets"),
    "offset 4.0": (literal(offsets="[0,4.0]"), "4.0"),
    "offset 4e0": (literal(offsets="[0,4e0]"), "4e0"),
    "offset -4": (literal(offsets="[-4,0]"), "-4"),
    "offsets reversed": (literal(offsets="[4,0]"), "-4 bytes"),
    "offsets near 2^63": (literal(offsets=f"[{2**63 - 5},{2**63 - 1}]"), "hole"),
    "offsets wrap at 2^64": (literal(offsets=f"[{2**64 - 4},{2**64}]"), "no size"),
    "hole at the start": (literal(offsets="[4,8]") + bytes(4), "hole"),
    "hole between": (two((0, 2), (3, 4), 4), "hole"),
    "overlap": (two((0, 3), (2, 4), 4), "overlaps"),
    "same place": (two((0, 4), (0, 4), 4), "overlaps"),
    "one inside the other": (two((0, 4), (1, 2), 4), "overlaps"),
    "zero-size inside another": (two((0, 4), (2, 2), 4), "overlaps"),
    "zero-size beyond the end": (two((0, 4), (5, 5), 4), "hole"),
    # Other formats.
    "a zip": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(200), "zip"),
    "a zip without flags": (b"PK\x03\x04\x00\x00\x00\x00" + bytes(200), "zip"),
    "a pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "git lfs pull",
    ),
    "an HTML page": (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
    "text": (b"Hello, world! This is no model.\n", "not a safetensors"),
    "zeros": (bytes(1000), "'{'"),
    "JSON alone": (b'{"t":' + ENTRY + b"}", "is JSON text (give the folder it lies in), not saf"),
    "a length that looks like JSON": (b"{" + bytes(7) + b"{}", "is truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    """Each wrong file is refused with a FormatError that names it and says what is wrong."""
    whole, phrase = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    with pytest.raises(FormatError) as refused:
        open_ingredients([path])
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert phrase in message.removeprefix(str(path))
    assert message.isprintable()
    assert len(message) < 700


def test_a_path_that_begins_like_a_message_is_still_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is named even where its name is a word of the message."""
    monkeypatch.chdir(tmp_path)
    for name in ("has", "is", "tensor", "i"):
        Path(name).write_bytes(content(GOOD)[:-1])
        with pytest.raises(FormatError, match=f"^{name}: is truncated"):
            open_ingredients([name])


def test_hostile_files_through_the_command_line(tmp_path: Path) -> None:
    """A soup of a wrong file exits with 1 and one line on stderr, and leaves no output behind."""
    good = tmp_path / "good.safetensors"
    good.write_bytes(content(GOOD))
    for i, (whole, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"bad{i}.safetensors").write_bytes(whole)
    script = (
        "import json, sys, os\n"
        "import streamsoup.methods.fixed, streamsoup.cli.terminal, streamsoup.engine.stream\n"
        "from streamsoup.cli import cli\n"
        "for i in range(int(sys.argv[1])):\n"
        "    print(f'case {i}', file=sys.stderr, flush=True)\n"
        "    paths = ['good.safetensors', f'bad{i}.safetensors']\n"
        "    status = cli(['uniform', *paths, '-o', f'out{i}'])\n"
        "    print(f'status {status}', file=sys.stderr, flush=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(len(HOSTILE))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout == ""
    lines = ran.stderr.split("\n")
    for i, case in enumerate(HOSTILE):
        said = lines[3 * i : 3 * i + 3]
        assert said[0] == f"case {i}", case
        assert said[1].startswith(f"error: bad{i}.safetensors: "), case
        assert said[1].isprintable(), case
        assert said[2] == "status 1", case
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_inspect_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` refuses a wrong file with one line, and prints nothing."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE["overlap"][0])
    assert cli(["inspect", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {path}: tensor 'b' overlaps")
    assert printed.err.count("\n") == 1


def test_the_errors_have_kinds() -> None:
    """Damage and an unknown dtype are told apart, and both are FormatErrors and ValueErrors."""
    with pytest.raises(CorruptFileError):
        parse_header(b"{", 9)
    with pytest.raises(UnsupportedDtypeError):
        parse_header(entry("F31"), 8 + len(entry("F31")) + 4)
    assert issubclass(UnsupportedDtypeError, ValueError)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_is_read(dtype: str) -> None:
    """Each dtype is read with its name, its shape and its width, sub-byte ones included."""
    nbytes = DTYPES[dtype].nbits
    parsed = parse_header(*_sized({"t": (dtype, (2, 4), bytes(nbytes))}))
    assert parsed.tensors["t"].nbytes == nbytes
    assert parsed.tensors["t"].shape == (2, 4)


def _sized(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> tuple[bytes, int]:
    return header_text(tensors), len(content(tensors))


@needs(safetensors, 0, 8)
def test_the_table_has_all_dtypes_of_safetensors() -> None:
    """What the reference reader lists as known is in our table, and nothing else is."""
    bad = raw(entry("F31"), bytes(4))
    with pytest.raises(safetensors.SafetensorError) as refused:
        safetensors.deserialize(bad)
    listed = str(refused.value).split("expected one of")[1].split(" at line")[0]
    assert set(listed.replace("`", "").replace(",", " ").split()) == set(DTYPES)


def test_valid_oddities_are_accepted() -> None:
    """No tensors, 0-d, zero-size anywhere, unsorted entries, blanks and odd names are valid."""
    for whole in (
        raw(b"{}"),
        raw(b'{"__metadata__":{"a":"\\u00e9"}}      '),
        content({"": tensor(np.float32(1))}),
        content({"a\x1b\n\u202e": tensor(np.float32(1))}),
        content({"__metadata": tensor(np.float32(1)), "\U0001f372": tensor(np.int64(3))}),
        content({"z": ("F32", (0,), b""), "y": tensor(np.float32(1)), "x": ("U8", (9, 0), b"")}),
        two((2, 4), (0, 2), 4),
        two((0, 0), (0, 0), 0),
        raw(entry(shape=[2**62 // 32, 0], offsets=[0, 0])),
        raw(b'{\t"t" :\r\n' + entry()[5:], bytes(4)),
        raw(b'{"\\ud83c\\udf72":' + ENTRY + b"}", bytes(4)),
    ):
        (length,) = struct.unpack("<Q", whole[:8])
        parsed, data = parse_header(whole[8 : 8 + length], len(whole)), whole[8 + length :]
        theirs = dict(safetensors.deserialize(whole))
        assert set(parsed.tensors) == set(theirs)
        for name, spec in parsed.tensors.items():
            assert theirs[name]["data"] == data[spec.begin : spec.begin + spec.nbytes]


@needs(torch, 2, 7)
@needs(safetensors, 0, 8)
def test_what_torch_writes_is_read_back(tmp_path: Path) -> None:
    """Files that safetensors writes from torch, in each dtype it knows, are read entry by entry."""
    named = (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
        *("complex64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
    tensors = {
        name: torch.arange(6, dtype=torch.uint8).repeat(16).view(getattr(torch, name))
        if name != "bool"
        else torch.tensor([True, False])
        for name in named
    }
    tensors["0-d"] = torch.tensor(2.5)
    tensors["none"] = torch.zeros(3, 0, 2)
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "é": "\n"})
    (opened,) = open_ingredients([tmp_path / "m.safetensors"])
    assert set(opened.layout.places) == set(tensors)
    data = (tmp_path / "m.safetensors").read_bytes()[opened.source.shards[0].data_begin :]
    for name, (_, spec) in opened.layout.places.items():
        assert spec.shape == tuple(tensors[name].shape)
        found = data[spec.begin : spec.begin + spec.nbytes]
        assert found == bytes(tensors[name].flatten().view(torch.uint8).numpy())


def test_headers_we_write_are_read_by_safetensors() -> None:
    """A header made here is valid for the reference reader, aligned, and says `format: pt`."""
    tensors = [("\x1bß", "F32", (2, 1), 8), ("b", "BF16", (), 2), ("c", "I64", (0,), 0)]
    head = make_header(tensors)
    assert len(head) % 8 == 0
    theirs = dict(safetensors.deserialize(head + bytes(range(10))))
    assert theirs["\x1bß"]["data"] == bytes(range(8))
    assert theirs["b"]["shape"] == []
    assert json.loads(head[8:])["__metadata__"] == {"format": "pt"}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a valid file with a few bytes, or a few words of its header, changed."""
    names = draw(st.lists(st.text(min_size=1, max_size=4), max_size=3, unique=True))
    tensors = {
        name: ("F16", shape, bytes(2 * int(np.prod(shape))))
        for name in names
        for shape in [draw(st.sampled_from([(), (0,), (1,), (2, 3)]))]
    }
    text = bytearray(header_text(tensors, draw(st.sampled_from([None, {}, {"k": "v"}]))))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text) - 1))
        words = (b"0", b"1", b"-", b"e", b".", b'"', b"\\u0041", b" ", b"}", b"{", b",", b"[", b"]")
        text[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from(words))
    data = b"".join(data for _, _, data in tensors.values())
    return raw(bytes(text), data + bytes(draw(st.sampled_from([0, 0, 0, 1]))))


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(mutated())
def test_we_accept_only_what_safetensors_accepts(whole: bytes) -> None:
    """Whatever we accept, the reference reader accepts too, and sees the same tensors in it."""
    _compare(whole)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=40), st.binary(max_size=8))
def test_arbitrary_bytes_never_surprise(text: bytes, data: bytes) -> None:
    """Any bytes at all give a FormatError or a header, never another exception."""
    _compare(raw(text, data))
    _compare(raw(b"{" + text, data))


def _compare(whole: bytes) -> None:
    (length,) = struct.unpack("<Q", whole[:8])
    try:
        parsed, data = parse_header(whole[8 : 8 + length], len(whole)), whole[8 + length :]
    except FormatError:
        return
    theirs = dict(safetensors.deserialize(whole))
    assert set(theirs) == set(parsed.tensors)
    for name, spec in parsed.tensors.items():
        assert theirs[name]["shape"] == list(spec.shape)
        assert theirs[name]["data"] == data[spec.begin : spec.begin + spec.nbytes]


def test_a_lenient_parser_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a parser that lets holes pass fails the comparison above."""
    whole = HOSTILE["hole between"][0]
    with pytest.raises(FormatError):
        safetensors_or_ours(whole)
    lenient = header.Header({})
    monkeypatch.setattr(sys.modules[__name__], "parse_header", lambda text, n: lenient)
    with pytest.raises(safetensors.SafetensorError):
        _compare(whole)


def safetensors_or_ours(whole: bytes) -> None:
    """Parse with our parser alone."""
    (length,) = struct.unpack("<Q", whole[:8])
    parse_header(whole[8 : 8 + length], len(whole))


@needs(safetensors, 0, 4, 5)
def test_what_safetensors_saves_we_accept() -> None:
    """Random models saved by the safetensors library are accepted, whatever their shapes."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        tensors = {
            f"t{i}": torch.zeros(tuple(rng.integers(0, 4, rng.integers(0, 5))))
            for i in range(rng.integers(0, 6))
        }
        _ = safetensors_or_ours(save(tensors, metadata={"a": "b"}))
