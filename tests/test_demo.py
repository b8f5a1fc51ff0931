"""The demo keeps its promises: clean splits, the same run twice, honest tables."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamsoup.demo import digits, judging, network, steps, table, task, training
from streamsoup.demo.digits import Digits, Parts, Sizes
from streamsoup.demo.steps import Plan
from streamsoup.demo.table import Results, Row
from streamsoup.demo.training import Training
from streamsoup.errors import OutputError
from streamsoup.study.measures.rows import Gain

TINY = Plan(
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
        "val": 500,
        "test": 1237,
        "MNIST": 1500,
        "corrupted": 1237,
    }


def test_a_leak_would_be_seen(parts: Parts) -> None:
    """Planted fault: one test image in the training part is counted as shared."""
    leaked = parts.judged["test"].pick(torch.tensor([5]))
    assert _n_shared([parts.train, parts.judged["test"], leaked]) == 1


def test_parts_depend_on_the_seed_alone(parts: Parts) -> None:
    """The same seed gives the same splits and corruptions; another seed gives others."""

    def target_splits(seed: int) -> list[Digits]:
        divided = digits.divide(digits.load_target(), [60, 500, 1237], seed)
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
    """Each digit comes back once with its label, changed, in [0, 1]; the original is untouched."""
    some = parts.judged["test"].pick(torch.arange(8))
    before = some.images.clone()
    corrupted = digits.corrupt(some, seed=3)
    assert torch.equal(corrupted.images, digits.corrupt(some, seed=3).images)
    assert torch.equal(corrupted.labels, some.labels)
    assert corrupted.images.shape == (8, 1, digits.SIDE, digits.SIDE)
    assert corrupted.images.min() >= 0
    assert corrupted.images.max() <= 1
    assert torch.equal(some.images, before)
    assert (corrupted.images != before).flatten(1).any(1).all()


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
    some = parts.train.pick(torch.arange(50))
    with training.reproducible():
        first = training.train(start, some, TINY.pretraining).state_dict()
        second = training.train(start, some, TINY.pretraining).state_dict()
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], before[name])


def test_torch_settings_are_restored() -> None:
    """`reproducible` restores the threads and the determinism flag, even after an error."""

    def settings() -> tuple[int, bool]:
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def fail() -> None:
        with training.reproducible():
            assert settings() == (1, True)
            raise RuntimeError("failed")

    before = settings()
    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert settings() == before


def test_drawn_trainings_repeat_and_differ() -> None:
    """The search is random but seeded, and within its ranges."""
    drawn = training.draw_trainings(10, 80, seed=0)
    assert drawn == training.draw_trainings(10, 80, seed=0)
    assert len({how.learning_rate for how in drawn}) == 10
    assert all(1e-4 <= how.learning_rate <= 5e-3 and 20 <= how.epochs <= 80 for how in drawn)


def test_tiny_demo_end_to_end(tmp_path: Path) -> None:
    """Every checkpoint loads, the soup is the mean of the ingredients, a second run agrees."""
    results = steps.produce(TINY, tmp_path, Console(file=io.StringIO()))

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
    assert kinds == ["uniform soup", "greedy soup", "learned soup", "ensemble, 2x cost"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["soups"][0]["n_right"] == results.soups[0].n_right
    assert steps.produce(TINY, tmp_path, Console(file=io.StringIO())) == results


def _answers(n_right: dict[str, int], n: int = 400) -> judging.Answers:
    return {split: np.arange(n) < k for split, k in n_right.items()}


def test_the_best_is_chosen_on_validation_alone() -> None:
    """The first of the best on validation counts, although a later one is better elsewhere."""
    counts = [{"val": 97, "test": 399}, {"val": 98, "test": 190}, {"val": 98, "test": 400}]
    assert judging.best_of([_answers(each) for each in counts]) == 1
    rows = [Row(f"{i}", each) for i, each in enumerate(counts)]
    assert Results({"val": 400, "test": 400}, rows[0], rows, []).best().name == "1"


def test_gains_are_paired_and_leave_validation_out() -> None:
    """The interval is that of the mean of differences; an unpaired one would hide the gain."""
    random = np.random.default_rng(0)
    theirs = random.random(400) < 0.5
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:10]] = True
    gains = judging.gains_of({"val": ours, "test": ours}, {"val": theirs, "test": theirs})
    assert list(gains) == ["test"]
    gain = gains["test"]
    assert gain.value == pytest.approx(10 / 400)
    # A sum of 400 differences, 10 of them 1, is about normal around 10 with this deviation.
    deviation = np.std(ours.astype(float) - theirs) / 20
    assert gain.low == pytest.approx(gain.value - 1.96 * deviation, abs=0.003)
    assert gain.high == pytest.approx(gain.value + 1.96 * deviation, abs=0.003)
    assert gain.outcome == "wins"
    # Planted fault: paired with other images, the same counts show nothing.
    shuffled = random.permutation(theirs)
    assert judging.gains_of({"test": ours}, {"test": shuffled})["test"].outcome == "no difference"


def test_an_ensemble_is_the_mean_of_logits(parts: Parts) -> None:
    """One network's answers are its own; two are right where the mean of their logits is."""
    networks = [network.build(seed) for seed in (0, 1)]
    some = parts.judged["test"].pick(torch.arange(100))
    logits = [network.predict(each, some.images) for each in networks]
    for chosen, expected in ([0], logits[0]), ([0, 1], logits[0] + logits[1]):
        found = judging.answers_of([networks[i] for i in chosen], {"test": some})
        assert found["test"].tolist() == (expected.argmax(1) == some.labels).tolist()


def test_the_tables_show_losses_in_80_columns() -> None:
    """Losses have their sign; verdicts follow the intervals alone; the widest numbers fit."""
    counts = {"val": 400, "test": 400, "MNIST": 400, "corrupted": 400}
    gains = {
        "test": Gain(0.004, -0.001, 0.009),
        "MNIST": Gain(-0.333, -0.444, -0.222),
        "corrupted": Gain(0.333, 0.222, 0.444),
    }
    how = Training(1e-2, 80, augmentation=0.5, label_smoothing=0.1, seed=0)
    single = Row("01", counts, how)
    soup = Row("ensemble, 10x cost", counts, gains=dict.fromkeys(gains, gains["corrupted"]))
    mixed = Row("greedy soup of 10", counts, gains=gains)
    results = Results(dict.fromkeys(counts, 400), single, [single], [soup, mixed])
    console = Console(file=io.StringIO(), width=80)
    console.print(table.scores(results))
    console.print(table.gains(results))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in drawn
    assert "best on val (01)" in drawn
    lines = [line.split() for line in drawn.splitlines() if "greedy soup of 10" in line]
    assert lines[0][4:] == ["100.00"] * 4
    assert " ".join(lines[1][4:]) == ("+0.4 [-0.1,+0.9] -33.3 [-44.4,-22.2] +33.3 [+22.2,+44.4]")
    assert table.verdict(mixed) == (
        "greedy soup of 10: wins on corrupted; loses on MNIST; no difference on test."
    )


def test_the_task_scores_as_the_demo_does() -> None:
    """The task file, on the splits of the default plan, agrees with the counts of the table."""
    model = network.build(seed=0)
    assert Plan().seed == 0
    judged = digits.prepare(Plan().sizes, Plan().seed).judged
    assert list(judged) == task.splits
    for split, n_right in judging.counts_of(judging.answers_of([model], judged)).items():
        assert task.score(model, split) == n_right / len(judged[split])


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of safetensors becomes a line with the file and the reason."""

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
    """A folder that cannot be made is an error before any training."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(steps, "produce", lambda *arguments: pytest.fail("began"))
    with pytest.raises(FileExistsError):
        steps.run(tmp_path / "file")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Only the folder of an earlier demo is replaced, finished or not."""
    steps.claim(tmp_path / "new")
    (tmp_path / "new" / "uniform").mkdir()
    steps.claim(tmp_path / "new")
    (tmp_path / "mine" / "uniform").mkdir(parents=True)
    with pytest.raises(OutputError, match="was not made by an earlier demo"):
        steps.claim(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["uniform"]
