"""Scoring on the nodes of a Ray cluster: an actor for each GPU, or several on each node.

An actor has a worker process of its own (`workers`), which the user's task may hang, flood or kill;
so it is the same code that scores here and there, and the same time limit. An actor that is lost is
started anew on its node, and its candidate goes to whichever actor is free. A node that is lost
takes its actors with it. The search asks in order (`asking`), so its outcome is the same.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import msgspec
from msgspec.structs import replace

from streamsoup.cluster.executor import Answer, attempt, result_of
from streamsoup.cluster.over_ray import RayExecutor, node_name
from streamsoup.cluster.shared import open_shared, share_plan
from streamsoup.errors import ClusterError, RecipeError, TaskError, option, printable
from streamsoup.output.make import plan_order
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.scorer import Candidate, Outcome, which
from streamsoup.search.scoring.work import Work
from streamsoup.search.scoring.workers import WorkerScorer
from streamsoup.system.pickles import for_another_process

__all__ = ["RayScorer", "places_on"]

LOSSES = 8
"""How often a candidate is given to another actor after one was lost with it. A node that died
may look alive for seconds."""

PATIENCE_S = 1.0
"""Time between two of these."""

_THREADS = "OMP_NUM_THREADS"
"""Ray sets it for its actors, and sums of a task may depend on it."""


class _Told(msgspec.Struct, frozen=True):
    """What an actor is told: a `Work` but for its plan, which it makes anew; and where it runs."""

    work: dict[str, Any]
    shared: bytes
    scratch: str
    timeout: float | None
    folder: str
    path: tuple[str, ...]
    threads: str | None


class _Place(msgspec.Struct):
    """Where an actor runs, and the actor that is there now."""

    node: str
    """Id of the node."""
    n_gpus: float
    n_cpus: float
    actor: Any = None
    started: Any = None
    """The task that starts its worker; None once it is known to have started."""


def places_on(nodes: dict[str, dict[str, float]], jobs: int) -> list[_Place]:
    """Return a place for each GPU of the nodes; if there are none, `jobs` for each node.

    In turns over the nodes, so that the first candidates go to different ones.
    """
    gpus = {node: int(has.get("GPU", 0)) for node, has in nodes.items()}
    if any(gpus.values()):
        turns = [(turn, node) for node, n in gpus.items() for turn in range(n)]
        return [_Place(node, 1, 0) for _, node in sorted(turns)]
    turns = [(turn, node) for node in nodes for turn in range(jobs)]
    return [_Place(node, 0, min(1.0, nodes[node]["CPU"] / jobs)) for _, node in sorted(turns)]


class RayScorer:
    """Actors on the nodes of a cluster, each of which scores one candidate at a time."""

    def __init__(
        self, executor: RayExecutor, work: Work, *, jobs: int, timeout: float | None
    ) -> None:
        """Start all actors, and wait until the first has loaded the task.

        Args:
            executor: The connection to the cluster.
            work: What each of them does; its scratch file is given a number.
            jobs: Actors on each node, where no node has a GPU.
            timeout: As for `WorkerScorer`.

        Raises:
            RecipeError: The task cannot be sent, or an ingredient has no files.
            TaskError: The task cannot be loaded.
            ClusterError: The cluster cannot be reached.
        """
        executor.open()
        self._executor, self._ray = executor, executor.ray
        options = replace(work.options, on_event=None, executor=None, ray=None)
        fields = {name: getattr(work, name) for name in Work.__struct_fields__}
        del fields["ordered"]
        self._told = _Told(
            work=fields | {"options": options, "n_workers": 1},
            shared=share_plan(
                work.ordered.plan, work.options, asked="ray", threads=1, memory=work.budget
            ),
            scratch=work.scratch,
            timeout=timeout,
            folder=os.getcwd(),
            path=tuple(sys.path),
            threads=os.environ.get(_THREADS),
        )
        self._lock = threading.Lock()
        """Guards what follows, which the threads that call `score` share."""
        self._is_closed = False
        self._n_started = 0
        self._places = places_on(executor.nodes(), jobs)
        self._idle: queue.SimpleQueue[_Place | None] = queue.SimpleQueue()
        if not self._places:
            raise ClusterError(f"{option('ray')}: no node has a CPU")
        self.n_at_once = len(self._places)
        try:
            for place in self._places:
                self._start(place)
                self._idle.put(place)
            self._loaded = self._first()
        except BaseException:
            self.close()
            raise
        self.name: str = self._loaded["task"]
        self.fingerprint: str = self._loaded["code"]
        self.split: str = self._loaded["split"]

    def prepare(self, recipe: Recipe) -> None:
        """Do nothing: each worker builds its model when it is sent its first candidate."""

    def score(self, candidate: Candidate) -> Outcome:
        """Score a candidate in an actor that is idle; see `Scorer.score`.

        Raises `ClusterError` if one actor after the other is lost with it.
        """
        why = ""
        for _ in range(LOSSES):
            place = self._idle.get()
            if place is None:
                self._idle.put(None)
                raise TaskError("the search is over")
            try:
                self._check_started(place)
                node, answer = self._ray.get(place.actor.score.remote(candidate))
            except self._ray.exceptions.RayError as error:
                why = printable(" ".join(str(error).split()), 300)
                self._replace(place)
                continue
            except BaseException:
                self._idle.put(place)
                raise
            self._idle.put(place)
            outcome: Outcome = result_of(answer, node_name(node))
            return outcome
        raise ClusterError(
            f"a candidate was lost {LOSSES} times with its actor: {why}{which(candidate)}"
        )

    def close(self) -> None:
        """Kill all actors, with their workers; a second time does nothing."""
        with self._lock:
            self._is_closed = True
            places, self._places = self._places, []
        self._idle.put(None)
        for place in places:
            self._kill(place)

    def _start(self, place: _Place) -> None:
        """Start an actor at a place."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._n_started += 1
        # Of its own, as the actor before it may not know yet that it is lost.
        told = replace(self._told, scratch=f"{self._told.scratch}-{self._n_started}")
        kind = self._ray.remote(
            num_cpus=place.n_cpus, num_gpus=place.n_gpus, max_restarts=0, max_task_retries=0
        )(_Actor)
        strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
        options = {"scheduling_strategy": strategy, "name": None}
        place.actor = kind.options(**options).remote(_pickled(told))
        place.started = place.actor.start.remote()

    def _first(self) -> dict[str, Any]:
        """Return what the first actor that has loaded the task says of it."""
        started, why = {place.started: place for place in self._places}, ""
        while started:
            (ref,), _ = self._ray.wait(list(started), num_returns=1)
            place = started.pop(ref)
            try:
                node, answer = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                why = printable(" ".join(str(error).split()), 300)
                continue  # `score` starts another one at its place
            told: dict[str, Any] = result_of(answer, node_name(node))
            place.started = None
            return told
        raise ClusterError(f"no actor could be started: {why}")

    def _check_started(self, place: _Place) -> None:
        """Wait until an actor has loaded the task. Raises `TaskError` if it has another one."""
        if place.started is None:
            return
        node, answer = self._ray.get(place.started)
        if result_of(answer, node_name(node)) != self._loaded:
            raise TaskError(
                f"the code of the task differs from that of other nodes; this was on "
                f"{node_name(node)}"
            )
        place.started = None

    def _replace(self, place: _Place) -> None:
        """Start an actor anew where one was lost, or give its place up with its node."""
        self._kill(place)
        time.sleep(PATIENCE_S)
        nodes = self._executor.nodes()
        with self._lock:
            if self._is_closed:
                raise TaskError("the search is over")
            if place.node not in nodes:
                if len(self._places) > 1:
                    self._places.remove(place)
                    return
                if not nodes:
                    raise ClusterError("no node of the cluster is left")
                place.node = min(nodes)
            self._start(place)
        self._idle.put(place)

    def _kill(self, place: _Place) -> None:
        with suppress(Exception):
            self._ray.kill(place.actor)


class _Actor:
    """What runs on a node: a worker process, which it starts and asks."""

    def __init__(self, told: bytes) -> None:
        """Keep what it is told; an error here would have no text."""
        self._pickled = told
        self._scorer: WorkerScorer | None = None

    def start(self) -> tuple[str, Answer]:
        """Start the worker; answer with what it says of its task."""
        return _here(), attempt(self._start, self._pickled, None)

    def score(self, candidate: Candidate) -> tuple[str, Answer]:
        """Score a candidate."""
        return _here(), attempt(self._score, b"", candidate)

    def _start(self, pickled: bytes, _: None) -> dict[str, Any]:
        told: _Told = pickle.loads(pickled)
        os.chdir(told.folder)  # of relative paths: of tasks, and of what they read
        sys.path[:] = told.path
        os.environ.pop(_THREADS, None)
        if told.threads is not None:
            os.environ[_THREADS] = told.threads
        opened = open_shared(told.shared)
        options = told.work["options"]
        ordered = plan_order(opened.plan.ingredients, opened.plan.recipe, options)
        work = Work(**told.work | {"ordered": ordered, "scratch": told.scratch})
        self._scorer = WorkerScorer([work], timeout=told.timeout)
        return {
            "task": self._scorer.name,
            "code": self._scorer.fingerprint,
            "split": self._scorer.split,
        }

    def _score(self, _: bytes, candidate: Candidate) -> Outcome:
        assert self._scorer is not None
        return self._scorer.score(candidate)


def _here() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def _pickled(told: _Told) -> bytes:
    """Pickle what an actor is told. Raises `RecipeError` for a task that only exists here."""
    try:
        return for_another_process(told)
    except Exception as error:
        raise RecipeError(
            f"the task cannot be sent to another process ({error}); give a task file, or leave out "
            f"{option('ray')}"
        ) from None
