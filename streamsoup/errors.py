"""The exceptions of streamsoup, and the words its messages share and its users give.

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
import signal
from collections.abc import Collection, Iterable

__all__ = [
    "BudgetError",
    "ChangedIngredientError",
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
"""What `option` returns. Names out of files cannot hold it: `printable` escapes these two."""


def option(name: str, value: str | bool | None = None, *, cli: str | None = None) -> str:
    """Return the mention of an option in a message, to be said in the caller's language.

    Args:
        name: What it is called in the library.
        value: What it is set to, where that is advised; True for a switch.
        cli: What it is called on the command line, where that is not `name`.

    >>> in_python(f"exists already; {option('overwrite', True)} replaces it")
    'exists already; overwrite=True replaces it'
    >>> in_options(f"exists already; {option('overwrite', True)} replaces it")
    'exists already; --overwrite replaces it'
    >>> in_python(option("non_float", "first")), in_options(option("non_float", "first"))
    ("non_float='first'", '--non-float first')
    """
    told = "" if value is None else f"={value}"
    return f"\x02{name}|{(cli or name).replace('_', '-')}{told}\x03"


def in_python(text: str) -> str:
    """Return a message with its options as arguments of Python."""

    def name(found: re.Match[str]) -> str:
        if not found[3]:
            return found[1]
        return f"{found[1]}={found[3] if found[3] == 'True' else repr(found[3])}"

    return _OPTION.sub(name, text) if "\x02" in text else text


def in_options(text: str) -> str:
    """Return a message with its options as the command line has them."""

    def name(found: re.Match[str]) -> str:
        return f"--{found[2]}{f' {found[3]}' if found[3] not in ('', 'True') else ''}"

    return _OPTION.sub(name, text) if "\x02" in text else text


class Message(str):
    """A warning that may name options: as Python has them, unless a reader asks for `text`."""

    text: str
    """The warning with its options marked: see `option`."""

    def __new__(cls, text: str) -> Message:
        """Take a text with what `option` returned in it."""
        made = super().__new__(cls, in_python(text))
        made.text = text
        return made


class StreamsoupError(Exception):
    """Anything streamsoup refuses to do, or could not do."""

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


class RecipeError(StreamsoupError, ValueError):
    """Coefficients, options or a recipe file that make no sense."""


class TaskError(StreamsoupError):
    """A user's task that failed, hung, or answered with something that is not a score."""


class OutputError(StreamsoupError, OSError):
    """An output that cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """An output that is already there, and that nobody asked to replace."""


class OutputBusyError(OutputError):
    """An output that another run is writing at this moment."""


class ResumeError(OutputError):
    """Unfinished work that is damaged, or belongs to something else."""


class NonFiniteError(StreamsoupError, ArithmeticError):
    """A NaN or an infinity in a result, when propagating them was not asked for."""


class VerificationError(StreamsoupError):
    """A soup whose bytes are not those its provenance promises."""


class Interrupted(StreamsoupError):
    """A thread was told to stop, as another failed; whoever waits is given that one's error."""


def printable(text: object, limit: int = 200) -> str:
    r"""Give `text` with control characters escaped and the middle of long texts left out.

    Names come out of files that nobody vouches for: a tensor's name must not move the cursor.

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
    """Raise `RecipeError` for a word that is none of the known ones. Types alone check nothing."""
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"{what} {printable(value)!r} is none of {', '.join(known)}")


def count(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1.

    >>> count(1, "tensor"), count(2, "tensor"), count(0, "loss")
    ('1 tensor', '2 tensors', '0 losses')
    """
    plural = f"{noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"
    return f"{n} {noun if n == 1 else plural}"


def is_plain(text: str) -> bool:
    """Whether a number in `text` means to people what it does to Python.

    >>> [is_plain(text) for text in (".5", "1_0", "٣")]
    [True, False, False]
    """
    return text.isascii() and "_" not in text


def signal_name(number: int) -> str:
    """Name a signal, one of the real-time signals too, which have no names of their own.

    >>> signal_name(9), signal_name(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def some(items: Iterable[object], limit: int = 5) -> str:
    """List the first few of `items` for a message, and count the rest.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    texts = [printable(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"
