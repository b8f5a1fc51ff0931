"""Tables and pictures, made anew from the rows: nothing in them is typed by hand.

The README's table goes between its markers; all tables go into `benchmarks/README.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, latest, read
from benchmarks.tasks.growth import START, exponent

__all__ = ["grown", "inserted", "main", "short_table", "tables"]

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HERE = Path(__file__).parent

HEADLINES = ("8 × 125M bf16", "4 × 1.1B bf16, 2 shards")
"""Cases of the README's table."""


def main() -> None:
    """Write the tables into both READMEs, and draw the pictures."""
    rows = read()
    for path, text in ((HERE.parent / "README.md", short_table), (HERE / "README.md", tables)):
        content = path.read_text(encoding="utf-8")
        if BEGIN in content:
            path.write_text(inserted(content, text(rows)), encoding="utf-8")
    draw(rows)


def inserted(content: str, text: str) -> str:
    """Put a text between the markers, in place of what is there."""
    before, _, rest = content.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{BEGIN} without {END}"
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


def short_table(rows: Sequence[Row]) -> str:
    """Give the README's table: one line per tool, whole process, warm page cache."""
    cases = [case for case in HEADLINES if latest(rows, "uniform", case, cache="warm")]
    if not cases:
        return "No rows yet."
    head = ["whole process, warm", *(f"{case}: time" for case in cases), "memory", "wrong elements"]
    tools: dict[str, list[str]] = {}
    order: dict[str, float] = {}
    for tool in _tools(rows, cases):
        cells = []
        for case in cases:
            found = _rows(rows, case, tool)
            cells.append(f"{_median(found, 'wall_s'):.2f} s" if found else "–")
        found = next(f for case in reversed(cases) if (f := _rows(rows, case, tool)))
        peak = _median(found, "peak_anonymous_nbytes") / 1e6
        wrong = max(row["answer"]["share_wrong"] for row in found)
        tools[tool] = [tool, *cells, _nbytes(peak), _percent(wrong)]
        order[tool] = min(
            (_median(f, "wall_s") for case in cases if (f := _rows(rows, case, tool))),
            default=0.0,
        )
    body = [tools[tool] for tool in sorted(tools, key=order.__getitem__)]
    limits = ["the machine's limit"]
    for case in cases:
        ours = _rows(rows, case, "streamsoup")
        limits.append(f"{_median(ours, 'limit_s'):.2f} s")
    table = _table([head, [*limits, "", ""], *body])
    parts = [table, _peers(rows, cases), _where(rows, cases), _alone(rows, cases)]
    return "\n\n".join(part for part in parts if part)


def _alone(rows: Sequence[Row], cases: Sequence[str]) -> str:
    """Say what streamsoup took in a later session, without peers beside it."""
    times = []
    for case in cases:
        last = latest(rows, "uniform", case, cache="warm", tool="streamsoup")
        if last[0]["session"] > _rows(rows, case, "streamsoup")[0]["session"]:
            ours, limit = _median(last, "wall_s"), _median(last, "limit_s")
            times.append(f"{case} in {ours:.2f} s, where the limit was {limit:.2f} s")
            about = f"commit {last[0]['commit']}, {last[0]['session'][:10]}"
    return f"Later, without peers: {'; '.join(times)} ({about})." if times else ""


def tables(rows: Sequence[Row]) -> str:
    """Give all tables."""
    parts = [
        *_uniform(rows),
        _limits(rows),
        _growth(rows),
        _kernels(rows),
        _startup(rows),
        *_others(rows),
    ]
    return "\n\n".join(part for part in parts if part) or "No rows yet."


def _uniform(rows: Sequence[Row]) -> Iterable[str]:
    """Give a table for each case and cache: tools, with medians and spreads."""
    cases = dict.fromkeys((r["case"], r.get("cache")) for r in rows if r["task"] == "uniform")
    for case, cache in cases:
        if cache is None or not latest(rows, "uniform", case, cache=cache, tool="streamsoup"):
            continue
        lines = []
        for tool in _tools(rows, [case], cache):
            found = _rows(rows, case, tool, cache)
            limits = [key for key in ("limit_s", "at_once_s") if key in found[0]]
            lines.append(
                (
                    _median(found, "wall_s"),
                    [
                        tool,
                        _spread(found, "wall_s"),
                        f"{_median(found, 'sync_s'):.2f}",
                        f"{_median(found, 'cpu_s'):.1f}",
                        " / ".join(f"{_share(found, key):.2f}" for key in limits),
                        _nbytes(_median(found, "peak_anonymous_nbytes") / 1e6),
                        f"{_median(found, 'read_nbytes') / 1e9:.2f}",
                        f"{_median(found, 'written_nbytes') / 1e9:.2f}",
                        _percent(max(row["answer"]["share_wrong"] for row in found)),
                        str(max(row["answer"]["largest_ulps"] for row in found)),
                    ],
                )
            )
        head = ["tool", "wall s: median (least–most)", "sync after, s", "CPU s", "limit / wall"]
        head += ["peak memory", "read GB", "written GB", "wrong elements", "ulps"]
        title = f"### Uniform soup, {case}, {cache} page cache"
        skipped = [
            f"{row['tool']}: {row['skipped']}." for row in rows if _skipped(row, rows, case, cache)
        ]
        table = _table([head, *(line for _, line in sorted(lines, key=lambda pair: pair[0]))])
        parts = [title, table, *skipped, _peers(rows, [case], cache), _where(rows, [case], cache)]
        yield "\n\n".join(part for part in parts if part)


def _share(rows: Sequence[Row], limit: str) -> float:
    """Give the median of a limit over the wall time of its own round."""
    return statistics.median(row[limit] / row["wall_s"] for row in rows)


def _skipped(row: Row, rows: Sequence[Row], case: str, cache: str) -> bool:
    session = _compared(rows, case, cache)[0]["session"]
    return (
        row["task"] == "uniform"
        and row["case"] == case
        and "skipped" in row
        and row["session"] == session
    )


def _limits(rows: Sequence[Row]) -> str:
    lines = []
    cases = dict.fromkeys((r["case"], r["cache"]) for r in rows if r["task"] == "limits")
    for case, cache in cases:
        found = latest(rows, "limits", case, cache=cache)
        for tool in dict.fromkeys(row["tool"] for row in found):
            mine = [row for row in found if row["tool"] == tool]
            lines.append([case, cache, tool, _spread(mine, "seconds"), _spread(mine, "gb_per_s")])
    head = ["case", "page cache", "what", "s: median (least–most)", "GB/s"]
    return "### What the machine can do\n\n" + _table([head, *lines]) if lines else ""


def grown(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Give what grew, its column, and the rows of the last session in which nothing else did.

    Those of `START`, which is all start-up, come first.
    """
    mine = [row for row in rows if row["task"] == "growth"]
    ways = (("ingredients", "n", "size"), ("bytes of a model", "output_nbytes", "n"))
    for what, of, fixed in ways:
        series: dict[tuple[str, Any], list[Row]] = {}
        for row in mine:
            if row["case"] != START.label:
                series.setdefault((row["session"], row[fixed]), []).append(row)
        fitting = [key for key, each in series.items() if len({row[of] for row in each}) > 2]
        if fitting:
            last = max(fitting)
            start = [row for row in mine if (row["session"], row["case"]) == (last[0], START.label)]
            yield what, of, start + series[last]


def _growth(rows: Sequence[Row]) -> str:
    text = []
    for what, of, found in grown(rows):
        cases = list(dict.fromkeys(row["case"] for row in found))
        groups = [[row for row in found if row["case"] == case] for case in cases]
        lines = [
            [
                case,
                f"{group[0]['input_nbytes'] / 1e9:.2f}",
                _spread(group, "wall_s"),
                _spread(group, "cpu_s"),
                f"{_share(group, 'limit_s'):.2f}",
                f"{_median(group, 'peak_anonymous_nbytes') / 1e6:.1f}",
            ]
            for case, group in zip(cases, groups, strict=True)
        ]
        head = ["case", "GB read", "wall s: median (least–most)", "CPU s", "limit / wall"]
        head += ["peak memory, MB"]
        start, *groups = groups
        moved = [(g[0]["input_nbytes"] + g[0]["output_nbytes"]) for g in groups]
        peaks = [_median(group, "peak_anonymous_nbytes") for group in groups]
        fits = []
        for key in ("wall_s", "cpu_s"):
            whole = [_median(group, key) for group in groups]
            beyond = [seconds - _median(start, key) for seconds in whole]
            fits.append(f"{key[:-2]} time {_exponent(moved, beyond)} beyond start-up")
            fits[-1] += f" ({_exponent(moved, whole)} with it)"
        limits = [_median(group, "limit_s") for group in groups]
        fits.append(f"the limit {_exponent(moved, limits)}")
        memory = _exponent([g[0][of] for g in groups], peaks)
        middle = statistics.median(peaks)
        swing = max(max(peaks) / middle - 1, 1 - min(peaks) / middle)
        text.append(
            f"### Growth with the number of {what}\n\n{_table([head, *lines])}\n\n"
            f"Exponents in bytes read and written: {', '.join(fits)}.\n"
            f"Exponent of memory: {memory}; it stays within ± {swing:.1%} of its median.\n\n"
            f"{_about(found)}"
        )
    return "\n\n".join(text)


def _exponent(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Fit an exponent, if everything is more than nothing."""
    return f"{exponent(list(zip(xs, ys, strict=True))):.2f}" if min(ys) > 0 else "–"


def _kernels(rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["task"] == "kernels" and row["tool"] == "streamsoup"]
    last = max((row["session"] for row in mine), default="")
    mine = [row for row in mine if row["session"] == last]
    lines = []
    for case in dict.fromkeys(row["case"] for row in mine):
        found = [row for row in mine if row["case"] == case]
        shares = [row["gb_per_s"] / row["limit_gb_per_s"] for row in found]
        lines.append([case, *(_spread(found, key) for key in ("gb_per_s", "limit_gb_per_s"))])
        lines[-1].append(f"{statistics.median(shares):.2f}")
    head = ["ingredients", "GB/s of input: median (least–most)", "memory, GB/s", "share"]
    title = "### Kernels alone, 8 ingredients"
    return "\n\n".join([title, _table([head, *lines]), _about(mine)]) if lines else ""


def _startup(rows: Sequence[Row]) -> str:
    cases = list(dict.fromkeys(row["case"] for row in rows if row["task"] == "startup"))
    lines = []
    for case in cases:
        found = latest(rows, "startup", case)
        peak = _median(found, "peak_anonymous_nbytes") / 1e6
        lines.append([case, _spread(found, "wall_s"), f"{_median(found, 'cpu_s'):.2f}"])
        lines[-1].append(f"{peak:.0f} MB")
    head = ["command", "wall s: median (least–most)", "CPU s", "peak memory"]
    return "### Start-up\n\n" + _table([head, *lines]) if lines else ""


def _others(rows: Sequence[Row]) -> Iterable[str]:
    """Give the tables of tasks whose rows name their own numbers."""
    for task, title in (
        ("greedy", "Greedy search"),
        ("gram", "Gram matrix"),
        ("learned", "Learned soup"),
    ):
        cases = list(dict.fromkeys(row["case"] for row in rows if row["task"] == task))
        lines = []
        for case in cases:
            found = latest(rows, task, case)
            for tool in dict.fromkeys(row["tool"] for row in found):
                mine = [row for row in found if row["tool"] == tool]
                shown = [f"{label} {_number(mine, key)}" for key, label in mine[0]["shown"].items()]
                lines.append([case, tool, "; ".join(shown)])
        if lines:
            about = _about(latest(rows, task, cases[-1]))
            yield f"### {title}\n\n{_table([['case', 'tool', 'numbers'], *lines])}\n\n{about}"


def draw(rows: Sequence[Row]) -> None:
    """Draw time by tool for each case, and growth, into `results/`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in HEADLINES if latest(rows, "uniform", case, cache="warm")]
    if cases:
        figure, axes = pyplot.subplots(
            1, len(cases), figsize=(6 * len(cases), 4), squeeze=False, layout="constrained"
        )
        for axis, case in zip(axes[0], cases, strict=True):
            medians = {
                tool: _median(_rows(rows, case, tool), "wall_s") for tool in _tools(rows, [case])
            }
            medians["the machine's limit"] = _median(_rows(rows, case, "streamsoup"), "limit_s")
            names = sorted(medians, key=lambda name: -medians[name])
            colours = [
                {"streamsoup": "C1", "the machine's limit": "0.3"}.get(n, "C0") for n in names
            ]
            bars = axis.barh(names, [medians[name] for name in names], color=colours)
            axis.bar_label(bars, fmt=" %.2f")
            axis.set_title(f"{case}, warm: seconds")
            axis.margins(x=0.12)
        figure.savefig(RESULTS / "uniform.svg", metadata={"Date": None})
        pyplot.close(figure)
    series = list(grown(rows))
    if series:
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
        for _, of, mine in series:
            points = sorted(
                {
                    (
                        group[0]["input_nbytes"] / 1e9,
                        _median(group, "wall_s"),
                        _median(group, "peak_anonymous_nbytes") / 1e6,
                    )
                    for case in dict.fromkeys(row["case"] for row in mine)
                    for group in [[row for row in mine if row["case"] == case]]
                }
            )
            label = "more ingredients" if of == "n" else "larger models"
            for axis, column in zip(axes, (1, 2), strict=True):
                axis.plot([p[0] for p in points], [p[column] for p in points], "o-", label=label)
        for axis, title in zip(axes, ("seconds, whole process", "peak memory, MB"), strict=True):
            axis.set(title=title, xlabel="GB read", xscale="log")
        axes[0].set_yscale("log")
        axes[0].legend()
        axes[1].set_ylim(0, 2 * axes[1].get_ylim()[1])  # flat is to look flat
        figure.savefig(RESULTS / "growth.svg", metadata={"Date": None})
        pyplot.close(figure)


def _tools(rows: Sequence[Row], cases: Sequence[str], cache: str = "warm") -> list[str]:
    return list(
        dict.fromkeys(row["tool"] for case in cases for row in _compared(rows, case, cache))
    )


def _rows(rows: Sequence[Row], case: str, tool: str, cache: str = "warm") -> list[Row]:
    found = _compared(rows, case, cache)
    return [row for row in found if row["tool"] == tool and row["status"] == 0]


def _compared(rows: Sequence[Row], case: str, cache: str) -> list[Row]:
    """Give the last session with peers, if there is one: only side by side do times compare."""
    beside = [
        row["session"]
        for row in rows
        if (row["task"], row["case"], row.get("cache")) == ("uniform", case, cache)
        and row["tool"] != "streamsoup"
    ]
    session = max(beside, default=None)
    within = [row for row in rows if session is None or row["session"] == session]
    return latest(within, "uniform", case, cache=cache)


def _median(rows: Sequence[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _spread(rows: Sequence[Row], key: str) -> str:
    values = [row[key] for row in rows]
    middle = statistics.median(values)
    digits = 3 if middle < 1 else 2 if middle < 10 else 1
    low, high = min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _number(rows: Sequence[Row], key: str) -> str:
    """Give a number as its name asks for: bytes as their median, all else with its spread."""
    if key.endswith("nbytes"):
        return _nbytes(_median(rows, key) / 1e6)
    return _spread(rows, key)


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.2%}" if share >= 5e-5 else f"{share:.0e}"


def _nbytes(mega: float) -> str:
    if mega < 999.5:
        return f"{mega:.0f} MB" if mega >= 1 else f"{1000 * mega:.0f} kB"
    return f"{mega / 1000:.1f} GB"


def _peers(rows: Sequence[Row], cases: Sequence[str], cache: str = "warm") -> str:
    """Say of what versions the peers were."""
    found = {
        f"{name} {number}"
        for case in cases
        for row in _compared(rows, case, cache)
        for name, number in row.get("tool_versions", {}).items()
    }
    return f"Peers: {', '.join(sorted(found))}." if found else ""


def _where(rows: Sequence[Row], cases: Sequence[str], cache: str = "warm") -> str:
    return _about([row for case in cases for row in _rows(rows, case, "streamsoup", cache)])


def _about(rows: Sequence[Row]) -> str:
    """Say on what, with what, and when rows were measured."""
    row = rows[-1]
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    commits = ", ".join(dict.fromkeys(each["commit"] for each in rows))
    days = ", ".join(dict.fromkeys(each["session"][:10] for each in rows))
    others = [each.get("others_cpus", 0.0) for each in rows]
    load = f"others kept {min(others):.2f}–{max(others):.2f} CPUs busy"
    text = f"{row['cpu']}, {row['n_cpus']} CPUs, {row['memory_gb']} GB, Linux {row['kernel']}, "
    return f"{text}Python {row['python']}, {versions}; commit {commits}, {days}, {load}."


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
