"""Soups of ingredients in buckets: the bytes of local ones, whatever the store does on the way.

The store is `hub_server` behind a stub of fsspec's file systems: listings, signed addresses and
tokens come from the stub, bytes by ranges from the server. test_stores_moto has s3fs itself.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serving
from test_remote import model, same_as_local

import streamsoup
from streamsoup.errors import ChangedIngredientError, FormatError, MissingFileError
from streamsoup.formats.remote.addresses import is_address, shown

SECRET = "neverShown123"


class Files:
    """A file system as s3fs and gcsfs give it, over a `Hub` that serves ``bucket/...``."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.failures: list[Exception] = []
        self.n_signed = 0
        self.credentials = self

    def ls(self, path: str, **_: Any) -> list[dict[str, str]]:
        if self.failures:
            raise self.failures.pop(0)
        folder = self.hub.root / path
        if not folder.is_dir():
            raise FileNotFoundError(path)
        return [
            {"name": f"{path}{file.name}", "type": "directory" if file.is_dir() else "file"}
            for file in folder.iterdir()
        ]

    def sign(self, path: str, expiration: int) -> str:
        if self.failures:
            raise self.failures.pop(0)
        assert expiration > 60
        self.n_signed += 1
        signature = f"{SECRET}{self.n_signed}"
        self.hub.signatures[signature] = self.hub.signed_for
        return f"{self.hub.url}/cdn/{path}?Signature={signature}"

    def url(self, path: str) -> str:
        return f"{self.hub.url}/token/{path}"

    def apply(self, headers: dict[str, str]) -> None:
        headers["Authorization"] = f"Bearer {SECRET}"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """A bucket with the folders ``org/one`` and ``org/two``."""
    for seed, name in enumerate(("one", "two")):
        model(tmp_path / "bucket/org" / name, seed)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serving(tmp_path) as hub:
        found = Files(hub)
        stub = types.SimpleNamespace(filesystem=lambda scheme, **_: found)
        monkeypatch.setitem(sys.modules, "fsspec", stub)
        yield found


def matches_local(files: Files, soup: str) -> None:
    """Assert that a soup has the files of one of the folders in the bucket, byte for byte."""
    whole, files.hub.root = files.hub.root, files.hub.root / "bucket"
    same_as_local(files.hub, soup)
    files.hub.root = whole


@pytest.mark.parametrize("scheme", ["s3", "gs", "S3"])
def test_a_soup_of_folders(files: Files, scheme: str) -> None:
    """Folders in a bucket make the soup of the same folders here, and secrets stay unseen."""
    at = f"{scheme}://bucket/org"
    streamsoup.uniform([f"{at}/one/", f"{at}/two"], output="soup")
    matches_local(files, "soup")
    streamsoup.verify("soup")
    record = Path("soup/streamsoup.json").read_text()
    paths = [each["path"] for each in json.loads(record)["ingredients"]]
    assert paths == [f"{scheme.lower()}://bucket/org/{name}" for name in ("one", "two")]
    assert SECRET not in "".join(p.read_bytes().decode("latin1") for p in Path("soup").iterdir())
    index, lone = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    streamsoup.uniform([f"{at}/one/{index}", f"{at}/two/{index}"], output="by-index")
    for file in Path("soup").glob("*.safetensors"):
        assert Path("by-index", file.name).read_bytes() == file.read_bytes()
    streamsoup.uniform([f"{at}/one/{lone}", f"{at}/two/{lone}"], output="lone")


def test_headers_alone(files: Files) -> None:
    """`inspect` and `plan` are sent kilobytes of megabytes."""
    model(files.hub.root / "bucket/large", 0, n=100_000)
    record = streamsoup.inspect("s3://bucket/large")
    assert record.nbytes > 16_000_000
    streamsoup.plan(["s3://bucket/large", "s3://bucket/large"])
    assert files.hub.nbytes < 500_000


@pytest.mark.parametrize("fault", ["500", "429", "short", "cut", "wrong-range"])
def test_faults_on_the_way(files: Files, fault: str) -> None:
    """An answer that fails is asked for again; the bytes are the same."""
    opened = streamsoup.open_ingredients(["s3://bucket/org/one", "s3://bucket/org/two"])
    files.hub.faults = [fault, "", fault]
    streamsoup.uniform(opened, output="soup")
    assert not files.hub.faults
    matches_local(files, "soup")


def test_addresses_that_expire(files: Files) -> None:
    """An object whose signed address has expired is given a new one."""
    files.hub.signed_for = 1
    streamsoup.uniform(["s3://bucket/org/one", "s3://bucket/org/two"], output="soup")
    matches_local(files, "soup")
    assert files.n_signed > 10


def test_credentials_that_open_nothing(files: Files) -> None:
    """An address that is refused when it is new is an error at once, not a wait."""
    files.hub.signed_for = 0
    with pytest.raises(MissingFileError, match="may not be read by us") as caught:
        streamsoup.open_ingredients(["s3://bucket/org/one"])
    assert SECRET not in str(caught.value)
    assert files.n_signed == 1


def test_a_token_is_sent_to_its_store_alone(files: Files) -> None:
    """The token of a store goes to the addresses that the store gave, and to no redirect."""
    files.hub.moved = True
    streamsoup.uniform(["gs://bucket/org/one", "gs://bucket/org/two"], output="soup")
    matches_local(files, "soup")
    asked = [(path.split("/")[1], SECRET in str(headers)) for path, headers in files.hub.asked]
    assert {*asked} == {("token", True), ("plain", False)}


def test_a_change_is_noticed(files: Files) -> None:
    """An object with another ETag, or that vanished, ends the soup by name."""
    opened = streamsoup.open_ingredients(["s3://bucket/org/one", "s3://bucket/org/two"])
    files.hub.etag = "two"
    with pytest.raises(ChangedIngredientError, match="was replaced"):
        streamsoup.uniform(opened, output="soup")
    files.hub.etag = "one"
    (files.hub.root / "bucket/org/one/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ChangedIngredientError, match=r"s3://bucket/org/one/.*vanished"):
        streamsoup.uniform(opened, output="soup")
    assert not Path("soup").exists()


class NoCredentialsError(Exception):
    """As botocore has it."""


class EndpointConnectionError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (PermissionError(SECRET), "may not be read by us"),
        (NoCredentialsError(SECRET), r"s3fs finds no credentials.*NoCredentialsError"),
        (EndpointConnectionError(SECRET), "s3fs failed: EndpointConnectionError"),
    ],
)
def test_libraries_that_fail(files: Files, failure: Exception, said: str) -> None:
    """Errors of the library are named by their kinds; a failure that passes is tried again."""
    reading = streamsoup.Options(network_timeout=0.3).reading
    files.failures = [failure] * 20
    with pytest.raises((FormatError, MissingFileError), match=said) as caught:
        streamsoup.open_ingredients(["s3://bucket/org/one"], reading)
    assert SECRET not in str(caught.value)
    files.failures = [EndpointConnectionError(SECRET)]
    assert streamsoup.open_ingredients(["s3://bucket/org/one"])


def test_what_is_missing(files: Files) -> None:
    """Folders and weights that are not there are named."""
    with pytest.raises(MissingFileError, match="s3://bucket/none: no such folder"):
        streamsoup.open_ingredients(["s3://bucket/none"])
    (files.hub.root / "bucket/pickled").mkdir()
    (files.hub.root / "bucket/pickled/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin; copy it to a local disk"):
        streamsoup.open_ingredients(["s3://bucket/pickled"])
    with pytest.raises(MissingFileError, match=r"none\.safetensors: no such file"):
        streamsoup.open_ingredients(["s3://bucket/org/none.safetensors"])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"s3://me:{SECRET}@bucket/x", "holds a password"),
        ("s3:///x", "names no bucket"),
        (f"s3://bucket/x?X-Signature={SECRET}", "no query"),
        ("gs://bucket/*.safetensors", "pattern"),
        ("gs://bucket//x", "empty part"),
    ],
)
def test_addresses_that_are_refused(address: str, said: str) -> None:
    """What names no object is refused before a library is loaded, without its secrets."""
    assert is_address(address)
    assert SECRET not in shown(address)
    with pytest.raises(MissingFileError, match=said) as caught:
        streamsoup.open_ingredients([address])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("scheme", "library"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_library_that_is_not_installed(scheme: str, library: str) -> None:
    """The message says what to install."""
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(MissingFileError, match=rf"pip install 'streamsoup\[{scheme}\]'"):
        streamsoup.open_ingredients([f"{scheme}://bucket/x"])
