"""Averages while a model trains have the values, and the bytes, of those of saved checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import streamsoup
from streamsoup import Average, Options
from streamsoup.errors import MismatchError, NonFiniteError, RecipeError
from streamsoup.training import arithmetic, device

State = dict[str, Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)


def states(n: int, seed: int = 0) -> list[State]:
    """Return the states of a run: every dtype, a scalar, nothing at all, and an integer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        state: State = {}
        for dtype in DTYPES:
            wide = torch.randn(7, 43, generator=generator, dtype=torch.float64)
            state[str(dtype).removeprefix("torch.")] = (wide * 10).to(dtype)
        state["float64"][0] = 0.1  # the sum of three of them is inexact
        state["scalar"] = torch.tensor(float(i))
        state["none"] = torch.zeros(0, 3)
        state["zero"] = torch.tensor([0.0, -0.0])
        state["mask"] = torch.tensor([0.0, -torch.inf])
        state["steps"] = torch.tensor([5])
        found.append(state)
    return found


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: State, other: State) -> None:
    """Check that two states have the same names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert bits(one[name]) == bits(other[name]), name


def averaged(run: Sequence[State], *settings: Any, **more: Any) -> Average:
    """Return the average of a run, in one go."""
    average = Average(*settings, **more)
    for state in run:
        average.update(state)
    return average


def files(run: Sequence[State], folder: Path) -> list[str]:
    """Save the states, as a trainer would."""
    paths = []
    for i, state in enumerate(run):
        (folder / f"step-{i + 1}").mkdir(parents=True)
        save_file(state, folder / f"step-{i + 1}" / "model.safetensors", {"format": "pt"})
        paths.append(str(folder / f"step-{i + 1}"))
    return paths


@pytest.fixture(params=["numpy", "plain", "fast"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every tier of kernels, though the models are small."""
    name: str = request.param
    monkeypatch.setenv("STREAMSOUP_KERNELS", name)
    monkeypatch.setattr(arithmetic, "COMPILE_NBYTES", 0)
    monkeypatch.setattr(arithmetic, "BLOCK", 64)
    return name


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize(
    ("verb", "n", "settings", "arguments"),
    [
        ("uniform", 3, {}, {}),
        ("lawa", 5, {"window": 3}, {"window": 3}),
        ("wsm", 4, {"n": 4, "curve": "cosine"}, {"curve": "cosine"}),
        ("wsm", 3, {"n": 3}, {}),
        ("wsm", 5, {"n": 5, "curve": "sqrt"}, {"curve": "sqrt"}),
    ],
)
def test_saved_bytes_are_those_of_files(
    tmp_path: Path,
    tier: str,
    place: str,
    verb: str,
    n: int,
    settings: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    """The file of the average is, byte by byte, the one made of the checkpoints on disk."""
    if place == "device" and verb != "lawa":
        run = [{k: v for k, v in each.items() if k != "float64"} for each in states(n)]
    else:
        run = states(n)
    kept = str(tmp_path / "kept") if place == "disk" else place
    average = averaged(run, verb, place=kept, **settings)
    average.save(tmp_path / "live")
    expected = getattr(streamsoup, verb)(
        files(run, tmp_path / "run"), **arguments, output=tmp_path / "soup"
    )
    live, soup = (Path(tmp_path, each, "model.safetensors") for each in ("live", "soup"))
    assert live.read_bytes() == soup.read_bytes()
    assert streamsoup.verify(tmp_path / "live", quick=True)
    same(average.result(), {name: load_file(soup)[name] for name in run[0]})
    assert expected.recipe.method == verb
    # Planted fault: another order of the updates of an uneven curve makes other bytes.
    if "curve" in settings:
        assert bits(averaged(run[1:] + run[:1], verb, **settings).result()["float32"]) != bits(
            average.result()["float32"]
        )


@pytest.mark.parametrize("curve", ["linear", "sqrt"])
def test_wsm_without_a_number_keeps_all_states(tmp_path: Path, curve: Any) -> None:
    """The number of updates is the one there was, at any time."""
    run = states(4)
    average = Average("wsm", curve=curve, place=tmp_path / "kept")
    for n, state in enumerate(run, 1):
        average.update(state)
        same(average.result(), averaged(run[:n], "wsm", n=n, curve=curve).result())
    with pytest.raises(RecipeError, match="needs n"):
        Average("wsm")


@pytest.mark.parametrize("decay", [0.0, 1e-200, 0.01, 0.5, 0.9, 0.999])
def test_an_ema_follows_its_recurrence(tier: str, decay: float) -> None:
    """In exact fractions, up to rounding of float64, with sums scaled down on the way."""
    generator = torch.Generator().manual_seed(1)
    run = [torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(120)]
    average = averaged([{"w": each} for each in run], "ema", decay=decay)
    exact = [Fraction(float(value)) for value in run[0]]
    d = Fraction(decay)
    for each in run[1:]:
        exact = [d * m + (1 - d) * Fraction(float(v)) for m, v in zip(exact, each, strict=True)]
        exact = [Fraction(round(m * 2**120), 2**120) for m in exact]
    found = average.result()["w"].numpy()
    expected = np.array([float(m) for m in exact])
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


def test_an_ema_of_files_rounds_to_the_same(tmp_path: Path) -> None:
    """As `ema` of checkpoints: the same values but for ties in float64."""
    run = states(6)
    streamsoup.ema(files(run, tmp_path / "run"), 0.9, output=tmp_path / "soup")
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    found = averaged(run, "ema", decay=0.9).result()
    for name in ("float32", "bfloat16", "float16", "mask", "scalar"):
        assert bits(found[name]) == bits(soup[name]), name


def test_an_ema_of_bfloat16_moves() -> None:
    """By updates so small that bfloat16 itself rounds each of them away."""
    start, end = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1.5, dtype=torch.bfloat16)
    average = averaged([{"w": start}, *[{"w": end}] * 1000], "ema", decay=0.999)
    expected = 1.5 - 0.5 * 0.999**1000
    assert average.result()["w"].double()[0] == pytest.approx(expected, abs=2**-8)
    # What torch's own tool does: the model's dtype, in which no update is large enough.
    naive = start.clone()
    for _ in range(1000):
        naive.lerp_(end, 0.001)
    assert naive[0] == 1.0


@pytest.mark.parametrize("decay", [None, 0.9, 0.99])
def test_pairs_of_float32_hold_more_than_float32(decay: float | None) -> None:
    """A sum with its compensation is within 2⁻⁴⁰ of float64, where float32 alone is not."""
    generator = torch.Generator().manual_seed(2)
    run = [{"w": torch.randn(1000, generator=generator) + 100} for _ in range(300)]
    settings: dict[str, Any] = {} if decay is None else {"decay": decay}
    method: Any = "uniform" if decay is None else "ema"
    average = averaged(run, method, precision="float32", place="device", **settings)
    exact = averaged([{"w": s["w"].double()} for s in run], method, **settings).result()["w"]
    sums: Any = average._sums
    made = (sums._sums["w"].double() + sums._rest["w"].double()) / average._weights.divisor
    assert float(((made - exact) / exact).abs().max()) < 2**-40
    alone = sums._sums["w"].double() / average._weights.divisor
    assert float(((alone - exact) / exact).abs().max()) > 2**-30
    plain = averaged(run, method, **settings).result()["w"]
    assert bits(average.result()["w"]) == bits(plain)


def test_products_in_float32_are_exact() -> None:
    """A product and its error are the product in float64, in which 48 bits have room."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1000, generator=generator)
    y = float(torch.tensor(1.2345678, dtype=torch.float32))
    product = x * y
    error = device._error_of_product(x, y, product)
    assert torch.equal(product.double() + error.double(), x.double() * y)


@pytest.mark.parametrize("method", ["uniform", "lawa"])
@pytest.mark.parametrize("place", ["host", "device"])
def test_merged_is_sequential(method: Any, place: str) -> None:
    """Two averages merged are the one that had all updates, in order."""
    settings: dict[str, Any] = {"window": 4} if method == "lawa" else {}
    run = [{k: v for k, v in s.items() if k != "float64"} for s in states(6)]
    for cut in (0, 1, 3, 6):
        first = averaged(run[:cut], method, place=place, **settings)
        second = averaged(run[cut:], method, place=place, **settings)
        first.merge(second)
        whole = averaged(run, method, place=place, **settings)
        same(first.result(), whole.result())
        assert first.n_updates == 6


def test_what_cannot_be_merged_is_refused() -> None:
    """An EMA depends on the order of its updates, and methods must agree."""
    run = states(2)
    with pytest.raises(RecipeError, match="depends on those before it"):
        averaged(run, "ema").merge(averaged(run, "ema"))
    with pytest.raises(RecipeError, match="settings differ"):
        averaged(run).merge(averaged(run, "ema"))
    with pytest.raises(MismatchError, match="expected F32"):
        averaged([{"w": torch.ones(2)}]).merge(averaged([{"w": torch.ones(3)}]))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("uniform", {}),
        ("uniform", {"precision": "float32"}),
        ("ema", {"decay": 0.7}),
        ("ema", {"decay": 0.7, "place": "device"}),
        ("lawa", {"window": 3}),
        ("lawa", {"window": 3, "place": "DISK"}),
        ("wsm", {"n": 7, "curve": "cosine"}),
        ("wsm", {"curve": "cosine", "place": "DISK"}),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 2, 5])
def test_a_saved_state_goes_on_bit_for_bit(
    tmp_path: Path, method: Any, settings: dict[str, Any], cut: int
) -> None:
    """Saved in mid-window with torch.save, loaded with weights only, and gone on with."""
    if settings.get("place") == "DISK":
        settings = {**settings, "place": tmp_path / "kept"}
    run = states(7)
    first = averaged(run[:cut], method, **settings)
    torch.save(first.state_dict(), tmp_path / "average.pt")
    second = Average(method, **settings)
    second.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    assert second.n_updates == cut
    for average in (first, second):
        for state in run[cut:]:
            average.update(state)
    same(first.result(), second.result())
    same(second.result(), averaged(run, method, **settings).result())


def test_a_state_of_other_settings_is_refused() -> None:
    """By the name of the setting; and what is no state at all."""
    state = averaged(states(2), "ema", decay=0.9).state_dict()
    with pytest.raises(RecipeError, match=r"decay 0\.9, not 0\.5"):
        Average("ema", decay=0.5).load_state_dict(state)
    for wrong in ({}, {**state, "layout": 5}, {**state, "settings": None}):
        with pytest.raises(RecipeError, match="not the state of an Average"):
            Average("ema", decay=0.9).load_state_dict(wrong)
    for name in state:
        with pytest.raises(RecipeError, match=f"not the state of an Average.*{name}"):
            Average("ema", decay=0.9).load_state_dict({k: state[k] for k in state if k != name})
    for damaged in ({}, {**state["sums"], "float32": torch.ones(3)}):
        average = Average("ema", decay=0.9)
        with pytest.raises(RecipeError, match="is damaged"):
            average.load_state_dict({**state, "sums": damaged})
        with pytest.raises(RecipeError, match="was interrupted"):
            average.result()
    with pytest.raises(RecipeError, match="of version 9"):
        Average("ema", decay=0.9).load_state_dict({**state, "version": 9})


def test_reset_forgets_all_updates() -> None:
    """An average that was reset is one that never had an update."""
    run = states(3)
    average = averaged(run[:2], "ema", decay=0.5)
    average.reset()
    assert (average.n_updates, average.ready) == (0, False)
    with pytest.raises(RecipeError, match="no update"):
        average.result()
    average.update({"other": torch.ones(1)})
    average.reset()
    average.update(run[2])
    same(average.result(), averaged(run[2:], "ema", decay=0.5).result())


def test_the_newest_integers_count() -> None:
    """Integers are never averaged."""
    average = averaged([{"n": torch.tensor(n), "w": torch.tensor(1.0)} for n in (3, 9)])
    assert average.result()["n"] == 9


def test_non_finite_values_are_named(tmp_path: Path) -> None:
    """Whenever they came; masks that are the same in all updates are kept."""
    for when in (0, 1, 2):
        run = [{"w": torch.ones(3), "v": torch.ones(3)} for _ in range(3)]
        run[when]["v"][1] = torch.nan
        average = averaged(run)
        with pytest.raises(NonFiniteError, match=r"^v: "):
            average.result()
        assert averaged(run, non_finite="propagate").result()["v"].isnan()[1]
    mask = torch.tensor([0.0, -torch.inf])
    average = averaged([{"m": mask}, {"m": mask.clone()}], "ema", decay=0.5)
    assert torch.equal(average.result()["m"], mask)
    average.update({"m": torch.zeros(2)})
    with pytest.raises(NonFiniteError, match=r"^m: "):
        average.result()


def test_other_tensors_than_before_are_refused() -> None:
    """By name, with what was expected; the average is as it was."""
    average = averaged([{"w": torch.ones(2), "n": torch.tensor(1)}])
    for wrong, message in (
        ({"w": torch.ones(2)}, "missing: n"),
        ({"w": torch.ones(2), "n": torch.tensor(1), "x": torch.ones(1)}, "unexpected: x"),
        ({"w": torch.ones(3), "n": torch.tensor(1)}, r"w: expected F32 of shape \[2\], found F32"),
        ({"w": torch.ones(2).half(), "n": torch.tensor(1)}, "found F16"),
        ({"w": torch.ones(2), "n": torch.tensor(1.0)}, "tied, frozen or trained otherwise"),
        ({"w": torch.ones(2), "n": "text"}, "n: cannot be averaged"),
        ({}, "no tensor at all"),
        ([1], "neither a torch.nn.Module nor a state dict"),
    ):
        with pytest.raises(MismatchError, match=message):
            average.update(wrong)  # type: ignore[arg-type]
    assert average.n_updates == 1
    assert torch.equal(average.result()["w"], torch.ones(2))
    for strange in (torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()):
        with pytest.raises(MismatchError, match="c: cannot be averaged"):
            Average().update({"c": strange})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "swa"}, "method must be one of uniform"),
        ({"decay": 0.9}, "decay is for the method ema"),
        ({"method": "ema", "decay": 1.0}, "not between 0 and 1"),
        ({"method": "lawa"}, "lawa needs a window"),
        ({"method": "lawa", "window": 0}, "window must be at least 1"),
        ({"method": "wsm", "n": 0}, "n must be at least 1"),
        ({"method": "wsm", "n": 3, "curve": "round"}, "curve must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"precision": "float32", "place": "folder"}, "kept in memory"),
        ({"frozen": "yes"}, "frozen must be one of"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    """Each is refused at once, by name."""
    with pytest.raises(RecipeError, match=message):
        Average(**settings)


def test_too_few_and_too_many_updates() -> None:
    """A result needs an update; wsm needs all that it was begun for, and no more."""
    with pytest.raises(RecipeError, match="no update"):
        Average().result()
    run = states(3)
    average = averaged(run[:2], "wsm", n=3)
    with pytest.raises(RecipeError, match="2 of 3 updates"):
        average.result()
    average.update(run[2])
    before = average.result()
    with pytest.raises(RecipeError, match="one more"):
        average.update(run[0])
    same(average.result(), before)


def test_an_update_that_was_interrupted_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that hold a part of an update give no result, until a saved state is loaded."""
    average = averaged(states(2))
    saved = {name: _copied(value) for name, value in average.state_dict().items()}
    expected = average.result()

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.training.host.HostSums._add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            average.update(states(1)[0])
    with pytest.raises(RecipeError, match="was interrupted"):
        average.result()
    average.load_state_dict(saved)
    same(average.result(), expected)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize("settings", [{}, {"method": "lawa", "window": 3}])
def test_memory_is_predicted(tmp_path: Path, place: str, settings: dict[str, Any]) -> None:
    """What is reserved is what was said: 8 bytes an element, or the window."""
    model = nn.Linear(300, 200).bfloat16()
    average = Average(**settings, place=tmp_path / "kept" if place == "disk" else place)
    told = average.memory(model)
    for _ in range(5):
        average.update(model)
    kept = getattr(average._sums, "_room", None)
    if kept is not None:
        found = len(kept)
    elif average._window is not None:
        held = {id(t): t for s in average._window.states for t in s.values()}
        found = sum(t.numel() * t.element_size() for t in held.values())
    else:
        found = sum(t.numel() * t.element_size() for t in average.state_dict()["sums"].values())
    by_place = {"host": told.host_nbytes, "device": told.device_nbytes, "disk": told.disk_nbytes}
    assert found <= by_place.pop(place) <= found + 1000
    assert set(by_place.values()) == {0}
    elements = 300 * 200 + 200
    assert found >= elements * (6 if settings else 8)
    assert not list((tmp_path / "kept").glob("*"))  # files without names


def test_options_of_saving(tmp_path: Path) -> None:
    """As for every verb: another dtype, and an output that exists is not replaced unasked."""
    average = averaged(states(2), "ema")
    average.save(tmp_path / "soup", options=Options(dtype="bf16"))
    found = load_file(tmp_path / "soup" / "model.safetensors")
    assert found["float32"].dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="saved whole"):
        average.save(tmp_path / "part", options=Options(part="1/2"))
    with pytest.raises(streamsoup.StreamsoupError, match="exists"):
        average.save(tmp_path / "soup")
    soup = average.save(tmp_path / "soup", options=Options(overwrite=True))
    assert soup is not None
    assert soup.provenance.report == {"n_updates": 2, "decay": 0.999}
