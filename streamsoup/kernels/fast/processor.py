"""What this machine's processor is, and what it can do.

Linux tells it in a file. LLVM is asked where that says too little: its library takes 25 ms to load.
"""

# llvmlite has no types.
# mypy: disable-error-code="no-untyped-call,import-untyped"

from __future__ import annotations

import platform

__all__ = ["description", "has_f16c", "has_pclmulqdq", "is_x86"]

_CPUINFO = "/proc/cpuinfo"

_TELLING = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
)
"""What the file says of a processor, on x86 and on ARM, that is the same for all processes. A new
kernel of the system may know further flags: kernels are then compiled anew, once."""


def is_x86() -> bool:
    """Return whether this is an x86-64."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_f16c() -> bool:
    """Return whether an x86-64 can widen float16 by an instruction."""
    facts = _facts()
    if facts:
        return "f16c" in facts["flags"].split()
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):
        return False
    return bool(llvm.get_host_cpu_features().get("f16c"))


def has_pclmulqdq() -> bool:
    """Return True if the system says that an x86-64 has carry-less products."""
    return "pclmulqdq" in _facts().get("flags", "").split()


def description() -> str:
    """Return all that compiled code may depend on, as text.

    Raises what importing LLVM's binding does where it is asked, and cannot be.
    """
    facts = _facts()
    if facts:
        return "\0".join([platform.machine(), *(f"{key}={facts[key]}" for key in sorted(facts))])
    import llvmlite.binding as llvm

    parts = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    return "\0".join([*parts, llvm.get_default_triple()])


def _facts() -> dict[str, str]:
    """Read what the system says of the first processor; nothing, if it does not say what it can.

    Emulators may show the file of a processor of another kind.
    """
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
    return found if ("flags" if is_x86() else "Features") in found else {}
