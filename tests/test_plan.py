"""The plan: every byte once, in one place, and every refusal at once, before a weight is read."""

from __future__ import annotations

import json
import math
import re
import struct
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import command, header_text, raw, save, save_sharded, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamsoup.engine.budget import fixed_nbytes, memory_budget, plan_memory
from streamsoup.engine.inner import plan_inner_memory
from streamsoup.engine.plan import LEAF, MixPlan, plan_files, plan_mix
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, MismatchError, RecipeError
from streamsoup.formats.header import parse_header
from streamsoup.formats.ingredients import Ingredient, open_ingredients
from streamsoup.formats.layout import Layout
from streamsoup.formats.shards import Attributes, Identity, Shard
from streamsoup.formats.stored import Stored
from streamsoup.live.running import plan_sums
from streamsoup.options import Options
from streamsoup.output.make import order
from streamsoup.recipe import ARITHMETIC, DIGEST, Coefficients, Provenance, Recipe
from streamsoup.tensors import DTYPES, float_dtype

Shape = tuple[int, ...]


def opened(shards: list[dict[str, tuple[str, Shape]]], name: str = "m") -> Ingredient:
    """Return an ingredient of any size whose files do not exist: plans look at headers only."""
    made = []
    places = {}
    for number, tensors in enumerate(shards):
        entries, offset = {}, 0
        for key, (dtype, shape) in tensors.items():
            nbytes = math.prod(shape) * DTYPES[dtype].nbits // 8
            fields = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
            entries[key] = fields
            offset += nbytes
        text = json.dumps(entries).encode()
        header = parse_header(text, 8 + len(text) + offset)
        places |= {key: (number, spec) for key, spec in header.tensors.items()}
        path = f"/nowhere/{name}/{number}.safetensors"
        attributes = Attributes(0, 1, 0, 0, 0)
        identity = Identity(0, number, offset, 0)
        made.append(
            Shard(
                path=path,
                identity=identity,
                attributes=attributes,
                heads=((0, 8 + len(text)),),
                head_digest=b"",
                header=header,
            )
        )
    layout = Layout(tuple(shard.header for shard in made), places)
    index = "model.safetensors.index.json"
    return Ingredient(Stored(name, f"/nowhere/{name}", made, layout, index), layout)


def planned(*ingredients: Ingredient, **more: object) -> MixPlan:
    """Plan a uniform soup."""
    names = tuple(each.name for each in ingredients)
    given = {"rule": Linear(Coefficients.uniform(len(names)))} | more
    return plan_mix(ingredients, Recipe(names, **given))  # type: ignore[arg-type]


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 255, 2049]), max_size=3).map(tuple)
dtypes = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U8"])
models = st.lists(
    st.dictionaries(
        st.text("aß\x1b\u202e.", min_size=1, max_size=5), st.tuples(dtypes, shapes), min_size=1
    ),
    min_size=1,
    max_size=3,
).map(lambda shards: [{f"{i}{k}": v for k, v in s.items()} for i, s in enumerate(shards)])
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@quick
@given(models)
def test_leaves_tile_each_tensor_once(shards: list[dict[str, tuple[str, Shape]]]) -> None:
    """The leaves of a tensor follow each other from its first unit to its last, without overlap."""
    plan = planned(opened(shards), opened(shards, "n"))
    reached = [0] * len(plan.tensors)
    numbers = []
    for leaf in sorted(plan.leaves(), key=lambda leaf: leaf.number):
        assert leaf.start == reached[leaf.tensor]
        assert 0 < leaf.n_units <= LEAF
        reached[leaf.tensor] += leaf.n_units
        numbers.append(leaf.number)
    assert reached == [tensor.n_units for tensor in plan.tensors]
    assert numbers == list(range(plan.n_leaves))
    assert plan.nbytes_read == 2 * plan.nbytes_written


@quick
@given(models, st.none() | st.integers(1, 10**7), st.sampled_from(["same", "BF16", "F64"]))
def test_every_output_byte_has_one_place(
    shards: list[dict[str, tuple[str, Shape]]], shard_size: int | None, dtype: str
) -> None:
    """Headers and tensors fill each file from its first byte to its last; sizes are respected."""
    plan = planned(opened(shards), shard_size=shard_size, dtype=dtype)
    files = plan_files(plan)
    seen = []
    for number, file in enumerate(files.files):
        at = len(file.header)
        (length,) = struct.unpack("<Q", file.header[:8])
        header = parse_header(file.header[8:], file.nbytes)
        assert length + 8 == at
        for t in file.tensors:
            assert files.places[t] == (number, at)
            if plan.tensors[t].nbytes:
                assert header.tensors[plan.tensors[t].name].begin == at - 8 - length
            at += plan.tensors[t].nbytes
            seen.append(t)
        assert at == file.nbytes
        if shard_size is not None and len(file.tensors) > 1:
            assert sum(plan.tensors[t].nbytes for t in file.tensors) <= shard_size
    assert sorted(seen) == list(range(len(plan.tensors)))
    assert len({file.name for file in files.files}) == len(files.files)
    if shard_size is None:
        assert [file.name for file in files.files] == list(plan.ingredients[0].file_names)
    else:
        assert seen == sorted(seen)
        assert (not files.index_names) == (len(files.files) == 1)


@pytest.mark.parametrize(
    ("name", "stem", "index"),
    [
        ("unet", "unet", "unet.safetensors.index.json"),
        ("model.fp16", "model.fp16", "model.safetensors.index.fp16.json"),
        ("model-00001-of-00001", "model", "model.safetensors.index.json"),
        ("model-00001-of-000001.fp16", "model.fp16", "model.safetensors.index.fp16.json"),
        ("-00001-of-00001", "model", "model.safetensors.index.json"),
        ("model.", "model.", "model..safetensors.index.json"),
    ],
)
def test_new_shards_are_named_like_the_old(
    name: str, stem: str, index: str, tmp_path: Path
) -> None:
    """Libraries look for their own file names: with a shard size, the first ingredient's stay."""
    tensors = {n: tensor(np.zeros(4, np.float32)) for n in "ab"}
    folder = save(tmp_path / "m", tensors, name=name)
    several = plan_files(planned(*open_ingredients([folder]), shard_size=16))
    assert [f.name for f in several.files] == [
        f"{stem}-{i}-of-00002.safetensors" for i in ("00001", "00002")
    ]
    assert several.index_names == (index,)
    whole = plan_files(planned(*open_ingredients([folder]), shard_size=1000))
    assert [f.name for f in whole.files] == [f"{stem}.safetensors"]
    assert whole.index_names == ()
    lone = open_ingredients([folder / f"{name}.safetensors"])
    assert plan_files(planned(*lone, shard_size=1000)).files[0].name == "model.safetensors"


def test_the_stem_of_shards_with_odd_names_is_the_index_s(tmp_path: Path) -> None:
    """Where shards are not numbered, the index says what the model is called, and its variant."""
    folder = save_sharded(tmp_path / "m", [{n: tensor(np.zeros(4, np.float32))} for n in "ab"])
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for i, name in enumerate(("text", "vision")):
        old = f"model-{i + 1:05}-of-00002.safetensors"
        (folder / old).rename(folder / f"{name}.safetensors")
        text = text.replace(old, f"{name}.safetensors")
    index.write_text(text)
    for name, stem in (
        (index.name, "model"),
        ("model.safetensors.index.fp16.json", "model.fp16"),
        ("model.safetensors.fp16.index.json", "model.fp16"),
    ):
        index = index.rename(folder / name)
        files = plan_files(planned(*open_ingredients([folder]), shard_size=1000))
        assert [f.name for f in files.files] == [f"{stem}.safetensors"]


@quick
@given(
    models,
    st.integers(1, 64),
    st.booleans(),
    st.integers(1, 64),
    st.integers(100_000_000, 3 * 10**9),
)
def test_blocks_fit_the_budget(
    shards: list[dict[str, tuple[str, Shape]]], k: int, mapped: bool, threads: int, budget: int
) -> None:
    """The predicted peak is within the budget, and covers at least sums, results and buffers."""
    plan = planned(*[opened(shards)] * k)
    try:
        memory = plan_memory(plan, mapped=mapped, threads=threads, budget=budget)
    except BudgetError:
        assert budget < 250_000_000
        return
    assert memory.peak_nbytes <= budget
    assert 1 <= memory.threads <= threads
    widest = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
    held = 8 + (0 if mapped else memory.group * widest)
    assert memory.peak_nbytes > memory.threads * memory.block * held


def test_a_larger_budget_is_used_and_a_smaller_one_explained() -> None:
    """Blocks grow with the budget; one that is too small is refused with what would do."""
    plan = planned(opened([{"a": ("F32", (10**9,))}]))
    small = plan_memory(plan, mapped=False, threads=8, budget=130_000_000)
    large = plan_memory(plan, mapped=False, threads=8, budget=10**9)
    assert small.block * small.threads < large.block * large.threads
    with pytest.raises(BudgetError, match=r"^a memory budget of 1 MB is too small: .* MB at least"):
        plan_memory(plan, mapped=False, threads=8, budget=10**6)


def test_any_number_of_threads_is_cut_to_what_there_is_to_do() -> None:
    """However many threads are asked for, as many as leaves, and as fit, are planned, at once."""
    two = planned(opened([{"a": ("F32", (LEAF + 1,))}]))
    many = planned(opened([{"a": ("F32", (10**6 * LEAF,))}]))
    for asked in (3, 10**6, 10**20):
        for plan in (plan_memory, partial(plan_inner_memory, n_values=1)):
            assert plan(two, mapped=True, threads=asked, budget=10**9).threads == 2
            fits = plan(many, mapped=True, threads=asked, budget=2 * 10**9)
            assert fits.peak_nbytes <= 2 * 10**9
            assert asked == fits.threads or fits.threads > 99
    assert plan_memory(planned(opened([{}])), mapped=True, threads=9, budget=10**9).threads == 1


def test_memory_does_not_grow_with_ingredients_or_size() -> None:
    """The peak of 64 ingredients of ten times the size is that of 2, but for a few digests."""
    few = planned(*[opened([{"a": ("BF16", (10**8,))}])] * 2)
    many = planned(*[opened([{"a": ("BF16", (10**9,))}])] * 64)
    for mapped in (True, False):
        a = plan_memory(few, mapped=mapped, threads=2, budget=150_000_000)
        b = plan_memory(many, mapped=mapped, threads=2, budget=150_000_000)
        assert b.peak_nbytes < 1.25 * a.peak_nbytes


def test_without_a_budget_no_plan_is_refused_for_its_size() -> None:
    """150 MB, and more where a plan takes more: a mixture of 60,000 experts has room for blocks."""
    few = planned(*[opened([{f"layers.{i}": ("BF16", (10**6,)) for i in range(1000)}])] * 8)
    assert memory_budget(few, None) == 150_000_000
    assert memory_budget(few, "1GB") == 10**9
    many = planned(*[opened([{f"experts.{i}": ("BF16", (10**6,)) for i in range(60_000)}])] * 8)
    budget = memory_budget(many, None)
    assert budget > fixed_nbytes(many) > 150_000_000
    for mapped in (True, False):
        memory = plan_memory(many, mapped=mapped, threads=2, budget=budget)
        assert memory.compiles
        assert memory.threads == 2
        assert memory.block >= 2**17
        assert memory.peak_nbytes <= budget


def test_all_disagreements_come_in_one_message() -> None:
    """Missing, extra, misshapen and mistyped tensors of all ingredients are listed together."""
    a = opened([{"x": ("F32", (2, 3)), "y": ("F32", (4,)), "z": ("I64", (1,))}], "A")
    b = opened([{"x": ("F32", (3, 2)), "y": ("F16", (4,)), "w": ("F32", (1,))}], "B")
    c = opened([{"x": ("F32", (2, 3)), "y": ("F32", (4,)), "z": ("I32", (1,))}], "C")
    with pytest.raises(MismatchError) as refused:
        planned(a, b, c)
    assert str(refused.value).splitlines() == [
        "these ingredients cannot be averaged:",
        "  B (ingredient 2) lacks 1 tensor of A (ingredient 1): z",
        "  B (ingredient 2) has 1 tensor that A (ingredient 1) lacks: w",
        "  B (ingredient 2) and A (ingredient 1) differ in the shape of 1 tensor: "
        "x [3, 2] and [2, 3]",
        "  B (ingredient 2) and A (ingredient 1) differ in the dtype of 1 tensor: y F16 and F32",
        "  C (ingredient 3) and A (ingredient 1) differ in the dtype of 1 tensor: z I32 and I64",
        "leave out what is of another architecture, or save it with the same tensors",
        "leave out what is of another architecture, or has resized embeddings",
        "convert all floats to one dtype with dtype",
        "save the tensors that are not floats in the same dtype",
    ]


@pytest.mark.parametrize(
    ("tensors", "advice"),
    [
        ({}, "; leave out what is of another architecture, or save it with the same tensors"),
        (
            {"x": ("F32", (3,))},
            "; leave out what is of another architecture, or has resized embeddings",
        ),
        ({"x": ("F16", (2,))}, "; convert all floats to one dtype with dtype"),
        ({"x": ("I32", (2,))}, "; save the tensors that are not floats in the same dtype"),
    ],
)
def test_a_disagreement_says_what_to_do(tensors: dict[str, tuple[str, Shape]], advice: str) -> None:
    """A disagreement ends in the one thing to do about it."""
    with pytest.raises(MismatchError, match=f"[^;]*{re.escape(advice)}$"):
        planned(opened([{"x": ("F32", (2,))}], "A"), opened([tensors], "B"))


def test_a_thousand_disagreements_stay_readable() -> None:
    """However much is wrong, the message is a page at most, counts the rest, and is printable."""
    a = opened([{f"\x1blayer.{i}": ("F32", (2,)) for i in range(1000)}], "A")
    others = [
        opened([{f"\x1blayer.{i}": ("F32", (2, n)) for i in range(1000)}], f"B{n}")
        for n in range(40)
    ]
    with pytest.raises(MismatchError) as refused:
        planned(a, *others)
    message = str(refused.value)
    assert len(message.splitlines()) < 16
    assert len(message) < 5000
    assert "1000 tensors" in message
    assert "28 more disagreements" in message
    assert message.replace("\n", "").isprintable()


def test_dtypes_may_differ_when_one_is_asked_for() -> None:
    """With an output dtype, floats of several dtypes mix; integers still have to agree."""
    a = opened([{"x": ("F32", (2,)), "n": ("I64", (1,))}], "A")
    b = opened([{"x": ("F8_E4M3", (2,)), "n": ("I64", (1,))}], "B")
    plan = planned(a, b, dtype="BF16")
    assert [t.dtype.name for t in plan.tensors] == ["BF16", "I64"]
    c = opened([{"x": ("F32", (2,)), "n": ("F32", (1,))}], "C")
    with pytest.raises(MismatchError, match="n F32 and I64"):
        planned(a, c, dtype="BF16")


def test_coefficients_must_fit() -> None:
    """Counts, names and values of coefficients are checked against the ingredients."""
    m = opened([{"a": ("F32", (2,))}])
    for coefficients, phrase in (
        (Coefficients((1.0,)), "1 coefficient for 2 ingredients"),
        (Coefficients((1.0, 1.0), 1.0, {"a": (1.0,)}), "1 coefficient for tensor 'a' for 2"),
        (Coefficients((1.0, 1.0), 1.0, {"b": (1.0, 1.0)}), "tensors that no ingredient has: b"),
        (Coefficients((1.0, math.inf)), "inf is not finite"),
        (Coefficients((1.0, 1.0), 0.0), "divisor must be finite and not 0"),
        (Coefficients((1.0, 1.0), math.nan), "divisor must be finite and not 0"),
    ):
        with pytest.raises(RecipeError, match=phrase):
            planned(m, m, rule=Linear(coefficients))
    with pytest.raises(RecipeError, match="at least one ingredient"):
        plan_mix([], Recipe((), Linear(Coefficients(()))))
    with pytest.raises(RecipeError, match="cannot be normalized"):
        Coefficients.given([1.0, -1.0], normalize=True)
    with pytest.raises(RecipeError, match="nan is not finite"):
        Coefficients.given([1.0, math.nan])
    assert Coefficients.given([1, 3], normalize=True) == Coefficients((1.0, 3.0), 4.0)


def test_rules_must_be_known() -> None:
    """Unknown rules, dtypes and sizes in a recipe are refused."""
    m = opened([{"a": ("F32", (2,))}])
    for more, phrase in (
        ({"non_float": "x"}, "must be one of same, first, got 'x'"),
        ({"non_finite": "x\x1b"}, "got 'x.*x1b'"),
        ({"shard_size": 0}, "at least 1 byte, got 0"),
        ({"dtype": "int8"}, "cannot be averaged in"),
    ):
        with pytest.raises(RecipeError, match=phrase):
            planned(m, **more)


def test_what_is_wider_than_the_rest_is_narrowed_with_a_word(tmp_path: Path) -> None:
    """Some models keep a few tensors wide on purpose, and --dtype is for all."""
    wide, half = tensor(np.ones(2, np.float32)), tensor(np.ones(2, np.uint16), "BF16")
    mixed = save(tmp_path / "m", {"gate": wide, "w": half})
    all_wide = save(tmp_path / "w", {"w": wide})
    ran = command("uniform", mixed, "-o", tmp_path / "o1", "--dtype", "bf16")
    assert "--dtype makes gate narrower, and not the others" in ran.stderr
    for number, told in enumerate(
        [(mixed,), (mixed, "--dtype", "f32"), (all_wide, "--dtype", "bf16")]
    ):
        assert command("uniform", *told, "-o", tmp_path / f"p{number}").stderr == ""


def test_dtypes_have_many_names() -> None:
    """The safetensors, torch and common names of a dtype are all understood."""
    for name in ("bf16", "BF16", "bfloat16", "torch.bfloat16"):
        assert float_dtype(name) is DTYPES["BF16"]
    for name in ("f16", "fp16", "half", "float16"):
        assert float_dtype(name) is DTYPES["F16"]
    assert float_dtype("float") is float_dtype("torch.float32") is DTYPES["F32"]
    assert float_dtype("double") is DTYPES["F64"]
    assert float_dtype(torch.bfloat16) is DTYPES["BF16"]
    for wrong in ("i64", "int8", "", "f4", "bool", None, torch.int8):
        with pytest.raises(RecipeError, match="cannot be averaged in"):
            float_dtype(wrong)


def test_a_provenance_comes_back_as_it_was() -> None:
    """JSON keeps every bit of a recipe's floats, and a changed file is noticed."""
    coefficients = Coefficients((0.1, 1 / 3, 5e-324), 0.7, {"\x1bß": (1e300, -0.0, 2)})
    recipe = Recipe(("a", "b", "c"), Linear(coefficients))
    how = ARITHMETIC, DIGEST, {"n": 1}, ""
    provenance = Provenance(recipe, (), (), (), {"a": "00"}, {}, "now", *how)
    text = provenance.sealed().to_json()
    back = Provenance.from_json(text, BUILT_IN)
    assert back.recipe == recipe
    assert back.intact
    assert Provenance.from_json(back.to_json(), BUILT_IN) == back
    assert not Provenance.from_json(text.replace(b"0.7", b"0.8"), BUILT_IN).intact
    for bad in (b"", b"[]", b"{}", text[:-5], b"\xff", text.replace(b"0.7", b'"\x1b"')):
        with pytest.raises(RecipeError, match="is not a streamsoup provenance") as refused:
            Provenance.from_json(bad, BUILT_IN)
        assert str(refused.value).isprintable()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    """A plan that is refused has read no weight: shards may even be shorter than they say."""
    a = save(tmp_path / "a", {"x": tensor(np.zeros((2, 3), np.float32))})
    b = save_sharded(tmp_path / "b", [{"x": tensor(np.zeros((3, 2), np.float32))}])
    with pytest.raises(MismatchError, match=r"x \[3, 2\] and \[2, 3\]"):
        planned(*open_ingredients([a, b]))


def test_empty_checkpoints_make_an_empty_soup(tmp_path: Path) -> None:
    """A file without tensors is valid, and so is the plan of its soup."""
    (tmp_path / "e.safetensors").write_bytes(raw(header_text({})))
    plan = planned(*open_ingredients([tmp_path / "e.safetensors"] * 2))
    assert (plan.n_leaves, plan.nbytes_read) == (0, 0)
    assert len(plan_files(plan).files) == 1


def test_lone_files_share_a_layout_whatever_they_are_called(tmp_path: Path) -> None:
    """Of files with the same header there is one layout, which is planned and counted once."""
    tensors = {"w": tensor(np.zeros(4, np.float32))}
    paths = [save(tmp_path, tensors, name=f"run{n}") / f"run{n}.safetensors" for n in range(5)]
    plan = planned(*open_ingredients(paths))
    assert len(plan.layouts) == 1
    assert plan.layout_of == (0,) * 5
    adapter = save(tmp_path / "x", tensors, name="adapter_model") / "adapter_model.safetensors"
    with pytest.raises(MismatchError, match=f"{adapter}: w belongs to an adapter"):
        planned(*open_ingredients([*paths, adapter]))


def test_a_running_sum_without_room_is_named() -> None:
    """What does not fit is the sum, not the soup."""
    plan = planned(*[opened([{"w": ("F32", (10**9,))}])] * 2)
    with pytest.raises(BudgetError, match=r"sum of 8 GB does not fit into a .* budget of 1 GB"):
        plan_sums(plan, mapped=True, threads=1, budget=10**9, scratch=None, place="memory")


def test_a_shard_may_be_exactly_as_large_as_asked(tmp_path: Path) -> None:
    """Tensors that fill a shard to the byte share it; one byte less, and they do not."""
    model = save(tmp_path / "m", {name: tensor(np.ones(25, np.float32)) for name in "abc"})
    for size, groups in [(200, [2, 1]), (199, [1, 1, 1]), (300, [3]), (100, [1, 1, 1])]:
        planned = order(
            [str(model)],
            Linear(Coefficients.uniform(1)),
            method="uniform",
            options=Options(shard_size=size),
        )
        assert [len(file.tensors) for file in planned.files.files] == groups


def test_verbs_that_look_say_what_the_command_line_says(tmp_path: Path) -> None:
    """`plan` and `inspect` in the library return the records that --json prints."""
    import streamsoup

    paths = [
        str(save(tmp_path / f"m{i}", {"t": tensor(np.full(9, i, np.float32))})) for i in range(2)
    ]
    ran = command("inspect", paths[0], "--json", "--tensors")
    told = streamsoup.inspect(paths[0], tensors=True)
    assert json.loads(ran.stdout) == json.loads(msgspec.json.encode(told))
    assert told.tensors["t"].shape == (9,)
    planned_too = json.loads(msgspec.json.encode(streamsoup.plan(paths)))
    printed = json.loads(command("plan", *paths, "--json").stdout)
    for record in (printed, planned_too):
        record.pop("free_nbytes")
    assert printed == planned_too
    assert (printed["n_passes"], printed["nbytes_read"]) == (1, 72)
