"""What this machine's processor is, and what it can do.

Linux tells it in a file. LLVM is asked where that says too little: its library takes 25 ms to load.
"""

# llvmlite has no types.
# mypy: disable-error-code="no-untyped-call,import-untyped"

from __future__ import annotations

import functools
import platform

__all__ = ["description", "features", "is_x86"]

_CPUINFO = "/proc/cpuinfo"

_TELLING = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
)
"""What the file says of a processor that does not change from boot to boot: on x86, on ARM."""


def is_x86() -> bool:
    """Whether this is an x86-64."""
    return platform.machine().lower() in ("x86_64", "amd64")


def features() -> frozenset[str]:
    """Give the names of what the processor can do beyond its kind's first model."""
    facts = _facts()
    told = facts.get("flags", facts.get("Features"))
    if told is not None:
        return frozenset(told.split())
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):
        return frozenset()
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def description() -> str:
    """Give all that compiled code may depend on, as text.

    Raises what importing LLVM's binding does where it is asked, and cannot be.
    """
    facts = _facts()
    if "flags" in facts or "Features" in facts:
        return "\0".join([platform.machine(), *(f"{key}={facts[key]}" for key in sorted(facts))])
    import llvmlite.binding as llvm

    parts = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    return "\0".join([*parts, llvm.get_default_triple()])


@functools.cache
def _facts() -> dict[str, str]:
    """Read what the system says of the first processor."""
    found: dict[str, str] = {}
    try:
        with open(_CPUINFO, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in _TELLING:
                    found[key.strip()] = value.strip()
                if not line.strip():
                    break
    except OSError:
        pass  # a sandbox without /proc
    return found
