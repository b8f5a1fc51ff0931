"""Coefficients by patterns of names and along the layers, against plain sums of each tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import load_array, save, tensor

import streamsoup
from streamsoup.cli import cli
from streamsoup.errors import RecipeError

NAMES = ["embed.weight", *(f"h.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn"))]
NAMES += ["norm.weight"]
Values = dict[str, dict[str, np.ndarray[Any, Any]]]


@pytest.fixture(autouse=True)
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Values:
    """Save base, A and B in the current folder, and return their tensors in float64."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    found: Values = {}
    for model in ("base", "A", "B"):
        own = {name: rng.normal(size=(4, 5)).astype("f4") for name in NAMES}
        save(tmp_path / model, {name: tensor(value) for name, value in own.items()})
        found[model] = {name: value.astype("f8") for name, value in own.items()}
    return found


def depth(name: str) -> float:
    """Return where a tensor stands along the three layers."""
    return {"embed": 0.0, "h.0": 0.0, "h.1": 0.5, "h.2": 1.0, "norm": 1.0}[
        name[:3] if name.startswith("h.") else name.split(".")[0]
    ]


def wanted(values: Values, factors: Any) -> dict[str, Any]:
    """Return Σ cᵢ·θᵢ of A and B with the factors of each tensor, rounded once."""
    found = {}
    for name in NAMES:
        a, b = factors(name)
        found[name] = (a * values["A"][name] + b * values["B"][name]).astype("f4")
    return found


def check(folder: str, expected: dict[str, Any]) -> None:
    """Compare every tensor bit for bit."""
    for name, value in expected.items():
        assert (load_array(Path(folder), name) == value).all(), name


def test_a_gradient_goes_from_the_first_layer_to_the_last(values: Values) -> None:
    """[0, 1] is 0 in the first layer and before it, 1 in the last and behind it."""
    assert cli(["mix", "A", "B", "-c", "0~1,1~.5~0", "-o", "one", "-q"]) == 0
    expected = wanted(values, lambda name: (depth(name), 1 - depth(name)))
    check("one", expected)
    streamsoup.mix(["A", "B"], [[0, 1], [1, 0]], output="two")
    check("two", expected)
    streamsoup.verify("two")


def test_the_first_pattern_that_fits_counts(values: Values) -> None:
    """Patterns in their order, then what has none; numbers and gradients may be mixed."""
    words = ["-c", ".5,.5", "-c", "h.2.*=1,0", "-c", "*mlp*=.25~.75,2"]
    assert cli(["mix", "A", "B", *words, "-o", "one", "-q"]) == 0

    def factors(name: str) -> tuple[float, float]:
        if name.startswith("h.2."):
            return 1.0, 0.0
        return (0.25 + 0.5 * depth(name), 2.0) if "mlp" in name else (0.5, 0.5)

    check("one", wanted(values, factors))
    given = {"h.2.*": [1, 0], "*mlp*": [[0.25, 0.75], 2], "*": 0.5}
    streamsoup.mix(["A", "B"], given, output="two")
    check("two", wanted(values, factors))


def test_they_are_divided_by_their_sum_tensor_by_tensor(values: Values) -> None:
    """With normalize, the factors of every tensor sum to 1."""
    streamsoup.mix(["A", "B"], {"*mlp*": [3, 1], "*": [1, 1]}, normalize=True, output="one")
    quarters = wanted(values, lambda name: (0.75, 0.25) if "mlp" in name else (0.5, 0.5))
    check("one", quarters)
    with pytest.raises(RecipeError, match=r"h\.0\.mlp\.weight: coefficients that sum to 0"):
        streamsoup.mix(["A", "B"], {"*mlp*": [1, -1], "*": 1}, normalize=True, output="two")


def test_task_vectors_have_them_too(values: Values) -> None:
    """arithmetic, and ties with everything kept, add what each tensor's factors say."""
    words = ["A", "--base", "base", "-o"]
    assert cli(["arithmetic", *words, "one", "--scale", "0~1", "-q"]) == 0
    plain = ["--density", "1", "--consensus", "none", "--no-normalize", "-q"]
    assert cli(["ties", *words, "two", "-c", "0~1", *plain]) == 0
    for name in NAMES:
        base, a = values["base"][name], values["A"][name]
        moved = base + depth(name) * (a - base)
        for folder in ("one", "two"):
            np.testing.assert_allclose(load_array(Path(folder), name), moved, rtol=1e-6)


def test_densities_differ_by_tensor(values: Values) -> None:
    """What is kept of a tensor is the share that its pattern says, and nothing of another."""
    words = ["A", "--base", "base", "-o", "one", "-q", "--density", ".25", "--density", "*mlp*=0"]
    assert cli(["ties", *words]) == 0
    for name in NAMES:
        changed = load_array(Path("one"), name) != values["base"][name].astype("f4")
        assert changed.sum() == (0 if "mlp" in name else 5), name
    streamsoup.verify("one")


def test_a_lone_number_or_gradient_is_for_all_task_vectors(values: Values) -> None:
    """.2~.8 is the gradient of each ingredient, and a pattern may have one number for all."""
    plain = ["--density", "1", "--consensus", "none", "--no-normalize", "-q", "--base", "base"]
    assert cli(["ties", "A", "B", *plain, "-c", "0~1", "-c", "*mlp*=3", "-o", "one"]) == 0
    given = {"*mlp*": 3, "*": [[0, 1], [0, 1]]}
    streamsoup.arithmetic(["A", "B"], given, base="base", output="two")
    words = ["A", "B", "--base", "base", "--scale", "0~1", "--scale", "*mlp*=3,3", "-q"]
    assert cli(["arithmetic", *words, "-o", "three"]) == 0
    for name in NAMES:
        base, factor = values["base"][name], 3 if "mlp" in name else depth(name)
        moved = base + factor * sum(values[each][name] - base for each in "AB")
        for folder in ("one", "two", "three"):
            np.testing.assert_allclose(load_array(Path(folder), name), moved, rtol=1e-5, atol=1e-6)


def test_the_recipe_of_patterns_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A printed recipe holds patterns as keys and gradients as lists, and makes the same bytes."""
    words = ["mix", "A", "B", "-c", "0~1,.5", "-c", "*mlp*=.25,.75"]
    assert cli([*words, "-o", "one", "-q"]) == 0
    capsys.readouterr()
    assert cli([*words, "--print-recipe"]) == 0
    text = capsys.readouterr().out
    assert "'*mlp*':" in text
    Path("r.yaml").write_text(text)
    assert cli(["run", "r.yaml", "-o", "two", "-q"]) == 0
    one, two = (json.loads(Path(each, "streamsoup.json").read_text()) for each in ("one", "two"))
    assert one["recipe"] == two["recipe"]
    assert one["tensors"] == two["tensors"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-c", "*mlp*=1,1"], 1, "no pattern fits embed.weight, h.0.attn.weight"),
        (["-c", "1,1", "-c", "*nlp*=1,1"], 1, "'*nlp*' fits no tensor, or none that is left"),
        (["-c", "*=1,1", "-c", "*mlp*=1,1"], 1, "'*mlp*' fits no tensor, or none that is left"),
        (["-c", "0~1"], 1, "1 value for 2 ingredients"),
        (["-c", "1,1", "-c", "*mlp*=1"], 1, "1 value for 2 ingredients"),
        (["-c", "1,1", "-c", "1,2"], 2, "numbers for all are given twice"),
        (["-c", "*a*=1,1", "-c", "*a*=1,2"], 2, "'*a*' are given twice"),
        (["-c", "*a*=1,x"], 2, "'*a*=1,x' is not a list of numbers"),
        (["-c", "1~,1"], 2, "is not a list of numbers"),
        (["-c", "A", "-c", "1,1"], 2, "a file holds all of them; give nothing else"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], status: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pattern that fits nothing, a tensor without numbers, too few of them, or twice."""
    assert cli(["mix", "A", "B", *words, "-o", "soup"]) == status
    assert message in capfd.readouterr().err
    assert not Path("soup").exists()
