"""What memory the machine grants this process: the limits of its control groups.

A container's limit counts files, too: libraries and ingredients as they are mapped. What does not
fit is dropped and read again, so a process with too little room does not fail, but crawls.
See cgroups(7), and the kernel's ``Documentation/admin-guide/cgroup-v2.rst``.
"""

from __future__ import annotations

import math
import os

__all__ = ["memory_limit"]


def memory_limit(root: str = "/") -> float:
    """Give the bytes that the memory groups above this process allow it, or infinity."""
    limit = math.inf
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # The narrowest of all groups above counts. In a container some are out of sight.
        parts = path.strip("/").split("/")
        for n in range(len(parts) + 1):
            text = _read(os.path.join(root, folder, *parts[:n], name)).strip()
            limit = min(limit, float(text) if text.isdecimal() else math.inf)
    return limit


def _read(path: str) -> str:
    """Give a small file's text; empty if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
