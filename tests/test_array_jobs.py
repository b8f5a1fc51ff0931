"""Soups made in parts: the bytes of one process, whatever is killed, lost or started twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_model, save, save_sharded, tensor
from crash import Machine, restore

import streamsoup
from streamsoup import GreedySettings, Options, mix, slerp, ties, uniform, verify
from streamsoup.engine import plan as planning
from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import OutputBusyError, OutputError, OutputExistsError, RecipeError
from streamsoup.output import verification
from streamsoup.output.jobs import commit
from streamsoup.output.make import order
from streamsoup.output.parts import Part, Parts, share
from streamsoup.output.write import FileLedger
from streamsoup.recipe import Coefficients
from streamsoup.system.launchers import parse_part


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make leaves so small that tensors have several."""
    monkeypatch.setattr(planning, "LEAF", 512)
    monkeypatch.setattr(verification, "LEAF", 512)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Return three checkpoints in two shards each, with integers and a side file."""
    paths = []
    for i in range(3):
        rng = np.random.default_rng(i)
        shards = [
            {
                "a": tensor(rng.standard_normal((60, 50)).astype("f4")),
                "count": tensor(np.arange(7)),
                "b": tensor(rng.standard_normal(1).astype("f2")),
            },
            {"c": tensor(rng.standard_normal((3, 700)).astype("f4")), **random_model(i)},
        ]
        folder = save_sharded(tmp_path / f"m{i}", shards)
        (folder / "config.json").write_text("{}")
        paths.append(str(folder))
    return paths


def content(folder: str | Path) -> dict[str, Any]:
    """Read all files of a soup; of its provenance, what does not tell of the time."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    provenance = json.loads(files.pop("streamsoup.json"))
    del provenance["created"], provenance["checksum"]
    return {**files, "": provenance}


METHODS: dict[str, Callable[..., Any]] = {
    "uniform": lambda paths, **more: uniform(paths, **more),
    "mix": lambda paths, **more: mix(paths, [0.2, -0.3, 1.1], **more),
    "slerp": lambda paths, **more: slerp(paths[:2], [0.3, 0.7], **more),
    "ties": lambda paths, **more: ties(paths[1:], base=paths[0], density=0.4, **more),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_parts_make_the_bytes_of_one_process(
    method: str, n: int, three: list[str], small_leaves: None, tmp_path: Path
) -> None:
    """For any number of parts, in any order, the soup has the bytes of an undivided one."""
    METHODS[method](three, output=tmp_path / "whole")
    numbers = list(range(1, n + 1))
    random.Random(n).shuffle(numbers)
    for k, number in enumerate(numbers):
        options = Options(part=f"{number}/{n}", commit=True)
        soup = METHODS[method](three, output=tmp_path / "out", options=options)
        assert (tmp_path / "out").exists() == (k == n - 1)
        assert set(soup.missing) == set(numbers[k + 1 :])
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    verify(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2", "whole", "out"}


def test_shares_are_a_partition_and_alike(three: list[str], small_leaves: None) -> None:
    """Each leaf is in one share; no share has much more than its part; tensors stay whole."""
    ordered = order(three, Linear(Coefficients.uniform(3)), method="uniform", options=Options())
    plan, files = ordered.plan, ordered.files
    everything = [leaf.number for leaf in plan.leaves()]
    for n in (1, 2, 5, 17):
        shares = [share(plan, files, number, n) for number in range(1, n + 1)]
        assert sorted(leaf.number for each in shares for leaf in each) == sorted(everything)
        sizes = [
            sum(leaf.n_units * plan.tensors[leaf.tensor].unit_nbytes for leaf in each)
            for each in shares
        ]
        assert max(sizes) <= sum(sizes) / n + 512 * 8
    rule = streamsoup.plan(three, options=Options())
    assert rule.n_tensors == len(plan.tensors)


def test_statistics_of_the_whole_model_are_refused(three: list[str], tmp_path: Path) -> None:
    """What needs all tensors at once cannot be shared out, and says so before any work."""
    options = Options(part="1/2")
    with pytest.raises(RecipeError, match="statistics of the whole model"):
        ties(
            three[1:],
            base=three[0],
            density=0.4,
            trim="model",
            output=tmp_path / "out",
            options=options,
        )
    with pytest.raises(RecipeError, match="a search is not made in parts"):
        streamsoup.greedy(
            three,
            lambda model: 0.0,
            output=tmp_path / "out",
            settings=GreedySettings(),
            options=options,
        )
    with pytest.raises(RecipeError, match="not made of files"):
        uniform([{"a": tensor_of(1)}, {"a": tensor_of(2)}], output=tmp_path / "o", options=options)


def tensor_of(value: float) -> Any:
    """Return a tensor of torch."""
    import torch

    return torch.full((3,), value)


def test_missing_parts_are_named(three: list[str], tmp_path: Path) -> None:
    """A commit before all parts are made fails, says which are missing, and changes nothing."""
    for number in (1, 4):
        uniform(three, output=tmp_path / "out", options=Options(part=f"{number}/4"))
    with pytest.raises(OutputError, match=r"2 parts of 4 not made yet: 2, 3"):
        commit(tmp_path / "out")
    with pytest.raises(OutputError, match="has no parts to commit"):
        commit(tmp_path / "other")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("number", "there are 2 parts, not 3"),
        ("recipe", "the recipe differs"),
        ("dtype", "the recipe differs"),
        ("order", "is in the place of"),
        ("fewer", "there are 3 ingredients, not 2"),
        ("time", r"m1 has another time here, in model-0000\d-of"),
        ("size", "m1 has other files here"),
        ("header", "m1 has another digest here"),
    ],
)
def test_parts_of_another_soup_are_refused_by_name(
    change: str, message: str, three: list[str], tmp_path: Path
) -> None:
    """A part that sees another plan, or another ingredient, stops and says what differs."""
    uniform(three, output=tmp_path / "out", options=Options(part="1/2"))
    before = sorted(os.listdir(tmp_path / "out.parts"))
    paths, part, dtype, method = list(three), "2/2", "same", "uniform"
    shard = tmp_path / "m1" / "model-00001-of-00002.safetensors"
    status = shard.stat()
    if change == "number":
        part = "2/3"
    elif change == "recipe":
        method = "mix"
    elif change == "dtype":
        dtype = "f64"
    elif change == "order":
        paths.reverse()
    elif change == "fewer":
        paths = paths[:2]
    elif change == "time":
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "size":
        shutil.rmtree(tmp_path / "m1")
        save(tmp_path / "m1", {})
        shutil.rmtree(tmp_path / "m1")
        shutil.copytree(tmp_path / "m2", tmp_path / "whole")
        joined = {}
        for path in sorted((tmp_path / "whole").glob("*.safetensors")):
            from safetensors.torch import load_file

            joined |= load_file(path)
        from safetensors.torch import save_file

        (tmp_path / "m1").mkdir()
        save_file(joined, tmp_path / "m1" / "model.safetensors")
        (tmp_path / "m1" / "config.json").write_text("{}")
    elif change == "header":
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    options = Options(part=part, dtype=dtype)
    with pytest.raises(OutputError, match=f"another soup than this one: .*{message}"):
        METHODS[method](paths, output=tmp_path / "out", options=options)
    assert sorted(os.listdir(tmp_path / "out.parts")) == before


def test_what_was_lost_after_a_part_is_made_again(
    three: list[str], small_leaves: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a finished part that are not those noted are made anew by the commit."""
    uniform(three, output=tmp_path / "whole")
    for trusting in (False, True):
        for number in (1, 2):
            uniform(three, output=tmp_path / "out", options=Options(part=f"{number}/2"))
        shard = tmp_path / "out.parts" / "soup" / "model-00002-of-00002.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[-3000:] = bytes(3000)
        shard.write_bytes(raw)
        if trusting:  # a commit that believes its notes would be found here
            monkeypatch.setattr(
                FileLedger,
                "restore",
                lambda self, leaf: self.digests.get(leaf.number) if self.noted(leaf) else None,
            )
        commit(tmp_path / "out")
        assert (content(tmp_path / "out") == content(tmp_path / "whole")) != trusting
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("made", [1, 2])
def test_an_older_soup_of_the_same_recipe_is_no_commit(
    made: int, three: list[str], tmp_path: Path
) -> None:
    """An output of the same paths, which held other weights then, is replaced, or stays."""
    uniform(three, output=tmp_path / "out")
    older = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "m1")
    shutil.copytree(tmp_path / "m2", tmp_path / "m1")
    for number in range(1, made + 1):
        options = Options(part=f"{number}/2", overwrite=True)
        uniform(three, output=tmp_path / "out", options=options)
    if made == 1:
        with pytest.raises(OutputError, match="1 part of 2 not made yet: 2"):
            commit(tmp_path / "out", options=Options(overwrite=True))
        assert content(tmp_path / "out") == older
        return
    with pytest.raises(OutputExistsError):
        commit(tmp_path / "out")
    assert content(tmp_path / "out") == older
    commit(tmp_path / "out", options=Options(overwrite=True))
    uniform(three, output=tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole") != older


def test_parts_begun_where_a_commit_was_tidying_up_make_their_own_soup(
    three: list[str], tmp_path: Path
) -> None:
    """What an earlier commit announced, and left when it was killed, says nothing of new parts."""
    uniform(three, output=tmp_path / "out")
    digest = digest_bytes((tmp_path / "out" / "streamsoup.json").read_bytes())
    (tmp_path / "out.parts").mkdir(0o700)
    (tmp_path / "out.parts" / f"commit-{digest}").touch()
    shutil.rmtree(tmp_path / "m1")
    shutil.copytree(tmp_path / "m2", tmp_path / "m1")
    for number in (1, 2):
        options = Options(part=f"{number}/2", overwrite=True, commit=True)
        uniform(three, output=tmp_path / "out", options=options)
    uniform(three, output=tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_part_killed_at_once_is_no_commit(three: list[str], tmp_path: Path) -> None:
    """The empty folder of a part that had no time is no sign that what it replaces is its soup."""
    uniform(three, output=tmp_path / "out")
    (tmp_path / "out.parts").mkdir(0o700)
    with pytest.raises(OutputError, match=r"out\.parts: is empty: .* run the parts again"):
        commit(tmp_path / "out", options=Options(overwrite=True))


def test_one_part_is_made_by_one_process(three: list[str], tmp_path: Path) -> None:
    """A part that another process is making is refused, with the process."""
    uniform(three, output=tmp_path / "out", options=Options(part="1/2"))
    parts = Parts.find(str(tmp_path / "out"))
    assert parts is not None
    with (
        parts,
        Part(parts, 2, 2),
        pytest.raises(OutputBusyError, match=r"part 2 of 2 is being made by process \d+"),
    ):
        uniform(three, output=tmp_path / "out", options=Options(part="2/2"))


def test_all_parts_at_once(three: list[str], tmp_path: Path) -> None:
    """Processes that start, finish and commit at the same time make one soup."""
    uniform(three, output=tmp_path / "whole")
    n = 5

    def run(number: int) -> subprocess.CompletedProcess[str]:
        command = ["uniform", *three, "-o", str(tmp_path / "out"), "--part", "auto", "--commit"]
        return subprocess.run(
            [sys.executable, "-m", "streamsoup", *command],
            env={**os.environ, "RANK": str(number), "WORLD_SIZE": str(n)},
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(n) as pool:
        ran = list(pool.map(run, range(n)))
    assert [each.returncode for each in ran] == [0] * n, [each.stderr for each in ran]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Return one machine for all tests of this file."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.mark.parametrize(("action", "older"), [("kill", False), ("power", False), ("kill", True)])
def test_parts_killed_at_any_call(
    three: list[str], tmp_path: Path, machine: Machine, action: str, older: bool
) -> None:
    """A part or a commit that is killed at any call, and run again, makes the same soup.

    Over an `older` one, which had the same recipe, too.
    """
    stage, before = tmp_path / "stage", tmp_path / "before"
    before.mkdir()
    out = str(stage / "out")
    soup = ["uniform", *three, "-o", out, "--threads", "1"]
    parts = [[*soup, "--part", "1/2"], [*soup, "--part", "2/2"], ["commit", out, "--threads", "1"]]
    restore(stage, before)
    if older:
        assert machine.run(*soup, stage=stage).status == 0
        shutil.rmtree(before)
        shutil.copytree(stage, before)
        shutil.rmtree(stage)
        stage.mkdir()
        shutil.rmtree(three[1])
        shutil.copytree(three[2], three[1])
        parts = [[*command, "--overwrite"] for command in parts]
    assert machine.run(*soup, stage=stage).status == 0
    whole = content(out)
    step = 1 if "EVERY_CALL" in os.environ else 31
    for k, command in enumerate(parts):
        for at in range(1 + k, 10_000, step):
            restore(stage, before)
            first = machine.run(*command, stage=stage, at=at, action=action)
            after = Path(f"{stage}.after")
            if after.exists():
                shutil.rmtree(stage)
                after.rename(stage)
            assert "Traceback" not in first.stderr
            if first.n_calls < at:
                assert first.status == 0, first.stderr
                break
            if older and k == 2 and not list((stage / "out.parts").glob("*")):
                assert content(out) == whole, at
                continue
            done = k == 2 and not (stage / "out.parts").exists()
            for again in [] if done else parts[k:]:
                ran = machine.run(*again, stage=stage)
                assert ran.status == 0, (k, at, ran.stderr)
            assert content(out) == whole, (k, at)
            assert set(os.listdir(stage)) == {"out"}, (k, at)
        restore(stage, before)
        assert machine.run(*command, stage=stage).status == 0
        shutil.rmtree(before)
        shutil.copytree(stage, before)


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/8", {"RANK": "0", "WORLD_SIZE": "2"}, (3, 8)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "2"}, (1, 2)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (4, 4)),
        ("auto", {"RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (1, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}, (6, 6)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (3, 4),
        ),
        ("auto", {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, (2, 2)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, (8, 8)),
        ("auto/8", {"SKYPILOT_NODE_RANK": "0"}, (1, 8)),
    ],
)
def test_launchers_say_the_part(
    text: str, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    """A part is read as given, or from the first launcher that says it."""
    assert parse_part(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("0/8", {}, "there is no part 0 of 8; parts count from 1"),
        ("9/8", {}, "there is no part 9 of 8"),
        ("3", {}, "is not I/N such as 3/8"),
        ("²/8", {}, "is not I/N"),
        ("3/8/9", {}, "is not I/N"),
        ("auto", {}, "no launcher has set RANK"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "but not of how many"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK 'x' is not a number"),
        ("auto/2", {"RANK": "2"}, "there is no part 3 of 2"),
    ],
)
def test_what_is_no_part_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    """Anything else is refused, with what would be right."""
    with pytest.raises(RecipeError, match=message):
        parse_part(text, environment)
