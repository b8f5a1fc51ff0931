"""The page of a greedy search: who is in the soup, every trial and its decision, and the cost.

All of it comes from the report that the soup itself holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamsoup.errors import count
from streamsoup.search.report import beyond_scoring
from streamsoup.sizes import nbytes_text
from streamsoup.study.names import short_names
from streamsoup.study.pages.blocks import (
    Block,
    Code,
    Heading,
    Plot,
    Point,
    Series,
    Table,
    Text,
)
from streamsoup.study.pages.page import Page

__all__ = ["cost", "page", "rows"]

Report = Mapping[str, Any]

LONGEST = 60
"""Letters of an ingredient's name in a table: what all names have in common is left out first."""

CHANGES = (("add", "kept"), ("drop", "dropped"), ("all", "kept"))
"""Trials, by kind and decision, after which the soup is the one that was tried."""


def rows(report: Report) -> Iterator[str]:
    """Return a JSON line for each trial: the ingredients alone, and then run by run."""
    for single in report["singles"]:
        yield json.dumps({"run": None, **single})
    for number, run in enumerate(report["runs"]):
        for trial in run["trials"]:
            yield json.dumps({"run": number, **trial})


def page(report: Report, commands: Sequence[str]) -> Page:
    """Put a greedy search on a page."""
    names = dict(
        zip(report["ingredients"], short_names(report["ingredients"], LONGEST), strict=True)
    )
    blocks: list[Block] = [Text(_verdict(report, names))]
    if "over_orders" in report:
        over, n = report["over_orders"], len(report["runs"])
        blocks.append(
            Text(f"Over {n} random orders: {over['mean']:.6g}, deviation {over['sd']:.2g}.")
        )
    if "advice" in report:
        blocks.append(Text(f"Advice: {report['advice']}."))
    best = _best(report)
    blocks += [_trial_plot(report, best, names), Heading("Ingredients"), _table(report, names)]
    for number, run in enumerate(report["runs"]):
        of = f" in order {number + 1}" if len(report["runs"]) > 1 else ""
        mark = " (the best)" if of and run is best else ""
        blocks += [Heading(f"Trials{of}{mark}"), _trials(run, report["split"], names)]
    blocks += [Text(_TRIALS), Heading("Rules"), _rules(report), Text(cost(report))]
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page("A greedy search", blocks)


_TRIALS = (
    "Better by: the score less the one to beat. Whether a trial is kept is decided by the rules "
    "below. Bold is what changed the soup. The pointer shows every digit of a score."
)


def cost(report: Report) -> str:
    """Return a line on what a search cost."""
    seconds, n = report["seconds"], report["n_scored"]
    known = f", {report['n_resumed']} known from an earlier run" if report["n_resumed"] else ""
    text = f"{count(n, 'score')} in {seconds['search']:.2f} s{known}"
    if report["rules"]["jobs"] == 1 and seconds["scoring"] > 0:
        text += f"; {100 * beyond_scoring(seconds):.1f} % of it beyond scoring"
    text += f"; {nbytes_text(report['nbytes_read'])} of ingredients read"
    if report["nbytes_sums"]:
        text += f", {nbytes_text(report['nbytes_sums'])} of sums moved"
    return text


def _verdict(report: Report, names: Mapping[str, str]) -> str:
    """Return a sentence on how many were kept, and the gain over the best ingredient."""
    n, kept = len(report["ingredients"]), len(report["members"])
    text = (
        f"A {report['rules']['direction']} search keeps {kept} of {n} ingredients: "
        f"{_shown(report['score'])} on {report['split']}"
    )
    singles = [(_number(s["score"]), s["ingredient"]) for s in report["singles"]]
    finite = [each for each in singles if math.isfinite(each[0])]
    if not finite:
        return f"{text}."
    top, name = max(finite, key=lambda each: each[0])
    gain = _number(report["score"]) - top
    return f"{text}, {gain:+.4g} over the best ingredient, {names[name]} ({top:.6g})."


def _best(report: Report) -> Mapping[str, Any]:
    """Return the run that the soup comes from."""
    return next(run for run in report["runs"] if list(run["members"]) == list(report["members"]))


def _trial_plot(report: Report, run: Mapping[str, Any], names: Mapping[str, str]) -> Plot:
    """Draw the score of each trial, in order, and that of the soup so far."""
    trials = run["trials"]
    so_far, reached = [], math.nan
    for n, trial in enumerate(trials, 1):
        if _changes(trial):
            reached = _number(trial["score"])
        so_far.append(Point(n, reached, f"the soup after {count(n, 'trial')}: {reached:.6g}"))
    decisions = dict.fromkeys((t["decision"], _changes(t)) for t in trials)
    series = [
        Series("the soup so far", so_far, "square", 1, line="solid", size=1.5),
        *(
            Series(
                decision,
                [
                    Point(n, _number(trial["score"]), _hint(trial, names))
                    for n, trial in enumerate(trials, 1)
                    if (trial["decision"], _changes(trial)) == (decision, changed)
                ],
                "star" if changed else "circle",
                2 if changed else 7,
                changed,
                size=6.5 if changed else 4.5,
            )
            for decision, changed in decisions
        ),
    ]
    singles = [_number(single["score"]) for single in report["singles"]]
    finite = [value for value in singles if math.isfinite(value)]
    line = "; the dashed line is the best ingredient" if finite else ""
    return Plot(
        "trials",
        f"The score of each trial on {report['split']}{line}.",
        "trial",
        f"score on {report['split']}",
        series,
        horizontals=[max(finite)] if finite else [],
        whole=True,
    )


def _table(report: Report, names: Mapping[str, str]) -> Table:
    """Show each ingredient alone, and whether it is in the soup; those first."""
    singles = {single["ingredient"]: single for single in report["singles"]}
    kept = [report["ingredients"][i] for i in report["members"]]
    others = [name for name in report["ingredients"] if name not in kept]
    order = [*kept, *sorted(others, key=lambda name: -_rank(singles.get(name)))]
    body = [
        [
            names[name],
            _shown(singles[name]["score"]) if name in singles else "–",
            "yes" if name in kept else "no",
            name,
        ]
        for name in order
    ]
    bold = frozenset((n, 2) for n, name in enumerate(order) if name in kept)
    hints = {(n, 1): _hint(singles[name], names) for n, name in enumerate(order) if name in singles}
    return Table(["ingredient", "alone", "in the soup", "path"], body, bold, hints)


def _trials(run: Mapping[str, Any], split: str, names: Mapping[str, str]) -> Table:
    body, hints, bold = [], {}, set()
    for n, trial in enumerate(run["trials"]):
        score, to_beat = _number(trial["score"]), _number(trial.get("to_beat"))
        verb = {"add": "add ", "drop": "drop ", "all": "all of them"}.get(trial["kind"], "")
        name = "" if trial["kind"] == "all" else names.get(trial["ingredient"], trial["ingredient"])
        gain = score - to_beat
        body.append(
            [
                str(n + 1),
                f"{verb}{name}",
                _shown(trial["score"]),
                _shown(to_beat),
                f"{gain:+.4g}" if math.isfinite(gain) else "–",
                trial["decision"],
                "known" if trial["known"] else f"{trial['scoring_s']:.2f}",
                f"{trial['mixing_s']:.2f}",
            ]
        )
        hints[n, 2] = _hint(trial, names)
        bold |= {(n, 5)} if _changes(trial) else set()
    head = ["trial", "what", f"score on {split}", "to beat", "better by", "decision",
            "scoring (s)", "mixing (s)"]  # fmt: skip
    return Table(head, body, frozenset(bold), hints)


def _hint(trial: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return all that is known of a trial, line by line, for the pointer."""
    name = names.get(trial["ingredient"], trial["ingredient"])
    lines = [f"{name}: {_number(trial['score'])!r}, {trial['decision'] or 'alone'}"]
    if trial.get("stopped"):
        lines.append("stopped early: the score is at most this")
    lines += [f"{metric}: {_number(value):.6g}" for metric, value in _metrics(trial).items()]
    if "to_beat" in trial:
        lines.append(f"to beat: {_number(trial['to_beat'])!r}")
    if "score_with_averaged_statistics" in trial:
        score = _shown(trial["score_with_averaged_statistics"])
        lines.append(f"{score} with averaged statistics")
    lines.append(f"{nbytes_text(trial['nbytes_read'])} of ingredients read")
    return "\n".join(lines)


def _changes(trial: Mapping[str, Any]) -> bool:
    return (trial["kind"], trial["decision"]) in CHANGES


def _metrics(trial: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics: Mapping[str, Any] = trial.get("metrics", {})
    return metrics


def _rules(report: Report) -> Table:
    rules = report["rules"]
    return Table(
        ["rule", "value"],
        [[name.replace("_", " "), str(value)] for name, value in rules.items()],
    )


def _rank(single: Mapping[str, Any] | None) -> float:
    value = -math.inf if single is None else _number(single["score"])
    return value if value == value else -math.inf


def _number(score: Any) -> float:
    return math.nan if score is None else float(score)


def _shown(score: Any) -> str:
    value = _number(score)
    return f"{value:.6g}" if math.isfinite(value) else "–"
