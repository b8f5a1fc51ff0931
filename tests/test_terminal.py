"""What a person sees while streamsoup works."""

from __future__ import annotations

import pytest

from streamsoup.terminal import _bar


def drawn(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Draw a bar in the middle of a long run; give its lines."""
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = _bar()
    bar.add_task("soup", total=567_800_000_000, completed=123_400_000_000)
    lines = bar.console.render_lines(bar.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_the_bar_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width, the bar is one line, which is no longer than that."""
    for columns in range(1, 200):
        lines = drawn(columns, monkeypatch)
        assert [len(line) <= columns for line in lines] == [True], columns


def test_the_bar_leaves_out_the_least_telling_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate goes first, then the bytes, then the label, then the time left."""
    parts = ("?", "123.4/567.8 GB", "soup", "-:--:--", "━")
    for columns, n_parts in {80: 5, 40: 5, 38: 4, 30: 3, 20: 2, 12: 1}.items():
        (line,) = drawn(columns, monkeypatch)
        assert [part in line for part in parts] == [False] * (5 - n_parts) + [True] * n_parts
