"""The memory limit of this process, as its control groups set it.

A container's limit also counts pages of mapped files, such as libraries and ingredients. Pages that
do not fit are dropped and read again, so a process with too little memory does not fail, but slows
down.
See cgroups(7), and the kernel's ``Documentation/admin-guide/cgroup-v2.rst``.
"""

from __future__ import annotations

import math
import os

__all__ = ["memory_limit"]


def memory_limit(root: str = "/") -> float:
    """Return the bytes that the memory cgroups of this process allow it, or infinity."""
    limit = math.inf
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # The lowest limit of all groups above counts. In a container some are not visible.
        parts = path.strip("/").split("/")
        for n in range(len(parts) + 1):
            text = _read(os.path.join(root, folder, *parts[:n], name)).strip()
            limit = min(limit, float(text) if text.isdecimal() else math.inf)
    return limit


def _read(path: str) -> str:
    """Return a small file's text; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
