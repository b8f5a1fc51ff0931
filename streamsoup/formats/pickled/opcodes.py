"""An interpreter of pickles that has no way to run anything, and a bound on what it holds.

A pickle is a program for a machine with a stack and a memo (`pickletools` documents each opcode).
Python's own unpickler imports what the program names and calls it. This one has the same stack and
memo, and descriptions on them (`formats.pickled.descriptions`). That it is safe follows from:

1. No opcode imports, calls or sets an attribute of anything but classes of `descriptions`, which
   are looked up in its tables by `find_global` and `build`. What would reach further (extension
   registry, out-of-band buffers, persistent ids that are text) is refused.
2. Every opcode adds to a count of bytes at least what it allocates, before it does: `_COSTS`, and
   the length of what it reads or copies. Beyond `LARGEST` the file is refused. No number in the
   program sizes an allocation without having been compared with what is left of the text.
3. Each opcode takes at least a byte of the text, and time in proportion to what it is charged for;
   nothing is hashed but memo keys below 2^32, and nothing is gone into by recursion.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from streamsoup.errors import CorruptFileError, UnsafePickleError
from streamsoup.formats.pickled.descriptions import (
    Items,
    build,
    extend,
    find_global,
    put,
    set_state,
    storage_of,
)

__all__ = ["LARGEST", "TEXT_LIMIT", "interpret"]

TEXT_LIMIT = 100_000_000
"""Bytes of a pickle at most, as for a header of safetensors."""

LARGEST = 400_000_000
"""Bytes that its descriptions may take. A tensor takes some 2,500, as it is counted here."""

_LONGEST_LINE = 4000
"""Bytes of a number or name on a line of its own, in the opcodes of protocol 0."""

_PLAIN, _REFERENCE, _CONTAINER, _TUPLE, _MARK, _MEMO, _PAIR, _CALL = (
    40,
    24,
    150,
    90,
    100,
    130,
    110,
    160,
)
"""Bytes charged for a number, a reference to a value, and so on: upper bounds of what CPython takes
(measured by `tests/test_pickles_that_attack.py`)."""


def interpret(text: bytes) -> tuple[Any, int]:
    """Return the description of what a pickle builds, and the bytes it took at most.

    Args:
        text: The pickle, of any protocol from 0 to 5.

    Raises:
        UnsafePickleError: It needs something that is not listed in `descriptions`.
        CorruptFileError: It is no pickle, or describes more than `LARGEST` bytes.
    """
    if len(text) > TEXT_LIMIT:
        raise CorruptFileError(
            f"has a pickle of {len(text)} bytes, above the limit of {TEXT_LIMIT}"
        )
    machine = _Machine(text)
    try:
        return machine.run(), machine.held
    except IndexError:
        raise CorruptFileError(f"has a pickle that is damaged at byte {machine.at}") from None
    except (struct.error, ValueError) as error:
        if isinstance(error, CorruptFileError | UnsafePickleError):
            raise
        raise CorruptFileError(f"has a pickle that is damaged at byte {machine.at}") from None


class _Machine:
    """The state of the interpreter: text, stack, marks and memo."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.at = 0
        self.held = len(text)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        text, n, steps, costs = self.text, len(self.text), _STEPS, _COSTS
        while self.at < n:
            opcode = text[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                return self.stack.pop()
            self.held += costs[opcode]
            if self.held > LARGEST:
                raise CorruptFileError(
                    f"has a pickle that would take more than {LARGEST} bytes to describe"
                )
            steps[opcode](self)
        raise CorruptFileError("has a pickle that ends before it stops")

    # Reading

    def take(self, n: int) -> bytes:
        """Return the next `n` bytes."""
        end = self.at + n
        if end > len(self.text):
            raise CorruptFileError("has a pickle that ends amid a value")
        piece = self.text[self.at : end]
        self.at = end
        return piece

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def sized(self, form: struct.Struct, times: int) -> bytes:
        """Return bytes whose length stands before them, charged `times` their number."""
        n = self.number(form)
        if n > len(self.text) - self.at:
            raise CorruptFileError("has a pickle that ends amid a value")
        self.charge(times * n)
        return self.take(n)

    def line(self) -> bytes:
        """Return the bytes up to the end of the line."""
        end = self.text.find(b"\n", self.at, self.at + _LONGEST_LINE)
        if end < 0:
            raise CorruptFileError("has a pickle with a line that does not end")
        piece = self.text[self.at : end]
        self.at = end + 1
        return piece

    def charge(self, nbytes: int) -> None:
        """Count bytes that are about to be held."""
        self.held += nbytes
        if self.held > LARGEST:
            raise CorruptFileError(
                f"has a pickle that would take more than {LARGEST} bytes to describe"
            )

    # Stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Return the values above the last mark, and take the mark away."""
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def remember(self, key: int) -> None:
        if not 0 <= key < 1 << 32:
            raise CorruptFileError("has a pickle with a memo of impossible size")
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise CorruptFileError("has a pickle that recalls what it never noted")
        self.stack.append(self.memo[key])

    # Opcodes with a body

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise IndexError
        values = tuple(self.stack[-n:])
        del self.stack[-n:]
        self.stack.append(values)

    def items(self) -> None:
        values = self.marked()
        self.charge(_PAIR * (len(values) // 2))
        put(self.stack[-1], values)

    def item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        put(self.stack[-1], (key, value))

    def append(self) -> None:
        value = self.stack.pop()
        extend(self.stack[-1], (value,))

    def appends(self) -> None:
        values = self.marked()
        extend(self.stack[-1], values)

    def dict_of(self) -> None:
        values, made = self.marked(), Items()
        self.charge(_PAIR * (len(values) // 2))
        put(made, values)
        self.stack.append(made)

    def call(self, *, keywords: bool = False) -> None:
        named = self.stack.pop() if keywords else None
        if isinstance(named, Items) and named.pairs:
            raise UnsafePickleError("calls a class with arguments by name")
        args, function = self.stack.pop(), self.stack.pop()
        self.make(function, args)

    def make(self, function: Any, args: Any) -> None:
        for each in args if isinstance(args, (tuple, list)) else ():
            if isinstance(each, (tuple, list)):
                self.charge(_REFERENCE * len(each))
                if isinstance(each, list):  # pairs of a mapping
                    self.charge(_PAIR * len(each))
            elif isinstance(each, Items):
                self.charge(_REFERENCE * len(each.pairs))
        self.stack.append(build(function, args))

    def instance(self) -> None:
        function = find_global(self.line().decode(), self.line().decode())
        self.make(function, tuple(self.marked()))

    def object_of(self) -> None:
        function, *args = self.marked()
        self.make(function, tuple(args))

    def give_state(self) -> None:
        given = self.stack.pop()
        set_state(self.stack[-1], given)

    def name(self) -> None:
        self.stack.append(find_global(self.line().decode(), self.line().decode()))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CorruptFileError("has a pickle that names something by what is not text")
        if len(name) + len(module) > _LONGEST_LINE:
            raise CorruptFileError("has a pickle with a name of impossible length")
        self.stack.append(find_global(module, name))

    def long_of(self, n: int) -> None:
        if n > 255:
            raise CorruptFileError("has a pickle with a number of impossible length")
        self.stack.append(int.from_bytes(self.take(n), "little", signed=True))

    def plain_int(self) -> None:
        line = self.line()
        known = {b"00": False, b"01": True}
        self.stack.append(known[line] if line in known else self.digits(line))

    def digits(self, line: bytes) -> int:
        if len(line) > 100:
            raise CorruptFileError("has a pickle with a number of impossible length")
        return int(line)

    def quoted(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise CorruptFileError("has a pickle with text that is not quoted")
        self.stack.append(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))

    def text_of(self, form: struct.Struct) -> None:
        self.stack.append(self.sized(form, 4).decode("utf-8", "surrogatepass"))

    def old_text(self, form: struct.Struct) -> None:
        """Text of Python 2, which `torch.load` takes for UTF-8."""
        raw = self.sized(form, 5)
        try:
            self.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self.stack.append(raw)

    def skip_frame(self) -> None:
        if self.number(_U64) > len(self.text) - self.at:
            raise CorruptFileError("has a pickle with a frame longer than itself")

    def protocol(self) -> None:
        if self.number(_U8) > 5:
            raise CorruptFileError("has a pickle of an unknown protocol")

    def unknown(self) -> None:
        raise CorruptFileError(f"has a pickle that is damaged at byte {self.at - 1}")

    def refuse(self) -> None:
        raise UnsafePickleError("has a pickle that refers to something outside of itself")


_U8, _U16, _U32, _U64 = (struct.Struct(f"<{letter}") for letter in "BHIQ")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")

_SET = find_global("builtins", "set")

_Step = Callable[[_Machine], Any]

_TABLE: dict[bytes, tuple[int, _Step]] = {
    # numbers and the like
    b"N": (0, lambda m: m.push(None)),
    b"\x88": (0, lambda m: m.push(True)),
    b"\x89": (0, lambda m: m.push(False)),
    b"I": (_PLAIN, _Machine.plain_int),
    b"J": (_PLAIN, lambda m: m.push(m.number(_I32))),
    b"K": (_PLAIN, lambda m: m.push(m.number(_U8))),
    b"M": (_PLAIN, lambda m: m.push(m.number(_U16))),
    b"L": (2 * _PLAIN, lambda m: m.push(m.digits(m.line().removesuffix(b"L")))),
    b"\x8a": (8 * _PLAIN, lambda m: m.long_of(m.number(_U8))),
    b"\x8b": (8 * _PLAIN, lambda m: m.long_of(m.number(_U32))),
    b"F": (_PLAIN, lambda m: m.push(float(m.line()))),
    b"G": (_PLAIN, lambda m: m.push(m.number(_F64))),
    # text and bytes
    b"S": (2 * _LONGEST_LINE, _Machine.quoted),
    b"T": (3 * _PLAIN, lambda m: m.old_text(_U32)),
    b"U": (3 * _PLAIN, lambda m: m.old_text(_U8)),
    b"V": (5 * _LONGEST_LINE, lambda m: m.push(m.line().decode("raw-unicode-escape"))),
    b"X": (2 * _PLAIN, lambda m: m.text_of(_U32)),
    b"\x8c": (2 * _PLAIN, lambda m: m.text_of(_U8)),
    b"\x8d": (2 * _PLAIN, lambda m: m.text_of(_U64)),
    b"B": (_PLAIN, lambda m: m.push(m.sized(_U32, 1))),
    b"C": (_PLAIN, lambda m: m.push(m.sized(_U8, 1))),
    b"\x8e": (_PLAIN, lambda m: m.push(m.sized(_U64, 1))),
    b"\x96": (_PLAIN, lambda m: m.push(m.sized(_U64, 1))),
    # containers
    b"(": (_MARK, _Machine.mark),
    b"0": (0, _Machine.pop),
    b"1": (0, lambda m: m.marked()),
    b"2": (0, lambda m: m.push(m.stack[-1])),
    b")": (0, lambda m: m.push(())),
    b"\x85": (_TUPLE, lambda m: m.tuple_of(1)),
    b"\x86": (_TUPLE, lambda m: m.tuple_of(2)),
    b"\x87": (_TUPLE, lambda m: m.tuple_of(3)),
    b"t": (_TUPLE, lambda m: m.push(tuple(m.marked()))),
    b"]": (_CONTAINER, lambda m: m.push([])),
    b"l": (_CONTAINER, lambda m: m.push(m.marked())),
    b"}": (_CONTAINER, lambda m: m.push(Items())),
    b"d": (_CONTAINER, _Machine.dict_of),
    b"\x8f": (_CONTAINER, lambda m: m.push(build(_SET, ()))),
    b"\x90": (0, _Machine.appends),
    b"\x91": (_CONTAINER, lambda m: m.push(build(_SET, (m.marked(),)))),
    b"a": (_REFERENCE, _Machine.append),
    b"e": (_REFERENCE, _Machine.appends),
    b"s": (_PAIR, _Machine.item),
    b"u": (_REFERENCE, _Machine.items),
    # memo
    b"p": (_MEMO, lambda m: m.remember(m.digits(m.line()))),
    b"q": (_MEMO, lambda m: m.remember(m.number(_U8))),
    b"r": (_MEMO, lambda m: m.remember(m.number(_U32))),
    b"\x94": (_MEMO, lambda m: m.remember(len(m.memo))),
    b"g": (0, lambda m: m.recall(m.digits(m.line()))),
    b"h": (0, lambda m: m.recall(m.number(_U8))),
    b"j": (0, lambda m: m.recall(m.number(_U32))),
    # names and calls
    b"c": (0, _Machine.name),
    b"\x93": (0, _Machine.stack_name),
    b"R": (_CALL, _Machine.call),
    b"\x81": (_CALL, _Machine.call),
    b"\x92": (_CALL, lambda m: m.call(keywords=True)),
    b"i": (_CALL, _Machine.instance),
    b"o": (_CALL, _Machine.object_of),
    b"b": (0, _Machine.give_state),
    b"Q": (_CONTAINER, lambda m: m.push(storage_of(m.stack.pop()))),
    # form
    b"\x80": (0, _Machine.protocol),
    b"\x95": (0, _Machine.skip_frame),
    # what reaches outside: text ids, the extension registry, buffers
    **dict.fromkeys((b"P", b"\x82", b"\x83", b"\x84"), (0, _Machine.refuse)),
    **dict.fromkeys((b"\x97", b"\x98"), (0, _Machine.refuse)),
}
"""What each opcode is charged beside a reference to its value, and what it does."""

_STEPS: list[_Step] = [_Machine.unknown] * 256
_COSTS = [_REFERENCE] * 256
for _letter, (_cost, _step) in _TABLE.items():
    _STEPS[_letter[0]], _COSTS[_letter[0]] = _step, _REFERENCE + _cost
