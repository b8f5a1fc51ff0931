"""Who scores the candidates of a search, and where: what all searches are told alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from streamsoup.errors import RecipeError
from streamsoup.options import settle

__all__ = ["ScoringSettings"]

JOBS = 1000
"""Most workers of a search."""


class ScoringSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How candidates are scored."""

    split: str | None = None
    """The split to search on; None for the first of the task."""
    recalibrate: bool = False
    """Measure BatchNorm statistics of each candidate of several ingredients on the task's batches
    before it is scored. A single one keeps its own, so it scores as its file does."""
    jobs: int = 1
    """Candidates scored at the same time, each in a process with a model of its own, with
    `Options.memory` for the blocks and the running sum of each."""
    timeout: float | None = None
    """Seconds that building the model, or one score, may take; scores in other processes."""
    isolate: bool = False
    """Score in another process even for one job, so that a task cannot harm this one."""
    servers: Sequence[str] = ()
    """Addresses of inference servers that score side by side, one candidate in each."""
    server_kind: Literal["vllm", "sglang"] | None = None
    """What the servers are."""
    scratch: str | None = None
    """A folder for candidates that the servers see under the same path, such as one in memory or
    on an NVMe disk; None for the folder of the search."""
    reload_timeout: float = 600.0
    """Seconds that a server may take to load a candidate, or to come back."""
    restart: bool = False
    """Forget the scores of an unfinished search of the same output."""

    def __post_init__(self) -> None:
        """Convert numbers of other libraries to Python's. Raises `RecipeError`."""
        settle(self, ScoringSettings)

    def check_scoring(self) -> None:
        """Raise `RecipeError` for settings that contradict each other."""
        if self.jobs < 1:
            raise RecipeError(f"jobs must be at least 1, got {self.jobs}")
        if self.jobs > JOBS:
            raise RecipeError(f"{self.jobs} jobs are more processes than any machine has room for")
        if bool(self.servers) != (self.server_kind is not None):
            raise RecipeError("servers and server_kind go together; give both")
        if isinstance(self.servers, str) or len(set(self.servers)) != len(self.servers):
            raise RecipeError("servers is a list of addresses, each once")
        if not 0 < self.reload_timeout < math.inf:
            raise RecipeError(f"reload_timeout must be above 0, got {self.reload_timeout}")
        if self.scratch is not None and not self.servers:
            raise RecipeError("scratch is where servers find candidates; give servers, too")
        if self.timeout is not None and not self.timeout > 0:
            raise RecipeError(f"a timeout of {self.timeout} s leaves no time to score")
        if self.timeout == math.inf:
            raise RecipeError("a timeout of inf s never comes; leave it out")
