"""How the processor computes: as IEEE 754 says, whatever the caller of a library has set.

A thread may have been told to take subnormal numbers for zero (``torch.set_flush_denormal``,
libraries built with ``-ffast-math``) or to round otherwise, and hands that on to the threads it
starts. Our results must not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streamsoup.system.libc import set_float_environment, standard_float_environment

__all__ = ["standard_floats"]


@contextmanager
def standard_floats() -> Iterator[None]:
    """Compute by the standard in this thread; give it back as it was. Takes microseconds."""
    before = standard_float_environment()
    try:
        yield
    finally:
        if before is not None:
            set_float_environment(before)
