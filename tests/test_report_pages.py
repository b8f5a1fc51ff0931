"""Pages of searches and geometries, where they may be written, and all pages in a browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
from learning import files, learn
from networks import ingredients
from safetensors.numpy import save_file
from test_report import Checker, small

import streamsoup
from streamsoup.cli import cli
from streamsoup.errors import OutputError, OutputExistsError, RecipeError
from streamsoup.study.pages.axes import axis
from streamsoup.study.pages.blocks import Heading, Plot, Point, Series, Table, Text, shades
from streamsoup.study.pages.heat import heat_map
from streamsoup.study.pages.page import Page
from streamsoup.study.pages.svg import SHAPES, draw, standing_alone
from streamsoup.study.report import searches
from streamsoup.study.report.write import write_report

NASTY = "x\"'><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp\x1b[2J\x9b"
"""A name that would be markup, an attribute, a script, and would turn a line around."""

in_a_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")


def trial(name: str, kind: str, value: float, decision: str, **more: Any) -> dict[str, Any]:
    """Return a trial as the report of a search has it."""
    nothing = {"known": False, "nbytes_read": 10, "nbytes_sums": 0, "mixing_s": 0.1}
    return {"ingredient": name, "kind": kind, "score": value, "decision": decision,
            "members": [0], "scoring_s": 0.5} | nothing | more  # fmt: skip


def search(names: tuple[str, str, str] = ("in/a", "in/b", "in/c")) -> dict[str, Any]:
    """Return the report of a search that keeps two of three, written out by hand."""
    a, b, c = names
    trials = [
        trial(a, "add", 0.5, "kept", known=True),
        trial(b, "add", 0.625, "kept", to_beat=0.5, metrics={"f1": 0.25}),
        trial(c, "add", math.nan, "left out", to_beat=0.625),
    ]
    return {
        "rules": {"ties": "accept", "direction": "forward", "jobs": 1},
        "ingredients": list(names), "members": [0, 1], "kept": [a, b], "score": 0.625,
        "split": "val", "singles": [trial(a, "single", 0.5, "scored"),
                                    trial(b, "single", 0.25, "scored")],
        "runs": [{"order": [0, 1, 2], "members": [0, 1], "score": 0.625, "trials": trials}],
        "n_scored": 4, "n_resumed": 0, "nbytes_read": 40, "nbytes_sums": 0,
        "seconds": {"search": 2.0, "scoring": 1.0, "mixing": 0.3},
    }  # fmt: skip


def test_a_search_on_a_page() -> None:
    """Who is in the soup, each trial with its decision, and what is better by how much."""
    page = searches.page(search(), ["streamsoup greedy"])
    markdown = page.to_markdown("plots")
    assert (
        "keeps 2 of 3 ingredients: 0.625 on val, +0.125 over the best ingredient, a (0.5)"
        in markdown
    )
    assert (
        "| a | 0.5 | **yes** | in/a |\n| b | 0.25 | **yes** | in/b |\n| c | – | no | in/c |"
        in markdown
    )
    assert "| 2 | add b | 0.625 | 0.5 | +0.125 | **kept** | 0.50 | 0.10 |" in markdown
    assert "| 3 | add c | – | 0.625 | – | left out | 0.50 | 0.10 |" in markdown
    assert "4 scores in 2.00 s; 50.0 % of it beyond scoring" in markdown
    assert "f1: 0.25" in page.to_html()
    (plot,) = [block for block in page.blocks if isinstance(block, Plot)]
    shown = {each.name: [(p.x, p.y) for p in each.points] for each in plot.series}
    assert shown["the soup so far"] == [(1, 0.5), (2, 0.625), (3, 0.625)]
    assert shown["kept"] == [(1, 0.5), (2, 0.625)]
    rows = [json.loads(row) for row in searches.rows(search())]
    assert [row["run"] for row in rows] == [None, None, 0, 0, 0]


def test_a_search_backwards_draws_what_changed_the_soup() -> None:
    """Backward, an ingredient that is kept changes nothing, and one that is dropped does."""
    report = search()
    trials = [
        trial("in/c", "all", 0.5, "kept"),
        trial("in/c", "drop", 0.625, "dropped", to_beat=0.5),
        trial("in/b", "drop", 0.25, "kept", to_beat=0.625),
    ]
    report["runs"] = [{"members": [0, 1], "trials": trials}]
    (plot,) = [b for b in searches.page(report, ()).blocks if isinstance(b, Plot)]
    so_far, *others = plot.series
    assert [p.y for p in so_far.points] == [0.5, 0.625, 0.625]
    assert [(s.name, s.filled, [p.x for p in s.points]) for s in others] == [
        ("kept", True, [1]), ("dropped", True, [2]), ("kept", False, [3]),
    ]  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Save two checkpoints and a base."""
    values = {"base": [0, 0, 0], "a": [3, 0, 0], "b": [0, 4, 0]}
    for name, each in values.items():
        save_file({"w": np.array(each, np.float32)}, str(tmp_path / f"{name}.safetensors"))
    return [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "base")]


def test_a_geometry_on_a_page(pair: list[str], tmp_path: Path) -> None:
    """Distances of 3, 4 and 5, and a right angle, are in the tables and below the pointer."""
    *checkpoints, base = pair
    assert cli(["geometry", *checkpoints, "--base", base, "-q", "--report",
                str(tmp_path / "g.md")]) == 0  # fmt: skip
    text = (tmp_path / "g.md").read_text()
    assert "| a | 3 | 100 | 33.33 | 90.0 | 90.0 | b | 5 |" in text
    assert "| a | – | 90.0 |\n| b | 90.0 | – |" in text
    assert "| w | 3 | 3.5 | 100 | 33.33 | 90.0 |" in text
    assert sorted(p.name for p in (tmp_path / "g-plots").iterdir()) == [
        "angles.svg", "distances.svg", "tensors.svg",
    ]  # fmt: skip
    found = streamsoup.geometry(checkpoints)
    page = Path(write_report(found, tmp_path / "folder"))
    assert 'title="a and b: 5"' in page.read_text()
    assert "Angles" not in page.read_text()
    rows = (page.parent / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["kind"] for row in rows] == ["geometry", "tensor"]


def test_greedy_reports_what_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The page is refused before the first score, or written; a finished soup still has it."""
    folders = ingredients(tmp_path / "in", 2)
    command = "echo 0.5 # {checkpoint}"
    out, mine = tmp_path / "out", tmp_path / "mine.html"
    mine.write_text("<p>mine")
    words = ["greedy", *folders, "--command", command, "--non-float", "first", "-o", str(out)]
    assert cli([*words, "--report", str(mine)]) == 1
    assert "not a report of streamsoup" in capfd.readouterr().err
    assert mine.read_text() == "<p>mine"
    assert not out.exists()
    for inside in (out, tmp_path, out / "page.html"):
        assert cli([*words, "--report", str(inside)]) == 1
        assert "is not apart from the soup" in capfd.readouterr().err
    page = tmp_path / "page.html"
    assert cli([*words, "--report", str(page)]) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == f"see {page}"
    assert "streamsoup" in page.read_text()
    assert "keeps 2 of 2 ingredients: 0.5 on" in page.read_text()
    recipe = ["greedy", *folders, "--command", command, "--report", "r.html", "--print-recipe"]
    assert cli(recipe) == 0
    assert "report: r.html" in capfd.readouterr().out


def test_a_learned_soup_on_a_page(tmp_path: Path) -> None:
    """Coefficients, losses and the chosen evaluation are those of the soup."""
    soup = learn(files(tmp_path), tmp_path / "soup", granularity="layer", evaluations=4)
    page = Path(write_report(soup, tmp_path / "report"))
    rows = [json.loads(line) for line in (page.parent / "rows.jsonl").read_text().splitlines()]
    told = [row["coefficients"] for row in rows if row["kind"] == "coefficients"]
    assert told == [list(row) for row in soup.rows]
    losses = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["loss"] for row in losses] == [each.loss for each in soup.evaluations]
    assert [row["best"] for row in losses].index(True) == soup.best
    text = (page.parent / "report.md").read_text()
    first, best = soup.evaluations[0], soup.evaluations[soup.best]
    assert f"Loss {first.loss:.5g} (uniform) to {best.loss:.5g}" in text
    assert f"| **{soup.best}** | **{best.loss:.6g}** |" in text
    for group, row in zip(soup.groups, soup.rows, strict=True):
        cells = " | ".join(f"{value:.4f}" for value in row)
        assert f"| {group} | {cells} |".replace("_", "\\_") in text
    assert {p.name for p in (page.parent / "plots").iterdir()} == {"coefficients.svg", "losses.svg"}


def test_where_a_report_may_go(pair: list[str], tmp_path: Path) -> None:
    """An earlier report is replaced; other files, folders and addresses are refused by name."""
    found = streamsoup.geometry(pair[:2])
    for name in ("p.html", "p.md", "folder"):
        write_report(found, tmp_path / name)
        write_report(found, tmp_path / name)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    (tmp_path / "link.html").symlink_to(other / "thesis.txt")
    for name in ("other", "link.html", pair[0]):
        with pytest.raises(OutputExistsError, match="is not a report of streamsoup"):
            write_report(found, tmp_path / name)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="no such folder"):
        write_report(found, tmp_path / "nowhere" / "p.html")
    with pytest.raises(OutputError, match="s3://"):
        write_report(found, "s3://bucket/p.html")
    with pytest.raises(RecipeError, match="has no report"):
        write_report(object(), tmp_path / "x.html")  # type: ignore[arg-type]


def nasty_pages() -> dict[str, Page]:
    """Make a page of each kind from a name that would be markup."""
    plot = Plot("p", NASTY, NASTY, NASTY, [Series(NASTY, [Point(0, 0, NASTY, name=NASTY)])])
    table = Table([NASTY, NASTY], [[NASTY, NASTY]], hints={(0, 1): NASTY},
                  shades={(0, 1): 1.0}, name="t", words=NASTY)  # fmt: skip
    blocks = [Heading(NASTY), Text(NASTY), plot, table, Plot("q", "", "", "", (), [NASTY])]
    return {
        "blocks": Page(NASTY, blocks),
        "search": searches.page(search((NASTY, "b", "c")), [NASTY]),
    }


@pytest.mark.parametrize("kind", ["blocks", "search"])
def test_no_name_becomes_markup(kind: str) -> None:
    """A hostile name is text wherever it stands: in tables, hints, plots and pictures."""
    page = nasty_pages()[kind]
    html = page.to_html()
    checker = Checker()
    checker.feed(html)
    assert (checker.open, checker.loaded, checker.handlers) == ([], [], [])
    assert html.count("<script") == 1
    for text in (html, page.to_markdown("plots"), *page.to_pictures().values()):
        assert text.replace("\n", "").isprintable()
    for drawing in page.to_pictures().values():
        tags = {each.tag.partition("}")[2] for each in ElementTree.fromstring(drawing).iter()}
        assert tags <= {"svg", "style", "rect", "g", "path", "text", "title"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.70, 0.71], ["0.700", "0.702", "0.704", "0.706", "0.708", "0.710"]),
        ([3.0, 3.0], ["2.950", "2.975", "3.000", "3.025", "3.050"]),
        ([-2e9, 1e9], ["-2e+09", "-1e+09", "0", "1e+09"]),
        ([1e-200, 3e-200], ["1e-200", "1.5e-200", "2e-200", "2.5e-200", "3e-200"]),
    ],
)
def test_ticks_are_round_and_differ(values: list[float], expected: list[str]) -> None:
    """Numbers along an axis are round, told apart, and within it."""
    found = axis(values, 0, 100, n_ticks=6)
    assert found is not None
    assert [text for _, text in found.ticks()] == expected


@pytest.mark.parametrize("values", [[], [math.nan], [-1.7e308, 1.7e308], [math.inf, 1.0, 1.0]])
def test_a_plot_of_anything(values: list[float]) -> None:
    """No score breaks a plot: nothing, NaN, infinities and all that float64 has."""
    points = [Point(n, value, "here") for n, value in enumerate(values)]
    series = [Series(s, points, s, line="solid") for s in SHAPES]
    drawing = standing_alone(draw(Plot("p", "w", "x", "y", series, diagonal=True)))
    ElementTree.fromstring(drawing)
    assert "nan" not in drawing
    assert "inf" not in drawing.replace("infinite", "").replace("no finite", "")
    known = shades({(0, n): value for n, value in enumerate(values)})
    assert all(0 <= value <= 1 for value in known.values())
    ElementTree.fromstring(standing_alone(heat_map(Table(["", "a"], [["r", "1"]], shades=known))))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """Start one browser for all tests here."""
    with browser.Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def column(number: int) -> str:
    """Return an expression for the texts in a column of the first table."""
    rows = "[...document.querySelector('tbody').rows]"
    return f"{rows}.map(row => row.cells[{number}].textContent)"


def edge(selector: str, side: str) -> str:
    """Return an expression for where an element ends."""
    return f"document.querySelector('{selector}').getBoundingClientRect().{side}"


@in_a_browser
def test_tables_sort_in_a_browser(chromium: browser.Browser, tmp_path: Path) -> None:
    """A click sorts, numbers as numbers and the largest first; again turns it; dashes come last."""
    rows = [["run10", "2"], ["run9", "10 [9, 11]"], ["run1", "–"], ["run2", "-1e3"]]
    path = tmp_path / "page.html"
    path.write_text(Page("t", [Table(["name", "n"], rows)]).to_html())
    chromium.open(path)
    for clicked, expected in [
        (1, ["10 [9, 11]", "2", "-1e3", "–"]),
        (1, ["-1e3", "2", "10 [9, 11]", "–"]),
    ]:
        chromium.click("thead button", clicked)
        assert chromium.run(column(clicked)) == expected
    assert chromium.run("document.querySelectorAll('[aria-sort=ascending]').length") == 1
    chromium.click("thead button", 0)
    assert chromium.run(column(0)) == ["run1", "run2", "run9", "run10"]
    assert chromium.said == []


@in_a_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_hints_in_a_browser(chromium: browser.Browser, tmp_path: Path, width: int) -> None:
    """The pointer on a cell or a mark shows its value at once, within the window; Escape hides."""
    path = tmp_path / "page.html"
    path.write_text(searches.page(search(), ()).to_html())
    chromium.open(path, width)
    for selector, expected in [
        (".mark[data-hint]", "a: 0.5, kept"),
        ("td[data-hint]", "a: 0.5"),
    ]:
        chromium.move(selector)
        lines = chromium.run("document.querySelector('#hint').textContent").split("\n")
        assert expected in lines[0]
        assert lines[-1] == "10 B of ingredients read"
        box = chromium.run(
            "(b => [b.left, b.right])(document.querySelector('#hint').getBoundingClientRect())"
        )
        assert 0 <= box[0] < box[1] <= width
    assert chromium.run("document.querySelector('#hint').hidden") is False
    chromium.run("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert chromium.run("document.querySelector('#hint').hidden") is True
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.said == []


@in_a_browser
@pytest.mark.parametrize("kind", ["blocks", "search", "comparison"])
def test_pages_run_nothing_and_stay_within_the_window(
    chromium: browser.Browser, tmp_path: Path, kind: str
) -> None:
    """Nothing is said, no script of a name runs, the page never scrolls sideways, heads stay."""
    if kind == "comparison":
        path = Path(write_report(small(NASTY), tmp_path / "page.html"))
    else:
        path = tmp_path / "page.html"
        path.write_text(nasty_pages()[kind].to_html())
    for width in (1200, 390):
        for scheme in ("light", "dark"):
            chromium.open(path, width, scheme=scheme)
            assert chromium.run("document.scripts.length") == 1
            assert chromium.run("document.images.length") == 0
            assert chromium.run("document.documentElement.scrollWidth") <= width
            dark = (
                chromium.run("getComputedStyle(document.body).backgroundColor")
                != "rgb(255, 255, 255)"
            )
            assert dark == (scheme == "dark")
    chromium.run("document.querySelector('.wide').scrollLeft = 100")
    left = "document.querySelector('tbody th').getBoundingClientRect().left"
    assert chromium.run(left) == chromium.run(
        "document.querySelector('.wide').getBoundingClientRect().left"
    )
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert chromium.said == []
