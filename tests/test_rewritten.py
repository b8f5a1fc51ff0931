"""A shard written in place with its old time stamp: never a mixture; a backup kills no run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import content, save, tensor

from streamsoup import Options, karcher, mix_into, slerp, stock, ties, uniform
from streamsoup.engine import plan, stream
from streamsoup.errors import ChangedIngredientError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.stored import Stored
from streamsoup.methods import closed, spheres

OLD = {"a": tensor(np.arange(5000.0)), "b": tensor(np.arange(5000.0))}
NEW = {"a": tensor(np.arange(5000.0) + 8), "b": tensor(np.arange(5000.0) + 8)}
OTHER = {"a": tensor(np.arange(5000.0) * 2), "b": tensor(np.arange(5000.0) * 2)}
N_LEAVES = 10


def write_in_place(path: Path, whole: bytes) -> None:
    """Do as ``rsync --inplace -t`` does: same inode, size and time stamp."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
        *(after.st_ino, after.st_size, after.st_mtime_ns),
    )


def after_leaf(n: int, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something change once `n` leaves of 1000 elements were made."""
    monkeypatch.setattr(plan, "LEAF", 1000)
    make_leaf, done = stream._Pass.make_leaf, 0

    def making(self: Any, *arguments: Any) -> None:
        nonlocal done
        make_leaf(self, *arguments)
        done += 1
        if done == n:
            change()

    monkeypatch.setattr(stream._Pass, "make_leaf", making)


def folders(tmp_path: Path) -> tuple[list[Path], Path]:
    """Save two ingredients; return them, and the file of the first."""
    paths = [save(tmp_path / "m0", OLD), save(tmp_path / "m1", OTHER)]
    return paths, paths[0] / "model.safetensors"


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("n", [1, 4, 9, N_LEAVES])
def test_a_rewritten_shard_makes_no_mixture(
    n: int, io: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written anew between two leaves, the run ends in an error that names file and tensor."""
    paths, victim = folders(tmp_path)
    after_leaf(n, lambda: write_in_place(victim, content(NEW)), monkeypatch)
    with pytest.raises(ChangedIngredientError) as refused:
        uniform(paths, output=tmp_path / "out", options=Options(io=io, threads=1))
    assert str(refused.value).startswith(f"{victim}: a: was written in place while it was being")
    assert not (tmp_path / "out").exists()


def test_a_rewritten_header_is_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of the same length that lays the same bytes out in another way is noticed."""
    paths, victim = folders(tmp_path)
    swapped = content({"b": OLD["b"], "a": OLD["a"]})
    after_leaf(N_LEAVES, lambda: write_in_place(victim, swapped), monkeypatch)
    with pytest.raises(ChangedIngredientError, match=r"m0/model\.safetensors: was rewritten in pl"):
        uniform(paths, output=tmp_path / "out", options=Options(threads=1))


def link(path: Path) -> None:
    """Back it up as ``cp -al`` and rsnapshot do."""
    os.link(path, path.with_suffix(".backup"))


def restore_times(path: Path) -> None:
    """Set back the access time, as ``tar --atime-preserve`` does: nothing but ctime tells."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def same_again(path: Path) -> None:
    """Write the bytes that are there, as a checksumming copy in place may."""
    write_in_place(path, path.read_bytes())


@pytest.mark.parametrize(
    "change", [link, restore_times, same_again, lambda path: path.chmod(0o600)]
)
def test_a_backup_kills_no_run(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes the change time alone is told by digests, and the soup is the same."""
    paths, victim = folders(tmp_path)
    expected = uniform(paths, output=tmp_path / "expected")
    after_leaf(4, lambda: change(victim), monkeypatch)
    soup = uniform(paths, output=tmp_path / "out", options=Options(threads=1))
    files = [Path(each.path) / "model.safetensors" for each in (expected, soup)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_changes_under_the_second_look_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link makes suspects; a rewrite while they are being settled does not get past."""
    paths, victim = folders(tmp_path)
    settle = Stored.settle
    after_leaf(4, lambda: link(victim), monkeypatch)

    def settling(self: Stored, suspects: Any) -> None:
        monkeypatch.setattr(Stored, "settle", settle)
        settle(self, suspects)
        write_in_place(victim, content(NEW))

    monkeypatch.setattr(Stored, "settle", settling)
    with pytest.raises(ChangedIngredientError, match="its content differs"):
        uniform(paths, output=tmp_path / "out", options=Options(threads=1))


def test_without_suspects_there_is_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: with the suspects taken out, leaves of two checkpoints end in one soup."""
    paths, victim = folders(tmp_path)
    after_leaf(4, lambda: write_in_place(victim, content(NEW)), monkeypatch)
    monkeypatch.setattr(Stored, "suspects", lambda self, strict: None)
    out = Path(uniform(paths, output=tmp_path / "out", options=Options(threads=1)).path)
    mixed = np.frombuffer((out / "model.safetensors").read_bytes()[-80_000:])
    assert set(mixed - np.tile(np.arange(5000.0) * 1.5, 2)) == {0, 4}


def test_a_live_mix_takes_links_and_nothing_else(tmp_path: Path) -> None:
    """Passes without digests go by what else has changed, each time since the last time."""
    paths, victim = folders(tmp_path)
    opened = open_ingredients(paths)
    model = torch.nn.Module()
    for name in OLD:
        model.register_buffer(name, torch.zeros(5000, dtype=torch.float64))
    link(victim)
    mix_into(model, opened)
    assert model.get_buffer("a")[2] == 3
    write_in_place(victim, content(NEW))
    with pytest.raises(ChangedIngredientError, match="its change time is newer"):
        mix_into(model, opened)
    mix_into(model, paths)
    assert model.get_buffer("a")[2] == 7


def test_a_source_given_twice_is_compared_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One open ingredient in two places of the list is checked in both."""
    (opened,) = open_ingredients([save(tmp_path / "m0", OLD)])
    victim = tmp_path / "m0" / "model.safetensors"
    shutil.copy(victim, tmp_path / "copy")
    after_leaf(4, lambda: link(victim), monkeypatch)
    soup = uniform([opened, opened], output=tmp_path / "out", options=Options(threads=1))
    assert (Path(soup.path) / "model.safetensors").read_bytes()[-80_000:] == (
        (tmp_path / "copy").read_bytes()[-80_000:]
    )


VERBS: dict[str, Callable[[list[Path], Path], object]] = {
    "slerp": lambda paths, out: slerp(paths, [0.5, 0.5], output=out),
    "stock": lambda paths, out: stock(paths, base=paths[0], output=out),
    "karcher": lambda paths, out: karcher(paths, output=out),
    "ties": lambda paths, out: ties(  # one thread: another would see the time before it is set back
        [paths[1]], base=paths[0], density=0.5, output=out, options=Options(threads=1)
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_changes_after_it_was_measured_makes_no_soup(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is written in place between two passes ends the run."""
    paths, first = folders(tmp_path)
    new = (save(tmp_path / "new", NEW) / "model.safetensors").read_bytes()
    if verb == "ties":
        after_leaf(1, lambda: write_in_place(first, new), monkeypatch)
    for module in (closed, spheres):
        measure_all = module.measure_all

        def measured(*given: Any, before: Callable[..., Any] = measure_all) -> Any:
            found = before(*given)
            write_in_place(first, new)
            return found

        monkeypatch.setattr(module, "measure_all", measured)
    with pytest.raises(ChangedIngredientError, match="its change time is newer"):
        VERBS[verb](paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
