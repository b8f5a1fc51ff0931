"""Work over Ray on several simulated nodes: workers, nodes and drivers are killed, hard."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import save, tensor

from streamsoup import (
    GreedySettings,
    Options,
    Trial,
    geometry,
    greedy,
    slerp,
    sweep,
    ties,
    uniform,
)
from streamsoup.errors import NonFiniteError, TaskError

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TESTS = os.path.dirname(__file__)
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start three nodes on this machine; processes find what the tests import."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(2):
        found.add_node(**NODE)
    yield found
    found.shutdown()
    patch.undo()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Save three checkpoints of twenty tensors."""
    for i in range(3):
        rng = np.random.default_rng(i)
        model = {f"w{n}": tensor(rng.standard_normal((40, 50)).astype("f4")) for n in range(20)}
        save(tmp_path / f"m{i}", model)
    return [str(tmp_path / f"m{i}") for i in range(3)]


def shard(folder: Path) -> bytes:
    """Read the weights of a soup."""
    return (folder / "model.safetensors").read_bytes()


def start(cluster: Any, output: Path, pause_s: float, paths: list[str]) -> subprocess.Popen[str]:
    """Start a driver."""
    arguments = [cluster.address, str(output), str(pause_s), *paths]
    return subprocess.Popen(
        [sys.executable, os.path.join(TESTS, "ray_driver.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def after(driver: subprocess.Popen[str], n: int) -> None:
    """Wait until a driver has counted so many units."""
    assert driver.stdout is not None
    while n:
        line = driver.stdout.readline()
        assert line
        n -= line.startswith("unit")


def workers() -> list[psutil.Process]:
    """Return the processes that do units now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::streamsoup" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def are_gone(within_s: float) -> bool:
    """Wait until no process does a unit any more."""
    end = time.monotonic() + within_s
    while workers() and time.monotonic() < end:
        time.sleep(0.1)
    return not workers()


def test_soups_of_several_nodes_have_the_bytes_of_one_process(
    cluster: Any, paths: list[str], tmp_path: Path
) -> None:
    """With one pass, with measured tensors, with angles measured before; and so has geometry."""
    seen: list[Any] = []
    options = Options(ray=cluster.address, threads=1, on_event=seen.append)
    for name, make in (
        ("uniform", lambda **more: uniform(paths, **more)),
        ("ties", lambda **more: ties(paths[1:], base=paths[0], density=0.5, **more)),
        ("slerp", lambda **more: slerp(paths, [1, 2, 3], **more)),
    ):
        make(output=tmp_path / f"{name}1")
        make(output=tmp_path / f"{name}2", options=options)
        assert shard(tmp_path / f"{name}2") == shard(tmp_path / f"{name}1")
    assert geometry(paths, options=options).to_builtins() == geometry(paths).to_builtins()
    nodes = {f"node_{node.node_id}" for node in cluster.list_all_nodes()}
    assert {name for event in seen for name in getattr(event, "nodes", ())} <= nodes


def test_an_error_names_the_node_as_ray_status_does(
    cluster: Any, paths: list[str], tmp_path: Path
) -> None:
    """The ingredient, the place, and the node; nothing is left behind."""
    bad = {f"w{n}": tensor(np.full((40, 50), np.nan, "f4")) for n in range(20)}
    save(tmp_path / "bad", bad)
    options = Options(ray=cluster.address, threads=1)
    with pytest.raises(NonFiniteError) as found:
        uniform([*paths, str(tmp_path / "bad")], output=tmp_path / "out", options=options)
    named = re.search(r"this was on node_(\w+)$", str(found.value))
    assert named
    assert named[1] in {node.node_id for node in cluster.list_all_nodes()}
    assert not list(tmp_path.glob("out*"))


def test_workers_and_a_node_are_lost(cluster: Any, paths: list[str], tmp_path: Path) -> None:
    """Their units are done by others, and the bytes are the same."""
    uniform(paths, output=tmp_path / "alone")
    with start(cluster, tmp_path / "out", 0.4, paths) as driver:
        after(driver, 2)
        workers()[0].kill()
        after(driver, 1)
        cluster.remove_node(cluster.add_node(**NODE), allow_graceful=False)
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        assert driver.stdout is not None
        assert driver.stdout.read().endswith("done\n")
    cluster.add_node(**NODE)
    assert shard(tmp_path / "out") == shard(tmp_path / "alone")


def test_a_driver_is_killed_and_started_again(
    cluster: Any, paths: list[str], tmp_path: Path
) -> None:
    """Its workers end; what they had finished is not made again; a second driver is kept out."""
    uniform(paths, output=tmp_path / "alone")
    output = tmp_path / "out"
    with start(cluster, output, 1.5, paths) as driver:
        after(driver, 2)
        with start(cluster, output, 1.5, paths) as second:
            assert second.stdout is not None
            assert "OutputBusyError" in second.stdout.read()
        after(driver, 2)
        time.sleep(0.7)  # a checkpoint
        driver.kill()
    assert are_gone(10)
    assert not output.exists()
    (journal,) = output.with_name("out.partial").glob("work-*/journal")
    n_noted = sum(
        len(json.loads(line.split(" ", 2)[2]).get("leaves", ()))
        for line in journal.read_text().splitlines()
    )
    assert n_noted >= 4
    with start(cluster, output, 0.4, paths) as driver:
        assert driver.stdout is not None
        assert driver.stdout.read().endswith("done\n")
    assert shard(output) == shard(tmp_path / "alone")


def test_ctrl_c_ends_the_workers(cluster: Any, paths: list[str], tmp_path: Path) -> None:
    """Within seconds, long before their units are done."""
    with start(cluster, tmp_path / "out", 30, paths) as driver:
        end = time.monotonic() + 60
        while not workers() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        began = time.monotonic()
        driver.send_signal(signal.SIGINT)
        driver.wait(20)
    assert are_gone(5)
    assert time.monotonic() - began < 10


def test_the_command_line_starts_ray_and_ends_it(paths: list[str], tmp_path: Path) -> None:
    """Stdout holds the result alone; no process of Ray is left."""
    uniform(paths, output=tmp_path / "alone")
    command = [sys.executable, "-m", "streamsoup", "uniform", *paths, "--ray", "local", "--json"]
    found = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout)["path"] == str(tmp_path / "out")
    assert shard(tmp_path / "out") == shard(tmp_path / "alone")


def test_a_cluster_that_is_not_there_is_named(paths: list[str], tmp_path: Path) -> None:
    """In one line, and nothing is left behind."""
    command = [sys.executable, "-m", "streamsoup", "uniform", *paths, "--ray", "127.0.0.1:9"]
    found = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "error: --ray 127.0.0.1:9: cannot be reached: " in found.stderr
    assert not list(tmp_path.glob("out*"))


TASK = """
import os, time
import torch
from torch import nn

splits = ["val"]


def build():
    model = nn.Module()
    for n in range(20):
        model.register_parameter(f"w{n}", nn.Parameter(torch.zeros(40, 50)))
    return model


def score(model, split):
    time.sleep(PAUSE)
    return round(-float(sum((p ** 2).sum() for p in model.parameters())), 2)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    """Write a task that likes weights near zero."""
    (tmp_path / "task.py").write_text(TASK.replace("PAUSE", "0.2"))
    return str(tmp_path / "task.py")


@pytest.fixture
def six(tmp_path: Path) -> list[str]:
    """Save six checkpoints, some of them better than others."""
    for i in range(6):
        rng = np.random.default_rng(i)
        scale = 1 + (i % 3) / 2
        model = {
            f"w{n}": tensor((scale * rng.standard_normal((40, 50))).astype("f4")) for n in range(20)
        }
        save(tmp_path / f"s{i}", model)
    return [str(tmp_path / f"s{i}") for i in range(6)]


def decided(soup: Any) -> Any:
    """Return every trial with its score and decision, and what was kept."""
    trials = [trial for run in soup.runs for trial in run.trials]
    return soup.members, [(t.members, t.score.value, t.decision) for t in (*soup.singles, *trials)]


def actors() -> list[psutil.Process]:
    """Return the actors of searches."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::_Actor" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_greedy_search_ends_as_it_does_here(
    cluster: Any, six: list[str], task: str, tmp_path: Path
) -> None:
    """With two actors on each node: the same trials, decisions and bytes; an actor is killed."""
    here = greedy(six, task, output=tmp_path / "here")
    killed: list[int] = []

    def on_event(event: object) -> None:
        if isinstance(event, Trial) and not killed:
            found = actors()[0]
            killed.append(found.pid)
            found.kill()

    there = greedy(
        six,
        task,
        output=tmp_path / "there",
        settings=GreedySettings(jobs=2),
        options=Options(ray=cluster.address, on_event=on_event),
    )
    assert killed
    assert decided(there) == decided(here)
    assert shard(tmp_path / "there") == shard(tmp_path / "here")
    end = time.monotonic() + 10
    while actors() and time.monotonic() < end:
        time.sleep(0.1)
    assert not actors()


def test_a_search_survives_its_node(
    cluster: Any, six: list[str], task: str, tmp_path: Path
) -> None:
    """Candidates of a node that died go to others."""
    here = greedy(six, task, output=tmp_path / "here")
    extra = cluster.add_node(**NODE)
    removed: list[str] = []

    def on_event(event: object) -> None:
        if isinstance(event, Trial) and not removed:
            removed.append(extra.node_id)
            cluster.remove_node(extra, allow_graceful=False)

    options = Options(ray=cluster.address, on_event=on_event)
    there = greedy(six, task, output=tmp_path / "there", options=options)
    assert removed
    assert decided(there) == decided(here)


def test_a_sweep_and_a_command_over_ray(
    cluster: Any, six: list[str], task: str, tmp_path: Path
) -> None:
    """Points of a sweep have the scores of one process; commands get folders of their own."""
    grid = {"density": [0.2, 0.5, 0.9]}
    found = []
    for name, ray in (("here", None), ("there", cluster.address)):
        soup = sweep(
            six[1:4],
            "ties",
            task,
            grid,
            base=six[0],
            output=tmp_path / name,
            options=Options(ray=ray),
        )
        found.append([soup.score, soup.best, soup.report["sweep"], shard(tmp_path / name)])
    assert found[0] == found[1]
    command = "wc -c < {checkpoint}/model.safetensors"
    python = [sys.executable, "-m", "streamsoup"]
    rest = ["--json", "-o", str(tmp_path / "c")]
    told = subprocess.run(
        [*python, "greedy", *six[:3], "--command", command, *("--ray", cluster.address), *rest],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["path"] == str(tmp_path / "c")


def test_an_error_of_a_task_names_the_node(cluster: Any, six: list[str], tmp_path: Path) -> None:
    """And the candidate, as in one process."""
    (tmp_path / "bad.py").write_text(TASK.replace("time.sleep(PAUSE)", "raise ValueError('no')"))
    with pytest.raises(TaskError, match=r"ValueError: no[^$]*this was on node_\w+"):
        greedy(
            six,
            str(tmp_path / "bad.py"),
            output=tmp_path / "out",
            options=Options(ray=cluster.address),
        )
    assert not (tmp_path / "out").exists()
