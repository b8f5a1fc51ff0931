"""A source from outside the package: planned, bounded, resumed and verified like our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import content, load, save, save_sharded, tensor
from outside.halving_source import Halved
from test_memory import SCRIPT, sparse
from test_rewritten import after_leaf, write_in_place

import streamsoup
from streamsoup import Options, Source, SourceTensor, mix_into, uniform, verify
from streamsoup.engine import plan, stream
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    ChangedIngredientError,
    FormatError,
    MismatchError,
    OutputError,
    RecipeError,
)
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.output.make import _fingerprint, order
from streamsoup.recipe import Coefficients

Model = dict[str, Any]


def model(seed: int, halved: bool = False) -> Model:
    """Make a small model of float32, float16 and integers; halved, as it can be stored exactly."""
    rng = np.random.default_rng(seed)
    half = 0.5 if halved else 1
    return {
        "a": tensor((rng.standard_normal((70, 90)) * half).astype(np.float32)),
        "b": tensor((rng.integers(-900, 900, 5000) * half).astype(np.float16)),
        "empty": tensor(np.zeros((0, 3), np.float32)),
        "n": tensor(np.array([1, 2], np.int64)),
        "scalar": tensor(np.float64(seed * half)),
    }


def halves(paths: list[Path], exact: bool = True) -> list[Halved]:
    """Open checkpoints, halved."""
    return [Halved(each.source, exact=exact) for each in open_ingredients(paths)]


def files(folder: Path | str) -> dict[str, bytes]:
    """Read the weights of a soup."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_soup_is_that_of_halved_files(tmp_path: Path, exact: bool, io: Any) -> None:
    """Halves are exact in these dtypes, so the bytes are those of halved files on disk."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(6)]
    really = [save(tmp_path / f"h{i}", model(i, halved=True)) for i in range(6)]
    for folder in (paths[0], really[0]):
        (folder / "config.json").write_text('{"hidden_size": 90}')
    options = Options(io=io)
    expected = uniform(really, output=tmp_path / "expected", options=options)
    soup = uniform(halves(paths, exact), output=tmp_path / "soup", options=options)
    assert files(soup.path) == files(expected.path)
    assert (tmp_path / "soup" / "config.json").exists()
    mixed: list[Any] = [*halves(paths[:3], exact), *really[3:]]
    both = uniform(mixed, output=tmp_path / "both", options=options)
    assert files(both.path) == files(expected.path)


def test_a_derived_source_is_rounded_once(tmp_path: Path) -> None:
    """Bfloat16 stands for what is delivered in float64: halving rounds nothing before the soup."""
    rng = np.random.default_rng(0)
    smallest = (rng.integers(1, 40, (2, 999))).astype("<u2")  # subnormal: halves are not bfloat16
    paths = [save(tmp_path / f"m{i}", {"w": tensor(smallest[i], "BF16")}) for i in range(2)]
    soup = uniform(halves(paths), output=tmp_path / "soup")
    found = np.frombuffer(load(Path(soup.path))["w"][2], "<u2")
    quarter = smallest.astype(int).sum(0) / 4  # subnormals are their own bits
    assert (found == np.round(quarter)).all()  # numpy's rounds ties to even, too
    twice = np.round(np.round(smallest / 2).sum(0) / 2)
    assert (found != twice).any(), "the test would not see a second rounding"


def test_files_are_mirrored_and_joined_sources_are_not(tmp_path: Path) -> None:
    """A sharded checkpoint, halved, makes shards of the same names, and goes into live models."""
    shards = [{"a": model(0)["a"]}, {"b": model(0)["b"]}]
    path = save_sharded(tmp_path / "m", shards)
    soup = uniform(halves([path]), output=tmp_path / "soup")
    assert sorted(os.listdir(soup.path)) == [
        "README.md",
        *sorted(os.listdir(path)),
        "streamsoup.json",
    ]
    live = torch.nn.Module()
    live.register_buffer("a", torch.zeros(70, 90))
    live.register_buffer("b", torch.zeros(5000, dtype=torch.float16))
    mix_into(live, halves([path]))
    want = load(Path(soup.path))
    for name in ("a", "b"):
        assert live.get_buffer(name).numpy().tobytes() == want[name][2]
    state = {name: buffer.clone() for name, buffer in live.named_buffers()}
    again = uniform([Halved(open_ingredients([state])[0].source)], output=tmp_path / "again")
    a = np.frombuffer(want["a"][2], np.float32)
    assert load(Path(again.path))["a"][2] == (a / 2).tobytes()


def test_it_is_verified_from_sources_alone(tmp_path: Path) -> None:
    """What has no path is given again; other sources are told from those that were used."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(2)]
    soup = uniform(halves(paths), output=tmp_path / "soup")
    assert verify(soup.path, ingredients=halves(paths)).rederived
    with pytest.raises(RecipeError, match=r"half of .*give all ingredients again"):
        verify(soup.path)
    with pytest.raises(streamsoup.StreamsoupError, match="is not the one that was used"):
        verify(soup.path, ingredients=paths)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from streamsoup.engine import plan, stream
from test_outside_source import halves
import streamsoup
plan.LEAF, stream.ALONE_NBYTES = 1000, -1
made, n = stream._Pass.make_leaf, 0
def make_leaf(self, *arguments):
    global n
    n += 1
    if n == {after}:
        self.ledger.checkpoint()
        os._exit(9)
    made(self, *arguments)
stream._Pass.make_leaf = make_leaf
one = streamsoup.Options(threads=1)
streamsoup.uniform(halves([Path(p) for p in {paths!r}]), output={output!r}, options=one)
"""


@pytest.mark.parametrize("after", [3, 9])
def test_it_is_resumed_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed between leaves, the same sources go on from them, to the bytes of one run."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(2)]
    whole = uniform(halves(paths), output=tmp_path / "whole")
    output, tests = str(tmp_path / "soup"), str(Path(__file__).parent)
    script = KILLED.format(tests=tests, after=after, paths=[*map(str, paths)], output=output)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    monkeypatch.setattr(plan, "LEAF", 1000)
    restored = []
    finish = stream._Pass.finish

    def finishing(self: stream._Pass, leaf: plan.Leaf, digests: bytes) -> None:
        assert self.ledger is not None
        restored.append(self.ledger.noted(leaf))
        finish(self, leaf, digests)

    monkeypatch.setattr(stream._Pass, "finish", finishing)
    resumed = uniform(halves(paths), output=output, options=Options(threads=1))
    assert files(resumed.path) == files(whole.path)
    assert any(restored)


def test_another_parameter_is_another_source(tmp_path: Path) -> None:
    """Sources that differ in a parameter share no unfinished work, though their names agree."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(2)]
    equal = Linear(Coefficients.uniform(2))
    prints = {
        _fingerprint(order(halves(paths, exact), equal, method="x", options=Options()))
        for exact in (True, False)
    }
    assert len(prints) == 2


HALVED = SCRIPT.replace(
    "paths = sys.argv[3:]",
    "from outside.halving_source import Halved\n"
    "from streamsoup import open_ingredients\n"
    "paths = [Halved(each.source) for each in open_ingredients(sys.argv[3:])]",
)


@pytest.mark.parametrize(("k", "io"), [(2, "mmap"), (16, "mmap"), (16, "read")])
def test_its_memory_is_planned(tmp_path: Path, k: int, io: str) -> None:
    """What the source holds is in the plan, for two and for many; the measured peak is below."""
    folder = sparse(tmp_path / "m", {f"t{i}": ("F32", (2_000_000,), 8_000_000) for i in range(3)})
    paths = []
    for i in range(k):
        (tmp_path / f"link{i}").symlink_to(folder)
        paths.append(str(tmp_path / f"link{i}"))
    assert "Halved" in HALVED
    settings = (
        '{"coefficients": null, "in_numpy": true, "compile_nbytes": 1000000000000, '
        f'"threads": 2, "memory": "130MB", "io": "{io}"}}'
    )
    ran = subprocess.run(
        [sys.executable, "-c", HALVED, settings, str(tmp_path / "out"), *paths],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert ran.returncode == 0, ran.stderr
    peak, planned = map(int, ran.stdout.split())
    assert 20_000_000 < peak <= planned <= 130_000_000


def test_a_file_below_that_changes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is written in place under a derived source ends the run, too."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(2)]
    victim = paths[0] / "model.safetensors"
    after_leaf(4, lambda: write_in_place(victim, content(model(7))), monkeypatch)
    with pytest.raises(ChangedIngredientError, match=r"m0/model\.safetensors: .: was written in"):
        uniform(halves(paths), output=tmp_path / "out", options=Options(threads=1))


def test_an_output_never_replaces_what_is_derived_from(tmp_path: Path) -> None:
    """The files below a source are ingredients, though no path leads to them."""
    paths = [save(tmp_path / f"m{i}", model(i)) for i in range(2)]
    with pytest.raises(OutputError, match="the ingredient"):
        uniform(halves(paths), output=paths[1], options=Options(overwrite=True))


class Wrong(Halved):
    """A source whose tensors say anything."""

    wrong: dict[str, SourceTensor]

    @property
    def tensors(self) -> dict[str, SourceTensor]:
        return self.wrong


@pytest.mark.parametrize(
    ("name", "given", "phrase"),
    [
        ("w", SourceTensor("F31", (2,)), "has dtype 'F31'"),
        ("w", SourceTensor("I64", (2,), "F64"), "stands for I64 and is delivered as F64"),
        ("w", SourceTensor("F32", (2,), "I32"), "stands for F32 and is delivered as I32"),
        ("w", SourceTensor("F32", (-2,)), "not a list of sizes"),
        ("w", SourceTensor("F32", (2,), None, 1), "is in file 1 of 1"),
        ("w", SourceTensor("F4", (1,)), "does not fill whole bytes"),
        ("w", SourceTensor("F32", (2**62,)), "does not fill whole bytes"),
        ("\ud800", SourceTensor("F32", (2,)), "name that no file can hold"),
    ],
)
def test_a_wrong_tensor_is_refused_when_it_is_opened(
    tmp_path: Path, name: str, given: SourceTensor, phrase: str
) -> None:
    """What no soup could hold is refused by source and tensor, before anything is read."""
    (source,) = open_ingredients([save(tmp_path / "m", model(0))])
    wrong = Wrong(source.source)
    wrong.wrong = {name: given}
    with pytest.raises(FormatError, match=r"^half of .*: tensor .*" + phrase):
        open_ingredients([wrong])


def test_what_lacks_a_member_is_told_which(tmp_path: Path) -> None:
    """An object that is nearly a source is refused with what it lacks; one alone is no list."""

    class Nearly:
        name = "x"

        def cursor(self, access: object) -> None: ...

    with pytest.raises(RecipeError, match=r"lacks check_read, check_unchanged, .*, tensors"):
        open_ingredients([Nearly()])
    (opened,) = open_ingredients([save(tmp_path / "m", model(0))])
    with pytest.raises(RecipeError, match="expected a list of ingredients, got one"):
        open_ingredients(opened.source)
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Source,), {})()


def test_a_view_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    """Planted fault: a cursor that returns fewer bytes is named, and nothing is written."""
    (opened,) = open_ingredients([save(tmp_path / "m", model(0))])

    class Short(Halved):
        def cursor(self, access: Any) -> Any:
            cursor = super().cursor(access)
            cursor.view = lambda tensor, begin, end: memoryview(bytearray(1))  # type: ignore[method-assign]
            return cursor

    with pytest.raises(FormatError, match="returned 1 bytes from byte 0 on, expected"):
        uniform([Short(opened.source)], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_are_copied_as_they_are_stored(tmp_path: Path) -> None:
    """A source that delivers parts of a quantised weight in another dtype is refused."""
    codes = {
        "w.qweight": tensor(np.arange(16, dtype=np.uint8)),
        "w.scales": tensor(np.ones(4, np.float32)),
    }
    paths = [save(tmp_path / f"m{i}", codes) for i in range(2)]
    with pytest.raises(MismatchError, match=r"w\.scales: is a part of a quantised weight"):
        uniform(halves(paths), output=tmp_path / "out")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of docs/joints/source.md makes the mean of one model and half of another."""
    text = (Path(__file__).parent.parent / "docs/joints/source.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    values = [np.random.default_rng(i).standard_normal(5000).astype(np.float32) for i in range(2)]
    for i in range(2):
        save(tmp_path / f"run{i + 1}", {"w": tensor(values[i])})
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    expected = ((values[0].astype(float) / 2 + values[1]) / 2).astype(np.float32)
    assert load(tmp_path / "soup")["w"][2] == expected.tobytes()
    members = re.findall(r"^\| (`\w.*?) \|", text, re.MULTILINE)
    told = {name for cell in members for name in re.findall(r"`(\w+)", cell)}
    assert told == {name for name in vars(Source) if name[0] != "_"}


def test_a_source_over_a_pipeline_mirrors_its_components(tmp_path: Path) -> None:
    """Halves of pipelines make a pipeline, with the files and the listing of the first."""
    for i in range(2):
        for part in ("unet", "vae"):
            save(tmp_path / f"m{i}" / part, {"w": tensor(np.full(4, 2.0 + i, np.float32))})
        (tmp_path / f"m{i}" / "model_index.json").write_text(
            '{"unet": ["a", "b"], "vae": ["a", "b"]}'
        )
    uniform(halves([tmp_path / "m0", tmp_path / "m1"]), output=tmp_path / "soup")
    for part in ("unet", "vae"):
        found = load(tmp_path / "soup" / part)["w"][2]
        assert found == np.full(4, 1.25, np.float32).tobytes()
    assert (tmp_path / "soup" / "model_index.json").exists()
