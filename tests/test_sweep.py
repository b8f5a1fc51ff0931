"""Sweeps over the parameters of a merge: every point scored as its file would be, the best kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamsoup
from streamsoup import Candidate, Options, Step, SweepSettings
from streamsoup.cli import cli
from streamsoup.errors import RecipeError, TaskError
from streamsoup.search.sweep import METHODS, places
from streamsoup.study.pages.blocks import Plot, Table
from streamsoup.study.report import sweeps

GRID = {"density": [0.2, 0.6], "lambda_": [0.5, 1.0]}


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Save a base and three networks near it, with the same running variances."""
    found = networks.ingredients(tmp_path / "in", 4)
    for path in found:
        file = Path(path) / "model.safetensors"
        state = load_file(file)
        save_file(state | {"1.running_var": torch.ones(24)}, file)
    return found


def score_of(folder: str | Path) -> float:
    """Score the network in a folder, loaded by safetensors."""
    model = networks.build()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return networks.score(model.eval())


def weights(folder: str | Path) -> bytes:
    """Read the weights of a soup."""
    return (Path(folder) / "model.safetensors").read_bytes()


def sweep(paths: list[str], output: Path, task: Any = networks.score, **told: Any) -> Any:
    """Sweep TIES over `GRID`."""
    model = told.pop("model", None)
    if task is networks.score and model is None:
        model = networks.build()
    return streamsoup.sweep(
        paths[1:],
        "ties",
        task,
        told.pop("grid", GRID),
        base=paths[0],
        output=output,
        model=model,
        options=Options(non_float="first"),
        **told,
    )


def test_every_point_scores_as_its_soup_does(paths: list[str], tmp_path: Path) -> None:
    """Scores are those of the files that the verb writes; the best of them is what is written."""
    model = networks.build()
    soup = sweep(paths, tmp_path / "soup", model=model)
    expected = []
    for i, told in enumerate(places(GRID)):
        made = streamsoup.ties(
            paths[1:],
            base=paths[0],
            output=tmp_path / f"{i}",
            options=Options(non_float="first"),
            **told,
        )
        expected.append(score_of(made.path))
    swept = soup.report["sweep"]
    assert [point["score"] for point in swept["points"]] == expected
    best = expected.index(max(expected))
    assert (swept["best"], soup.score, dict(soup.best)) == (best, max(expected), places(GRID)[best])
    assert weights(soup.path) == weights(tmp_path / f"{best}")
    assert networks.score(model.eval()) == soup.score
    assert streamsoup.verify(soup.path).rederived
    mean = streamsoup.uniform(
        paths[1:], output=tmp_path / "mean", options=Options(non_float="first")
    )
    assert swept["compared"] == {"the base": score_of(paths[0]), "the mean": score_of(mean.path)}
    assert not Path(f"{soup.path}.search").exists()


class Mixes:
    """Scores in a model of its own, and is killed before it gives its n-th score."""

    name, fingerprint, split, n_at_once = "mixes", "1", "val", 1

    def __init__(self, n: int = -1) -> None:
        self.left, self.asked = n, 0

    def prepare(self, recipe: Any) -> None:
        """Need nothing."""

    def score(self, candidate: Candidate) -> float:
        """Mix the recipe of the candidate into a fresh model."""
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += 1
        model, recipe = networks.build(), candidate.recipe
        options = Options(non_float="first")
        streamsoup.mix_into(model, recipe.ingredients, recipe.rule, options=options)
        return networks.score(model.eval())

    def close(self) -> None:
        """Hold nothing."""


@pytest.mark.parametrize("n_before", [1, 3, 5])
def test_a_sweep_resumes_with_the_scores_it_has(
    paths: list[str], tmp_path: Path, n_before: int
) -> None:
    """Killed after any score, the same call asks for the others alone, and ends the same."""
    whole = sweep(paths, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sweep(paths, tmp_path / "soup", Mixes(n_before))
    assert not (tmp_path / "soup").exists()
    scorer = Mixes()
    again = sweep(paths, tmp_path / "soup", scorer)
    assert scorer.asked == 6 - n_before
    assert (again.report["n_resumed"], again.report["n_scored"]) == (n_before, 6 - n_before)
    assert again.report["sweep"] == whole.report["sweep"]
    assert weights(again.path) == weights(whole.path)


def test_another_grid_is_another_sweep(paths: list[str], tmp_path: Path) -> None:
    """Scores of an unfinished sweep are refused for other points, and forgotten with restart."""
    with pytest.raises(KeyboardInterrupt):
        sweep(paths, tmp_path / "soup", Mixes(1))
    other = {"density": [0.3]}
    with pytest.raises(streamsoup.StreamsoupError, match=r"the grid, .* changed; .*restart"):
        sweep(paths, tmp_path / "soup", Mixes(), grid=other)
    settings = SweepSettings(restart=True)
    soup = sweep(paths, tmp_path / "soup", Mixes(), grid=other, settings=settings)
    assert soup.best == {"density": 0.3}


TOLD: dict[str, tuple[dict[str, list[float]], dict[str, Any]]] = {
    "arithmetic": ({"scale": [0.2, 0.4]}, {}),
    "ties": ({"density": [0.3, 0.7]}, {"rescale": "l1"}),
    "dare": ({"density": [0.3, 0.7]}, {"seed": 3}),
    "breadcrumbs": ({"gamma": [0.1, 0.2]}, {"density": 0.5}),
    "della": ({"epsilon": [0.1, 0.2]}, {"density": 0.5}),
    "sce": ({"select_topk": [0.1, 0.9]}, {}),
    "ram": ({"epsilon": [1e-5, 0.1]}, {}),
    "nearswap": ({"t": [0.01, 0.1]}, {}),
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_swept(paths: list[str], tmp_path: Path, method: str) -> None:
    """A scorer from outside is given recipes of the method, each with the point's parameter."""
    grid, told = TOLD[method]
    seen: list[Candidate] = []

    class Looks:
        name, fingerprint, split, n_at_once = "looks", "1", "val", 1

        def prepare(self, recipe: Any) -> None:
            """Need nothing."""

        def score(self, candidate: Candidate) -> float:
            """Prefer the last."""
            seen.append(candidate)
            return float(len(seen))

        def close(self) -> None:
            """Hold nothing."""

    others = paths[1:2] if method == "nearswap" else paths[1:]
    options = Options(non_float="first")
    soup = streamsoup.sweep(
        others, method, Looks(), grid, base=paths[0], output=tmp_path / "soup",
        options=options, **told,
    )  # fmt: skip
    ((name, values),) = grid.items()
    assert [each.text for each in seen[2:]] == [f"{name} {value:g}" for value in values]
    assert soup.recipe.rule == seen[-1].recipe.rule != seen[-2].recipe.rule
    told = {**told, name: values[-1]}
    verb = getattr(streamsoup, method)
    made = verb(others, base=paths[0], output=tmp_path / "made", options=options, **told)
    assert weights(soup.path) == weights(made.path)


def test_what_cannot_be_swept_is_refused(paths: list[str], tmp_path: Path) -> None:
    """A parameter that the verb has not, a value out of range at any point, an empty grid."""
    for grid, message in [
        ({"dansity": [0.5]}, "ties: .*dansity"),
        ({"density": [0.5, 1.5]}, "density must be between 0 and 1, got 1.5"),
        ({"density": []}, "needs a parameter"),
        ({}, "needs a parameter"),
        ({"density": ["a"]}, "density: 'a' is not a number"),
    ]:
        with pytest.raises(RecipeError, match=message):
            sweep(paths, tmp_path / "soup", grid=grid)
    with pytest.raises(RecipeError, match="method"):
        streamsoup.sweep(
            paths[1:], "slerp", networks.score, GRID, base=paths[0], output=tmp_path / "soup"
        )
    with pytest.raises(RecipeError, match="part: only soups made by a formula"):
        streamsoup.sweep(
            paths[1:], "ties", Mixes(0), GRID, base=paths[0], output=tmp_path / "soup",
            options=Options(non_float="first", part="1/2"),
        )  # fmt: skip
    with pytest.raises(TaskError, match="every score is NaN"):
        sweep(paths, tmp_path / "soup", lambda model: float("nan"), model=networks.build())
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    "words",
    [
        "plan uniform a b --print-recipe",
        "sweep interpolate a b --alpha 0:1:.5 --command {checkpoint} -o soup --print-recipe",
    ],
)
def test_what_is_swept_or_planned_prints_no_recipe(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """--print-recipe after a command that is not run itself is refused, with the reason."""
    assert cli(words.split()) == 2
    assert "--print-recipe is for the command itself" in capsys.readouterr().err


def test_a_failing_task_names_the_point(paths: list[str], tmp_path: Path) -> None:
    """The message says at which parameters the task failed."""

    def fails(model: Any) -> float:
        raise ValueError("no")

    with pytest.raises(TaskError, match="the candidate is the base"):
        sweep(paths, tmp_path / "soup", fails, model=networks.build())


def test_progress_counts_the_points(paths: list[str], tmp_path: Path) -> None:
    """A step for each point, and one before the first."""
    steps: list[Step] = []

    def on_event(event: object) -> None:
        if isinstance(event, Step):
            steps.append(event)

    streamsoup.sweep(
        paths[1:],
        "dare",
        networks.score,
        {"density": [0.5]},
        base=paths[0],
        output=tmp_path / "soup",
        model=networks.build(),
        options=Options(non_float="first", on_event=on_event),
    )
    assert [(step.n_done, step.n) for step in steps] == [(i, 3) for i in range(4)]


def test_the_command_sweeps_and_reports(
    paths: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranges become a grid; table, page, rows and picture agree with the soup's own report."""
    task = tmp_path / "task.py"
    task.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                    "from networks import build, score\n")  # fmt: skip
    out, report = tmp_path / "out", tmp_path / "report"
    words = ["sweep", "ties", *paths[1:], "--base", paths[0], "--density", ".2:.6:.4"]
    words += ["--lambda=.5:1:.5", "--non-float", "first", "--task", str(task), "-o", str(out)]
    assert cli([*words, "--report", str(report)]) == 0
    said = capfd.readouterr().out
    assert said.count("best") >= 2
    found = json.loads((out / "streamsoup.json").read_text())["report"]
    same = sweep(paths, tmp_path / "same").report["sweep"]
    scores = [point["score"] for point in same["points"]]
    assert [point["score"] for point in found["sweep"]["points"]] == scores
    assert weights(out) == weights(tmp_path / "same")
    rows = [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows if row["kind"] == "point"] == scores
    assert (report / "report.html").exists()
    for extra, message in [
        (["sweep", "ties", paths[1], "--base", paths[0], "--density", ".5"], "nothing to sweep"),
        (["sweep", "nothing"], "first the command"),
        (["sweep", "nuslerp", *paths[1:3], "-t", "0:1:.5"], "cannot be swept"),
    ]:
        assert cli([*extra, "--task", str(task), "-o", str(tmp_path / "x")]) == 2
        assert message in capfd.readouterr().err


def test_seeds_are_whole_numbers(
    paths: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A seed can be swept, in the library and on the command line."""
    soup = streamsoup.sweep(
        paths[1:], "dare", Mixes(), {"seed": [4, 7]}, base=paths[0], density=0.5,
        output=tmp_path / "soup", options=Options(non_float="first"),
    )  # fmt: skip
    assert dict(soup.best) in ({"seed": 4}, {"seed": 7})
    words = ["sweep", "dare", *paths[1:], "--base", paths[0], "--density", ".5", "--seed", "4:7:3"]
    words += ["--non-float", "first", "--json", "-o", str(tmp_path / "out")]
    score = f"{sys.executable} -c \"import os; print(os.path.getsize('{{checkpoint}}'))\""
    assert cli([*words, "--command", score]) == 0
    found = json.loads(capfd.readouterr().out)["report"]["sweep"]
    assert [point["values"] for point in found["points"]] == [{"seed": 4}, {"seed": 7}]


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_pictures_of_one_and_two_parameters(n_axes: int) -> None:
    """A curve, a heat map, and for more parameters a table alone."""
    names = ["density", "lambda", "gamma"][:n_axes]
    points = [
        {"values": values, "score": sum(values.values())}
        for values in places(dict.fromkeys(names, (0.1, 0.2)))
    ]
    report = {
        "split": "val",
        "sweep": {
            "method": "ties",
            "parameters": names,
            "points": points,
            "best": len(points) - 1,
            "compared": {"the base": 0.15, "the mean": 0.9},
        },
    }
    page = sweeps.page(report, ())
    assert list(page.to_pictures()) == ["sweep.svg"] * (n_axes < 3)
    values = [f"{point['score']:.6g}" for point in points]
    if n_axes == 1:
        (plot,) = [block for block in page.blocks if isinstance(block, Plot)]
        assert [(p.x, p.y) for p in plot.series[0].points] == [(0.1, 0.1), (0.2, 0.2)]
        assert [each.name for each in plot.series] == ["ties", "best", "the base", "the mean"]
    elif n_axes == 2:
        heat = next(block for block in page.blocks if isinstance(block, Table))
        assert [cell for row in heat.rows for cell in row[1:]] == values
        assert heat.shades[0, 1] == 0
        assert heat.shades[1, 2] == 1
        assert heat.bold == {(1, 2)}
    lines = sweeps.lines(report)
    assert lines[0].split()[:n_axes] == names
    assert lines[len(points)].endswith("best")
    assert lines[-1].startswith("the mean scores 0.9")
    assert "A sweep of ties" in page.to_markdown("plots")
