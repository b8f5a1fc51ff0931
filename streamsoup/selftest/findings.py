"""What a self-test found, as plain data."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Check", "Report"]


class Check(msgspec.Struct, frozen=True):
    """One thing that is right or wrong."""

    name: str
    passed: bool
    detail: str
    elapsed_s: float


class Report(msgspec.Struct):
    """What a self-test found."""

    environment: dict[str, Any]
    checks: list[Check] = []
    limits: dict[str, float] = {}
    """What this machine can do at most, in bytes a second."""
    rates: dict[str, float] = {}
    """What streamsoup makes of that, in bytes of ingredients a second."""
    ratios: dict[str, float] = {}
    warnings: list[str] = []

    @property
    def passed(self) -> bool:
        """Return True if everything was right; rates have no part in it."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain data for JSON."""
        return {"passed": self.passed, **msgspec.to_builtins(self)}
