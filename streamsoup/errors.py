"""The exceptions of streamsoup, and helpers for the text of messages.

::

    StreamsoupError
    ├── FormatError (ValueError)          a file is not what its name promises
    │   ├── CorruptFileError              damaged, truncated, or contradicting itself
    │   ├── UnsafePickleError             a pickle, which could run code
    │   └── UnsupportedDtypeError         a dtype outside the table in `tensors`
    ├── MissingFileError (FileNotFoundError)   there is no such ingredient
    ├── MismatchError (ValueError)        ingredients that do not fit together
    ├── ChangedIngredientError            an ingredient changed while it was read
    ├── BudgetError (ValueError)          memory, disk space or device too small
    ├── RecipeError (ValueError)          coefficients, options or a recipe that make no sense
    ├── DeviceError (RuntimeError)        no such accelerator here, or it failed
    ├── ClusterError (RuntimeError)       no such cluster, or it lost too much
    ├── TaskError                         the user's scoring code failed
    ├── OutputError (OSError)             the output cannot be written
    │   ├── OutputExistsError (FileExistsError)
    │   ├── OutputBusyError               another run is writing it
    │   └── ResumeError                   unfinished work that cannot be continued
    ├── NonFiniteError (ArithmeticError)  NaN or Inf where it was not asked for
    ├── VerificationError                 a soup is not what its provenance says
    └── Interrupted                       a thread stopped, as another had failed

Every message says what, where (``file: tensor``), what was expected and found, and what to do.
Where it names an option, it does so through `option`: the library says ``overwrite=True``, and the
command line ``--overwrite``.
"""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Collection, Iterable

__all__ = [
    "BudgetError",
    "ChangedIngredientError",
    "ClusterError",
    "CorruptFileError",
    "DeviceError",
    "FormatError",
    "Interrupted",
    "Message",
    "MismatchError",
    "MissingFileError",
    "NonFiniteError",
    "OutputBusyError",
    "OutputError",
    "OutputExistsError",
    "RecipeError",
    "ResumeError",
    "StreamsoupError",
    "TaskError",
    "UnsafePickleError",
    "UnsupportedDtypeError",
    "VerificationError",
    "check_choice",
    "count",
    "in_options",
    "in_python",
    "is_plain",
    "option",
    "printable",
    "signal_name",
    "some",
]


_OPTION = re.compile("\x02([^\x02\x03=|]+)\\|([^\x02\x03=]+)=?([^\x02\x03]*)\x03")
"""Matches what `option` returns. `printable` escapes \\x02 and \\x03 in names from files."""


def option(name: str, value: str | bool | None = None, *, cli: str | None = None) -> str:
    """Return a marker for an option in a message, rendered later as Python or as a flag.

    Args:
        name: The option's name in the library.
        value: The advised value, if there is one; True for a switch.
        cli: The option's name on the command line, if it differs from `name`.

    Returns:
        The marked text. `in_python` and `in_options` render it; costs nothing else.

    >>> in_python(f"exists already; {option('overwrite', True)} replaces it")
    'exists already; overwrite=True replaces it'
    >>> in_options(f"exists already; {option('overwrite', True)} replaces it")
    'exists already; --overwrite replaces it'
    >>> in_python(option("non_float", "first")), in_options(option("non_float", "first"))
    ("non_float='first'", '--non-float first')
    """
    assigned = "" if value is None else f"={value}"
    return f"\x02{name}|{(cli or name).replace('_', '-')}{assigned}\x03"


def in_python(text: str) -> str:
    """Return a message with its options rendered as Python arguments."""

    def name(found: re.Match[str]) -> str:
        if not found[3]:
            return found[1]
        return f"{found[1]}={found[3] if found[3] == 'True' else repr(found[3])}"

    return _OPTION.sub(name, text) if "\x02" in text else text


def in_options(text: str) -> str:
    """Return a message with its options rendered as command-line flags."""

    def name(found: re.Match[str]) -> str:
        value = f" {shlex.quote(found[3])}" if found[3] not in ("", "True") else ""
        return f"--{found[2]}{value}"

    return _OPTION.sub(name, text) if "\x02" in text else text


class Message(str):
    """A warning whose options are rendered as Python arguments; `text` keeps the markers."""

    text: str
    """The warning with its options marked: see `option`."""

    def __new__(cls, text: str) -> Message:
        """Render a text that may hold markers made by `option`."""
        made = super().__new__(cls, in_python(text))
        made.text = text
        return made


class StreamsoupError(Exception):
    """Parent of every error that streamsoup raises on purpose."""

    @property
    def text(self) -> str:
        """The message with its options marked, for another message to hold: see `option`."""
        return super().__str__()

    def __str__(self) -> str:
        """Return the message with options as arguments of Python."""
        return in_python(self.text)


class FormatError(StreamsoupError, ValueError):
    """A file or folder that is not a checkpoint streamsoup can read."""


class CorruptFileError(FormatError):
    """A checkpoint that is damaged, truncated, or contradicts itself."""


class UnsafePickleError(FormatError):
    """A pickle, which could run code when opened, and so is never opened by surprise."""


class UnsupportedDtypeError(FormatError):
    """A dtype that is not in the one table of `streamsoup.tensors`."""


class MissingFileError(StreamsoupError, FileNotFoundError):
    """An ingredient, or one of its shards, that is not there."""


class MismatchError(StreamsoupError, ValueError):
    """Ingredients whose names, shapes, dtypes or fixed values do not agree."""


class ChangedIngredientError(StreamsoupError):
    """A shard that was replaced, rewritten, truncated or removed while it was being read."""


class BudgetError(StreamsoupError, ValueError):
    """Memory or disk space that cannot hold what was asked for."""


class DeviceError(StreamsoupError, RuntimeError):
    """An accelerator that is not there, cannot be used, or failed."""


class ClusterError(StreamsoupError, RuntimeError):
    """A cluster that is not there, cannot be used, or lost too much."""


class RecipeError(StreamsoupError, ValueError):
    """Coefficients, options or a recipe file that make no sense."""


class TaskError(StreamsoupError):
    """A user's task that failed, hung, or answered with something that is not a score."""


class OutputError(StreamsoupError, OSError):
    """An output that cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """An output that exists already, when replacing it was not asked for."""


class OutputBusyError(OutputError):
    """An output that another run is writing at this moment."""


class ResumeError(OutputError):
    """Unfinished work that is damaged, or belongs to something else."""


class NonFiniteError(StreamsoupError, ArithmeticError):
    """A NaN or an infinity in a result, when propagating them was not asked for."""


class VerificationError(StreamsoupError):
    """A soup whose bytes are not those its provenance promises."""


class Interrupted(StreamsoupError):
    """A thread stopped because another had failed; the caller gets the other thread's error."""


def printable(text: object, limit: int = 200) -> str:
    r"""Return `text` with control characters escaped and the middle of long texts left out.

    Names come from untrusted files: a tensor's name must not move the terminal's cursor.

    >>> printable("layer\x1b[2J.weight")
    'layer\\x1b[2J.weight'
    """
    raw = str(text)
    if len(raw) > limit:
        half = limit // 2
        raw = f"{raw[:half]}…{raw[-half:]}"
    if raw.isprintable():  # as nearly all are, of a hundred thousand tensors
        return raw
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in raw)


def check_choice(what: str, value: object, known: Collection[str]) -> None:
    """Raise `RecipeError` unless `value` is one of the `known` words."""
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"{what} must be one of {', '.join(known)}, got {printable(value)!r}")


def count(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1.

    >>> count(1, "tensor"), count(2, "tensor"), count(0, "loss")
    ('1 tensor', '2 tensors', '0 losses')
    """
    plural = f"{noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"
    return f"{n} {noun if n == 1 else plural}"


def is_plain(text: str) -> bool:
    """Return True if `text` has no digits or separators that only Python reads as a number.

    >>> [is_plain(text) for text in (".5", "1_0", "٣")]
    [True, False, False]
    """
    return text.isascii() and "_" not in text


def signal_name(number: int) -> str:
    """Return the name of a signal; real-time signals, which have none, are numbered.

    >>> signal_name(9), signal_name(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def some(items: Iterable[object], limit: int = 5) -> str:
    """Return the first few of `items` as text for a message, and a count of the rest.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    texts = [printable(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"
