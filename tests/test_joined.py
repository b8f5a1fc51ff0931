"""Tensors mixed as one: the same bits in the same places, and errors that name the right tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save, save_sharded, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamsoup
from streamsoup import Options
from streamsoup.engine import budget
from streamsoup.engine.plan import Leaf
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import NonFiniteError
from streamsoup.live import joined
from streamsoup.live.candidates import Candidates
from streamsoup.live.running import plan_sums
from streamsoup.output.make import Order, order
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import Bytes, address_of

SIZES = [0, 1, 2, 3, 7, 40, 65]


class Shelf:
    """A sink that keeps every byte by tensor, and notices any that is put twice."""

    def __init__(self, ordered: Order) -> None:
        self.names = [t.name for t in ordered.plan.tensors]
        self.sizes = [t.unit_nbytes for t in ordered.plan.tensors]
        self.found = {t.name: np.zeros(t.nbytes, np.uint8) for t in ordered.plan.tensors}
        self.n_puts = {t.name: np.zeros(t.nbytes, np.int64) for t in ordered.plan.tensors}
        self.n_blocks = 0
        self.roomy, self.n_made_there = False, 0
        """Return True if results may be made where they belong."""

    def session(self) -> Shelf:
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        begin = start * self.sizes[leaf.tensor]
        found = self.found[self.names[leaf.tensor]].data
        return found[begin : begin + nbytes] if self.roomy else None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        name, begin = self.names[leaf.tensor], start * self.sizes[leaf.tensor]
        assert len(block), "a piece without bytes"
        place = self.found[name][begin : begin + len(block)]
        if self.roomy:
            self.n_made_there += place.ctypes.data == address_of(block)
        place[:] = np.frombuffer(block, np.uint8)
        self.n_puts[name][begin : begin + len(block)] += 1
        self.n_blocks += 1

    def close(self) -> None:
        pass


def candidates(paths: list[str], place: Any = None) -> tuple[Order, Candidates]:
    """Plan candidates of `paths`."""
    ordered = order(
        paths, Linear(Coefficients.uniform(len(paths))), method="greedy", options=Options()
    )
    scratch = str(Path(paths[0]).parent / "sum")
    sums = plan_sums(
        ordered.plan, mapped=True, threads=2, budget=150_000_000, scratch=scratch, place=place
    )
    return ordered, Candidates(ordered.plan, sums, mapped=True, threads=2, scratch=scratch)


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[str, str, int]]:
    """Draw names, dtypes and sizes of tensors, in the order in which they lie."""
    n = draw(st.integers(1, 9))
    kinds = st.sampled_from(["F32", "F32", "F32", "BF16", "I64"])
    return [(f"t{i}", draw(kinds), draw(st.sampled_from(SIZES))) for i in range(n)]


def tensors_of(layout: list[tuple[str, str, int]], seed: int) -> dict[str, Any]:
    """Fill a layout with numbers: what is not averaged is the same for every seed."""
    made: dict[str, Any] = {}
    for number, (name, dtype, size) in enumerate(layout):
        rng = np.random.default_rng([number, 0 if dtype == "I64" else seed])
        if dtype == "F32":
            made[name] = tensor(rng.standard_normal(size).astype(np.float32))
        elif dtype == "BF16":
            words = rng.standard_normal(size).astype(np.float32).view(np.uint32) >> 16
            made[name] = tensor(words.astype(np.uint16), "BF16")
        else:
            made[name] = tensor(rng.integers(0, 9, size))
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(layout=layouts(), turned=st.booleans(), n_shards=st.integers(1, 3), largest=st.data())
def test_every_byte_is_put_once_with_the_bits_of_uniform(
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[tuple[str, str, int]],
    turned: bool,
    n_shards: int,
    largest: st.DataObject,
) -> None:
    """Whatever lies beside what: in shards, in another order in the last ingredient, too large."""
    tmp_path = tmp_path_factory.mktemp("joined")
    paths = []
    for seed in (1, 2, 3):
        mine = layout[::-1] if turned and seed == 3 else layout
        cut = [tensors_of(layout, seed)[name] for name, _, _ in mine]
        named = [(name, made) for (name, _, _), made in zip(mine, cut, strict=True)]
        shards = [dict(named[i::n_shards]) for i in range(n_shards)]
        shards = [shard for shard in shards if shard]
        folder = tmp_path / f"m{seed}"
        paths.append(
            str(save_sharded(folder, shards) if len(shards) > 1 else save(folder, shards[0]))
        )
    uniform = streamsoup.uniform(paths, output=tmp_path / "uniform")
    expected = order(
        [uniform.path], Linear(Coefficients.uniform(1)), method="greedy", options=Options()
    )
    before = joined.LARGEST_BLOCK
    most = largest.draw(st.sampled_from([1, 8, 50, before]))
    # Also blocks smaller than what was joined, as where memory is short.
    block = largest.draw(st.sampled_from([3, 16, before]))
    joined.LARGEST_BLOCK, budget.LARGEST_BLOCK = most, block
    try:
        for place in ("memory", "reread", "file"):
            ordered, made = candidates(paths, place)
            for roomy in (False, True):
                shelf = Shelf(ordered)
                shelf.roomy = roomy
                made.mix((0, 1, 2), shelf, keep=True)
                for planned in expected.plan.tensors:
                    source = planned.sources[0]
                    shard = expected.plan.ingredients[0].source.shards[source.shard]
                    content = Path(shard.path).read_bytes()[shard.data_begin :]
                    wanted = content[source.offset : source.offset + planned.nbytes]
                    assert shelf.found[planned.name].tobytes() == wanted, planned.name
                    assert (shelf.n_puts[planned.name] == 1).all(), planned.name
            made.forget()
    finally:
        joined.LARGEST_BLOCK = budget.LARGEST_BLOCK = before


@pytest.mark.parametrize("keep", [False, True])
def test_results_are_made_where_they_belong(tmp_path: Path, keep: bool) -> None:
    """A block of one tensor goes into its memory at once; one of several is cut up first."""
    for number, (layout, n_there) in enumerate(
        [([("a", "F32", 5000)], 1), ([("a", "F32", 50), ("b", "F32", 50)], 0)]
    ):
        paths = [str(save(tmp_path / f"m{number}{s}", tensors_of(layout, s))) for s in (1, 2, 3)]
        ordered, made = candidates(paths, "memory")
        shelf = Shelf(ordered)
        shelf.roomy = True
        made.mix((0, 1, 2), shelf, keep=keep)
        assert shelf.n_made_there == n_there
        assert all((n == 1).all() for n in shelf.n_puts.values())


def test_tensors_side_by_side_are_one_pass(tmp_path: Path) -> None:
    """A hundred small tensors are one; another dtype, a gap of names or a full block ends it."""
    layout = [(f"a{i}", "F32", 3) for i in range(100)]
    layout += [("b", "BF16", 3), ("c", "I64", 2), ("d", "F32", 3)]
    layout += [("e", "F32", joined.LARGEST_BLOCK - 2), ("f", "F32", 2)]
    paths = [str(save(tmp_path / f"m{seed}", tensors_of(layout, seed))) for seed in (1, 2)]
    ordered, _ = candidates(paths)
    found = joined.join(ordered.plan)
    assert [t.name for t in found.tensors] == ["a0", "b", "c", "d", "e"]
    assert [t.n_units for t in found.tensors] == [300, 3, 16, 3, joined.LARGEST_BLOCK]
    assert [t.first_leaf for t in found.tensors] == [0, 1, 2, 3, 4]
    assert found.n_leaves == 5
    assert found.nbytes_read == ordered.plan.nbytes_read


def test_what_only_seems_to_follow_is_not_joined(tmp_path: Path) -> None:
    """Offsets that fit by chance in another shard, and other dtypes made into one by --dtype."""
    one, other = {"a": tensor(np.ones(0, np.float32))}, {"b": tensor(np.ones(1, np.float32))}
    shards = [str(save_sharded(tmp_path / f"s{seed}", [one, other])) for seed in (1, 2)]
    plan = candidates(shards)[0].plan
    first, second = (t.sources[0] for t in plan.tensors)
    assert first.shard != second.shard
    assert first.offset == second.offset
    assert len(joined.join(plan).tensors) == 2
    layout = [("a", "F32", 3), ("b", "BF16", 3)]
    paths = [str(save(tmp_path / f"m{seed}", tensors_of(layout, seed))) for seed in (1, 2)]
    options = Options(dtype="float32")
    plan = order(paths, Linear(Coefficients.uniform(2)), method="greedy", options=options).plan
    assert len({t.dtype for t in plan.tensors}) == 1
    assert len(joined.join(plan).tensors) == 2


@pytest.mark.parametrize("place", ["memory", "reread"])
def test_what_is_not_finite_is_found_in_its_own_tensor(tmp_path: Path, place: str) -> None:
    """The error names tensor and index as if nothing had been joined, also from a running sum."""
    names = ["first", "second", "third"]
    paths = []
    for seed in range(4):
        arrays = {name: np.ones((2, 3), np.float32) for name in names}
        if seed == 3:
            arrays["second"][1, 2] = np.nan
        if seed == 2:
            arrays["third"][0, 1] = 3e38
        if seed == 1:
            arrays["third"][0, 1] = 3e38
        paths.append(str(save(tmp_path / f"m{seed}", {n: tensor(a) for n, a in arrays.items()})))
    ordered, made = candidates(paths, place)
    made.mix((0, 1), Shelf(ordered), keep=True)
    with pytest.raises(NonFiniteError, match=r"second: holds nan at \[1, 2\]"):
        made.mix((0, 1, 3), Shelf(ordered), keep=True)
    shelf = Shelf(ordered)
    made.mix((0, 1, 2), shelf, keep=True)  # and all goes on
    assert shelf.found["first"].view(np.float32).tolist() == [1.0] * 6
