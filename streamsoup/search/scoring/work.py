"""What one built-in scorer is to do, as data that can be sent to another process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.errors import BudgetError
from streamsoup.live.candidates import Candidates
from streamsoup.live.rule_candidates import RuleCandidates
from streamsoup.live.running import SumsPlace, plan_sums
from streamsoup.options import Options
from streamsoup.search.scoring.scorer import Candidate

if TYPE_CHECKING:
    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import Order

__all__ = ["Work", "candidates_of", "for_candidate"]


class Work(msgspec.Struct, frozen=True):
    """What to score, with which task, and within which bounds; it survives pickling."""

    task: Any
    split: str | None
    recalibrate: bool
    ordered: Order
    options: Options
    sums: SumsPlace | None
    budget: int
    """Bytes for blocks and the running sum."""
    scratch: str
    """Path of a scratch file for the running sum, in the folder of the search."""
    n_workers: int
    """Workers that share a device, and the budget there."""
    keeps: bool = True
    """True if the sum of a candidate's ingredients is worth keeping for the next one."""
    by_rule: bool = False
    """True if candidates are soups of all ingredients by rules of their own, not means of some."""

    @property
    def folder(self) -> str:
        """The folder of the search."""
        return os.path.dirname(self.scratch)


def for_candidate(
    candidates: Candidates | RuleCandidates, candidate: Candidate
) -> Candidates | RuleCandidates:
    """Return what makes a candidate: in a sweep, by the rule of its own."""
    if isinstance(candidates, RuleCandidates):
        candidates.rule = candidate.recipe.rule
    return candidates


def candidates_of(work: Work, sink: ModelSink | None) -> Candidates | RuleCandidates:
    """Prepare to make candidates, in the live model of `sink` or in files.

    Raises:
        BudgetError: If the running sum does not fit where it was asked for.
        DeviceError: If the device cannot be used.
    """
    ordered, threads = work.ordered, work.options.n_threads
    where = "cpu, on the way to disk"
    if work.by_rule:
        return RuleCandidates(ordered.plan, sink, mapped=ordered.mapped, options=work.options)
    if sink is not None:
        from streamsoup.engine.device import device_budget
        from streamsoup.kernels.accelerator.device import open_device
        from streamsoup.live.mix import DeviceCandidates, device_of, device_text

        name = device_of(sink, work.options)
        if name != "cpu":
            whole = device_budget(open_device(name), work.options)
            options = replace(work.options, device_memory=whole // work.n_workers)
            try:
                return DeviceCandidates(
                    ordered.plan, sink, mapped=ordered.mapped, place=work.sums, options=options
                )
            except BudgetError as error:
                shared = f"; {work.n_workers} jobs share it" if work.n_workers > 1 else ""
                raise BudgetError(f"{error.text}{shared}") from None
        where = device_text(sink, work.options)
    sums = plan_sums(
        ordered.plan,
        mapped=ordered.mapped,
        threads=threads,
        budget=work.budget,
        scratch=work.scratch,
        place=work.sums,
    )
    return Candidates(
        ordered.plan,
        sums,
        mapped=ordered.mapped,
        threads=threads,
        scratch=work.scratch,
        where=where,
    )
