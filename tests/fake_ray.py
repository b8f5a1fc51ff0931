"""What streamsoup uses of Ray, in this process: tasks and actors run when they are asked for.

`lose` makes the next calls of actors end as if their process was lost; `dead` are nodes that are
gone.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception): ...


class RayTaskError(RayError): ...


class Affinity:
    def __init__(self, node_id: str, soft: bool) -> None:
        self.node_id, self.soft = node_id, soft


class FakeRay(ModuleType):
    """A cluster of some nodes with two CPUs each."""

    def __init__(self, n_nodes: int) -> None:
        super().__init__("ray")
        self.names = [f"{n}" * 6 for n in range(n_nodes)]
        self.dead: set[str] = set()
        self.lose = 0
        self.n_actors = 0
        self.where: list[str] = []
        """The node of each task, in order."""
        self.cancelled: list[Any] = []
        self.killed: list[Any] = []
        self.told: dict[str, Any] = {}
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self._turn = itertools.count()
        self._here = ""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Be what ``import ray`` finds."""
        strategies = ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = Affinity  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "ray", self)
        patch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        patch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)

    def is_initialized(self) -> bool:
        return False

    def init(self, **told: Any) -> None:
        self.told = told

    def shutdown(self) -> None:
        self.told = {}

    def nodes(self) -> list[dict[str, Any]]:
        has = {"CPU": 2.0, "memory": 1e12}
        return [
            {"NodeID": name, "Alive": name not in self.dead, "Resources": has}
            for name in self.names
        ]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **resources: Any) -> Any:
        return lambda work: _Remote(self, work, {})

    def get(self, ref: _Ref) -> Any:
        return ref.result()

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float | None = None) -> Any:
        return refs[:num_returns], refs[num_returns:]

    def cancel(self, ref: Any, force: bool) -> None:
        self.cancelled.append(ref)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: self._here)

    def place(self, strategy: Any) -> str:
        """Return the node for a task or an actor."""
        alive = [name for name in self.names if name not in self.dead]
        if isinstance(strategy, Affinity):
            if strategy.node_id in alive:
                return strategy.node_id
            if not strategy.soft:
                raise RayError(f"the node {strategy.node_id} is gone")
        return alive[next(self._turn) % len(alive)]

    def call(self, node: str, function: Any, args: Any) -> Any:
        self._here = node
        return function(*args)


class _Remote:
    """A function or class that is remote."""

    def __init__(self, ray: FakeRay, work: Any, options: dict[str, Any]) -> None:
        self._ray, self._work, self._options = ray, work, options

    def options(self, **options: Any) -> _Remote:
        return _Remote(self._ray, self._work, options)

    def remote(self, *args: Any) -> Any:
        strategy = self._options.get("scheduling_strategy")
        if isinstance(self._work, type):
            self._ray.n_actors += 1
            return _Handle(self._ray, self._work(*args), strategy)

        def run() -> Any:
            node = self._ray.place(strategy)
            self._ray.where.append(node)
            return self._ray.call(node, self._work, args)

        return _Ref(run)


class _Handle:
    """An actor."""

    def __init__(self, ray: FakeRay, actor: Any, strategy: Any) -> None:
        self._ray, self._actor, self._strategy = ray, actor, strategy

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: _Ref(lambda: self._call(name, args)))

    def _call(self, name: str, args: Any) -> Any:
        node = self._ray.place(self._strategy)
        if name == "score" and self._ray.lose:
            self._ray.lose -= 1
            raise RayError("the actor died")
        return self._ray.call(node, getattr(self._actor, name), args)


class _Ref:
    def __init__(self, run: Any) -> None:
        self._run = run

    def result(self) -> Any:
        return self._run()
