"""The journal's law: a torn tail is dropped, any other damage is refused."""

from __future__ import annotations

import os
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamsoup.errors import ResumeError
from streamsoup.output import journal as module
from streamsoup.output.journal import Journal

RECORDS = [{"fingerprint": "0123"}, {"leaves": [[0, "ab"], [1, "ÿ\n\0"]]}, {"commit": "ff"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a journal of three records."""
    path = tmp_path / "journal"
    with Journal(str(path)) as journal:
        for record in RECORDS:
            journal.append(record)
    return path


def read(path: Path) -> list[dict[str, object]]:
    """Open a journal and give its records."""
    with Journal(str(path)) as journal:
        return list(journal)


def test_records_come_back(path: Path) -> None:
    """What was appended is read, by this run and by the next."""
    assert read(path) == RECORDS
    with Journal(str(path)) as journal:
        journal.append({"more": 1})
    assert read(path) == [*RECORDS, {"more": 1}]


def test_a_torn_tail_is_dropped(path: Path) -> None:
    """Cut off anywhere, the whole records before the cut are left, and appending goes on there."""
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        n = sum(end <= length for end in ends)
        assert read(path) == RECORDS[:n]
        with Journal(str(path)) as journal:
            journal.append({"more": 1})
        assert read(path) == [*RECORDS[:n], {"more": 1}]


def test_an_unwritten_tail_is_dropped(path: Path) -> None:
    """A power cut may leave zeros where the last record was to be."""
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for begin in range(last, len(whole)):
        for end in (len(whole) - 1, len(whole), len(whole) + 4096):
            path.write_bytes(whole[:begin] + b"\0" * (end - begin) + whole[end:])
            found = read(path)
            assert found == (RECORDS if begin == end else RECORDS[:2])


def test_other_damage_is_refused(path: Path) -> None:
    """A record that is not as it was written is refused, wherever the damage is."""
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ResumeError, match=r"record \d is damaged.*; remove .* to start anew"):
            read(path)


def misplacements(lines: list[bytes], strange: bytes) -> list[list[bytes]]:
    """Lose, double, move or put in a record, in every way that leaves one behind it."""
    made = []
    places = range(len(lines))
    for i in places:
        made += [lines[:i] + lines[i + 1 :]] if i < len(lines) - 1 else []
        made += [[*lines[:j], lines[i], *lines[j:]] for j in range(1, len(lines) + 1)]
        made += [[*lines[:i], strange, *lines[i:]], [*lines[:i], strange, *lines[i + 1 :]]]
        for j in range(i + 1, len(lines)):
            swapped = list(lines)
            swapped[i], swapped[j] = lines[j], lines[i]
            made.append(swapped)
    return [each for each in made if each != lines]


def test_a_record_stays_where_it_was_written(tmp_path: Path) -> None:
    """A whole record that was lost, doubled, swapped or put in from elsewhere is refused."""
    path, other = tmp_path / "journal", tmp_path / "other"
    for place, first in ((path, "0123"), (other, "4567")):
        with Journal(str(place)) as journal:
            for record in ({"fingerprint": first}, *({"score": i // 2} for i in range(6))):
                journal.append(record)
    lines = path.read_bytes().splitlines(keepends=True)
    strange = other.read_bytes().splitlines(keepends=True)
    tried = [each for line in strange for each in misplacements(lines, line)]
    assert len(tried) > 500
    for each in tried:
        content = b"".join(each)
        path.write_bytes(content)
        with pytest.raises(ResumeError, match=r"record \d is damaged"):
            read(path)
        assert path.read_bytes() == content
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(ResumeError, match="4 is damaged, or was not written after record 3; rem"):
        read(path)


def test_records_are_not_kept_in_memory(tmp_path: Path) -> None:
    """The notes of a large soup, of all ingredients, are opened and read one at a time."""
    path = tmp_path / "journal"
    with Journal(str(path)) as journal:
        for number in range(200):
            journal.append({"leaves": [[number, "ab" * 50_000]]}, wait=False)
    tracemalloc.start()
    try:
        with Journal(str(path)) as journal:
            journal.append({"leaves": [[200, "ab" * 50_000]]})
            assert [record["leaves"][0][0] for record in journal] == list(range(201))
            assert journal.n_records == 201
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 < path.stat().st_size // 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"Dear diary,", b"monday\ntuesday\n", b"\xff" * 100])
def test_a_strangers_file_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    """A file that is no journal is neither believed nor changed."""
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(ResumeError):
        read(path)
    assert path.read_bytes() == content


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link in the journal's place leads nowhere."""
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "journal").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        read(tmp_path / "journal")


def test_what_was_not_synced_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose sync failed is not there for the next run to believe."""
    with Journal(str(path)) as journal:

        def fail(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            journal.append({"more": 1})
        assert list(journal) == RECORDS
    assert read(path) == RECORDS


def test_a_failed_close_is_not_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second close could hit a file that another thread has opened meanwhile."""
    close = os.close

    def fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(5, "Input/output error")

    journal = Journal(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail)
        with pytest.raises(OSError, match="Input/output"):
            journal.close()
        journal.close()


def test_a_planted_lack_of_a_checksum_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law fails for a journal that believes any JSON."""

    def gullible(line: bytes, before: int) -> tuple[dict[str, object], int] | None:
        parts = line.split(b" ", 2)
        try:
            return module.json.loads(parts[2]), int(parts[0], 16)
        except (IndexError, ValueError):
            return None

    monkeypatch.setattr(module, "_decode", gullible)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_other_damage_is_refused(path)


def test_a_planted_lack_of_order_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law of places fails for checksums of single records."""
    alone = SimpleNamespace(crc32=lambda text, before: zlib.crc32(text))
    monkeypatch.setattr(module, "zlib", alone)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_record_stays_where_it_was_written(tmp_path)
