"""The command that says how checkpoints lie to each other."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from streamsoup.cli import arguments, common, reports, results
from streamsoup.cli.help import command
from streamsoup.errors import printable

if TYPE_CHECKING:
    from streamsoup.cli.terminal import Watcher
    from streamsoup.methods.angles import Geometry
    from streamsoup.options import Options


@command()
@arguments.INGREDIENTS
@click.option("--base", metavar="CKPT", help="What they were fine-tuned from.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--plot", metavar="PNG", help="Draw the angles as a heat map.")
@reports.REPORT
@arguments.READING
@arguments.RUNNING
@arguments.RAY
@arguments.REPORTING
def geometry(
    ingredients: tuple[str, ...],
    base: str | None,
    tensors: bool,
    plot: str | None,
    report: str | None,
    **settings: Any,
) -> int:
    """Show norms, angles and distances of checkpoints, from one pass over them."""

    def work(options: Options, watcher: Watcher, as_json: bool) -> None:
        import time

        from streamsoup.cli.terminal import summary
        from streamsoup.methods.angles import geometry

        if plot is not None:
            from streamsoup.output.destination import check_outside
            from streamsoup.study.plot import check_plot

            check_plot(plot)
            check_outside(plot, paths)
        reports.check(report, paths)
        started = time.monotonic()
        found = geometry(ingredients, base=base, options=options)
        elapsed_s = time.monotonic() - started
        watcher.close()
        if plot is not None:
            from streamsoup.study.plot import plot_geometry

            plot_geometry(found, plot)
        seen = reports.write(found, report)
        notes = [] if settings_quiet else [f"note: {note}" for note in found.notes]
        if as_json:
            for note in notes:
                results.say(note)
            with results.telling():
                write_json(found, watcher.warnings, sys.stdout)
            return
        what = f"geometry of {len(found.names)}"
        last = summary(what, found.nbytes_read, 0, elapsed_s, watcher.peak_nbytes)
        rows = [*describe(found, shutil.get_terminal_size().columns)]
        rows += describe_tensors(found) if tensors else []
        results.tell([*rows, *notes, last, *seen])

    settings_quiet = bool(settings["quiet"])
    paths = ingredients if base is None else (base, *ingredients)
    return common.supervise(work, "geometry", paths, settings)


def write_json(found: Geometry, warnings: list[str], file: TextIO) -> None:
    """Write all as JSON, a tensor at a time: of 64 ingredients each has 4096 products."""
    head = json.dumps({**found.summary(), "warnings": warnings})
    file.write(head[:-1] + ', "tensors": [')
    separators = itertools.chain([""], itertools.repeat(", "))
    file.writelines(
        separator + json.dumps(tensor.to_builtins())
        for separator, tensor in zip(separators, found.tensors, strict=False)
    )
    file.write("]}\n")


def describe(found: Geometry, width: int) -> list[str]:
    """Return lines on each ingredient's place by the base and the others; a matrix if it fits."""
    from streamsoup.study.names import short_names

    labels = short_names(found.names, max(12, min(32, width - 64)))
    total = found.total
    angles, distances = total.angles, total.distances
    reference = "base" if found.base is not None else "mean"
    column = max(len(label) for label in labels)
    head = f"{'':>3}  {'ingredient':{column}}  {'to ' + reference:>9} {'relative':>8}"
    if found.base is not None:
        head += f" {'changed':>8} {'angles to others':>18}"
    lines = [head + f"  {'nearest':>9}"]
    n = len(labels)
    for i in range(n):
        relative = _ratio(float(total.norms[i]), float(total.weight_norms[i]))
        line = f"{i + 1:>3}  {labels[i]:{column}}  {total.norms[i]:9.4g} {relative:>8}"
        others = [j for j in range(n) if j != i]
        if found.base is not None:
            seen = [float(angles[i, j]) for j in others if math.isfinite(angles[i, j])]
            span = f"{min(seen):.0f}° to {max(seen):.0f}°" if seen else "none"
            line += f" {total.shares[i]:>8.2%} {span:>18}"
        if others:
            nearest = min(others, key=lambda j: float(distances[i, j]))
            line += f"  {distances[i, nearest]:9.4g} (to {nearest + 1})"
        lines.append(line)
    what = "angles in degrees" if found.base is not None else "distances, relative to the largest"
    if n >= 2 and 5 + 5 * n <= width:
        lines += ["", what, "     " + "".join(f"{j + 1:>5}" for j in range(n))]
        largest = float(distances.max()) or 1.0
        for i in range(n):
            if found.base is not None:
                cells = [f"{angles[i, j]:5.0f}" if i != j else "    ·" for j in range(n)]
            else:
                cells = [
                    f"{distances[i, j] / largest:5.2f}" if i != j else "    ·" for j in range(n)
                ]
            lines.append(f"{i + 1:>3}  " + "".join(cells).replace("nan", "  -"))
    return [*lines, ""]


def describe_tensors(found: Geometry) -> list[str]:
    """Return a line for each tensor: how far it moved, and at which angles."""
    import numpy as np

    reference = "base" if found.base is not None else "mean"
    lines = [f"{'mean angle':>10} {'to ' + reference:>9} {'relative':>8} {'changed':>8}  tensor"]
    for place in found.tensors:
        upper = place.angles[np.triu_indices(len(found.names), 1)]
        defined = upper[np.isfinite(upper)]
        angle = f"{defined.mean():.1f}°" if len(defined) else "none"
        norm = float(place.norms.mean())
        relative = _ratio(norm, float(place.weight_norms.mean()))
        share = float(place.shares.mean())
        name = printable(place.name)
        lines.append(f"{angle:>10} {norm:9.4g} {relative:>8} {share:>8.2%}  {name}")
    return [*lines, ""]


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole > 0 else "none"
