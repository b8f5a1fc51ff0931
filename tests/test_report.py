"""Reports: whole, self-contained, honest; and the paper's own 72 models through them."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from checkpoints import command
from msgspec.structs import replace
from networks import ingredients
from safetensors.numpy import save_file

import streamsoup
from streamsoup.cli.compare import _table
from streamsoup.errors import OutputError
from streamsoup.search.trials import best_first
from streamsoup.study.landscape.landscape import Landscape, Mark
from streamsoup.study.landscape.paths import Sweep
from streamsoup.study.landscape.plane import Plane
from streamsoup.study.measures.rows import (
    MEAN,
    Cell,
    Comparison,
    CurvePoint,
    Gain,
    Pair,
    Row,
    Splits,
)
from streamsoup.study.names import short_names
from streamsoup.study.pages.blocks import Code, Heading, Plot, Table, Text
from streamsoup.study.pages.page import Page
from streamsoup.study.plot import plot_coefficients, plot_geometry
from streamsoup.study.report import comparison_plots, figures
from streamsoup.study.report.comparison import verdict
from streamsoup.study.report.paths import draw_landscape, sweep_page
from streamsoup.study.report.write import write_report

CLIP = Path(__file__).parents[2] / "shared" / "data" / "clip72"

published = pytest.mark.skipif(not CLIP.is_dir(), reason="the published scores are not here")
drawn = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("matplotlib"), reason="needs matplotlib"
)


def lines(name: str) -> list[dict[str, Any]]:
    """Read the published scores."""
    return [json.loads(line) for line in (CLIP / name).read_text().splitlines()]


def of_paper() -> Comparison:
    """Put the published scores of 72 models, and of two soups, into a comparison."""
    shifts = ("ImageNetV2", "ImageNetSketch", "ImageNetR", "ObjectNet", "ImageNetA")
    splits = Splits("ImageNet2p", "ImageNet", shifts)

    def row(name: str, kind: Any, scores: dict[str, Any], n: int) -> Row:
        cells = {split: Cell(float(scores[split])) for split in splits.all}
        cells[MEAN] = Cell(float(np.mean([scores[split] for split in shifts])))
        return Row(name, kind, cells, n, 1)

    models = lines("individual_model_results.jsonl")
    singles = [row(each["model_name"], "ingredient", each, 1) for each in models]
    best = singles[best_first([r.cells["ImageNet2p"].value for r in singles])[0]]
    (uniform,) = lines("uniform_soup_results.jsonl")
    (greedy,) = lines("greedy_soup_results.jsonl")
    rows = (
        *singles,
        Row(f"best on ImageNet2p: {best.name}", "best", best.cells, 1, 1),
        row("uniform soup", "soup", uniform, 72),
        row("greedy soup", "soup", greedy, 5),
    )
    names = tuple(each["model_name"] for each in models)
    return Comparison(splits, names, names, "accuracy", True, rows)


@published
def test_the_papers_order_and_its_ties() -> None:
    """Best first by the held-out score; the models that tie exactly stay in the order given."""
    models = lines("individual_model_results.jsonl")
    scores = [each["ImageNet2p"] for each in models]
    order = best_first(scores)
    assert models[order[0]]["model_name"] == "model_43"
    for before, after in pairwise(order):
        assert (-scores[before], before) < (-scores[after], after)
    ties = [(i, j) for i, j in pairwise(order) if scores[i] == scores[j]]
    assert ties == [(4, 5)]


@published
def test_the_papers_scatter(tmp_path: Path) -> None:
    """72 models and the published soups are in the picture, at the published places."""
    found = of_paper()
    (plot,) = comparison_plots.scatter(found)
    points = {each.name: each.points for each in plot.series}
    assert len(points["ingredients (72)"]) == 72
    for name in ("uniform soup", "greedy soup"):
        (scores,) = lines(f"{name.replace(' ', '_')}_results.jsonl")
        shifts = np.mean([scores[split] for split in found.splits.shifts])
        (point,) = points[name]
        assert (point.x, point.y) == pytest.approx((100 * scores["ImageNet"], 100 * shifts))
    assert not any(point.name for point in points["ingredients (72)"])  # too many to be written
    page = Path(write_report(found, tmp_path)).read_text()
    assert "81.03" in page
    assert "wins on" not in page  # there are no results by example


class Checker(HTMLParser):
    """Notes tags that are not closed, and whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.loaded += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        self.loaded += [v for _, v in attrs if v and "url(" in v]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def small(name: str = "a<b>|*c*") -> Comparison:
    """Make a comparison with everything in it, by hand."""
    splits = Splits("val", "test", ("far", "farther"))
    rng = np.random.default_rng(0)

    def cells(gain: float) -> dict[str, Cell]:
        over = Gain(gain, gain - 0.015, gain + 0.015)
        return {
            column: Cell(
                0.8 + gain, 0.7, 0.9, nll=0.5, ece=0.1, nll_scaled=0.4, ece_scaled=0.05,
                over_best=over,
            )
            for column in splits.columns
        }  # fmt: skip

    worse = {
        "far": Cell(0.7, over_best=Gain(-0.1, -0.2, -0.01)),
        "farther": Cell(0.7, over_best=Gain(-0.1)),
    }
    rows = (
        Row(name, "ingredient", cells(0.0), 1, 1, (0,), 1.5),
        Row("run1", "ingredient", cells(-0.01), 1, 1, (1,), 1.2),
        Row(f"best on val: {name}", "best", cells(0.0), 1, 1, (0,), 1.5),
        Row("uniform soup", "soup", cells(0.02), 2, 1, (0, 1), 1.5),
        Row("greedy soup", "soup", {**cells(0.0), **worse}, 1, 1, (0,), 1.5),
        Row(
            "learned soup",
            "soup",
            {c: Cell(0.5) for c in splits.columns},
            2,
            1,
            (0, 1),
            groups=("layers.0", "head"),
            coefficients=((0.25, 0.75), (1.5, -0.5)),
        ),
        Row("ensemble of all", "ensemble", cells(0.03), 2, 2, (0, 1), 1.5),
    )
    curves = tuple(
        CurvePoint(method, n, dict.fromkeys(splits.columns, 0.8))
        for method in ("best on validation", "uniform soup", "greedy soup", "ensemble of all")
        for n in (1, 2)
    )
    pairs = (Pair(0, 1, 70.0, 0.01, *rng.standard_normal(3)),)
    return Comparison(
        splits, (name, "run1"), (name, "run1"), "accuracy", True, rows, curves, pairs,
        notes=("A note.",), n_examples={"val": 10}, commands=("streamsoup compare <a> b",),
    )  # fmt: skip


def test_a_report_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    """One HTML file with closed tags and its plots inside; Markdown and rows beside it."""
    page = Path(write_report(small(), tmp_path))
    checker = Checker()
    checker.feed(page.read_text())
    assert (checker.open, checker.loaded, checker.handlers) == ([], [], [])
    assert page.read_text().count("<svg") == 8
    who = "greedy soup: 1 of 2: a<b>|*c*."
    for text in (
        who,
        "uniform soup: all 2.",
        "0.875",
        "0.125",
        "streamsoup compare <a> b",
        "A note.",
        "82.00 [70.00, 90.00]",
    ):
        assert text in checker.text
    # Calibration before and after scaling: every row that has some, in every column.
    for pair in ("0.500 → 0.400", "10.0 → 5.0"):
        assert checker.text.count(pair) == 4 * 5 - 2
    markdown = (tmp_path / "report.md").read_text()
    assert r"a\<b>\|\*c\*" in markdown
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("](")[2].rstrip(")")).is_file()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("curve") == 8
    assert rows[5]["cells"]["far"]["low"] is None
    before = page.read_bytes()
    write_report(small(), tmp_path)
    assert page.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_report_shows_what_steers_a_terminal_as_escapes(tmp_path: Path) -> None:
    """Control characters and marks that turn a line around reach neither Markdown nor HTML."""
    nasty = "x\x1b[2J\u202egnp.exe\u2066\x07\x9b"
    blocks = [
        Heading(nasty),
        Text(nasty),
        Code([nasty, nasty]),
        Table([nasty, nasty], [[nasty, nasty]], frozenset({0})),
    ]
    page = Page(nasty, blocks)
    for text in (page.to_markdown("plots"), page.to_html()):
        assert text.replace("\n", "").isprintable()
        assert text.count("u202e") >= 9


def test_a_report_writes_through_no_planted_link(tmp_path: Path) -> None:
    """Links where a report or its temporary files go are replaced or refused, never followed."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "report"
    write_report(small(), folder)
    (folder / "report.md").unlink()
    (folder / "rows.jsonl").unlink()
    for name in ("report.md", "rows.jsonl", "report.html.partial", "rows.jsonl.partial"):
        (folder / name).symlink_to(mine)
    write_report(small(), folder)
    assert mine.read_text() == "precious"
    assert not (folder / "report.md").is_symlink()
    (tmp_path / "pictures").mkdir()
    other = tmp_path / "other"
    write_report(small(), other)
    shutil.rmtree(other / "plots")
    (other / "plots").symlink_to(tmp_path / "pictures")
    with pytest.raises(OutputError, match="plots: is a link"):
        write_report(small(), other)
    assert not list((tmp_path / "pictures").iterdir())


def test_short_names_are_distinct() -> None:
    """Checkpoints whose names differ in the middle alone are told apart."""
    paths = [f"runs/vit-b32-lr1e-{lr}-wd0.1-seed3-ep10/checkpoint-1000" for lr in range(3, 15)]
    names = short_names([*paths, "runs/other/checkpoint-1000", paths[0]], 24)
    assert len(set(names)) == 14
    assert max(map(len, names)) <= 24
    assert names[12] == "other"


def test_verdict_names_losses() -> None:
    """Wins and losses are told by split where an interval says so; the rest is no difference."""
    found = small()
    rows = {row.name: row for row in found.rows}
    assert verdict(found, rows["greedy soup"]) == (
        "greedy soup, against the best on val: loses on far; no difference on val, test; "
        "no difference can be shown on farther without results by example."
    )
    assert "wins on val, test, far, farther" in verdict(found, rows["uniform soup"])
    assert "has no score" in verdict(found, rows["learned soup"])


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.001, 0.1, "wins"),
        (-0.1, -0.001, "loses"),
        (0.0, 0.1, "no difference"),
        (-0.1, 0.1, "no difference"),
        (math.nan, math.nan, "untested"),
    ],
)
def test_an_interval_decides(low: float, high: float, outcome: str) -> None:
    """A difference counts only if its interval leaves 0 out, however large it is."""
    assert Gain(0.05, low, high).outcome == outcome


def test_the_base_is_judged_too() -> None:
    """The base is set against the best on validation, and every soup against the base."""
    found = small()
    lost = {c: Cell(0.1, over_best=Gain(-0.7, -0.8, -0.6)) for c in found.splits.columns}
    base = Row("base", "base", lost, 1, 1, (2,))
    won = {
        column: replace(cell, over_base=Gain(0.7, 0.6, 0.8))
        for column, cell in found.rows[3].cells.items()
    }
    soup = replace(found.rows[3], cells=won)
    found = replace(found, rows=(base, *found.rows[:3], soup))
    assert verdict(found, base) == (
        "base, against the best on val: loses on val, test, far, farther."
    )
    assert verdict(found, soup).endswith("Against the base: wins on val, test, far, farther.")


def test_bold_is_the_best_of_a_column(tmp_path: Path) -> None:
    """One row may be the best of one column and another of the next; the oracle takes no part."""
    found = small()
    columns = found.splits.columns
    oracle = Row("oracle best", "oracle", {c: Cell(0.99) for c in columns}, 1, 1)
    rows = [oracle, *found.rows]
    far = {**rows[-2].cells, "far": Cell(0.95)}
    rows[-2] = replace(rows[-2], cells=far)
    write_report(replace(found, rows=tuple(rows)), tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith(("| oracle", "| ensemble", "| learned"))]
    oracle_line, learned_line, ensemble_line = table[:3]
    assert "**" not in oracle_line
    assert learned_line.count("**") == 2
    assert "**95.00**" in learned_line
    assert ensemble_line.count("**") == 2 * (len(columns) - 1)


def test_tables_fit_a_terminal() -> None:
    """Columns that do not fit are printed below, with the names again; none is lost."""
    found = small()
    splits = Splits("val", "test", tuple(f"shift-{n}-of-a-long-name" for n in range(9)))
    cells = {c: Cell(0.5 + n / 100) for n, c in enumerate(splits.columns)}
    rows = tuple(replace(row, cells=cells) for row in found.rows)
    for width in (80, 40):
        lines = _table(replace(found, splits=splits, rows=rows), width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        for n in range(len(splits.columns)):
            assert text.count(f"{50 + n}.00") == len(rows) - 2
    assert len(_table(found, 200)) == len(found.rows) - 1


def test_percent_only_where_the_task_says_so(tmp_path: Path) -> None:
    """A score keeps its name and its scale, even between 0 and 1; the picture says the same."""
    found = replace(small(), metric="matthews", is_share=False)
    page = Path(write_report(found, tmp_path)).read_text()
    assert "The matthews, larger is better" in page
    assert "0.82 [0.7, 0.9]" in page
    assert "82.00" not in page
    first, *_ = comparison_plots.intervals(found)
    assert first.across == "matthews on test"


def test_coefficients_are_shown() -> None:
    """Each learned soup has a heat map with its numbers, in the places of its members."""
    (table,) = comparison_plots.heat_maps(small("plain"))
    assert table.head == ["tensors", "plain", "run1"]
    assert table.rows == [["layers.0", "0.2500", "0.7500"], ["head", "1.5000", "-0.5000"]]
    assert table.shades == {(0, 1): 0.375, (0, 2): 0.625, (1, 1): 1.0, (1, 2): 0.0}


def test_axes_of_a_path_name_its_ends() -> None:
    """What is at α = 0 and at α = 1 stands below the axis."""
    values = {"val": (0.5, 0.9)}
    ends = ("runs/base/model", "runs/tuned$/model")
    found = Sweep(ends, Splits("val", None, ()), "f1", (0.0, 1.0), values, {})
    (plot,) = [block for block in sweep_page(found, ()).blocks if isinstance(block, Plot)]
    assert (plot.across, plot.up) == ("α, from base to tuned$", "f1")
    assert [(p.x, p.y) for p in plot.series[0].points] == [(0.0, 0.5), (1.0, 0.9)]


def test_text_cannot_become_markup() -> None:
    """Whatever names hold, it is shown and not obeyed."""
    nasty = "<script>alert(1)</script> [x](y) `z` &lt; ~~a~~ $b$"
    code = Code(["<x>", "```", "a"])
    page = Page("t", [Heading("h"), Text(nasty), Table(["a", "b"], [[nasty, "1"]]), code])
    html = page.to_html()
    assert html.count("<script>") == 1  # the page's own
    assert "script-src 'sha256-" in html
    assert "&lt;script&gt;" in html
    markdown = page.to_markdown("plots")
    assert r"\<script>alert(1)\</script> \[x](y) \`z\` \&lt; \~\~a\~\~ \$b\$" in markdown
    assert "````\n<x>\n```\na\n````\n" in markdown


def test_names_of_splits_break_no_table() -> None:
    """Heads of tables, and what pictures show, are escaped as cells are."""
    table = Table(["", "a|b", "<b>"], [["x", "1", "2"]])
    plot = Plot("p", "On [a|b]", "x", "y", ())
    markdown = Page("t", [table, plot]).to_markdown("plots of (a)")
    assert "|  | a\\|b | \\<b> |\n| --- | ---: | ---: |\n| x | 1 | 2 |" in markdown
    assert "![On \\[a\\|b]](plots%20of%20%28a%29/p.svg)\n\nOn \\[a\\|b]" in markdown


@drawn
@pytest.mark.parametrize("end", [".png", ".svg", ".pdf"])
def test_heat_maps_draw_names_as_they_are(tmp_path: Path, end: str) -> None:
    """No checkpoint and no layer is taken for a formula, and none draws a warning."""
    files = []
    for i, name in enumerate(("m$x^$", "$\\frac$", "模型", "$")):
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file({"w": np.random.default_rng(i).normal(size=9)}, files[-1])
    for base in (files[3], None):
        plot_geometry(streamsoup.geometry(files, base=base), str(tmp_path / f"angles{end}"))
    names = ["$\\frac$", "模型"]
    plot_coefficients(np.eye(2), ["层$x^$", "_$"], names, str(tmp_path / f"coefficients{end}"))
    assert len(list(tmp_path.glob(f"*{end}"))) == 2
    if end == ".svg":
        text = (tmp_path / "coefficients.svg").read_text()
        assert "<!-- $\\frac$ -->" in text


@drawn
def test_names_cover_nothing(tmp_path: Path) -> None:
    """Names beside points cover neither names nor points; without room they are left out."""
    from streamsoup.study.report.figures import new_figure, place_names

    rng = np.random.default_rng(0)
    named = [(f"a-long-name-{i}", *rng.normal(size=2)) for i in range(14)]
    for always in (False, True):
        figure = new_figure(6, 4)
        axes = figure.add_subplot()
        axes.scatter(*zip(*(spot[1:] for spot in named), strict=True))
        place_names(figure, axes, named, always=always, fontsize=8)
        boxes = [text.get_window_extent() for text in axes.texts]
        overlaps = sum(box.count_overlaps(boxes) - 1 for box in boxes)
        points = axes.transData.transform([spot[1:] for spot in named])
        covered = sum(box.contains(*point) for box in boxes for point in points)
        assert (len(boxes) == 14) == always
        assert (overlaps + covered == 0) != always
        assert len(boxes) > 7


def test_a_path_in_words_and_lines(tmp_path: Path) -> None:
    """The chosen α stands out; both barriers are named; the picture is drawn."""
    values = {"val": (0.5, 0.9, 0.9), "test": (0.5, 0.4, 0.8)}
    found = Sweep(
        ("a", "b"), Splits("val", "test", ()), "accuracy", (0.0, 0.5, 1.0), values, {}, 0, True
    )
    assert found.best == 0.5
    text = sweep_page(found, ("cmd",)).to_markdown("plots")
    assert "**0.5**" in text
    assert "| test | 25.00 | 25.00 | – | – | -25.00 |" in text
    assert "over the chord" in text.lower()
    write_report(found, tmp_path / "path.md", commands=("cmd",))
    assert (tmp_path / "path-plots" / "score.svg").stat().st_size > 1000
    assert math.isnan(
        Sweep(("a", "b"), found.splits, "x", (0.5,), {"val": (1.0,), "test": (1.0,)}, {}).advantage(
            "val"
        )
    )


@drawn
@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_a_plane_without_hills(tmp_path: Path, value: float) -> None:
    """What is nowhere a number, or the same everywhere, is drawn too; its rows are JSON."""
    plane = Plane(2.0, 0.5, 1.5)
    xs, ys = plane.grid(3, 0.1)
    values = {"val": np.full((len(ys), len(xs)), value)}
    found = Landscape(plane, xs, ys, values, values, (Mark("base", 0.0, 0.0, False),))
    draw_landscape(found, str(tmp_path / "plane.png"))
    assert (tmp_path / "plane.png").stat().st_size > 1000
    rows = [json.loads(line, parse_constant=pytest.fail) for line in found.to_lines()]
    assert rows[1]["nll"] == (None if math.isnan(value) else value)


TASK = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, networks
torch.set_num_threads(1)
splits = ["val", "test", "far"]
def build():
    return networks.build()
def predictions(model, split):
    inputs, labels = networks.data(splits.index(split), 60)
    for some in torch.arange(60).split(6):
        yield model(inputs[some]), labels[some]
print("ready")
os.system("echo ready, too")
def score(model, split):
    right = [(logits.argmax(1) == labels).sum() for logits, labels in predictions(model, split)]
    return float(sum(right)) / 60
"""


@drawn
def test_the_commands(tmp_path: Path) -> None:
    """compare, interpolate --alphas and landscape end in pages and pictures; runs are resumed."""
    task = tmp_path / "task.py"
    task.write_text(TASK.format(tests=str(Path(__file__).parent)))
    folders = ingredients(tmp_path / "in", 4)
    run = (
        "compare",
        *folders[1:],
        "--base",
        folders[0],
        "--task",
        task,
        "-q",
        "-o",
        tmp_path / "out",
    )
    first = command(*run, "--orders", 1, "--curve", 2, "--pairs", 2)
    assert (first.returncode, first.stderr) == (0, "")
    assert "learned soup, by layer" in first.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "streamsoup compare" in page
    assert page.count("<svg") == 8
    again = command(*run, "--orders", 1, "--curve", 2, "--pairs", 2, "--json")
    assert again.returncode == 0
    assert sorted(again.stderr.splitlines()) == ["ready", "ready, too"]
    printed = json.loads(again.stdout)
    assert any("BatchNorm" in each for each in printed[0]["warnings"])  # though it was quiet
    kinds = {row["kind"] for row in printed}
    assert kinds >= {"comparison", "ingredient", "base", "oracle", "soup", "ensemble", "pair"}

    swept = command(
        "interpolate",
        *folders[:2],
        "--alphas",
        "0:1:0.5",
        "--task",
        task,
        "-q",
        "-o",
        tmp_path / "path",
    )
    assert (swept.returncode, swept.stderr) == (0, "")
    assert "best α on val" in swept.stdout
    assert (tmp_path / "path" / "plots" / "score.svg").is_file()
    wrong = command("interpolate", *folders[:2], "--alphas", "0:1:0.5", "-o", tmp_path / "x")
    assert wrong.returncode == 2
    assert "--task" in wrong.stderr
    wrong = command("interpolate", *folders[:2], "--recalibrate", "-o", tmp_path / "x")
    assert wrong.returncode == 2
    assert "for a sweep" in wrong.stderr

    picture, thesis = tmp_path / "plane.png", tmp_path / "plane.jsonl"
    thesis.write_text("mine")
    taken = command("landscape", *folders[:3], "--task", task, "--plot", picture)
    assert taken.returncode == 1
    assert "not a landscape of streamsoup" in taken.stderr
    assert thesis.read_text() == "mine"
    thesis.unlink()
    plane = command(
        "landscape", *folders[:3], "--task", task, "--plot", picture, "--resolution", 4, "-q"
    )
    assert (plane.returncode, plane.stderr) == (0, "")
    assert picture.stat().st_size > 10_000
    assert (tmp_path / "plane.jsonl").read_text().count('"point"') >= 8


def test_a_picture_is_whole_or_absent_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figure gives the same bytes, SVG too; one that fails leaves nothing behind."""
    contents = []
    for name in ("a.svg", "b.svg"):
        figure = figures.new_figure(2, 2)
        figure.add_subplot().plot([0, 1], [1, 0])
        figures.save(figure, str(tmp_path / name))
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    figure = figures.new_figure(2, 2)

    def fail(file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OutputError, match="No space left"):
        figures.save(figure, str(tmp_path / "c.svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
