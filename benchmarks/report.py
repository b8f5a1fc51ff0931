"""Tables and pictures, made anew from the rows: nothing in them is typed by hand.

The README's table goes between its markers; all tables go into `benchmarks/README.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.bars import bars
from benchmarks.rows import RESULTS, Row, compared, latest, median, of_tool, read, share
from benchmarks.tasks.growth import fitted, grown

__all__ = ["inserted", "main", "short_table", "tables"]

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
    """Return the README's table: one line per tool, whole process, warm page cache."""
    cases = [case for case in HEADLINES if latest(rows, "uniform", case, cache="warm")]
    if not cases:
        return "No rows yet."
    head = ["whole process, warm", *(f"{case}: time" for case in cases), "memory", "wrong elements"]
    tools: dict[str, list[str]] = {}
    order: dict[str, float] = {}
    for tool in _tools(rows, cases):
        cells = []
        for case in cases:
            found = of_tool(rows, case, tool)
            cells.append(f"{median(found, 'wall_s'):.2f} s" if found else "–")
        found = next(f for case in reversed(cases) if (f := of_tool(rows, case, tool)))
        peak = median(found, "peak_anonymous_nbytes") / 1e6
        wrong = max(row["answer"]["share_wrong"] for row in found)
        tools[tool] = [tool, *cells, _nbytes(peak), _percent(wrong)]
        order[tool] = min(
            (median(f, "wall_s") for case in cases if (f := of_tool(rows, case, tool))),
            default=0.0,
        )
    body = [tools[tool] for tool in sorted(tools, key=order.__getitem__)]
    limits = ["the machine's limit"]
    for case in cases:
        ours = of_tool(rows, case, "streamsoup")
        limits.append(f"{median(ours, 'limit_s'):.2f} s")
    table = _table([head, [*limits, "", ""], *body])
    parts = [table, _peers(rows, cases), _where(rows, cases), _alone(rows, cases)]
    return "\n\n".join(part for part in parts if part)


def _alone(rows: Sequence[Row], cases: Sequence[str]) -> str:
    """Return the times of streamsoup in a later session, without peers beside it."""
    times = []
    for case in cases:
        last = latest(rows, "uniform", case, cache="warm", tool="streamsoup")
        if last[0]["session"] > of_tool(rows, case, "streamsoup")[0]["session"]:
            ours, limit = median(last, "wall_s"), median(last, "limit_s")
            times.append(f"{case} in {ours:.2f} s, where the limit was {limit:.2f} s")
            about = f"commit {last[0]['commit']}, {last[0]['session'][:10]}"
    return f"Later, without peers: {'; '.join(times)} ({about})." if times else ""


def tables(rows: Sequence[Row]) -> str:
    """Return all tables."""
    parts = [
        "### The bars\n\n" + _table(list(bars(rows))),
        *_uniform(rows),
        _limits(rows),
        _growth(rows),
        _kernels(rows),
        _startup(rows),
        *_others(rows),
    ]
    return "\n\n".join(part for part in parts if part) or "No rows yet."


def _uniform(rows: Sequence[Row]) -> Iterable[str]:
    """Return a table for each case and cache: tools, with medians and spreads."""
    cases = dict.fromkeys((r["case"], r.get("cache")) for r in rows if r["task"] == "uniform")
    for case, cache in cases:
        if cache is None or not latest(rows, "uniform", case, cache=cache, tool="streamsoup"):
            continue
        lines = []
        for tool in _tools(rows, [case], cache):
            found = of_tool(rows, case, tool, cache)
            limits = [key for key in ("limit_s", "at_once_s") if key in found[0]]
            lines.append(
                (
                    median(found, "wall_s"),
                    [
                        tool,
                        _spread(found, "wall_s"),
                        f"{median(found, 'sync_s'):.2f}",
                        f"{median(found, 'cpu_s'):.1f}",
                        " / ".join(f"{share(found, key):.2f}" for key in limits),
                        _nbytes(median(found, "peak_anonymous_nbytes") / 1e6),
                        f"{median(found, 'read_nbytes') / 1e9:.2f}",
                        f"{median(found, 'written_nbytes') / 1e9:.2f}",
                        _percent(max(row["answer"]["share_wrong"] for row in found)),
                        str(max(row["answer"]["largest_ulps"] for row in found)),
                    ],
                )
            )
        head = ["tool", "wall s: median (least–most)", "sync after, s", "CPU s", "limit / wall"]
        head += ["peak memory", "read GB", "written GB", "wrong elements", "ulps"]
        title = f"### Uniform soup, {case}, {cache} page cache"
        table = _table([head, *(line for _, line in sorted(lines, key=lambda pair: pair[0]))])
        parts = [title, table, *(_skipped(rows, case, cache) if len(lines) > 1 else ())]
        parts += [_peers(rows, [case], cache), _where(rows, [case], cache)]
        yield "\n\n".join(part for part in parts if part)


def _skipped(rows: Sequence[Row], case: str, cache: str) -> list[str]:
    """Return the reason for each tool that was not measured."""
    session = compared(rows, case, cache)[0]["session"]
    return [
        f"{row['tool']}: {row['skipped']}."
        for row in rows
        if (row["task"], row["case"], row["session"]) == ("uniform", case, session)
        and "skipped" in row
    ]


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
                f"{share(group, 'limit_s'):.2f}",
                f"{median(group, 'peak_anonymous_nbytes') / 1e6:.1f}",
            ]
            for case, group in zip(cases, groups, strict=True)
        ]
        head = ["case", "GB read", "wall s: median (least–most)", "CPU s", "limit / wall"]
        head += ["peak memory, MB"]
        fit = fitted(found, of)
        text.append(
            f"### Growth with the number of {what}\n\n{_table([head, *lines])}\n\n"
            f"Exponents in bytes read and written: wall time {fit.wall:.2f} beyond start-up "
            f"({fit.whole_wall:.2f} with it), cpu time {fit.cpu:.2f} beyond start-up "
            f"({fit.whole_cpu:.2f} with it), the limit {fit.limit:.2f}.\n"
            f"Exponent of memory: {fit.memory:.3f}; it stays within ± {fit.memory_swing:.1%} of "
            "its median.\n\n"
            f"{_about(found)}"
        )
    return "\n\n".join(text)


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
        peak = median(found, "peak_anonymous_nbytes") / 1e6
        lines.append([case, _spread(found, "wall_s"), f"{median(found, 'cpu_s'):.2f}"])
        lines[-1].append(f"{peak:.0f} MB")
    head = ["command", "wall s: median (least–most)", "CPU s", "peak memory"]
    return "### Start-up\n\n" + _table([head, *lines]) if lines else ""


def _others(rows: Sequence[Row]) -> Iterable[str]:
    """Return the tables of tasks whose rows name their own numbers."""
    for task, title in (
        ("greedy", "Greedy search"),
        ("gram", "Gram matrix"),
        ("learned", "Learned soup"),
        ("merges", "Merges of task vectors and on spheres, beside a uniform soup"),
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
    matplotlib.rcParams["svg.hashsalt"] = "streamsoup"  # the same rows give the same bytes
    from matplotlib import pyplot

    cases = [case for case in HEADLINES if latest(rows, "uniform", case, cache="warm")]
    if cases:
        figure, axes = pyplot.subplots(
            1, len(cases), figsize=(6 * len(cases), 4), squeeze=False, layout="constrained"
        )
        for axis, case in zip(axes[0], cases, strict=True):
            medians = {
                tool: median(of_tool(rows, case, tool), "wall_s") for tool in _tools(rows, [case])
            }
            medians["the machine's limit"] = median(of_tool(rows, case, "streamsoup"), "limit_s")
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
                        median(group, "wall_s"),
                        median(group, "peak_anonymous_nbytes") / 1e6,
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
    return list(dict.fromkeys(row["tool"] for case in cases for row in compared(rows, case, cache)))


def _spread(rows: Sequence[Row], key: str) -> str:
    values = [row[key] for row in rows]
    middle = statistics.median(values)
    digits = 3 if middle < 1 else 2 if middle < 10 else 1
    low, high = min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _number(rows: Sequence[Row], key: str) -> str:
    """Return a number as its name asks for: bytes as their median, all else with its spread."""
    if key.endswith("nbytes"):
        return _nbytes(median(rows, key) / 1e6)
    return _spread(rows, key)


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.2%}" if share >= 5e-5 else f"{share:.0e}"


def _nbytes(mega: float) -> str:
    if mega < 999.5:
        return f"{mega:.0f} MB" if mega >= 1 else f"{1000 * mega:.0f} kB"
    return f"{mega / 1000:.1f} GB"


def _peers(rows: Sequence[Row], cases: Sequence[str], cache: str = "warm") -> str:
    """Return the versions of the peers."""
    found = {
        f"{name} {number}"
        for case in cases
        for row in compared(rows, case, cache)
        for name, number in row.get("tool_versions", {}).items()
    }
    return f"Peers: {', '.join(sorted(found))}." if found else ""


def _where(rows: Sequence[Row], cases: Sequence[str], cache: str = "warm") -> str:
    return _about([row for case in cases for row in of_tool(rows, case, "streamsoup", cache)])


def _about(rows: Sequence[Row]) -> str:
    """Return the machine, versions, commits and date of the rows."""
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
