"""What is asked of Ray, of a stand-in for it: where tasks go, what is lost, what is tidied up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save, tensor
from fake_ray import Affinity, FakeRay

import streamsoup
from streamsoup import Options, Progress, slerp, uniform
from streamsoup.cli.terminal import Watcher
from streamsoup.cluster import over_ray, passes, units
from streamsoup.errors import ClusterError, TaskError
from streamsoup.search.scoring import actors


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Put a cluster of three nodes in the place of Ray."""
    found = FakeRay(3)
    found.install(monkeypatch)
    monkeypatch.setattr(units, "SMALLEST_NBYTES", 1)
    monkeypatch.setattr(passes, "TICK_S", 0.0)
    monkeypatch.setattr(actors, "PATIENCE_S", 0.0)
    return found


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Save three checkpoints of twelve tensors."""
    for i in range(3):
        rng = np.random.default_rng(i)
        model = {f"w{n}": tensor(rng.standard_normal((40, 50)).astype("f4")) for n in range(12)}
        save(tmp_path / f"m{i}", model)
    return [str(tmp_path / f"m{i}") for i in range(3)]


def test_what_was_read_somewhere_is_made_there(
    ray: FakeRay, paths: list[str], tmp_path: Path
) -> None:
    """Tasks of the second pass go to the nodes of the first, and a node that is gone to others."""
    read: dict[str, str] = {}
    moved: list[str] = []
    real = over_ray.RayExecutor._place

    def place(self: Any, unit: Any) -> dict[str, Any]:
        found = real(self, unit)
        strategy = found["scheduling_strategy"]
        if isinstance(strategy, Affinity):
            assert strategy.soft
            assert strategy.node_id in {self._read_at.get(name) for name in unit.tensors}
            moved.append(strategy.node_id)
            ray.dead.add(ray.names[0])
        else:
            read.update(dict.fromkeys(unit.tensors, ""))
        return found

    patch = pytest.MonkeyPatch()
    with patch.context():
        patch.setattr(over_ray.RayExecutor, "_place", place)
        soup = slerp(paths, [1, 2, 3], output=tmp_path / "there", options=Options(ray="auto"))
        patch.undo()
    slerp(paths, [1, 2, 3], output=tmp_path / "here")
    there, here = (Path(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()
    assert len(set(moved)) > 1
    assert len(read) == 12
    assert ray.told == {}  # disconnected
    assert soup.summed_on == "cpu, of the processes of a cluster"


def test_an_exception_of_a_callback_ends_all_tasks(
    ray: FakeRay, paths: list[str], tmp_path: Path
) -> None:
    """As Ctrl-C does: what runs is cancelled by force, and Ray is left."""

    def on_event(event: object) -> None:
        if isinstance(event, Progress) and event.nbytes_done:
            raise KeyboardInterrupt

    options = Options(ray="auto", on_event=on_event)
    with pytest.raises(KeyboardInterrupt):
        uniform(paths, output=tmp_path / "out", options=options)
    assert ray.cancelled
    assert ray.told == {}


def test_a_unit_that_fits_nowhere_is_refused(
    ray: FakeRay, paths: list[str], tmp_path: Path
) -> None:
    """Ray would wait for ever; nothing is left behind."""
    with pytest.raises(ClusterError, match="no node has 3 CPUs"):
        uniform(paths, output=tmp_path / "out", options=Options(ray="auto", threads=3))
    assert not list(tmp_path.glob("out*"))


class _Scores:
    """Stands in for the worker process of an actor."""

    name, fingerprint, split = "task", "code", "val"

    def __init__(self, works: Any, timeout: Any) -> None:
        (work,) = works
        self.scratch = work.scratch

    def score(self, candidate: Any) -> Any:
        return self.scratch, candidate


@pytest.fixture
def scorer(
    ray: FakeRay, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> actors.RayScorer:
    """Start two actors on each of three nodes."""
    from streamsoup.engine.rules.linear import Linear
    from streamsoup.output.make import order
    from streamsoup.search.scoring.work import Work

    monkeypatch.setattr(actors, "WorkerScorer", _Scores)
    options = Options()
    ordered = order(
        paths, Linear(streamsoup.Coefficients.uniform(3)), method="mix", options=options
    )
    scratch = str(tmp_path / "sum-0")
    work = Work(
        "task.py", None, False, ordered, options, None, 10**9, scratch, 1, keeps=True, by_rule=False
    )
    return actors.RayScorer(over_ray.RayExecutor("auto"), work, jobs=2, timeout=None)


def test_a_lost_actor_is_replaced_and_its_candidate_scored(
    ray: FakeRay, scorer: actors.RayScorer
) -> None:
    """By another one; each actor that was ever started has a scratch file of its own."""
    assert scorer.n_at_once == 6
    candidate: Any = "c"
    ray.lose = 3
    found: Any = [scorer.score(candidate) for _ in range(12)]
    assert [each[1] for each in found] == ["c"] * 12
    assert ray.n_actors == 9
    assert len({each[0] for each in found}) == 6  # three of nine were lost
    assert len(ray.killed) == 3


def test_a_lost_node_takes_its_actors_with_it(ray: FakeRay, scorer: actors.RayScorer) -> None:
    """The others go on, two on each node; the last node's actors are started elsewhere."""
    candidate: Any = "c"
    ray.dead = {ray.names[0]}
    assert [scorer.score(candidate)[1] for _ in range(8)] == ["c"] * 8  # type: ignore[index]
    assert {place.node for place in scorer._places} == set(ray.names[1:])
    ray.dead = set(ray.names[1:])
    assert scorer.score(candidate)[1] == "c"  # type: ignore[index]
    ray.dead = set(ray.names)
    with pytest.raises(ClusterError, match="no node of the cluster is left"):
        scorer.score(candidate)


def test_a_candidate_that_loses_every_actor_ends_the_search(
    ray: FakeRay, scorer: actors.RayScorer, paths: list[str]
) -> None:
    """It is named, with what Ray says."""
    from streamsoup.search.scoring.scorer import Candidate

    recipe = streamsoup.Recipe(
        tuple(paths[:1]), streamsoup.Linear(streamsoup.Coefficients.uniform(1))
    )
    ray.lose = 1000
    with pytest.raises(ClusterError, match=r"lost 8 times with its actor: the actor died; .*m0"):
        scorer.score(Candidate(recipe, (0,)))


def test_a_closed_scorer_lets_no_thread_wait(ray: FakeRay, scorer: actors.RayScorer) -> None:
    """All actors are killed, and whoever asks for one is told."""
    scorer.close()
    scorer.close()
    assert len(ray.killed) == 6
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(7):
                scorer._idle.get_nowait()
        except Exception:  # the queue is empty, but for the word that ends it
            scorer._idle.put(None)
        try:
            scorer.score("c")  # type: ignore[arg-type]
        except TaskError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 3


def test_the_terminal_tells_what_each_node_has_read() -> None:
    """By the beginnings of their names, in order."""
    watcher = Watcher("uniform", True)
    watcher(
        Progress(
            3_000_000, 9_000_000, 1.0, {"node_bbbbbbbbbb": 10**6, "node_aaaaaaaaaa": 2 * 10**6}
        )
    )
    assert watcher._parts(0.0)[3] == "node_aaaaaaa 2 MB, node_bbbbbbb 1 MB"
    watcher.close()
