"""Soups of ingredients in buckets by s3fs itself, from moto's server on this machine."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import command
from test_remote import model

import streamsoup
from streamsoup.errors import ChangedIngredientError, FormatError, MissingFileError

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of sessions that s3fs leaves open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SECRET = "neverShown123"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``s3://soups/run 1/one`` and ``two``, with the same folders here."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        model(tmp_path / "local" / name, seed)
    put(tmp_path / "local")
    return tmp_path / "local"


def put(folder: Path, acl: str = "private") -> None:
    """Upload a folder as ``s3://soups/run 1``."""
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    if not files.exists("soups"):
        files.mkdir("soups")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"soups/run 1/{path.relative_to(folder)}", path.read_bytes(), ACL=acl)
    gc.collect()


AT = [f"s3://soups/run 1/{name}" for name in ("one", "two")]


def test_a_soup_of_folders(bucket: Path) -> None:
    """On the command line and in the library: the bytes of local folders, and no secret seen."""
    ran = command("uniform", *AT, "-o", "soup")
    assert ran.returncode == 0, ran.stderr
    streamsoup.uniform([bucket / "one", bucket / "two"], output="plain")
    assert set(os.listdir("soup")) == set(os.listdir("plain"))
    for name in {*os.listdir("plain")} - {"streamsoup.json", "README.md"}:
        assert Path("soup", name).read_bytes() == Path("plain", name).read_bytes(), name
    record = Path("soup/streamsoup.json").read_text()
    assert [each["path"] for each in json.loads(record)["ingredients"]] == AT
    told = ran.stderr + ran.stdout + record + Path("soup/README.md").read_text()
    assert SECRET not in told
    assert "X-Amz" not in told
    assert command("verify", "soup").returncode == 0


def test_a_change_is_noticed(bucket: Path) -> None:
    """An object that was put again with other bytes ends the soup."""
    opened = streamsoup.open_ingredients(AT)
    model(bucket.parent / "other/one", 7)
    put(bucket.parent / "other")
    with pytest.raises(ChangedIngredientError, match="was replaced"):
        streamsoup.uniform(opened, output="soup")
    assert not Path("soup").exists()


def test_what_is_missing(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets, folders and servers that are not there are named in one line."""
    for at in ("s3://soups/none", "s3://no-such-bucket/x"):
        with pytest.raises(MissingFileError, match="no such folder"):
            streamsoup.open_ingredients([at])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(FormatError, match="s3fs failed: EndpointConnectionError"):
        streamsoup.open_ingredients(AT, streamsoup.Options(network_timeout=1).reading)


def test_public_buckets(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials the message says how a public bucket is read, and it is read so."""
    put(bucket, acl="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(bucket.parent))
    ran = command("inspect", AT[0])
    assert ran.returncode == 1
    assert "FSSPEC_S3_ANON=true" in ran.stderr, ran.stderr
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    ran = command("inspect", AT[0])
    assert ran.returncode == 0, ran.stderr


def test_memory_is_bounded(bucket: Path) -> None:
    """With the library of the store, a soup of 140 MB holds its budget at most, sampled."""
    for name in ("one", "two"):
        model(bucket.parent / "large" / name, 0, n=830_000)
    put(bucket.parent / "large")
    script = (
        "import streamsoup, sys, threading, time\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().split('\\n')\n"
        "    return [int(line.split()[1]) for line in lines if line.startswith('RssAnon')][0]\n"
        "def sample():\n"
        "    while True:\n"
        "        seen.append(anonymous())\n"
        "        time.sleep(0.005)\n"
        "seen = []\n"
        "threading.Thread(target=sample, daemon=True).start()\n"
        "streamsoup.uniform(sys.argv[1:], output='soup', "
        "options=streamsoup.Options(memory='160MB', threads=2))\n"
        "print(max(seen))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, *AT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 10e6 < int(ran.stdout) * 1024 < 160e6, ran.stdout
