"""The demo from raw digits to the table, in order.

Pretrain one network on MNIST; fine-tune it into ingredients on the target; save each as a
safetensors directory; soup the directories; judge everything on the same four splits.  No training
sees any of the four, and only validation has a say in which model counts as the best.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

import streamsoup
from streamsoup.demo import comparison, digits, network, table, training
from streamsoup.demo.digits import Parts, Sizes
from streamsoup.demo.network import Network
from streamsoup.demo.table import Results, Row
from streamsoup.demo.training import Training
from streamsoup.errors import OutputExistsError, printable
from streamsoup.methods.angles import Geometry
from streamsoup.search.greedy import GreedySoup
from streamsoup.search.learned import LearnedSoup
from streamsoup.search.report import beyond_scoring
from streamsoup.study.report.page import write_text

BATCH = 60
"""Validation images in a batch of the learned soup: ten batches, of which two watch."""


class Menu(msgspec.Struct, frozen=True):
    """What to cook, and how much of it."""

    sizes: Sizes = msgspec.field(default_factory=Sizes)
    pretraining: Training = msgspec.field(
        default_factory=lambda: Training(
            learning_rate=2e-3, epochs=12, augmentation=0.5, label_smoothing=0.0, seed=0
        )
    )
    n_ingredients: int = 10

    max_epochs: int = 16
    """The longest fine-tuning; the number of epochs is drawn from a quarter of it upwards."""

    seed: int = 0
    """Decides the splits, the corruptions, the first weights and the hyper-parameters."""


def serve(folder: str | os.PathLike[str]) -> None:
    """Run the demo into `folder`, and print what is being done, the table, and what to try next."""
    started = time.perf_counter()
    console = Console()
    _take(Path(folder))
    results = cook(Menu(), Path(folder), console)

    console.print(table.render(results))
    counts = ", ".join(f"{split} {n:,}" for split, n in results.n_images.items())
    console.print(f"Percent right; images: {counts}.", highlight=False)
    for soup in results.soups:
        console.print(table.verdict(results, soup), highlight=False)
    console.print("Comparing them in every way: calibration, ensembles, curves, pairs.")
    page = comparison.write(Path(folder), results, _command())
    console.print(f"The report is {page}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.", highlight=False)
    console.print(_next_steps(Path(folder)), highlight=False, markup=False, soft_wrap=True)


def _take(folder: Path) -> None:
    """Make the folder, or take that of an earlier demo. Raises `OutputExistsError` for others."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / ".streamsoup-demo"
    if any(folder.iterdir()) and not marker.exists():
        raise OutputExistsError(
            f"{printable(str(folder))}: is there already, and of no earlier demo, whose folders "
            "alone are replaced; choose another with -o, or remove it yourself"
        )
    marker.touch()


def cook(menu: Menu, folder: Path, console: Console) -> Results:
    """Do all the work of the demo; return the results, also left in `folder/results.json`."""
    with training.reproducible():
        console.print("Preparing digits: MNIST, and the UCI digits of other writers.")
        parts = digits.prepare(menu.sizes, menu.seed)

        console.print(f"Pretraining on {len(parts.pretrain):,} MNIST digits.", highlight=False)
        base = training.train(network.build(menu.seed), parts.pretrain, menu.pretraining)
        network.save(base, folder / "base")

        hows = training.draw_trainings(menu.n_ingredients, menu.max_epochs, menu.seed)
        console.print(
            f"Fine-tuning it {len(hows)} times on the same {len(parts.train):,} UCI digits.",
            highlight=False,
        )
        paths = []
        bar = track(hows, "", console=console, transient=True, disable=not console.is_terminal)
        for i, how in enumerate(bar, start=1):
            tuned = training.train(base, parts.train, how)
            paths.append(network.save(tuned, folder / "ingredients" / f"{i:02}"))

        found = streamsoup.geometry(paths, base=folder / "base")
        console.print(_angles(found), highlight=False)
        console.print("Souping: uniform; greedy and learned on validation.")
        soup_path = mix_uniform(paths, folder / "uniform")
        greedy = mix_greedy(paths, parts, folder / "greedy")
        console.print(_told(greedy), highlight=False)
        learned = mix_learned(paths, parts, folder / "learned")
        console.print(_learned(learned), highlight=False)

        results = Results(
            n_images={split: len(judged) for split, judged in parts.judged.items()},
            base=judge("base", base, parts, menu.pretraining),
            ingredients=[
                judge(path.name, network.load(path), parts, how)
                for path, how in zip(paths, hows, strict=True)
            ],
            soups=[
                judge("uniform soup", network.load(soup_path), parts),
                judge(
                    f"greedy soup of {len(greedy.members)}", network.load(Path(greedy.path)), parts
                ),
                judge("learned soup", network.load(Path(learned.path)), parts),
                judge_together("ensemble", [network.load(path) for path in paths], parts),
            ],
        )
    _write(results, folder / "results.json")
    return results


def mix_uniform(ingredients: Sequence[Path], output: Path) -> Path:
    """Write the plain average of `ingredients` to `output`, in place of an older one."""
    soup = streamsoup.uniform(
        ingredients, output=output, options=streamsoup.Options(overwrite=True)
    )
    return Path(soup.path)


def mix_greedy(ingredients: Sequence[Path], parts: Parts, output: Path) -> GreedySoup:
    """Write the mean of those that belong together to `output`, in place of an older one."""
    val = parts.judged["val"]

    def score(model: Network) -> float:
        return float((network.predict(model, val.images).argmax(1) == val.labels).double().mean())

    return streamsoup.greedy(
        ingredients,
        score,
        output=output,
        model=network.build(seed=0),
        settings=streamsoup.GreedySettings(restart=True),
        options=streamsoup.Options(overwrite=True),
    )


def mix_learned(ingredients: Sequence[Path], parts: Parts, output: Path) -> LearnedSoup:
    """Write the mix with the lowest validation loss to `output`, in place of an older one."""
    val = parts.judged["val"]

    def loss(model: Network, split: str) -> Iterator[tuple[Tensor, int]]:
        for images, labels in zip(val.images.split(BATCH), val.labels.split(BATCH), strict=True):
            yield functional.cross_entropy(model(images), labels), len(labels)

    return streamsoup.learned(
        ingredients,
        SimpleNamespace(score=lambda model: 0.0, loss=loss),
        output=output,
        model=network.build(seed=0),
        settings=streamsoup.LearnedSettings(granularity="layer", constraint="affine", restart=True),
        options=streamsoup.Options(overwrite=True),
    )


def judge_together(name: str, cooked: Sequence[Network], parts: Parts) -> Row:
    """Count the right answers of the mean of all networks' logits: each image costs all of them."""
    n_right = {}
    for split, judged in parts.judged.items():
        logits = torch.stack([network.predict(each, judged.images) for each in cooked]).mean(0)
        n_right[split] = int((logits.argmax(1) == judged.labels).sum())
    return Row(f"{name} ({len(cooked)} x cost)", n_right)


def judge(name: str, cooked: Network, parts: Parts, how: Training | None = None) -> Row:
    """Count the right answers of a network on every split that no training has seen."""
    n_right = {
        split: int((network.predict(cooked, judged.images).argmax(1) == judged.labels).sum())
        for split, judged in parts.judged.items()
    }
    return Row(name, n_right, how)


def _told(soup: GreedySoup) -> str:
    """Say what the greedy search took, beside the scoring."""
    seconds = soup.report["seconds"]
    share = 100 * beyond_scoring(seconds)
    return (
        f"Greedy: {soup.report['n_scored']} scores in {seconds['search']:.2f} s, "
        f"{share:.0f} % of it beyond scoring; kept {', '.join(map(_last, soup.report['kept']))}."
    )


def _learned(soup: LearnedSoup) -> str:
    """Say what learning took and gave."""
    report, first, best = soup.report, soup.evaluations[0], soup.evaluations[soup.best]
    return (
        f"Learned, by layer: loss {first.loss:.4f} to {best.loss:.4f} in "
        f"{len(soup.evaluations)} evaluations, "
        f"{report['n_passes']} passes over the ingredients (predicted: at most "
        f"{report['predicted']['passes']}), {report['elapsed_s']:.2f} s."
    )


def _angles(found: Geometry) -> str:
    """Say how far apart the fine-tunes are, seen from the base."""
    upper = np.triu_indices(len(found.names), 1)
    angles, distances = found.total.angles[upper], found.total.norms / found.total.weight_norms
    return (
        f"Angles between them, seen from the base: {angles.min():.0f}° to {angles.max():.0f}°; "
        f"they went {100 * distances.min():.0f} to {100 * distances.max():.0f} % of their length."
    )


def _last(path: str) -> str:
    return Path(path).name


def _write(results: Results, path: Path) -> None:
    write_text(str(path), json.dumps(msgspec.to_builtins(results), indent=2) + "\n")


def _next_steps(folder: Path) -> str:
    command, ingredients, soup = _command(), folder / "ingredients", folder / "uniform"
    return "\n".join(
        [
            f"The pretrained base, the ingredients and the soup lie in {folder}{os.sep}. Try:",
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
