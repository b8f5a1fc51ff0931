"""The demo keeps its promises: clean splits, the same run twice, honest tables."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamsoup.demo import digits, kitchen, network, table, training
from streamsoup.demo.digits import Digits, Parts, Sizes
from streamsoup.demo.kitchen import Menu
from streamsoup.demo.table import Results, Row
from streamsoup.demo.training import Training
from streamsoup.errors import OutputError

TINY = Menu(
    sizes=Sizes(pretrain=200, mnist=60, train=60, val=50, test=40),
    pretraining=Training(
        learning_rate=2e-3, epochs=1, augmentation=0.5, label_smoothing=0.0, seed=0
    ),
    n_ingredients=2,
    max_epochs=1,
)


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Return the splits that `make demo` uses."""
    return digits.prepare(Sizes(), seed=0)


def _fingerprints(some: Digits) -> set[str]:
    return {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in some.images}


def _n_shared(groups: Iterable[Digits]) -> int:
    """Count the images that occur twice, by content, within or across the groups."""
    groups = list(groups)
    return sum(map(len, groups)) - len(set[str]().union(*map(_fingerprints, groups)))


def _blank(n: int) -> Digits:
    return Digits(torch.zeros(n, 1, digits.SIDE, digits.SIDE), torch.zeros(n, dtype=torch.int64))


def test_no_judged_image_was_seen_in_training(parts: Parts) -> None:
    """No two of the images in all parts, trained on or judged, have the same pixels."""
    assert _n_shared([parts.pretrain, parts.train, *parts.judged.values()]) == 0
    assert {split: len(judged) for split, judged in parts.judged.items()} == {
        "val": 600,
        "test": 597,
        "MNIST": 1000,
        "corrupted": 4 * 597,
    }


def test_a_leak_would_be_seen(parts: Parts) -> None:
    """Planted fault: one test image in the training part is counted as shared."""
    leaked = parts.judged["test"].pick(torch.tensor([5]))
    assert _n_shared([parts.train, parts.judged["test"], leaked]) == 1


def test_parts_depend_on_the_seed_alone(parts: Parts) -> None:
    """The same seed gives the same splits and corruptions; another seed gives others."""

    def target_splits(seed: int) -> list[Digits]:
        divided = digits.divide(digits.load_target(), [600, 600, 597], seed)
        return [*divided, digits.corrupt(divided[2], seed)]

    expected = [parts.train, *(parts.judged[split] for split in ("val", "test", "corrupted"))]
    for part, same, other in zip(expected, target_splits(0), target_splits(1), strict=True):
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
        assert not torch.equal(part.images, other.images)


def test_more_digits_than_there_are_is_an_error() -> None:
    """Parts are never silently smaller than asked for."""
    with pytest.raises(ValueError, match="5 digits cannot be divided"):
        digits.divide(_blank(5), [3, 3], seed=0)


def test_corruption_keeps_labels_range_and_original(parts: Parts) -> None:
    """Each digit comes back four times with its label, in [0, 1]; the original is untouched."""
    some = parts.judged["test"].pick(torch.arange(8))
    before = some.images.clone()
    corrupted = digits.corrupt(some, seed=3)
    assert torch.equal(corrupted.images, digits.corrupt(some, seed=3).images)
    assert torch.equal(corrupted.labels, some.labels.repeat(4))
    assert corrupted.images.shape == (32, 1, digits.SIDE, digits.SIDE)
    assert corrupted.images.min() >= 0
    assert corrupted.images.max() <= 1
    assert torch.equal(some.images, before)
    for spoiled in corrupted.images.split(8):
        assert not torch.equal(spoiled, before)


def test_augmentation_of_strength_zero_changes_nothing(parts: Parts) -> None:
    """Strength 0 is the identity; strength 1 is not, and the seed decides it."""
    images = parts.train.images[:6]

    def augmented(strength: float, seed: int) -> torch.Tensor:
        return training.augment(images, strength, torch.Generator().manual_seed(seed))

    assert torch.equal(augmented(0, 0), images)
    assert not torch.allclose(augmented(1, 0), images)
    assert torch.equal(augmented(1, 0), augmented(1, 0))


def test_training_repeats_and_leaves_its_start_alone(parts: Parts) -> None:
    """Same start, data and settings give the same bits; the start is not modified."""
    start = network.build(seed=0)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    some = parts.train.pick(torch.arange(100))
    with training.reproducible():
        first = training.train(start, some, TINY.pretraining).state_dict()
        second = training.train(start, some, TINY.pretraining).state_dict()
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], before[name])


def test_torch_settings_are_restored() -> None:
    """`reproducible` gives the threads and the determinism flag back, even after an error."""

    def settings() -> tuple[int, bool]:
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def burn() -> None:
        with training.reproducible(n_threads=1):
            assert settings() == (1, True)
            raise RuntimeError("burnt")

    before = settings()
    with pytest.raises(RuntimeError, match="burnt"):
        burn()
    assert settings() == before


def test_drawn_trainings_repeat_and_differ() -> None:
    """The search is random but seeded, within its ranges, and has rates that are too high."""
    drawn = training.draw_trainings(10, 16, seed=0)
    assert drawn == training.draw_trainings(10, 16, seed=0)
    assert len({how.learning_rate for how in drawn}) == 10
    assert all(1e-4 <= how.learning_rate <= 1e-2 and 4 <= how.epochs <= 16 for how in drawn)
    assert any(how.learning_rate > 5e-3 for how in drawn)


def test_tiny_demo_end_to_end(tmp_path: Path) -> None:
    """Every checkpoint loads, the soup is the mean of the ingredients, a second run agrees."""
    results = kitchen.cook(TINY, tmp_path, Console(file=io.StringIO()))

    folders = [tmp_path / "ingredients" / "01", tmp_path / "ingredients" / "02"]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    soup = load_file(tmp_path / "uniform" / "model.safetensors")
    assert list(soup) == list(first) == list(second)
    for name, tensor in soup.items():
        mean = (first[name].double() + second[name].double()) / 2
        assert torch.equal(tensor, mean.float())
        assert not torch.equal(first[name], second[name])
    assert json.loads((tmp_path / "uniform" / "config.json").read_text())["num_labels"] == 10
    assert network.load(tmp_path / "base").training

    assert [row.name for row in results.ingredients] == ["01", "02"]
    kinds = [row.name.split(" of ")[0] for row in results.soups]
    assert kinds == ["uniform soup", "greedy soup", "learned soup", "ensemble (2 x cost)"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["soups"][0]["n_right"] == results.soups[0].n_right
    assert kitchen.cook(TINY, tmp_path, Console(file=io.StringIO())) == results


@pytest.fixture
def mixed_results() -> Results:
    """Return results in which the soup loses, wins, and ties."""
    return Results(
        n_images={"val": 100, "test": 200, "MNIST": 100, "corrupted": 400},
        base=Row("base", {"val": 50, "test": 100, "MNIST": 99, "corrupted": 100}),
        ingredients=[
            Row("01", {"val": 97, "test": 199, "MNIST": 80, "corrupted": 300}),
            Row("02", {"val": 98, "test": 190, "MNIST": 80, "corrupted": 300}),
            Row("03", {"val": 98, "test": 200, "MNIST": 90, "corrupted": 400}),
        ],
        soups=[Row("uniform soup", {"val": 97, "test": 189, "MNIST": 85, "corrupted": 300})],
    )


def test_the_best_is_chosen_on_validation_alone(mixed_results: Results) -> None:
    """The first of the best on validation counts, although a later one is better elsewhere."""
    assert mixed_results.best().name == "02"


def test_the_table_shows_losses(mixed_results: Results) -> None:
    """A loss is a negative number in the table and is named in the sentence below it."""
    console = Console(file=io.StringIO(), width=80)
    console.print(table.render(mixed_results))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "best on val (02)" in drawn
    last = next(line for line in drawn.splitlines() if "minus the best" in line)
    assert last.split()[3:] == ["-1.00", "-0.50", "+5.00", "0"]
    assert table.verdict(mixed_results, mixed_results.soups[0]) == (
        "Against the best single model, the uniform soup "
        "wins on MNIST; equals it on corrupted; loses on val, test."
    )


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever safetensors calls it, the line names the file and the reason."""

    def save_file(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(network, "save_file", save_file)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written: .*No space"):
        network.save(network.build(seed=0), tmp_path / "run")


def test_without_its_extras_the_demo_says_what_to_install() -> None:
    """One line of advice, exit status 1, no traceback; and importing the demo loads no torch."""
    script = (
        "import sys; sys.modules['mlxtend'] = None; from streamsoup.demo import main; "
        "assert 'torch' not in sys.modules; main('nowhere')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the demo needs mlxtend; install its extras: pip install 'streamsoup[demo]'\n"
    )


def test_a_folder_that_cannot_be_made_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for pretraining only to learn that there is no place for it."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(kitchen, "cook", lambda *arguments: pytest.fail("began"))
    with pytest.raises(FileExistsError):
        kitchen.serve(tmp_path / "file")


def test_the_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Only what an earlier demo made is replaced, finished or not."""
    kitchen._take(tmp_path / "new")
    (tmp_path / "new" / "uniform").mkdir()
    kitchen._take(tmp_path / "new")
    (tmp_path / "mine" / "uniform").mkdir(parents=True)
    with pytest.raises(OutputError, match="is there already, and of no earlier demo"):
        kitchen._take(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["uniform"]
