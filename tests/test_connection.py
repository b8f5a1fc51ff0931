"""Between a search and its workers: whole messages come through whole, and nothing else does."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from streamsoup.errors import TaskError
from streamsoup.search.scoring.connection import Connection


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection, socket.socket]]:
    """Return both ends, and the socket of the second, to write past it."""
    ours, theirs = socket.socketpair()
    yield Connection(ours), Connection(theirs), theirs
    ours.close()
    theirs.close()


Ends = tuple[Connection, Connection, socket.socket]


@pytest.mark.parametrize("size", [0, 1, 23, 24, 1000, 5_000_000])
def test_messages_come_whole_and_in_order(ends: Ends, size: int) -> None:
    """What is sent is taken, message by message, however many parts it comes in."""
    ours, theirs, _ = ends
    sent = [random.Random(i).randbytes(size) for i in range(3)]
    sender = threading.Thread(target=lambda: [theirs.send(each) for each in sent])
    sender.start()
    assert [ours.take(wait=True) for _ in sent] == sent
    sender.join()
    assert ours.take(wait=False) is None


def test_a_part_is_not_waited_for(ends: Ends) -> None:
    """While a message has not all come there is none, and no byte of it is lost."""
    ours, theirs, raw = ends
    spare, copied = socket.socketpair()
    Connection(spare).send(b"soup")
    whole = copied.recv(100)
    for byte in whole[:-1]:
        raw.send(bytes([byte]))
        assert ours.take(wait=False) is None
    raw.send(whole[-1:])
    assert ours.take(wait=False) == b"soup"
    theirs.send(b"again")
    assert ours.take(wait=False) == b"again"
    spare.close()
    copied.close()


def test_no_garbage_is_taken(ends: Ends) -> None:
    """Every first byte but the mark's is refused; and a message that was written into."""
    ours, _, raw = ends
    for byte in range(256):
        if byte == 0x93:
            continue
        raw.send(bytes([byte]))
        with pytest.raises(TaskError, match="not its own"):
            ours.take(wait=False)
        ours._come.clear()
    spare, copied = socket.socketpair()
    Connection(spare).send(b"soup of the day")
    whole = copied.recv(100)
    raw.send(whole[:30] + b"!" + whole[31:])
    with pytest.raises(TaskError, match="not its own"):
        ours.take(wait=False)
    spare.close()
    copied.close()


def test_a_closed_end_is_told(ends: Ends) -> None:
    """Nothing more will come: an error, whether waiting or not, also amid a message."""
    ours, _, raw = ends
    raw.send(b"\x93")
    raw.close()
    for wait in (True, False):
        with pytest.raises(EOFError):
            ours.take(wait=wait)
