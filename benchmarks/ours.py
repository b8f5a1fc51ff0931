"""streamsoup's own command, as users call it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["streamsoup", "uniform"]


def streamsoup(*arguments: object) -> list[str]:
    """Return a command of streamsoup: the installed script beside this Python."""
    script = Path(sys.executable).with_name("streamsoup")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "streamsoup"]
    return [*start, *map(str, arguments)]


def uniform(output: Path, ingredients: Sequence[Path], *options: object) -> list[str]:
    """Return the command that makes the uniform soup."""
    return streamsoup("uniform", *ingredients, "-o", output, "--quiet", *options)
