"""Merges of task vectors against their specification, bit for bit, and against whole tensors."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import load, save, tensor

import streamsoup
from streamsoup import Options
from streamsoup.engine import budget, plan, reduce, stream
from streamsoup.engine.rules import selection, task_vectors
from streamsoup.engine.rules.selection import Selection
from streamsoup.errors import BudgetError, NonFiniteError, RecipeError
from streamsoup.kernels import merges_reference as reference
from streamsoup.kernels.philox import Key, key_of, philox, words
from streamsoup.kernels.reference import narrow, widen
from streamsoup.tensors import DTYPES

SHAPES = {"a": (7, 1301), "c": (), "d": (0, 3), "e": (1, 90), "f": (90, 1), "g": (3, 4, 5)}
CODES = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
KINDS = ["normal", "equal", "same", "few"]


def bits_of(values: Any, name: str) -> Any:
    """Round float64 to the bits of a dtype, by numpy where it knows it."""
    if name == "BF16":
        return (np.float32(values).view(np.uint32) >> 16).astype(np.uint16)
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    return np.asarray(values, kinds[name]).view(CODES[name])


def checkpoints(
    tmp_path: Path, name: str = "F32", n: int = 3, kind: str = "normal"
) -> tuple[str, list[str]]:
    """Save a base and `n` fine-tunes of it.

    Changes are ``normal``, or have ``equal`` magnitudes, or are none (``same``), or are of a
    ``few`` elements only; the base holds zeros of both signs.
    """
    rng = np.random.default_rng(7)
    paths = []
    base = {
        key: np.where(rng.random(shape) < 0.1, -0.0, rng.normal(size=shape) * 0.1)
        for key, shape in SHAPES.items()
    }
    for i in range(n + 1):
        content = {}
        for key, value in base.items():
            change = rng.normal(size=value.shape) * 0.01
            if kind == "equal":
                value = np.zeros_like(value)
                change = np.where(change > 0, 0.25, -0.25)
            if kind == "same":
                change = np.zeros(value.shape)
            if kind == "few":
                change = np.where(rng.random(value.shape) < 0.05, change, 0.0)
            bits = bits_of(value if i == 0 or not np.any(change) else value + change, name)
            content[key] = (name, value.shape, bits.tobytes())
        paths.append(str(save(tmp_path / f"m{i}", content)))
    return paths[0], paths[1:]


def elements(path: str) -> dict[str, list[float]]:
    """Read every tensor as a flat list of float64, by the specification of its dtype."""
    return {
        name: [widen(int(bits), DTYPES[dtype]) for bits in np.frombuffer(data, CODES[dtype])]
        for name, (dtype, _, data) in load(Path(path)).items()
    }


def soup_bits(soup: streamsoup.Soup) -> dict[str, list[int]]:
    """Read the bits of a soup."""
    return {
        name: np.frombuffer(data, CODES[dtype]).tolist()
        for name, (dtype, _, data) in load(Path(soup.path)).items()
    }


def files(soup: streamsoup.Soup) -> dict[str, bytes]:
    """Read the weights of a soup."""
    return {path.name: path.read_bytes() for path in sorted(Path(soup.path).glob("*.safetensors"))}


def masks_of(method: str, tasks: Any, name: str, parameters: Any) -> list[list[bool]]:
    """Make the masks of a tensor as the specification says."""
    masks = []
    for i, (task, density) in enumerate(zip(tasks, parameters["density"], strict=True)):
        key = key_of(parameters.get("seed", 0), i, name)
        n = len(task)
        if density == 1:
            masks.append([True] * n)
        elif method == "ties":
            masks.append(reference.largest(task, 0 if density == 0 else max(1, int(density * n))))
        elif method == "breadcrumbs":
            masks.append(reference.middle(task, density, parameters.get("gamma", 0.01)))
        elif method == "dare":
            masks.append(reference.random_mask(n, density, key))
        else:
            epsilon = parameters.get("epsilon", 0.15)
            masks.append(reference.della_mask(task, SHAPES[name], density, epsilon, key))
    return masks


def expected(method: str, base: str, others: Sequence[str], dtype: str, parameters: Any) -> Any:
    """Merge by the specification, all in memory."""
    start, every = elements(base), [elements(path) for path in others]
    made = {}
    for name in SHAPES:
        tasks = [reference.task_vector(each[name], start[name]) for each in every]
        if method == "sce":
            result = reference.sce(start[name], tasks, parameters["select_topk"])
        elif method == "ram":
            result = reference.ram(start[name], tasks, parameters["epsilon"])
        elif method == "nearswap":
            result = reference.near_swap(start[name], every[0][name], parameters["t"])
        else:
            masks = masks_of(method, tasks, name, parameters)
            factors = [1.0] * len(tasks)
            if parameters["rescale"] == "l1":
                factors = [
                    1.0 if all(mask) else reference.factor_by_l1(task, mask)
                    for task, mask in zip(tasks, masks, strict=True)
                ]
            if parameters["rescale"] == "density":
                factors = [reference.factor_by_density(each) for each in parameters["density"]]
            result = reference.sum_of_task_vectors(
                start[name],
                tasks,
                masks,
                factors,
                parameters["coefficients"],
                scale=parameters["lambda_"],
                consensus=parameters["consensus"] == "sum",
                normalize=parameters["normalize"],
            )
        made[name] = [narrow(value, DTYPES[dtype]) for value in result]
    return made


def parameters(**own: Any) -> dict[str, Any]:
    """Return all parameters of a sum of task vectors."""
    usual = {
        "density": (0.3, 0.5, 0.7),
        "coefficients": (1.0, -0.4, 0.7),
        "lambda_": 0.8,
        "consensus": "sum",
        "normalize": True,
        "rescale": "none",
    }
    return usual | own


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ties", parameters()),
    ("ties", parameters(rescale="l1", consensus="none")),
    ("ties", parameters(density=(0.0, 1.0, 1e-9), normalize=False)),
    ("ties", parameters(density=(1.0,) * 3, rescale="density", lambda_=1.0)),
    ("breadcrumbs", parameters(density=(0.0, 0.98, 0.995), consensus="none", normalize=False)),
    ("breadcrumbs", parameters(gamma=0.2, rescale="l1", coefficients=(0.5, -0.25, -0.25))),
    ("dare", parameters(rescale="density", seed=5)),
    ("dare", parameters(rescale="l1", consensus="none", normalize=False)),
    ("dare", parameters(density=(0.0, 1.0, 0.5), rescale="l1")),
    ("della", parameters(rescale="l1", epsilon=0.2, seed=-3)),
    ("della", parameters(density=(1.0, 0.5, 0.16), consensus="none", normalize=True)),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("sce", {"select_topk": 1.0}),
    ("sce", {"select_topk": 0.4}),
    ("sce", {"select_topk": 0.0}),
    ("ram", {"epsilon": 1e-5}),
    ("ram", {"epsilon": 0.01}),
    ("nearswap", {"t": 0.005}),
    ("nearswap", {"t": 0.0}),
]


def merge(
    method: str, base: str, others: Sequence[str], output: Path, told: Any, **more: Any
) -> Any:
    """Call a verb of the library."""
    verb = getattr(streamsoup, method)
    if method == "nearswap":
        others = others[:1]
    return verb(others, base=base, output=output, options=Options(**more), **told)


@pytest.fixture(params=["numpy", "fast"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Merge in numpy, or by compiled kernels, however small the job."""
    monkeypatch.setenv("STREAMSOUP_KERNELS", request.param)
    monkeypatch.setattr(reduce, "MERGER_NBYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "told"), [*CASES, *OTHERS])
@pytest.mark.usefixtures("kernels")
def test_a_merge_is_what_is_specified(
    tmp_path: Path, method: str, told: dict[str, Any], kind: str
) -> None:
    """Every element has the bits of the specification, for all kinds of changes and shapes."""
    dtype = {"normal": "F32", "equal": "BF16", "same": "F16", "few": "F64"}[kind]
    base, others = checkpoints(tmp_path, dtype, kind=kind)
    soup = merge(method, base, others, tmp_path / "soup", told)
    assert soup_bits(soup) == expected(method, base, others, dtype, told)
    if kind == "same":
        bits = np.frombuffer(load(Path(base))["a"][2], np.uint16).tolist()
        assert soup_bits(soup)["a"] == bits


@pytest.mark.parametrize(("method", "told"), [*CASES, OTHERS[1], OTHERS[3]])
def test_bytes_do_not_depend_on_how_tensors_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, told: dict[str, Any]
) -> None:
    """Small leaves and blocks, any number of threads, mapped or read: the same bytes."""
    base, others = checkpoints(tmp_path, "BF16")
    whole = merge(method, base, others, tmp_path / "whole", told)
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 4096)
    monkeypatch.setattr(stream, "ALONE_NBYTES", 0)
    monkeypatch.setattr(task_vectors, "MOST_COLLECTED", 8)
    for threads, io in [(1, "mmap"), (3, "read")]:
        cut = merge(method, base, others, tmp_path / f"{threads}", told, threads=threads, io=io)
        assert files(cut) == files(whole)


def test_a_row_may_be_longer_than_a_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DELLA ranks all of a row, whatever blocks and leaves it lies in."""
    shape, rng = (2, 9001), np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
    paths = [str(save(tmp_path / f"m{i}", {"a": tensor(each)})) for i, each in enumerate(values)]
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 4096)
    monkeypatch.setitem(SHAPES, "a", shape)
    soup = streamsoup.della(
        paths[1:], 0.5, base=paths[0], output=tmp_path / "soup", rescale="none", normalize=False
    )
    task = (values[1].astype(float) - values[0]).ravel()
    mask = np.zeros(task.size, bool)
    for row in range(2):
        part = np.abs(task[row * 9001 : (row + 1) * 9001])
        rank = np.empty(9001, int)
        rank[np.lexsort((-np.arange(9001), part))] = np.arange(9001)
        chance = (0.5 - 0.15) + 2 * 0.15 * (rank / 9000)
        drawn = words(key_of(0, 0, "a"), row * 9001, 9001) / 2**32
        mask[row * 9001 : (row + 1) * 9001] = drawn < chance
    made = values[0].ravel().astype(float) + np.where(mask, task, 0.0)
    assert np.array_equal(
        np.frombuffer(load(Path(soup.path))["a"][2], np.float32), np.float32(made)
    )


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_a_model_is_trimmed_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With trim="model", magnitudes are ranked over all tensors, in the order of their names."""
    monkeypatch.setattr(plan, "LEAF", 4096)
    base, others = checkpoints(tmp_path, "F32", kind="equal")
    told = parameters(trim="model", consensus="none", normalize=False, lambda_=1.0)
    soup = merge(method, base, others, tmp_path / "soup", told)
    start, every = elements(base), [elements(path) for path in others]
    names = sorted(SHAPES)
    flat = [value for name in names for value in start[name]]
    tasks = [
        reference.task_vector([v for name in names for v in each[name]], flat) for each in every
    ]
    masks = masks_of(method, tasks, "all", told)
    merged = reference.sum_of_task_vectors(flat, tasks, masks, [1.0] * 3, told["coefficients"])
    made = soup_bits(soup)
    found = [bits for name in names for bits in made[name]]
    assert found == [narrow(value, DTYPES["F32"]) for value in merged]


def test_random_words_are_those_of_the_published_generator() -> None:
    """Philox4x32-10 gives the known answers of Random123, one by one and as an array."""
    answers = {
        ((0,) * 4, Key(0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((0xFFFFFFFF,) * 4, Key(0xFFFFFFFF, 0xFFFFFFFF)): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            Key(0xA4093822, 0x299F31D0),
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), answer in answers.items():
        assert " ".join(f"{word:08x}" for word in philox(counter, key)) == answer
    key = key_of(1, 2, "x")
    start = 4 * (2**32 - 2) + 1
    counters = [i // 4 for i in range(start, start + 23)]
    one_by_one = [
        philox((c % 2**32, c >> 32, 0, 0), key)[i % 4]
        for c, i in zip(counters, range(start, start + 23), strict=True)
    ]
    assert words(key, start, 23).tolist() == one_by_one
    whole = words(key, 0, 100_000)
    assert np.array_equal(whole[777:5000], words(key, 777, 4223))


def test_a_mask_is_made_by_ten_lines_of_numpy(tmp_path: Path) -> None:
    """What the page tells outsiders makes the mask of `dare`."""
    n, name, seed, density = 9107, "a", 11, 0.37
    low, high = np.frombuffer(
        hashlib.blake2b(f"{seed}:0:{name}".encode(), digest_size=8).digest(), "<u4"
    ).tolist()
    index = np.arange(-(-n // 4), dtype=np.uint64)
    a, b, c, d = index & 0xFFFFFFFF, index >> 32, 0 * index, 0 * index
    for i in range(10):
        key = (low + i * 0x9E3779B9) % 2**32, (high + i * 0xBB67AE85) % 2**32
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ key[0], q & 0xFFFFFFFF, (p >> 32) ^ d ^ key[1], p & 0xFFFFFFFF
    drawn = np.stack([a, b, c, d], axis=1).ravel()[:n] / 2**32
    base, others = checkpoints(tmp_path, "F64", n=1)
    soup = streamsoup.dare(
        others, density, base=base, output=tmp_path / "soup", rescale="none", seed=seed
    )
    start, other = (np.frombuffer(load(Path(p))["a"][2]) for p in (base, others[0]))
    made = np.frombuffer(load(Path(soup.path))["a"][2])
    assert np.array_equal(made, np.where(drawn < density, start + (other - start), start))


def test_masks_have_their_statistics() -> None:
    """Densities are met within four deviations, and masks of two streams are independent."""
    n = 1 << 18
    first, second = (words(key_of(0, i, "a"), 0, n) < 0.3 * 2**32 for i in range(2))
    deviation = (0.3 * 0.7 / n) ** 0.5
    assert abs(first.mean() - 0.3) < 4 * deviation
    assert abs((first & second).mean() - 0.09) < 4 * deviation
    assert abs((first[1:] & first[:-1]).mean() - 0.09) < 4 * deviation


def test_a_merge_is_verified_and_its_seed_recorded(tmp_path: Path) -> None:
    """Soups of all merges verify without being told their rules; another seed is another soup."""
    base, others = checkpoints(tmp_path)
    for method, told in [CASES[0], CASES[9], OTHERS[1], OTHERS[3], OTHERS[5]]:
        soup = merge(method, base, others, tmp_path / method, told)
        assert streamsoup.verify(soup.path).rederived
    one = streamsoup.dare(others, 0.5, base=base, output=tmp_path / "1")
    assert b'"seed": 0' in (Path(one.path) / "streamsoup.json").read_bytes()
    two = streamsoup.dare(others, 0.5, base=base, output=tmp_path / "2", seed=1)
    assert files(one) != files(two)


@pytest.mark.parametrize(
    ("method", "told", "message"),
    [
        ("ties", {"density": 1.5}, "density must be between 0 and 1"),
        ("ties", {"density": [0.5, 0.5]}, "density: 2 values for 3 ingredients"),
        ("ties", {"density": 0.5, "coefficients": [1, float("nan"), 1]}, "must be finite"),
        ("ties", {"density": 0.5, "consensus": "count"}, "consensus"),
        ("ties", {"density": 0.5, "rescale": "l2"}, "rescale"),
        ("breadcrumbs", {"density": 0.5, "gamma": -1}, "gamma must be between 0 and 1"),
        ("della", {"density": 0.9}, "must lie between 0 and 1, both excluded"),
        ("della", {"density": 0.5, "rescale": "density"}, "no one density"),
        ("sce", {"select_topk": 2}, "select_topk must be between 0 and 1"),
        ("ram", {"epsilon": -1}, "epsilon must be 0 or more"),
    ],
)
def test_parameters_out_of_range_are_refused(
    tmp_path: Path, method: str, told: dict[str, Any], message: str
) -> None:
    """Whatever a rule cannot mean is refused before a weight is read."""
    base, others = checkpoints(tmp_path)
    with pytest.raises(RecipeError, match=message):
        merge(method, base, others, tmp_path / "soup", told)
    assert not (tmp_path / "soup").exists()


def test_swapping_two_is_refused(tmp_path: Path) -> None:
    """NearSwap takes one ingredient."""
    base, others = checkpoints(tmp_path)
    with pytest.raises(RecipeError, match="one ingredient besides the base, got 3"):
        streamsoup.nearswap(others, 0.1, base=base, output=tmp_path / "soup")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("based", [True, False])
def test_rows_turn_by_their_own_angles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, based: bool
) -> None:
    """Row-wise NuSLERP has the bits of the specification, however tensors are cut."""
    dtype = {"normal": "F32", "equal": "BF16", "same": "F16", "few": "F64"}[kind]
    base, others = checkpoints(tmp_path, dtype, n=2, kind=kind)
    start, first, second = (elements(path) for path in (base, *others))
    expected = {}
    for name, shape in SHAPES.items():
        x, y = first[name], second[name]
        length = int(np.prod(shape[1:] if len(shape) > 1 else shape))
        if based:
            x, y = (reference.task_vector(each, start[name]) for each in (x, y))
        made = reference.row_slerp(x, y, length, 0.3)
        if based:
            made = [b if m == 0 else b + m for b, m in zip(start[name], made, strict=True)]
        expected[name] = [narrow(value, DTYPES[dtype]) for value in made]
    told: dict[str, Any] = {"base": base} if based else {}
    for cut in range(2):
        soup = streamsoup.nuslerp(
            others, [0.7, 0.3], row_wise=True, output=tmp_path / f"{cut}", **told
        )
        assert soup_bits(soup) == expected
        assert cut or streamsoup.verify(soup.path).rederived
        monkeypatch.setattr(plan, "LEAF", 4096)
        monkeypatch.setattr(budget, "LARGEST_BLOCK", 4096)
    assert soup.n_passes == 1


def test_what_is_not_finite_is_named_while_it_is_measured(tmp_path: Path) -> None:
    """A NaN that would be trimmed away ends the run, with its file and tensor."""
    base, others = checkpoints(tmp_path)
    content = load(Path(others[1]))
    values = np.frombuffer(content["a"][2], np.float32).copy()
    values[5] = np.nan
    save(Path(others[1]), content | {"a": ("F32", SHAPES["a"], values.tobytes())})
    for method, told in [CASES[0], CASES[6], OTHERS[1], OTHERS[4]]:
        with pytest.raises(NonFiniteError, match=r"m2.*: a: holds nan at \[0, 5\]"):
            merge(method, base, others, tmp_path / "soup", told)


def test_long_rows_are_in_the_plan(tmp_path: Path) -> None:
    """A row that does not fit the budget is refused before a weight is read."""
    rng = np.random.default_rng(0)
    paths = [
        str(save(tmp_path / f"m{i}", {"a": tensor(rng.normal(size=400_000).astype(np.float32))}))
        for i in range(2)
    ]
    with pytest.raises(BudgetError, match="too small"):
        streamsoup.della(
            paths[1:],
            0.5,
            base=paths[0],
            output=tmp_path / "soup",
            options=Options(memory="130MB", threads=1),
        )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(("method", "told"), CASES)
def test_compiled_loops_have_the_bits_of_numpy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    told: dict[str, Any],
    dtype: str,
) -> None:
    """For every dtype, blocks cut small and digits counted too, all bytes are the same."""
    base, others = checkpoints(tmp_path, dtype)
    monkeypatch.setenv("STREAMSOUP_KERNELS", "numpy")
    plain = merge(method, base, others, tmp_path / "plain", told)
    monkeypatch.setenv("STREAMSOUP_KERNELS", "fast")
    monkeypatch.setattr(reduce, "MERGER_NBYTES", 0)
    for most in (40, 1 << 17):
        monkeypatch.setattr(task_vectors, "MOST_COLLECTED", most)
        made = merge(method, base, others, tmp_path / f"compiled{most}", told)
        assert files(made) == files(plain)
        monkeypatch.setattr(plan, "LEAF", 4096)


def test_dtypes_may_differ_in_compiled_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base in float32 with fine-tunes in bfloat16 and float16 is merged as numpy does it."""
    base, _ = checkpoints(tmp_path / "a", "F32", n=1)
    others = [checkpoints(tmp_path / name, name, n=1)[1][0] for name in ("BF16", "F16", "F64")]
    made = []
    for tier in ("numpy", "fast"):
        monkeypatch.setenv("STREAMSOUP_KERNELS", tier)
        monkeypatch.setattr(reduce, "MERGER_NBYTES", 0)
        soup = merge("ties", base, others, tmp_path / tier, parameters(), dtype="bf16")
        made.append(files(soup))
    assert made[0] == made[1]


MAGNITUDES = {
    "of 16 bits": lambda rng, n: (
        np.abs(np.float32(rng.normal(size=n)).view(np.uint32) >> 16 << 16)
        .astype(np.uint32)
        .view(np.float32)
        .astype(float)
    ),
    "all different": lambda rng, n: np.abs(rng.normal(size=n)),
    "all equal": lambda rng, n: np.full(n, 0.3),
    "two of them": lambda rng, n: rng.choice([0.3, np.nextafter(0.3, 1)], n),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.9, 0.0, rng.random(n)),
    "tiny": lambda rng, n: rng.random(n) * 1e-300,
    "subnormal": lambda rng, n: rng.integers(0, 3, n) * 5e-324,
    "huge": lambda rng, n: rng.random(n) * 1e300,
    "with inf and nan": lambda rng, n: rng.choice([1.0, np.inf, np.nan, 1e308], n),
}


@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize("most", [1, 50, 10_000])
def test_a_selection_is_what_sorting_selects(kind: str, most: int) -> None:
    """Whatever the magnitudes, the k largest are those that a stable sort finds, within the passes.

    Leaves of different sizes and distributions, so that ties lie in some of them only.
    """
    rng = np.random.default_rng(3)
    n = 3000
    magnitudes = np.abs(MAGNITUDES[kind](rng, n))
    magnitudes[:700] = np.sort(magnitudes[:700])
    magnitudes[np.isnan(magnitudes)] = np.nan
    ends = [0, 100, 700, 2900, n]
    leaves = list(itertools.pairwise(ends))
    by_rank = np.lexsort((np.arange(n), -magnitudes.view(np.int64)))
    for k in (0, 1, 7, 299, 1500, 2990, 2999, n):
        chosen = Selection(k, n, most=most)
        n_passes = 0
        while chosen.measuring:
            for start, end in leaves:
                state = chosen.start()
                half = (start + end) // 2
                chosen.measure(state, magnitudes[start:half], start)
                chosen.measure(state, magnitudes[half:end], half)
                chosen.merge(state, start)
            chosen.end_pass()
            n_passes += 1
        assert n_passes <= selection.N_PASSES
        kept = np.zeros(n, bool)
        for start, end in leaves:
            cut = chosen.cut(start)
            half = (start + end) // 2
            kept[start:half] = cut.kept(magnitudes[start:half])
            kept[half:end] = cut.kept(magnitudes[half:end])
        expected = np.zeros(n, bool)
        expected[by_rank[:k]] = True
        assert np.array_equal(kept, expected), (kind, most, k)


def test_differences_of_16_bits_take_two_passes(tmp_path: Path) -> None:
    """One pass finds the threshold of fine-tunes stored in 16 bits, though many equal it."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=50_000) * 0.02
    values = [bits_of(base + 0.001 * i * rng.normal(size=base.size), "BF16") for i in range(2)]
    floats = [np.uint32(each.astype(np.uint32) << 16).view(np.float32) for each in values]
    magnitudes = np.abs(floats[1].astype(float) - floats[0])
    selection = Selection(25_000, 50_000, most=100)
    for start in (0, 25_000):
        state = selection.start()
        selection.measure(state, magnitudes[start : start + 25_000], start)
        selection.merge(state, start)
    selection.end_pass()
    assert not selection.measuring
    kept = [
        selection.cut(start).kept(magnitudes[start : start + 25_000]).sum() for start in (0, 25_000)
    ]
    assert sum(kept) == 25_000


def test_thresholds_of_many_tensors_hold_no_counts(tmp_path: Path) -> None:
    """What selections count is let go of with their pass: memory does not grow with tensors."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(4):
        content = {f"t{j}": tensor(rng.normal(size=999).astype(np.float32)) for j in range(60)}
        paths.append(str(save(tmp_path / f"m{i}", content)))
    tracemalloc.start()
    try:
        streamsoup.ties(paths[1:], 0.5, base=paths[0], output=tmp_path / "soup")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 3 * 8 * 65536 / 3
