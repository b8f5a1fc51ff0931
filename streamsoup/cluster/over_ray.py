"""The executor over Ray: units are its tasks, which it starts anew when a node or worker is lost.

A unit asks for as many CPUs as it has threads and for the memory that it may take, so Ray starts as
many on a node as fit there. Ray's scheduler decides where; a unit whose tensors some node has read
before asks for that one, and goes elsewhere if it is gone. Nodes have the names that ``ray status``
shows. (https://docs.ray.io, 2.60; "Ray tasks", "Scheduling", "Fault tolerance".)
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from streamsoup.cluster.executor import Work
from streamsoup.cluster.units import Unit
from streamsoup.errors import ClusterError, RecipeError, option, printable
from streamsoup.options import n_cpus
from streamsoup.system.closing import Closing

__all__ = ["RayExecutor", "import_ray", "node_name"]

LOSSES = 5
"""How often a unit is started anew after its process or node was lost. One that kills whatever
process does it has to end, too."""

AHEAD = 2
"""Units sent for each slot: one is done, the next one waits there already."""

TICK_S = 0.1
"""Time between looks at what else there is to do."""

ENDING_S = 3.0
"""How long to wait for processes that were told to end."""

ANSWER_S = 10.0
"""How long the head of a cluster may take to answer."""

STORE_NBYTES = 80 << 20
"""Ray's store of objects on this machine, which is given plans and digests only: the least."""


def import_ray() -> Any:
    """Import Ray. Raises `ClusterError` if it is not installed."""
    try:
        import ray
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "ray":
            raise ClusterError(
                f"{option('ray')} needs Ray, which is not installed; pip install 'streamsoup[ray]'"
            ) from None
        raise ClusterError(f"Ray cannot be imported: {printable(error, 300)}") from None
    return ray


def node_name(node: str) -> str:
    """Return what ``ray status`` calls a node, by its id."""
    return f"node_{node}"


class RayExecutor(Closing):
    """Does units as tasks of Ray."""

    def __init__(self, address: str) -> None:
        """Connect to nothing yet.

        Args:
            address: ``local`` starts Ray on this machine, for as long as this is open; else the
                address of a cluster, ``auto`` for the one that this machine belongs to.

        Raises `RecipeError` for an address of another form.
        """
        is_place = ":" in address and "://" not in address
        if address not in ("local", "auto") and not is_place:
            raise RecipeError(
                f"{option('ray')} {printable(repr(address))} is not local, auto, or the HOST:PORT "
                "of a cluster; Ray's client (ray://) is not supported: run this on one of the nodes"
            )
        self.address = address
        self._ray: Any = None
        self._owns = False
        self._read_at: dict[str, str] = {}
        """By the name of a tensor, the id of the node that read it last."""

    def open(self) -> None:
        """Connect, or use the connection that this process has. Raises `ClusterError`."""
        if self._ray is not None:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.address == "local":  # where Ray runs on macOS, it needs no switch
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = import_ray()
        if not ray.is_initialized():
            with _own_handlers():
                self._connect(ray)
            self._owns = True
        self._ray = ray

    def _connect(self, ray: Any) -> None:
        settings: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "configure_logging": False,
        }
        if self.address == "local":
            settings |= {
                "num_cpus": n_cpus(),
                "include_dashboard": False,
                "object_store_memory": STORE_NBYTES,
                "_node_ip_address": "127.0.0.1",
            }
        _check_answers(
            os.environ.get("RAY_ADDRESS", "") if self.address == "auto" else self.address
        )
        try:
            ray.init(address=self.address, **settings)
        except Exception as error:
            with suppress(Exception):
                ray.shutdown()
            text = printable(str(error).strip().partition("\n")[0], 300)
            raise ClusterError(
                f"{option('ray')} {printable(self.address)}: cannot be reached: {text}"
            ) from None

    @property
    def ray(self) -> Any:
        """The module, once this is open."""
        return self._ray

    def nodes(self) -> dict[str, dict[str, float]]:
        """Return what each node has: CPUs, GPUs, memory; by its id, those that are alive."""
        self.open()
        return {
            node["NodeID"]: dict(node["Resources"])
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        }

    def n_cpus(self) -> int:
        """Return the CPUs of the smallest node that has any. Raises `ClusterError` if none has."""
        counts = [int(each["CPU"]) for each in self.nodes().values()]
        if not counts:
            raise ClusterError(f"{option('ray')} {printable(self.address)}: no node has a CPU")
        return min(counts)

    def n_slots(self, n_cpus: int, nbytes: int) -> int:
        """Count what fits on all nodes at the same time; 0 if nothing fits on any."""
        return sum(
            int(min(each["CPU"] // n_cpus, each.get("memory", nbytes) // max(nbytes, 1)))
            for each in self.nodes().values()
        )

    def run(
        self,
        work: Work,
        shared: bytes,
        units: Sequence[Unit],
        *,
        n_cpus: int,
        nbytes: int,
        on_done: Callable[[Unit, Any, str], None],
        on_wait: Callable[[], None],
    ) -> None:
        """Do all units; see `Executor.run`. Raises `ClusterError` if one fits on no node."""
        self.open()
        ray = self._ray
        if self.n_slots(n_cpus, nbytes) == 0:
            raise ClusterError(
                f"no node has {n_cpus} CPUs and {nbytes} bytes of memory for Ray's tasks; lower "
                f"{option('threads')} or {option('memory')}"
            )
        task = ray.remote(
            num_cpus=n_cpus, memory=nbytes, max_retries=LOSSES, retry_exceptions=False
        )(_do)
        everyone = ray.put(shared)
        todo = list(reversed(units))
        running: dict[Any, Unit] = {}
        try:
            while todo or running:
                most = AHEAD * max(1, self.n_slots(n_cpus, nbytes))
                while todo and len(running) < most:
                    unit = todo.pop()
                    sent = task.options(**self._place(unit), name="streamsoup")
                    running[sent.remote(work, everyone, unit.own)] = unit
                done, _ = ray.wait(list(running), num_returns=1, timeout=TICK_S)
                for ref in done:
                    node, answer = self._take(ref)
                    unit = running.pop(ref)
                    self._read_at.update(dict.fromkeys(unit.tensors, node))
                    on_done(unit, answer, node_name(node))
                on_wait()
        except BaseException:
            self._end(list(running))
            raise

    def _place(self, unit: Unit) -> dict[str, Any]:
        """Return where to do a unit: where it was read, else wherever there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = next((self._read_at[name] for name in unit.tensors if name in self._read_at), None)
        if node is None:
            return {"scheduling_strategy": "SPREAD"}
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}

    def _take(self, ref: Any) -> tuple[str, Any]:
        """Return the node and the answer of a task. Raises `ClusterError`."""
        exceptions = self._ray.exceptions
        try:
            found: tuple[str, Any] = self._ray.get(ref)
        except exceptions.RayTaskError as error:  # not of the unit: `work` raises nothing
            text = printable(str(error).strip().rpartition("\n")[2], 300)
            raise ClusterError(
                f"a node cannot run streamsoup: {text}; install the same version, and Ray's, on "
                "every node"
            ) from None
        except exceptions.RayError as error:
            text = printable(" ".join(str(error).split()), 400)
            raise ClusterError(
                f"a unit was lost {LOSSES + 1} times with its process: {text}; finished work is "
                "kept, and the same command resumes"
            ) from None
        return found

    def _end(self, refs: Sequence[Any]) -> None:
        """End the processes that do these tasks."""
        with suppress(Exception):
            for ref in refs:
                self._ray.cancel(ref, force=True)
            if refs:
                self._ray.wait(list(refs), num_returns=len(refs), timeout=ENDING_S)

    def close(self) -> None:
        """Disconnect, if this has connected; what it started on this machine ends."""
        ray, self._ray = self._ray, None
        if ray is not None and self._owns:
            self._owns = False
            with _own_handlers():
                ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise `ClusterError` if nothing answers at a HOST:PORT: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"{option('ray')} {printable(address)}: cannot be reached: {error}; give the address "
            "of a running cluster, as ray start has printed it"
        ) from None


def _do(work: Work, shared: bytes, own: Any) -> tuple[str, Any]:
    """Do a unit, as a task of Ray; return the id of the node, and the result."""
    import ray

    return ray.get_runtime_context().get_node_id(), work(shared, own)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the handlers of signals that this process has: Ray sets one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)
