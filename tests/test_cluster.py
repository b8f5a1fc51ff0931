"""Work over an executor: the bytes of one process, whatever is lost, late, or done twice."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_model, save_sharded, tensor
from hypothesis import given
from hypothesis import strategies as st
from outside.executors import Elsewhere, Shuffled

import streamsoup
from streamsoup import Executor, Options, Progress, karcher, mix, slerp, stock, ties, uniform
from streamsoup.cluster import units as cutting
from streamsoup.cluster.executor import Answer, attempt, result_of
from streamsoup.cluster.over_ray import RayExecutor
from streamsoup.cluster.shared import open_shared, share_plan
from streamsoup.cluster.units import cut, in_units
from streamsoup.engine import plan as planning
from streamsoup.engine.plan import plan_mix
from streamsoup.errors import (
    ChangedIngredientError,
    ClusterError,
    NonFiniteError,
    RecipeError,
    StreamsoupError,
)
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.output.planned import planned
from streamsoup.output.write import FileLedger, FileSession, FileSink
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.search.scoring.actors import places_on


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make leaves and units so small that there are several of each tensor."""
    monkeypatch.setattr(planning, "LEAF", 4096)
    monkeypatch.setattr(cutting, "SMALLEST_NBYTES", 1 << 13)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Return three checkpoints in two shards each, one of them in a folder, with integers."""
    paths = []
    for i in range(3):
        rng = np.random.default_rng(i)
        shards = [
            {
                "a": tensor(rng.standard_normal((130, 100)).astype("f4")),
                "count": tensor(np.arange(7)),
            },
            {"c": tensor(rng.standard_normal((3, 3000)).astype("f4")), **random_model(i)},
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
    "ties": lambda paths, **more: ties(paths[1:], base=paths[0], density=0.4, **more),
    "slerp": lambda paths, **more: slerp(paths[:2], [0.3, 0.7], **more),
    "stock": lambda paths, **more: stock(paths[1:], base=paths[0], **more),
    "karcher": lambda paths, **more: karcher(paths, **more),
}


@pytest.mark.parametrize("method", METHODS)
def test_units_give_the_bytes_of_one_process(method: str, three: list[str], tmp_path: Path) -> None:
    """In any order, twice, with any number of measuring passes; and so are the bytes read."""
    alone = METHODS[method](three, output=str(tmp_path / "alone"))
    executor = Shuffled(len(method))
    seen: list[Any] = []
    options = Options(executor=executor, on_event=seen.append)
    soup = METHODS[method](three, output=str(tmp_path / "units"), options=options)
    assert content(tmp_path / "units") == content(tmp_path / "alone")
    assert (soup.nbytes_read, soup.n_passes) == (alone.nbytes_read, alone.n_passes)
    assert len(executor.done) >= 6
    assert executor.n_open > 0
    last = [event for event in seen if isinstance(event, Progress)][-1]
    assert last.nbytes_done == last.nbytes == sum(last.nodes.values())
    assert set(last.nodes) == {"node-0", "node-1"}


def test_geometry_gives_the_numbers_of_one_process(three: list[str]) -> None:
    """Sums of leaves are added up in the order of the plan, with a base and without; to the bit."""
    for base in (None, three[0]):
        alone = streamsoup.geometry(three[1:], base=base)
        spread = streamsoup.geometry(three[1:], base=base, options=Options(executor=Shuffled(3)))
        assert spread.to_builtins() == alone.to_builtins()


def test_another_process_makes_a_unit(three: list[str], tmp_path: Path) -> None:
    """What it is sent is all that it needs: paths, a recipe, and the leaves."""
    uniform(three, output=str(tmp_path / "alone"))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # the other process has leaves of the usual size
        patch.setattr(planning, "LEAF", 1 << 22)
        options = Options(executor=Elsewhere())
        uniform(three, output=str(tmp_path / "alone2"))
        uniform(three, output=str(tmp_path / "units"), options=options)
    assert content(tmp_path / "units") == content(tmp_path / "alone2")


def test_a_unit_is_on_disk_before_it_is_noted(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unit waits for the disk under all the shards that it wrote to, and then answers."""
    written: set[int] = set()
    n_noted = 0
    write, sync = FileSession.write, FileSink.sync

    def writing(self: Any, leaf: Any, *more: Any) -> None:
        write(self, leaf, *more)
        written.add(self._sink.file_of(leaf))

    def syncing(self: Any, numbers: Any = None) -> None:
        sync(self, numbers)
        written.difference_update(range(9) if numbers is None else numbers)

    class Watching(Shuffled):
        def run(self, *arguments: Any, on_done: Any, **more: Any) -> None:
            def noted(*done: Any) -> None:
                nonlocal n_noted
                n_noted += 1
                assert not written
                on_done(*done)

            super().run(*arguments, on_done=noted, **more)

    monkeypatch.setattr(FileSession, "write", writing)
    monkeypatch.setattr(FileSink, "sync", syncing)
    uniform(three, output=str(tmp_path / "soup"), options=Options(executor=Watching(2)))
    assert n_noted > 5


def test_only_units_that_were_lost_are_made_again(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver stops after five units; the next run makes the others, and believes those five.

    Planted: a byte of a finished leaf is changed meanwhile, and that leaf is made again, too.
    """
    uniform(three, output=str(tmp_path / "alone"))
    output, first = str(tmp_path / "units"), Shuffled(1, most=5)
    with pytest.raises(KeyboardInterrupt):
        uniform(three, output=output, options=Options(executor=first))
    assert not os.path.exists(output)
    (shard,) = Path(output + ".partial").glob("work-*/soup/*00001*")
    damaged = bytearray(shard.read_bytes())
    damaged[-30_000] ^= 1
    made: list[int] = []
    real = FileLedger.finish_leaf

    def finish(self: FileLedger, leaf: Any, digests: bytes) -> None:
        if not self.noted(leaf) and type(self._journal).__name__ == "_Notes":
            made.append(leaf.number)
        real(self, leaf, digests)

    monkeypatch.setattr(FileLedger, "finish_leaf", finish)
    shard.write_bytes(damaged)
    uniform(three, output=output, options=Options(executor=Shuffled(2)))
    assert content(output) == content(tmp_path / "alone")
    finished = {leaf for leaves in first.done for leaf in leaves}
    assert finished
    assert finished.isdisjoint(made)


def test_the_error_of_a_unit_names_its_node(three: list[str], tmp_path: Path) -> None:
    """It is the error of one process, with the node at its end, and nothing is left behind."""
    bad = random_model(9)
    broken = dict(bad)
    name = next(name for name, each in broken.items() if each[0] == "F32")
    shape = broken[name][1]
    broken[name] = tensor(np.full(shape, np.nan, "f4"))
    paths = []
    for i, each in enumerate([bad, broken]):
        paths.append(str(save_sharded(tmp_path / f"n{i}", [each])))
    with pytest.raises(NonFiniteError, match=r"holds nan at .*; this was on node-[01]$"):
        uniform(paths, output=str(tmp_path / "out"), options=Options(executor=Shuffled()))
    assert not list(tmp_path.glob("out*"))


def _fails(shared: bytes, own: Any) -> Any:
    raise own


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NonFiniteError("x: NaN"), "x: NaN; this was on n"),
        (OSError(28, "No space left on device", "/a"), "/a: No space left on device; .* on n"),
        (MemoryError(), "out of memory; lower memory or threads; this was on n"),
        (KeyError("k"), "KeyError: 'k'; this was on n"),
    ],
)
def test_errors_travel_as_plain_data(error: Exception, text: str) -> None:
    """They keep their class where it is ours or the system's, the number of which comes along."""
    answer = pickle.loads(pickle.dumps(attempt(_fails, b"", error)))
    assert isinstance(answer, Answer)
    kind = type(error) if isinstance(error, (StreamsoupError, OSError)) else StreamsoupError
    with pytest.raises(kind, match=text) as found:
        result_of(answer, "n")
    if isinstance(error, OSError):
        assert isinstance(found.value, OSError)
        assert found.value.errno == 28


def test_a_full_disk_on_a_node_keeps_what_is_finished(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to do, and the same call resumes."""
    real = os.pwrite
    n = 0

    def pwrite(*args: Any) -> int:
        nonlocal n
        n += 1
        if n == 12:
            raise OSError(28, "No space left on device")
        return real(*args)

    output = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(streamsoup.StreamsoupError, match=r"No space left on device; .*node-"):
            uniform(three, output=output, options=Options(executor=Shuffled()))
    uniform(three, output=output, options=Options(executor=Shuffled()))
    uniform(three, output=str(tmp_path / "alone"))
    assert content(output) == content(tmp_path / "alone")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=40), st.integers(1, 99))
def test_a_cut_has_every_leaf_once(steps: list[tuple[int, int]], target: int) -> None:
    """Runs are in order, whole where keys are equal, and no longer than they need be."""
    keys = list(np.cumsum([step for step, _ in steps]))
    sizes = [nbytes for _, nbytes in steps]
    runs = cut(keys, sizes, target)
    assert [at for run in runs for at in run] == list(range(len(keys)))
    homes = {at: n for n, run in enumerate(runs) for at in run}
    for at in range(1, len(keys)):
        assert keys[at] != keys[at - 1] or homes[at] == homes[at - 1]
    for run in runs:
        groups = dict.fromkeys(keys[at] for at in run)
        first = sizes[run[-1]] if len(set(groups)) == 1 else 0
        before = sum(sizes[at] for at in run if keys[at] != keys[run[-1]])
        assert before < target or first


def test_statistics_of_a_tensor_stay_in_one_unit(three: list[str]) -> None:
    """A rule that measures has whole tensors; the planted one without does not."""
    opened = open_ingredients(three)
    for n_passes, whole in ((1, False), (2, True)):
        plan = plan_mix(opened, Recipe(tuple(three), streamsoup.Linear(Coefficients.uniform(3))))
        plan = _WithPasses(plan, n_passes)  # type: ignore[assignment]
        units = in_units(plan, list(plan.leaves()), 2)
        homes: dict[str, int] = {}
        for unit in units:
            for name in unit.tensors:
                homes[name] = homes.get(name, 0) + 1
        assert (max(homes.values()) == 1) is whole


class _WithPasses:
    """A plan with a rule of so many passes."""

    def __init__(self, plan: Any, n_passes: int) -> None:
        self._plan = plan
        rule = type("R", (), {"n_passes": n_passes})
        self.recipe = type("P", (), {"rule": rule})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


def test_a_process_refuses_what_it_was_not_asked_for(three: list[str]) -> None:
    """Other files, or another streamsoup, are named before anything is read."""
    plan = plan_mix(
        open_ingredients(three), Recipe(tuple(three), streamsoup.Linear(Coefficients.uniform(3)))
    )
    shared = share_plan(plan, Options(), asked="ray", threads=1, memory=10**9)
    assert open_shared(shared).plan.n_leaves == plan.n_leaves
    other = shared.replace(b"xxh3", b"xxh9") if b"xxh3" in shared else b""
    told = pickle.loads(shared)
    other = pickle.dumps(
        type(told)(*[getattr(told, n) for n in told.__struct_fields__[:-1]], ("0",))
    )
    with pytest.raises(ClusterError, match="install the same on every node"):
        open_shared(other)
    (file,) = Path(three[1]).glob("*00001*.safetensors")
    os.utime(file, (1, 1))
    with pytest.raises(ChangedIngredientError, match=r"m1 has another time here, in model-00001"):
        open_shared(shared)


def test_what_cannot_be_spread_is_refused_by_name(three: list[str], tmp_path: Path) -> None:
    """Before anything is made: in memory, whole models, parts, devices, and other verbs."""
    spread: dict[str, Any] = {"executor": Shuffled()}
    output = str(tmp_path / "out")

    def refused(match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(RecipeError, match=match):
            call()
        assert not list(tmp_path.glob("out*"))

    state = {"w": torch.zeros(3)}
    refused(
        "is not made of files.*leave out executor",
        lambda: uniform([state, state], output=output, options=Options(**spread)),
    )
    refused(
        "whole model.*leave out executor",
        lambda: ties(
            three[1:],
            base=three[0],
            density=0.5,
            trim="model",
            output=output,
            options=Options(**spread),
        ),
    )
    refused(
        "executor and part are two ways",
        lambda: slerp(three[:2], [1, 1], output=output, options=Options(**spread, part="1/2")),
    )
    refused(
        "learned works in this process alone: leave out ray",
        lambda: streamsoup.learned(three, "task.py", output=output, options=Options(ray="local")),
    )
    refused(
        "commit works in this process alone",
        lambda: streamsoup.commit(output, options=Options(**spread)),
    )
    settings: dict[str, Any] = {"base": three[0], "output": output}
    refused(
        "whole model.*leave out ray",
        lambda: streamsoup.sweep(
            three[1:],
            "ties",
            "task.py",
            {"density": [0.5]},
            trim="model",
            **settings,
            options=Options(ray="local"),
        ),
    )
    refused(
        "candidates are scored over Ray, or by a scorer of your own",
        lambda: streamsoup.greedy(three, "task.py", output=output, options=Options(**spread)),
    )
    for address in ("", "ray://head:10001"):
        refused(
            "is not local, auto, or the HOST:PORT",
            lambda address=address: uniform(three, output=output, options=Options(ray=address)),
        )


def test_without_ray_one_line_says_what_to_install(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plan needs none: nothing imports it before there is work for it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    options = Options(ray="local")
    output = str(tmp_path / "out")
    found = planned(lambda told: uniform(three, output=output, options=told), options)
    assert found.order.plan.n_leaves > 3
    for verb in ("uniform", "slerp"):
        with pytest.raises(ClusterError, match=r"pip install 'streamsoup\[ray\]'$"):
            METHODS[verb](three, output=output, options=options)
    assert not list(tmp_path.glob("out*"))
    assert isinstance(RayExecutor("local"), Executor)
    assert isinstance(Shuffled(), Executor)


def test_an_actor_has_a_place_on_each_gpu_or_several_on_each_node() -> None:
    """In turns over the nodes; CPUs are shared where there are more jobs than CPUs."""
    cpus = {"a": {"CPU": 4.0}, "b": {"CPU": 1.0}}
    found = [(place.node, place.n_gpus, place.n_cpus) for place in places_on(cpus, 2)]
    assert found == [("a", 0, 1), ("b", 0, 0.5), ("a", 0, 1), ("b", 0, 0.5)]
    gpus = {"a": {"CPU": 4.0, "GPU": 2.0}, "b": {"CPU": 4.0}, "c": {"CPU": 4.0, "GPU": 1.0}}
    assert [(place.node, place.n_gpus) for place in places_on(gpus, 3)] == [
        *(("a", 1), ("c", 1), ("a", 1)),
    ]
