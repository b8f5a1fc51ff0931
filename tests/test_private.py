"""The folder of compiled kernels: what is in it is executed, so only this user may write there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save, tensor

from streamsoup.kernels.fast import objects
from streamsoup.methods.fixed import uniform
from streamsoup.system.private import open_private, read_private, write_private

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that nobody else may write to, whatever the umask."""
    before = os.umask(0o022)
    home = tmp_path / "home"
    home.mkdir()
    yield home
    os.umask(before)


def opens(path: Path) -> bool:
    """Try to open a private folder."""
    folder = open_private(str(path))
    if folder is not None:
        folder.close()
    return folder is not None


def test_a_private_folder_keeps_files(home: Path) -> None:
    """It is made with mode 0700, folders above it too; a file comes back as it was written."""
    folder = open_private(str(home / "new" / "cache" / "streamsoup"))
    assert folder is not None
    with folder:
        write_private(folder, "mix.o", b"code")
        write_private(folder, "mix.o", b"newer")
        assert read_private(folder, "mix.o") == b"newer"
        assert folder.names() == ["mix.o"]
    for path in (home / "new", home / "new" / "cache", home / "new" / "cache" / "streamsoup"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_links_of_the_user_are_followed(home: Path) -> None:
    """A ~/.cache on another disk is common: absolute, relative, and through several links."""
    (home / "scratch" / "deep").mkdir(parents=True)
    (home / "one").symlink_to(home / "scratch")
    (home / "two").symlink_to("./one/../one/deep")
    assert opens(home / "two" / "streamsoup")
    assert (home / "scratch" / "deep" / "streamsoup").is_dir()
    (home / "loop").symlink_to("loop")
    assert not opens(home / "loop" / "streamsoup")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_links_that_others_may_have_put_there_are_not(home: Path, mode: int) -> None:
    """Neither in an open folder nor in a sticky one, and not in one that a link leads through."""
    (home / "mine").mkdir()
    shared = home / "shared"
    shared.mkdir()
    (shared / "cache").symlink_to(home / "mine")
    (home / "by-way-of").symlink_to("shared/cache")
    shared.chmod(mode)
    assert not opens(shared / "cache" / "streamsoup")
    assert not opens(home / "by-way-of" / "streamsoup")
    shared.chmod(0o755)
    assert opens(shared / "cache" / "streamsoup")


def test_every_folder_on_the_way_counts(home: Path) -> None:
    """Not only the last: who may rename one above puts another in its place."""
    assert opens(home / "a" / "b" / "streamsoup")
    for path in (home / "a", home / "a" / "b"):
        for mode in (0o770, 0o707):
            path.chmod(mode)
            assert not opens(home / "a" / "b" / "streamsoup"), (path, oct(mode))
        path.chmod(0o1777)  # as /tmp is
        assert opens(home / "a" / "b" / "streamsoup")
        path.chmod(0o700)
    if IS_ROOT:
        os.chown(home / "a", 1234, 1234)
        assert not opens(home / "a" / "b" / "streamsoup")


def test_the_last_folder_is_the_one_that_was_made_for_it(home: Path) -> None:
    """Never a link, never one that others may look into, never somebody's."""
    soup = home / "soup"
    soup.mkdir(mode=0o700)
    (home / "streamsoup").symlink_to(soup)
    assert not opens(home / "streamsoup")
    (home / "streamsoup").unlink()
    (home / "streamsoup").mkdir(mode=0o755)
    assert not opens(home / "streamsoup")
    (home / "streamsoup").chmod(0o700)
    assert opens(home / "streamsoup")
    if IS_ROOT:
        os.chown(home / "streamsoup", 1234, 1234)
        assert not opens(home / "streamsoup")
    assert not opens(Path("streamsoup"))


def test_files_are_looked_at_by_their_descriptors(home: Path) -> None:
    """No link, no second name, no other mode, owner or kind, and nothing too large."""
    folder = open_private(str(home / "streamsoup"))
    assert folder is not None
    with folder:
        write_private(folder, "good", b"code")
        good = home / "streamsoup" / "good"

        def refused(name: str) -> bool:
            try:
                read_private(folder, name)
            except OSError:
                return True
            return False

        (home / "streamsoup" / "link").symlink_to("good")
        os.mkfifo(home / "streamsoup" / "pipe", 0o700)
        (home / "streamsoup" / "folder").mkdir(mode=0o700)
        assert all(map(refused, ("link", "pipe", "folder", "none")))
        for mode in (0o600, 0o644, 0o755, 0o770, 0o4700):
            good.chmod(mode)
            assert refused("good"), oct(mode)
        good.chmod(0o700)
        assert not refused("good")
        os.link(good, home / "second")
        assert refused("good")
        (home / "second").unlink()
        if IS_ROOT:
            os.chown(good, 1234, 1234)
            assert refused("good")
            os.chown(good, 0, 0)
        os.truncate(good, 1 << 27)
        assert refused("good")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_side_file_named_like_a_kernel_is_never_taken_for_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Planted: a real kernel, copied into the user's own soup, with the cache led there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "real"))
    name = objects._cache_name("evil", [])
    monkeypatch.setattr(objects, "_load", lambda name, code: code)
    objects.make("evil", [], lambda: ("symbol", b"machine code"))
    assert objects.find("evil", []) == b"machine code"
    model = save(home / "model", {"t": tensor(np.ones(3, "f4"))})
    shutil.copy(home / "real" / "streamsoup" / name, model / name)
    os.umask(umask)
    uniform([model], output=home / "soup")
    assert (home / "soup" / name).read_bytes() == (model / name).read_bytes()
    (home / "planted").mkdir()
    (home / "planted" / "streamsoup").symlink_to(home / "soup")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "planted"))
    assert objects.find("evil", []) is None
    (home / "planted" / "streamsoup").unlink()
    (home / "soup").rename(home / "planted" / "streamsoup")
    (home / "planted" / "streamsoup").chmod(0o700)
    assert objects.find("evil", []) is None  # by the mode of the file, all else being right
    (home / "planted" / "streamsoup" / name).chmod(0o700)
    assert objects.find("evil", []) == b"machine code"
