"""Soups of models at addresses: the bytes of local ones, whatever the server does on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import command, content, tensor
from hub_server import COMMIT, Hub, serving

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    CorruptFileError,
    FormatError,
    MissingFileError,
    RecipeError,
)
from streamsoup.formats.remote.addresses import is_address, shown, token_for

TOKEN = "hf_neverShown123"


def model(folder: Path, seed: int, n: int = 3000) -> None:
    """Write a model of two shards, with an index, a configuration and a tokenizer."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {}
    for i, name in enumerate(names):
        tensors = {f"w{i}.{j}": tensor(random.standard_normal((n, 7), "f4")) for j in range(3)}
        (folder / name).write_bytes(content(tensors))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "plain", "hidden_size": 7}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine with ``org/one`` and ``org/two``, and an empty cache."""
    for seed, name in enumerate(("one", "two")):
        model(tmp_path / "served/org" / name, seed)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serving(tmp_path / "served") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        yield served


def same_as_local(hub: Hub, soup: str) -> None:
    """Assert that a soup has the files of one of the folders that are served, byte for byte."""
    streamsoup.uniform([hub.root / "org/one", hub.root / "org/two"], output="local")
    names = set(os.listdir("local"))
    assert set(os.listdir(soup)) == names
    for name in names - {"streamsoup.json", "README.md"}:
        assert Path(soup, name).read_bytes() == Path("local", name).read_bytes(), name


def test_a_soup_of_ids(hub: Hub, tmp_path: Path) -> None:
    """Ids that are not cached are read by ranges: no copy stays, the commit does."""
    streamsoup.uniform(["org/one", "org/two@v1"], output="soup")
    same_as_local(hub, "soup")
    record = json.loads(Path("soup/streamsoup.json").read_text())
    assert [each["path"] for each in record["ingredients"]] == [
        *(f"hf://org/one@{COMMIT}", f"hf://org/two@{COMMIT}")
    ]
    assert not (tmp_path / "home").exists()
    assert "org/one" in Path("soup/README.md").read_text()
    hub.asked.clear()
    assert streamsoup.verify("soup").rederived
    resolved = [path for path, _ in hub.asked if "/resolve/" in path]
    assert resolved
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


def test_a_soup_of_addresses(hub: Hub) -> None:
    """Addresses of a folder and of its index are the folder; that of a file is a lone file."""
    at = f"{hub.url}/plain/org"
    streamsoup.uniform([f"{at}/one/", f"{at}/two/model.safetensors.index.json"], output="soup")
    same_as_local(hub, "soup")
    streamsoup.verify("soup")
    file = "model-00001-of-00002.safetensors"
    streamsoup.uniform([f"{at}/{n}/{file}?X-Signature=secret" for n in ("one", "two")], output="x")
    streamsoup.uniform([hub.root / f"org/{n}/{file}" for n in ("one", "two")], output="y")
    assert Path("x/model.safetensors").read_bytes() == Path("y/model.safetensors").read_bytes()
    assert "secret" not in Path("x/streamsoup.json").read_text()


def test_inspect_reads_headers(hub: Hub) -> None:
    """Of a model of megabytes, `inspect` and `plan` are sent kilobytes."""
    shutil.rmtree(hub.root / "org/one")
    model(hub.root / "org/one", 0, n=100_000)
    ran = command("inspect", "org/one", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["n_tensors"] == 6
    assert json.loads(ran.stdout)["nbytes"] > 16_000_000
    ran = command("plan", "org/one", "org/one@v1")
    assert ran.returncode == 0, ran.stderr
    # Six times 64 KiB: what each of the two files is asked for first.
    assert hub.nbytes < 500_000


@pytest.mark.parametrize("fault", ["500", "429", "short", "cut", "hang", "wrong-range"])
def test_faults_on_the_way(hub: Hub, fault: str) -> None:
    """An answer that fails, stalls or is too short is asked for again; the bytes are the same."""
    ingredients = streamsoup.open_ingredients(
        ["org/one", "org/two"], streamsoup.Options(network_timeout=6).reading
    )
    hub.faults = [fault, "", fault]
    streamsoup.uniform(ingredients, output="soup")
    assert not hub.faults
    same_as_local(hub, "soup")


def test_redirects_that_expire(hub: Hub) -> None:
    """A signed address that no longer answers is resolved again."""
    streamsoup.uniform(["org/one", "org/two"], output="lasting")
    n_signed = len(hub.signatures)
    hub.signed_for = 1  # each address is asked twice
    streamsoup.uniform(["org/one", "org/two"], output="soup")
    same_as_local(hub, "soup")
    assert len(hub.signatures) > 2 * n_signed


def test_a_server_that_stays_silent(hub: Hub) -> None:
    """After the timeout without a byte it is an error, which names the file and not its secret."""
    opened = streamsoup.open_ingredients(
        ["org/one", "org/two"], streamsoup.Options(network_timeout=0.5).reading
    )
    hub.always = "hang"
    with pytest.raises(FormatError, match="without a byte") as caught:
        streamsoup.uniform(opened, output="soup")
    assert "safetensors" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not Path("soup").exists()
    hub.always = ""
    streamsoup.uniform(["org/one", "org/two"], output="soup")  # resumes
    same_as_local(hub, "soup")


def test_a_soup_goes_on_after_a_broken_connection(hub: Hub) -> None:
    """Made again, a soup that ended in an error asks for what it had not made, and is the same."""
    for seed, name in enumerate(("one", "two")):
        shutil.rmtree(hub.root / "org" / name)
        model(hub.root / "org" / name, seed, n=700_000)  # tensors of two leaves
    hub.faults = [""] * 24 + ["500"] * 100
    program = [sys.executable, "-m", "streamsoup", "uniform", "org/one", "org/two", "-o", "soup"]
    # Work is noted twice a second.
    failed = subprocess.run([*program, "--network-timeout", "2"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "status 500" in failed.stderr
    assert not Path("soup").exists()
    hub.faults = []
    hub.nbytes = 0
    assert subprocess.run(program, capture_output=True).returncode == 0
    resumed = hub.nbytes
    same_as_local(hub, "soup")
    hub.nbytes = 0
    streamsoup.uniform(["org/one", "org/two"], output="whole")
    assert resumed < 0.95 * hub.nbytes


@pytest.mark.parametrize("at", ["org/{}", "{url}/plain/org/{}"])
def test_a_change_is_noticed(hub: Hub, at: str) -> None:
    """A file with another ETag or size is refused by name, and no soup is made."""
    names = [at.format(name, url=hub.url) for name in ("one", "two")]
    opened = streamsoup.open_ingredients(names)
    hub.etag = "two"
    with pytest.raises(ChangedIngredientError, match="was replaced"):
        streamsoup.uniform(opened, output="soup")
    hub.etag = "one"
    opened = streamsoup.open_ingredients(names)
    for file in hub.root.glob("org/*/*.safetensors"):
        file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ChangedIngredientError, match="changed size"):
        streamsoup.uniform(opened, output="soup")
    assert not Path("soup").exists()


def test_a_server_that_asks_to_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer wait than the timeout is not begun: the error says what the server asked for."""
    opened = streamsoup.open_ingredients(["org/one"])
    hub.always, hub.retry_after = "429", "9000"
    with pytest.raises(FormatError, match="status 429, which asks to wait for 9000 s"):
        streamsoup.uniform(opened, output="soup")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(MissingFileError, match="cannot be reached: Connection refused"):
        streamsoup.open_ingredients(["org/one"])


def test_ranges_that_are_ignored(hub: Hub) -> None:
    """A server that sends whole files is refused, when it is opened and later."""
    opened = streamsoup.open_ingredients(["org/one"])
    hub.always = "ignored"
    for given in (["org/one"], opened):
        with pytest.raises(FormatError, match="ignores ranges"):
            streamsoup.uniform(given, output="soup")


def test_a_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private model is read with the token, which no redirect, message or record has."""
    hub.token = TOKEN
    ran = command("inspect", "org/one")
    assert ran.returncode == 1
    assert "hf auth login" in ran.stderr
    home = Path(os.environ["HF_HOME"])
    home.mkdir()
    (home / "token").write_text(f"{TOKEN}\n")
    assert token_for("https://huggingface.co/x") is None
    ran = command("uniform", "org/one", "org/two", "-o", "soup")
    assert ran.returncode == 0, ran.stderr
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")
    failed = command("uniform", "org/one", "-o", "other")
    assert failed.returncode == 1
    told = ran.stderr + ran.stdout + failed.stderr
    for file in Path("soup").iterdir():
        told += file.read_bytes().decode("latin1")
    for secret in (TOKEN, "Signature", "secret"):
        assert secret not in told
    sent = [path for path, headers in hub.asked if TOKEN in str(headers)]
    assert sent
    assert not [path for path in sent if path.startswith(("/cdn/", "/plain/"))]
    assert token_for(f"{hub.url}/x")
    assert token_for(hub.url.replace("127.0.0.1", "localhost")) is None


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://example.com/model.safetensors", "this machine only"),
        ("https://me:secret@example.com/model.safetensors", "holds a password"),
        ("https://example.com/folder?X-Signature=secret", "a folder has no query"),
        ("https:///x.safetensors", "not an address"),
        ("hf://org", "names no model"),
        ("hf://org/one/model.safetensors", "names no model"),
        ("https://example.com/a b.safetensors", "percent-encode"),
        ("https://[::1/x.safetensors", "cannot be parsed"),
    ],
)
def test_addresses_that_are_refused(address: str, said: str) -> None:
    """An address that is not read is refused before anything is asked, without its secrets."""
    with pytest.raises(MissingFileError, match=said) as caught:
        streamsoup.open_ingredients([address])
    assert "secret" not in str(caught.value)


def test_what_is_missing(hub: Hub) -> None:
    """Models, files and servers that are not there are named, with what to do."""
    with pytest.raises(MissingFileError, match=r"org/none.*the Hub has no such model"):
        streamsoup.open_ingredients(["org/none"])
    with pytest.raises(RecipeError, match="part is for files that all processes see"):
        streamsoup.uniform(
            ["org/one", "org/two"], output="soup", options=streamsoup.Options(part="1/2")
        )
    with pytest.raises(MissingFileError, match=r"none/model\.safetensors: no such file"):
        streamsoup.open_ingredients([f"{hub.url}/plain/none"])
    (hub.root / "org/one/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="model-00002"):
        streamsoup.open_ingredients(["org/one"])


def test_damaged_headers(hub: Hub) -> None:
    """Headers are checked as those of local files, and the address is named once."""
    file = hub.root / "org/one/model-00002-of-00002.safetensors"
    data = file.read_bytes()
    for spoilt in (data[:-1], b"", b"\xff" * 100):
        file.write_bytes(spoilt)
        with pytest.raises((CorruptFileError, FormatError)) as caught:
            streamsoup.open_ingredients(
                ["org/one"], streamsoup.Options(network_timeout=0.5).reading
            )
        assert str(caught.value).count("http://") == 1


def test_memory_is_bounded(hub: Hub) -> None:
    """A soup of remote models of 140 MB holds 110 MB at most, sampled while it is made."""
    for name in ("one", "two"):
        shutil.rmtree(hub.root / "org" / name)
        model(hub.root / "org" / name, 0, n=830_000)
    script = (
        "import streamsoup, threading, time\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().split('\\n')\n"
        "    return [int(line.split()[1]) for line in lines if line.startswith('RssAnon')][0]\n"
        "def sample():\n"
        "    while True:\n"
        "        seen.append(anonymous())\n"
        "        time.sleep(0.005)\n"
        "seen = []\n"
        "threading.Thread(target=sample, daemon=True).start()\n"
        "streamsoup.uniform(['org/one', 'org/two'], output='soup', "
        "options=streamsoup.Options(memory='110MB', threads=2))\n"
        "print(max(seen))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 10e6 < int(ran.stdout) * 1024 < 110e6


def test_download(hub: Hub) -> None:
    """`download` puts a model into the Hub's cache, where it is found by its id from then on."""
    pytest.importorskip("huggingface_hub")
    (hub.root / "org/one/pytorch_model.bin").write_bytes(b"never sent")
    ran = command("uniform", "org/one", "org/two", "-o", "soup", "--download")
    assert ran.returncode == 0, ran.stderr
    same_as_local(hub, "soup")
    assert not [path for path, _ in hub.asked if path.endswith(".bin")]
    asked = len(hub.asked)
    streamsoup.uniform(["org/one", "org/two"], output="again")
    streamsoup.verify("again")
    assert len(hub.asked) == asked
    ran = command("inspect", "org/none", "--download")
    assert ran.returncode == 1
    assert "RepositoryNotFoundError" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_searches_download(hub: Hub) -> None:
    """What a search reads many times is downloaded, and recorded as any other reading is not."""
    reading = streamsoup.Options().reading.downloading
    assert reading.download
    assert reading.told == {}
    with pytest.raises(RecipeError, match="components"):
        streamsoup.open_ingredients(["org/one"], streamsoup.Options(components=("unet",)).reading)


def test_timeouts_are_numbers() -> None:
    """What is no time in seconds is refused."""
    for wrong in (0, -1, "5", True, float("nan")):
        with pytest.raises(RecipeError, match="network_timeout"):
            streamsoup.Options(network_timeout=wrong)


def test_what_is_shown() -> None:
    """No part of an address that may be a secret is shown; paths are no addresses."""
    assert shown("https://u:p@h:1/a/b.safetensors?t=1#f") == "https://h:1/a/b.safetensors"
    assert not any(map(is_address, ("a/b", "./https://x", "/s3://x", "C:/x")))
