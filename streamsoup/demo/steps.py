"""The steps of the demo in order, from raw digits to the table.

Pretrain one network on MNIST; fine-tune it into ingredients on a few digits of the target; save
each as a safetensors directory; average the directories; judge everything on the same four splits.
No training sees any of the four.  The best single model, the greedy and the learned soup are chosen
on validation; test and the shifts are only looked at in the table.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

import streamsoup
from streamsoup.demo import comparison, digits, judging, network, soups, table, training
from streamsoup.demo.digits import Parts, Sizes
from streamsoup.demo.table import Results, Row
from streamsoup.demo.training import Training
from streamsoup.errors import OutputExistsError, printable
from streamsoup.methods.angles import Geometry
from streamsoup.search.greedy import GreedySoup
from streamsoup.search.learned import LearnedSoup
from streamsoup.study.pages.page import write_text


class Plan(msgspec.Struct, frozen=True):
    """What is trained, on how much data."""

    sizes: Sizes = msgspec.field(default_factory=Sizes)
    pretraining: Training = msgspec.field(
        default_factory=lambda: Training(
            *(2e-3, 12), augmentation=0.5, label_smoothing=0.0, seed=0, batch_size=50
        )
    )
    n_ingredients: int = 10

    max_epochs: int = 80
    """The longest fine-tuning; the number of epochs is drawn from a quarter of it upwards."""

    seed: int = 0
    """Of the splits, the corruptions, the first weights and the drawn settings."""


def run(folder: str | os.PathLike[str]) -> None:
    """Run the demo into `folder`; print its progress, the tables, and commands to try next."""
    started = time.perf_counter()
    folder, console = Path(folder), Console(highlight=False)
    claim(folder)
    results = produce(Plan(), folder, console)

    console.print(table.scores(results))
    images = ", ".join(f"{split} {n:,}" for split, n in results.n_images.items())
    console.print(f"Percent right; images: {images}.\n")
    console.print(table.gains(results))
    console.print("Percentage points, [95 % interval] by paired bootstrap over images.")
    for soup in results.soups:
        console.print(table.verdict(soup))
    console.print("\nComparing them in every way: calibration, ensembles, curves, pairs.")
    page = comparison.write(folder, results, _command())
    console.print(f"The report is {page}", markup=False, soft_wrap=True)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    console.print(_next_steps(folder), markup=False, soft_wrap=True)


def claim(folder: Path) -> None:
    """Make the folder, or reuse that of an earlier demo. Raise `OutputExistsError` for others."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / ".streamsoup-demo"
    if any(folder.iterdir()) and not marker.exists():
        raise OutputExistsError(
            f"{printable(str(folder))}: exists and was not made by an earlier demo, so it is not "
            "replaced; choose another folder, or remove it yourself"
        )
    marker.touch()


def produce(plan: Plan, folder: Path, console: Console) -> Results:
    """Train, average and judge; return the results, also written to `folder/results.json`."""
    with training.reproducible():
        console.print("Preparing digits: MNIST, and the UCI digits of other writers.")
        parts = digits.prepare(plan.sizes, plan.seed)
        paths, hows = train_all(plan, parts, folder, console)
        console.print(_angles(streamsoup.geometry(paths, base=folder / "base")))

        console.print("Averaging: uniform; greedy and learned on validation.")
        val = parts.judged["val"]
        uniform = soups.uniform(paths, folder / "uniform")
        greedy = soups.greedy(paths, val, folder / "greedy")
        console.print(_greedy(greedy))
        learned = soups.learned(paths, val, folder / "learned")
        console.print(_learned(learned))

        models = {
            "uniform soup": [uniform],
            f"greedy soup of {len(greedy.members)}": [Path(greedy.path)],
            "learned soup": [Path(learned.path)],
            f"ensemble, {len(paths)}x cost": paths,
        }

        def answers(*folders: Path) -> judging.Answers:
            return judging.answers_of([network.load(each) for each in folders], parts.judged)

        singles = [answers(path) for path in paths]
        best = singles[judging.best_of(singles)]
        averaged = {name: answers(*folders) for name, folders in models.items()}
        results = Results(
            n_images={split: len(judged) for split, judged in parts.judged.items()},
            base=Row("base", judging.counts_of(answers(folder / "base")), plan.pretraining),
            ingredients=[
                Row(path.name, judging.counts_of(found), how)
                for path, found, how in zip(paths, singles, hows, strict=True)
            ],
            soups=[
                Row(name, judging.counts_of(found), gains=judging.gains_of(found, best))
                for name, found in averaged.items()
            ],
        )
    text = json.dumps(msgspec.to_builtins(results), indent=2)
    write_text(str(folder / "results.json"), f"{text}\n")
    return results


def train_all(
    plan: Plan, parts: Parts, folder: Path, console: Console
) -> tuple[list[Path], list[Training]]:
    """Write the base and its fine-tunes; return the fine-tunes' folders and their settings."""
    console.print(f"Pretraining on {len(parts.pretrain):,} MNIST digits.")
    base = training.train(network.build(plan.seed), parts.pretrain, plan.pretraining)
    network.save(base, folder / "base")

    hows = training.draw_trainings(plan.n_ingredients, plan.max_epochs, plan.seed)
    console.print(f"Fine-tuning it {len(hows)} times on the same {len(parts.train):,} UCI digits.")
    paths = []
    bar = track(hows, "", console=console, transient=True, disable=not console.is_terminal)
    for i, how in enumerate(bar, start=1):
        tuned = training.train(base, parts.train, how)
        paths.append(network.save(tuned, folder / "ingredients" / f"{i:02}"))
    return paths, hows


def _angles(found: Geometry) -> str:
    """Return how far the fine-tunes are from each other and from the base."""
    upper = np.triu_indices(len(found.names), 1)
    angles, distances = found.total.angles[upper], found.total.norms / found.total.weight_norms
    return (
        f"Fine-tuning moved the weights by {100 * distances.min():.0f} to "
        f"{100 * distances.max():.0f} % of their norm,\n"
        f"in directions {angles.min():.0f}° to {angles.max():.0f}° apart."
    )


def _greedy(soup: GreedySoup) -> str:
    kept = ", ".join(Path(path).name for path in soup.report["kept"])
    return f"Greedy: {soup.report['n_scored']} mixtures scored; kept {kept}."


def _learned(soup: LearnedSoup) -> str:
    first, best = soup.evaluations[0], soup.evaluations[soup.best]
    return (
        f"Learned, by layer: validation loss {first.loss:.4f} to {best.loss:.4f} "
        f"in {len(soup.evaluations)} evaluations."
    )


def _next_steps(folder: Path) -> str:
    command, ingredients, soup = _command(), folder / "ingredients", folder / "uniform"
    return "\n".join(
        [
            f"The pretrained base, the ingredients and the soups are in {folder}{os.sep}. Try:",
            f"  {command} inspect {soup}",
            f"  {command} verify {soup}",
            f"  {command} uniform {ingredients / '01'} {ingredients / '08'} -o {folder / 'pair'}",
        ]
    )


def _command() -> str:
    """Return how to call streamsoup from here: by name, or by path if it is not on the PATH."""
    if shutil.which("streamsoup"):
        return "streamsoup"
    return os.path.relpath(Path(sys.executable).with_name("streamsoup"))
