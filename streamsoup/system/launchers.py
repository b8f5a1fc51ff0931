"""Which process of how many this is, as the launchers of array jobs say it in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from streamsoup.errors import RecipeError, option, printable

__all__ = ["parse_part"]

_COUNTED = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
)
"""Variables of torchrun, srun, sbatch --array and SkyPilot: a number, and how many there are."""

_ALONE = "JOB_COMPLETION_INDEX"
"""The variable of an indexed job of Kubernetes, which does not say how many there are."""

_FORM = re.compile(r"(auto|[0-9]{1,9})(?:/([0-9]{1,9}))?", re.ASCII)


def parse_part(text: str, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return the number of a part, from 1 on, and the number of parts.

    Args:
        text: ``3/8``; ``auto``, for what the launcher says; or ``auto/8``, where it only says which
            process this is.
        environment: Variables; None for those of the process. Of several launchers the first in
            this order counts: torchrun, srun, a Slurm array, SkyPilot, Kubernetes.

    Raises:
        RecipeError: The text is none of these, or the launcher does not say it.
    """
    found = _FORM.fullmatch(text)
    if found is None or (found[1] != "auto" and found[2] is None):
        raise RecipeError(
            f"{option('part')} {printable(text)!r} is not I/N such as 3/8, auto, or auto/N"
        )
    n = None if found[2] is None else int(found[2])
    if found[1] == "auto":
        number, n = _said(os.environ if environment is None else environment, n)
    else:
        assert n is not None
        number = int(found[1])
    if not 1 <= number <= n:
        raise RecipeError(
            f"{option('part')} {printable(text)!r}: there is no part {number} of {n}; parts count "
            "from 1"
        )
    return number, n


def _said(environment: Mapping[str, str], n: int | None) -> tuple[int, int]:
    """Return the number of this process, from 1 on, and how many there are."""
    for rank, count in _COUNTED:
        if rank in environment and (n is not None or count in environment):
            place = _number(environment, rank)
            if rank == "SLURM_ARRAY_TASK_ID":  # which may count from any number, in steps
                first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
                place = (place - first) // max(_number(environment, "SLURM_ARRAY_TASK_STEP", 1), 1)
            return place + 1, _number(environment, count) if n is None else n
    if n is not None and _ALONE in environment:
        return _number(environment, _ALONE) + 1, n
    if _ALONE in environment:
        raise RecipeError(
            f"{_ALONE} says which process this is, but not of how many; give {option('part')} as "
            "auto/N"
        )
    names = ", ".join(rank for rank, _ in _COUNTED)
    raise RecipeError(
        f"{option('part')} auto: no launcher has set {names}; give {option('part')} as I/N"
    )


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "" if otherwise is None else str(otherwise))
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise RecipeError(
            f"{name} {printable(text)!r} is not a number; give {option('part')} as I/N"
        )
    return int(text)
