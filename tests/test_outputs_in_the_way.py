"""Outputs that cannot be made: folders of others, links, mounts, full disks, strange names."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import unexpected
from commands import (
    IS_ROOT,
    large,
    listing,
    run,
    small,
)

from streamsoup.errors import OutputError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.methods.fixed import uniform
from streamsoup.options import Options
from streamsoup.output import staging
from streamsoup.output.destination import check_output, check_replaceable
from streamsoup.output.staging import Staging
from streamsoup.system import libc

# -- what is in the way ---------------------------------------------------------------------------


def test_a_strangers_folder_is_refused_untouched(tmp_path: Path) -> None:
    """An OUT.partial that is not ours is left as it is, whatever its files are called."""
    a = small(tmp_path / "a")
    for number, files in enumerate(
        [
            {"thesis.tex": "x"},
            {"lock": "mine"},
            {"lock": "", "more": "x"},
            {"journal": "Dear diary"},
        ]
    ):
        partial = tmp_path / f"soup-{number}.partial"
        partial.mkdir()
        for name, text in files.items():
            (partial / name).write_text(text)
        before = listing(partial)
        status, stderr = run("uniform", a, a, "-o", tmp_path / f"soup-{number}")
        assert status == 1
        assert "not made by streamsoup" in stderr or "damaged" in stderr
        assert {p: v for p, v in listing(partial).items() if p in before} == before
    (tmp_path / "file.partial").write_text("x")
    assert "not made by streamsoup" in run("uniform", a, a, "-o", tmp_path / "file")[1]


def test_no_link_leads_the_writer_elsewhere(tmp_path: Path) -> None:
    """Links in the work folder, symbolic or hard, are refused, never written through."""
    a = small(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("lock", "journal", "model.safetensors"):
        (elsewhere / name).write_text("")
    before = listing(elsewhere)
    soup, partial = tmp_path / "soup", tmp_path / "soup.partial"
    for name in ("", "lock", "journal", "soup"):
        for hard in (False, True):
            if name:
                partial.mkdir()
                (partial / "lock").touch()
                (partial / name).unlink(missing_ok=True)
            target = elsewhere / name if name in ("lock", "journal") else elsewhere
            if not hard:
                (partial / name).symlink_to(target)
            elif target.is_file():
                (partial / name).hardlink_to(target)
            else:
                continue
            status, stderr = run("uniform", a, a, "-o", soup)
            assert (status, "not made by streamsoup" in stderr) == (1, True), (name, hard)
            subprocess.run(["rm", "-rf", partial], check=True)
            assert listing(elsewhere) == before
    assert os.listdir(elsewhere)


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    """A link to a folder stands for that folder; one that leads nowhere, for what it names."""
    a = small(tmp_path / "a")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert "exists already" in run("uniform", a, a, "-o", tmp_path / "link")[1]
    assert run("uniform", a, a, "-o", tmp_path / "link", "--overwrite") == (0, "")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()
    (tmp_path / "nowhere").symlink_to("new")
    assert run("uniform", a, a, "-o", tmp_path / "nowhere") == (0, "")
    assert (tmp_path / "new" / "model.safetensors").exists()
    (tmp_path / "loop").symlink_to("loop")
    assert run("uniform", a, a, "-o", tmp_path / "loop")[0] == 1


def test_no_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~ that no shell replaced is neither a home nor, by accident, a new folder of that name."""
    a = small(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    status, stderr = run("uniform", a, a, "-o", "~/soup")
    assert (status, "write the whole path" in stderr) == (1, True)
    assert "not quoted" in run("uniform", "~/a", a, "-o", "soup")[1]
    assert os.listdir(tmp_path) == ["a"]
    assert run("uniform", a, a, "-o", "./~") == (0, "")


def test_the_folder_we_are_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's working folder is pulled away from under them; a new one in it will do."""
    a = small(tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, stderr = run("uniform", a, a, "-o", ".", "--overwrite")
    assert (status, "choose a new folder in it" in stderr) == (1, True)
    assert run("uniform", a, a, "-o", "soup") == (0, "")


def test_the_folder_we_are_in_may_be_gone(tmp_path: Path) -> None:
    """Where it was removed, a path relative to it is refused in words, and a whole one will do."""
    a = small(tmp_path / "a")
    gone = "mkdir gone; cd gone; rmdir ../gone; exec"
    for output, overwrite, reason in (
        ("soup", "", "error: soup: cannot be made, as the current folder was removed"),
        (tmp_path / "soup", "", ""),
        (tmp_path / "soup", "--overwrite", ""),
    ):
        line = f"{gone} '{sys.executable}' -m streamsoup uniform {a} {a} -o {output} {overwrite}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == bool(reason), done.stderr
        assert unexpected(done.stderr).startswith(reason)
        assert unexpected(done.stderr).count("\n") == bool(reason)


def test_never_into_an_ingredient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output in, over or around an ingredient, by whatever path or link."""
    a = small(tmp_path / "zoo" / "deep" / "a")
    b = small(tmp_path / "b", seed=1)
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "zoo" / "x.safetensors").write_bytes(b"")  # so that it could be replaced
    (tmp_path / "hard").mkdir()
    os.link(a / "model.safetensors", tmp_path / "hard" / "model.safetensors")
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft" / "model.safetensors").symlink_to(a / "model.safetensors")
    (tmp_path / "soup.partial").mkdir()
    inside = small(tmp_path / "soup.partial" / "soup", seed=2)
    (tmp_path / "soup.partial" / "lock").touch()
    before = listing(tmp_path)
    ingredients = [str(path) for path in (a, b, inside)]
    lone = [str(a / "model.safetensors"), *ingredients[1:]]
    monkeypatch.chdir(a)
    for output in (
        *(a, f"{a}/", f"{a}/.", a / "x" / "soup", tmp_path / "link", tmp_path / "link" / "soup"),
        *(a.parent / "b" / ".." / "a", a.parent.parent, tmp_path / "hard", tmp_path / "soft"),
        *(tmp_path / "soup", tmp_path, "/", "..", ".", "x", ""),
    ):
        for given in (ingredients, lone):
            if given is lone and output in (a / "x" / "soup", tmp_path / "link" / "soup", "x"):
                continue  # beside a lone file there is room
            with pytest.raises(OutputError):
                uniform(given, output=output, options=Options(overwrite=True))
            assert listing(tmp_path) == before, output


def test_a_disk_that_hides_something_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be looked at may be an ingredient: it is neither replaced nor cleared."""
    a = small(tmp_path / "soup" / "deep" / "a")
    (tmp_path / "soup" / "x.safetensors").write_bytes(b"")
    before = listing(tmp_path)
    opened = open_ingredients([a])
    scandir, stat = os.scandir, os.stat

    def fail(path: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def blind_scandir(path: str) -> object:
        return fail(path) if str(path).endswith("deep") else scandir(path)

    def blind_stat(path: str, **named: Any) -> object:
        return fail(path) if str(path).endswith("model.safetensors") else stat(path, **named)

    for name, blind in (("scandir", blind_scandir), ("stat", blind_stat)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, blind)
            with pytest.raises(OSError, match="Input/output error"):
                check_output(str(tmp_path / "soup"), opened, overwrite=True, resumes=True)
    assert listing(tmp_path) == before


def test_only_a_lone_checkpoint_is_replaced(tmp_path: Path) -> None:
    """--overwrite spares a folder of something else, and one of several checkpoints."""
    a = small(tmp_path / "a")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter-1.tex").write_text("x")
    training = small(tmp_path / "training")
    small(training / "checkpoint-500", seed=1)
    legacy = small(tmp_path / "legacy")
    (legacy / "original").mkdir()
    (legacy / "original" / "consolidated.00.pth").write_text("x")
    before = listing(tmp_path)
    for output, reason in (
        (thesis, "is not a checkpoint"),
        (training, "more than one checkpoint (checkpoint-500)"),
        (legacy, "more than one checkpoint (original)"),
    ):
        status, stderr = run("uniform", a, a, "-o", output, "--overwrite")
        assert status == 1
        assert f"{output}: " in stderr
        assert reason in stderr
        assert listing(tmp_path) == before
    soup = small(tmp_path / "soup")
    (soup / "tokenizer").mkdir()
    (soup / "tokenizer" / "vocab.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for output in (soup, tmp_path / "empty"):
        assert run("uniform", a, a, "-o", output, "--overwrite") == (0, "")


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_never_into_an_ingredient_by_a_mount(tmp_path: Path) -> None:
    """A bind mount of an ingredient is the ingredient."""
    a = small(tmp_path / "zoo" / "a")
    (tmp_path / "zoo" / "x.safetensors").write_bytes(b"")
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "--bind", a, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        for ingredient, output in [(a, mount), (a, mount / "x"), (mount, a), (mount, a.parent)]:
            status, stderr = run("uniform", ingredient, "-o", output, "--overwrite")
            assert status == 1
            assert "ingredient" in stderr
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file/soup", "Not a directory|is a file"),
        ("x" * 300, "name too long"),
        ("x" * 250, "name too long"),
        ("soup.safetensors", "leave out"),
        ("file", "is a file"),
        ("/proc/soup", "cannot be made"),
    ],
)
def test_an_impossible_output(tmp_path: Path, output: str, reason: str) -> None:
    """An output that cannot be is refused in one line that names it, and leaves nothing."""
    a = small(tmp_path / "a")
    (tmp_path / "file").write_text("")
    status, stderr = run("uniform", a, a, "-o", output, cwd=tmp_path)
    assert status == 1
    assert stderr.count("\n") == 1
    assert any(word in stderr for word in reason.split("|")), stderr
    assert output[:50] in stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_folders_above_that_another_run_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that could not begin removes what it had made, just when this one builds on it."""
    mkdir, n_taken = os.mkdir, 0

    def taken_away(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        nonlocal n_taken
        if path.endswith(".partial") and n_taken < 3:
            n_taken += 1
            os.rmdir(tmp_path / "a" / "b")
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", taken_away)
    with Staging(str(tmp_path / "a" / "b" / "soup"), "x", overwrite=False) as staging:
        assert n_taken == 3
        staging.discard()
    assert os.listdir(tmp_path) == []


def test_folders_above_are_not_left_behind(tmp_path: Path) -> None:
    """Folders that were made for an output that then cannot be begun are removed again."""
    a = small(tmp_path / "a")
    status, stderr = run("uniform", a, a, "-o", tmp_path / "new" / "folders" / ("x" * 250))
    assert status == 1
    assert "name too long" in stderr
    assert os.listdir(tmp_path) == ["a"]


def test_few_descriptors(tmp_path: Path) -> None:
    """Where too few files may be open, one line says so, and nothing is left."""
    small(tmp_path / "a")
    failed = 0
    for n in range(5, 9):
        line = f"ulimit -n {n}; exec '{sys.executable}' -m streamsoup uniform a a -o new/soup"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            assert unexpected(done.stderr).count("\n") == 1
            assert "kept beside it" not in done.stderr
            assert os.listdir(tmp_path) == ["a"], n
            failed += 1
        else:
            shutil.rmtree(tmp_path / "new")
    assert failed


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
def test_a_forbidden_output(tmp_path: Path) -> None:
    """A folder that is read-only is named."""
    a = small(tmp_path / "a")
    (tmp_path / "closed").mkdir(mode=0o500)
    status, stderr = run("uniform", a, a, "-o", tmp_path / "closed" / "soup")
    assert status == 1
    assert "Permission denied" in stderr


@pytest.mark.parametrize("name", ["a b", "ÿ", "new\nline", os.fsdecode(b"\xff\xfe"), "-o"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_names_and_modes(tmp_path: Path, name: str, umask: int) -> None:
    """Any name that a file may have will do, and modes follow the umask."""
    a = small(tmp_path / "a")
    (a / "sub").mkdir()
    (a / "sub" / "side.txt").write_text("x")
    command = ["uniform", a, a, f"--output={name}"]
    assert run(*command, cwd=tmp_path, umask=umask) == (0, "")
    soup = tmp_path / name
    for path in (soup, *soup.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask
    assert sorted(os.listdir(tmp_path)) == sorted(["a", name])


def test_a_file_size_limit(tmp_path: Path) -> None:
    """Where files may not grow so large, one line says so, and nothing is left."""
    small(tmp_path / "a")
    line = f"ulimit -f 2; exec '{sys.executable}' -m streamsoup uniform a a -o soup"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert unexpected(done.stderr).startswith("error: soup: cannot be written: File too large; ")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_full_disk(tmp_path: Path) -> None:
    """A disk that is too full is known before the work, and nothing is left on it."""
    a = large(tmp_path / "a", gigabytes=0.05)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        status, stderr = run("uniform", a, "-o", disk / "soup")
        assert status == 1
        assert stderr.startswith(f"error: {disk}/soup: cannot be written: No space left on device")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_disk_of_few_files(tmp_path: Path) -> None:
    """Where there is no place for one more file, what was made so far is removed."""
    a = small(tmp_path / "a")
    disk = tmp_path / "disk"
    disk.mkdir()
    for nr_inodes in range(1, 7):
        mount = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={nr_inodes}", "none", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount")
        try:
            status, stderr = run("uniform", a, a, "-o", disk / "new" / "folders" / "soup")
            assert status == 1
            assert "No space left on device" in stderr
            assert os.listdir(disk) == [], nr_inodes
        finally:
            subprocess.run(["umount", disk], check=True)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a checkpoint ``soup``, which lies in a lower layer."""
    small(tmp_path / "lower" / "soup", seed=1)
    folder, disk = tmp_path / "overlay", tmp_path / "disk"
    for each in (folder, disk):
        each.mkdir()
    # The upper layer of its own, as an overlay on an overlay may not be.
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        layers = f"lowerdir={tmp_path}/lower,upperdir={disk}/upper,workdir={disk}/work"
        mount = ["mount", "-t", "overlay", "-o", f"redirect_dir=off,{layers}", "none", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine has no overlays")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_lower_layer_is_known_before_the_work(tmp_path: Path, overlay: Path) -> None:
    """What an overlay cannot rename is refused at once, untouched; once removed, all is well."""
    a = small(tmp_path / "a")
    before = listing(overlay)
    command = ("uniform", a, a, "-o", overlay / "soup", "--overwrite")
    status, stderr = run(*command)
    assert (status, stderr.count("\n")) == (1, 1)
    assert "in a lower layer of an overlay file system; choose another folder" in stderr
    assert stderr.endswith("remove it yourself and run again\n")
    assert listing(overlay) == before
    shutil.rmtree(overlay / "soup")
    for _ in range(2):  # what replaces it lies in the upper layer, and can be replaced
        assert run(*command) == (0, "")
        assert os.listdir(overlay) == ["soup"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_cannot_be_renamed_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Refused in words after the work, which is kept: without the old output, a rename is left."""
    a = small(tmp_path / "a")
    old = small(tmp_path / "soup", seed=1)
    before = listing(old)
    rename2, rename = staging.rename, os.rename

    def stuck2(source: str, target: str, flag: int, **named: int) -> bool:
        if flag == libc.EXCHANGE and exchanges:
            raise OSError(errno.EXDEV, "Invalid cross-device link", target)
        return flag != libc.EXCHANGE and rename2(source, target, flag, **named)

    def stuck(source: str, target: str, **named: int) -> None:
        if source == old.name and target == "old":
            raise OSError(errno.EXDEV, "Invalid cross-device link", target)
        rename(source, target, **named)

    monkeypatch.setattr(staging, "rename", stuck2)
    monkeypatch.setattr(os, "rename", stuck)
    for _ in range(2):
        with pytest.raises(OutputError, match="which then only has to put the finished soup in"):
            uniform([a, a], output=old, options=Options(overwrite=True))
        assert listing(old) == before
    shutil.rmtree(old)
    assert uniform([a, a], output=old, options=Options(overwrite=True)).finished
    assert sorted(os.listdir(tmp_path)) == ["a", "soup"]


@pytest.mark.parametrize("what", [".git/config", "optimizer.bin", "scheduler.pt"])
def test_what_is_no_part_of_a_checkpoint_is_not_replaced(tmp_path: Path, what: str) -> None:
    """A repository, or a run's state beside the weights, is not lost to --overwrite."""
    a, out = small(tmp_path / "a"), small(tmp_path / "out")
    (out / ".cache").mkdir()
    (out / "training_args.bin").touch()
    precious = out / what
    precious.parent.mkdir(exist_ok=True)
    precious.touch()
    status, stderr = run("uniform", a, a, "-o", out, "--overwrite")
    assert status == 1
    assert (
        f"holds files that are not part of a checkpoint ({what.split('/')[0]}) and would be"
        in stderr
    )
    assert precious.exists()
    shutil.rmtree(precious.parent) if precious.parent != out else precious.unlink()
    assert run("uniform", a, a, "-o", out, "--overwrite") == (0, "")


def test_a_read_only_output_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be moved out of the way."""
    small(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(OutputError, match="is read-only, and so cannot be replaced"):
        check_replaceable(str(tmp_path / "out"))
