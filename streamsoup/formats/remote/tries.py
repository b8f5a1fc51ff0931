"""Tries of a request over a network: how long to wait for the next one, and when to give up."""

from __future__ import annotations

import random
import ssl
import time

from streamsoup.errors import FormatError, count, option
from streamsoup.formats.remote.addresses import shown

__all__ = ["Broken", "Tries"]

_LONGEST_WAIT = 8.0
"""Seconds between two tries at most, unless the server asks for more."""


class Broken(Exception):
    """A try that failed, and may work the next time."""

    def __init__(self, text: str, wait_s: float = 0.0, n_tries: int = 1_000_000) -> None:
        """Say what failed, how long the server asks to wait, and how often to try at most."""
        super().__init__(text)
        self.wait_s, self.n_tries = wait_s, n_tries


class Tries:
    """The tries of one request: how long there was no byte, and how long to wait."""

    def __init__(
        self, url: str, timeout_s: float, n_tries: int = 1_000_000, *, patient: bool = True
    ) -> None:
        """Begin to count.

        Args:
            url: What is asked for.
            timeout_s: Seconds without a byte that end in an error.
            n_tries: Tries at most, however many bytes came.
            patient: False if a server that cannot be reached is an error at once.
        """
        self._url, self._timeout_s, self._n_left, self._patient = url, timeout_s, n_tries, patient
        self.had_a_byte()

    def had_a_byte(self) -> None:
        """Begin to count anew: a byte came that will not be asked for again."""
        self._since, self._n = time.monotonic(), 0

    def again(self, error: Exception, at: int = 0) -> None:
        """Wait for the next try. Raise `FormatError` if there was no byte for too long."""
        where = shown(self._url)
        is_certificate = isinstance(error, ssl.SSLCertVerificationError)
        if is_certificate or (not self._patient and isinstance(error, OSError)):
            raise FormatError(f"{where}: cannot be reached: {_reason(error)}") from None
        self._n += 1
        self._n_left -= 1
        wait = min(_LONGEST_WAIT, 0.1 * 2.0**self._n) * random.uniform(0.5, 1)
        asked_s = error.wait_s if isinstance(error, Broken) else 0.0
        n_tries = error.n_tries if isinstance(error, Broken) else self._n + 1
        wait = max(wait, asked_s)
        elapsed = time.monotonic() - self._since
        if self._n_left <= 0 or self._n >= n_tries or elapsed + wait >= self._timeout_s:
            asks = f", which asks to wait for {asked_s:.0f} s" if asked_s else ""
            raise FormatError(
                f"{where}: could not be read from byte {at} on, after "
                f"{count(self._n, 'attempt')} and {elapsed:.0f} s without a byte: "
                f"{_reason(error)}{asks}; check the network, and run again, or give more time "
                f"with {option('network_timeout')}"
            ) from None
        time.sleep(wait)


def _reason(error: Exception) -> str:
    """Return what went wrong, without text of the server, which may hold secrets."""
    if isinstance(error, Broken):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
