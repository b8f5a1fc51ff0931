"""The average of a run's newest checkpoints, kept up to date on disk while the run goes on.

A checkpoint is taken when it is complete: it opens by its headers, with all its shards, and two
looks in a row found the same files, of the same sizes and times, in it. What changes in spite of
that while it is averaged stops that average, and the output stays what it was.

The output is replaced in one step, so that it is always a complete average. Its provenance holds
which files it was made of, so a watch that is started anew makes nothing that is there already; and
a run that is started anew, and writes its checkpoints again, has them averaged again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from streamsoup.cluster.choice import refuse_spread
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    ChangedIngredientError,
    FormatError,
    MismatchError,
    MissingFileError,
    NonFiniteError,
    OutputExistsError,
    RecipeError,
    StreamsoupError,
    check_choice,
    count,
    option,
    printable,
    some,
)
from streamsoup.formats.ingredients import Ingredient, open_ingredients
from streamsoup.methods.averages import Curve, ema_factors, wsm_coefficients
from streamsoup.methods.checkpoints import Choice, choose, find_checkpoints
from streamsoup.options import Note, Options, check_options, take
from streamsoup.output.make import Soup, make, order
from streamsoup.output.verification import read_provenance
from streamsoup.recipe import Coefficients

__all__ = ["WatchMethod", "watch"]

WatchMethod = Literal["uniform", "ema", "lawa", "wsm"]

log = logging.getLogger("streamsoup")


class _Asked(msgspec.Struct, frozen=True):
    """What is made of the checkpoints of which run, and where."""

    run: str
    output: str
    method: str
    last: int | None
    every: int
    decay: float
    curve: str
    until: int | None
    options: Options

    def coefficients(self, n: int) -> Coefficients:
        """Return the coefficients of `n` checkpoints, oldest first."""
        if self.method == "ema":
            return Coefficients.given(ema_factors(n, self.decay))
        if self.method == "wsm":
            return wsm_coefficients(n, self.curve)  # type: ignore[arg-type]
        return Coefficients.uniform(n)

    def tell(self, text: str) -> None:
        """Send a line for the user."""
        if self.options.on_event is not None:
            self.options.on_event(Note(text))


def watch(
    run: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    method: WatchMethod = "lawa",
    last: int | None = None,
    every: int = 1,
    decay: float = 0.9,
    curve: Curve = "linear",
    until: int | None = None,
    poll_s: float = 10.0,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup | None:
    """Average the newest checkpoints of a run into `output`, again whenever one is complete.

    Args:
        run: The folder of the run; it need not exist yet.
        output: The folder to make, and to replace. One that exists is refused unless it was made by
            watching the same run, or `options` say ``overwrite``.
        method: ``lawa`` and ``uniform`` weight all alike, ``ema`` and ``wsm`` as those verbs do.
        last: How many of the newest; all there are while there are fewer. ``lawa`` needs it; None
            takes all for the others.
        every: Take the newest, and every `every`-th counted back from it, and then the `last`.
        decay: For ``ema``.
        curve: For ``wsm``.
        until: Return once a checkpoint of this step, or a later one, is in the average; None goes
            on until it is interrupted.
        poll_s: Seconds between two looks at the folder.
        options: As for every verb. Each average, and what keeps one from being made, is told as a
            `Note`.

    Returns:
        The last soup; None if the output was up to date already.

    Raises:
        RecipeError: Settings that make no sense, or checkpoints without steps.
        OutputExistsError: The output is something else.
        OutputError: The output cannot be written.

    Checkpoints that do not fit together, or are not finite, are told and passed over until others
    are there. Each average costs what `uniform` of its checkpoints does.
    """
    check_options(options, Options)
    refuse_spread(options, "watch")
    asked = _asked(run, output, method, last, every, decay, curve, until, options)
    poll_s = take("float", "poll_s", poll_s)
    if not 0 < poll_s < 1e6:
        raise RecipeError(f"poll_s must be above 0, got {poll_s}")
    there = _there(asked)
    folder = _Folder(asked)
    soup: Soup | None = None
    failed: object = None
    while True:
        choice = folder.look()
        if choice is not None:
            identity = _identity(asked, choice)
            if identity not in (there, failed):
                try:
                    soup = _make(asked, choice, identity, replaces=there is not None)
                except (ChangedIngredientError, MissingFileError) as error:
                    asked.tell(f"a checkpoint changed, so it is looked at again: {error}")
                except (FormatError, MismatchError, NonFiniteError) as error:
                    failed = identity
                    asked.tell(f"not averaged: {error}")
                else:
                    there = identity
            newest = choice.checkpoints[-1].step
            if identity == there and until is not None and newest is not None and newest >= until:
                return soup
        time.sleep(poll_s)


def _asked(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: str,
    last: int | None,
    every: int,
    decay: float,
    curve: str,
    until: int | None,
    options: Options,
) -> _Asked:
    """Check the settings. Raises `RecipeError`."""
    check_choice("method", method, get_args(WatchMethod))
    if options.part is not None:
        raise RecipeError("a watch makes each average whole; leave part out")
    if method == "lawa" and last is None:
        raise RecipeError(f"lawa needs {option('last')}: how many of the newest are averaged")
    numbers = {"last": last, "every": every, "until": until}
    for name, number in numbers.items():
        if number is not None and take("int", name, number) < (0 if name == "until" else 1):
            raise RecipeError(f"{name} must be at least 1, got {number}")
    decay = take("float", "decay", decay)
    if not 0 <= decay < 1:
        raise RecipeError(f"decay {decay} is not between 0 and 1, 1 excluded")
    check_choice("curve", curve, get_args(Curve))
    path = os.path.abspath(os.fsdecode(run))
    if os.path.realpath(output) == os.path.realpath(path):
        raise RecipeError(f"{printable(path)}: is the run itself; give another output")
    return _Asked(path, os.fsdecode(output), method, last, every, decay, curve, until, options)


class _Folder:
    """The folder of a run, and what was found in it at the last look."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._seen: dict[str, object] = {}
        """The files of each checkpoint."""
        self._opened: dict[str, Ingredient] = {}
        """Complete checkpoints, as they were at the last look."""
        self._told: set[str] = set()
        """What was said of those that cannot be read."""

    def look(self) -> Choice | None:
        """Return the complete checkpoints to average, oldest first; None if there are none."""
        asked = self._asked
        found = {path: _files(path) for path in self._paths()}
        settled = [path for path, files in found.items() if files == self._seen.get(path)]
        opened = {}
        for path in settled:
            try:
                opened[path] = self._open(path)
            except (ChangedIngredientError, MissingFileError) as error:
                log.debug("%s", error)  # not complete
            except FormatError as error:  # not complete, or never readable as it is asked for
                if str(error) not in self._told:
                    self._told.add(str(error))
                    asked.tell(f"not read so far: {error}")
        self._seen, self._opened = found, opened
        if not opened:
            return None
        every = choose(list(opened.values()), by="step", every=asked.every)
        n = len(every.checkpoints) if asked.last is None else asked.last
        return replace(every, checkpoints=every.checkpoints[-n:])

    def _open(self, path: str) -> Ingredient:
        """Open a checkpoint by its headers, unless it is open and unchanged."""
        known = self._opened.get(path)
        if known is not None:
            try:
                known.check_unchanged()
                return known
            except ChangedIngredientError:
                pass
        (opened,) = open_ingredients([path], self._asked.options.reading)
        return opened

    def _paths(self) -> list[str]:
        """List what looks like a checkpoint; nothing while the folder is not there."""
        inside = os.path.join(self._asked.run, "checkpoints")
        own = os.path.realpath(self._asked.output)
        for folder in (self._asked.run, inside):  # Lightning has them one folder below
            try:
                found = find_checkpoints(folder, []) if os.path.isdir(folder) else []
                found = [path for path in found if os.path.realpath(path) != own]
                if found:
                    return found
            except FormatError as error:
                log.debug("%s", error)
        return []


def _files(path: str) -> object:
    """Return what changes while a checkpoint is written: its files, their sizes and times."""
    try:
        if not os.path.isdir(path):
            return _status(path)
        names = sorted(os.listdir(path))
        return [(name, _status(os.path.join(path, name))) for name in names]
    except OSError:
        return object()  # equal to nothing: gone, or renamed


def _status(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _identity(asked: _Asked, choice: Choice) -> str:
    """Return a text that differs for averages of other files, or made in another way."""
    n = len(choice.checkpoints)
    files = [[each.path, _weights_of(each.path)] for each in choice.checkpoints]
    made = msgspec.to_builtins(asked.coefficients(n))
    options = asked.options
    how = [options.dtype, options.shard_size, options.non_float, options.non_finite]
    reading = msgspec.to_builtins(options.reading)
    return json.dumps([asked.method, made, [str(each) for each in how], reading, files])


def _weights_of(path: str | None) -> object:
    """Return the sizes and times of the weights, which later runs of the watch compare."""
    assert path is not None
    found = _files(path)
    if not isinstance(found, list):
        return found
    kept = (".safetensors", ".bin", ".json", ".pt", ".pth", ".ckpt")
    return [[name, *status] for name, status in found if name.endswith(kept)]


def _there(asked: _Asked) -> str | None:
    """Return the identity of the average that the output holds; None if there is none.

    Raises `OutputExistsError` for anything that watching this run did not make.
    """
    if not os.path.lexists(asked.output):
        return None
    report: Mapping[str, Any] = {}
    try:
        report = read_provenance(os.path.realpath(asked.output)).report
    except StreamsoupError:
        pass
    identity = report.get("identity")
    if report.get("watched") == os.path.realpath(asked.run) and isinstance(identity, str):
        return identity
    if asked.options.overwrite:
        return ""
    raise OutputExistsError(
        f"{printable(asked.output)}: exists already, and was not made by watching "
        f"{printable(asked.run)}; {option('overwrite', True)} replaces it"
    )


def _make(asked: _Asked, choice: Choice, identity: str, *, replaces: bool) -> Soup:
    """Make the average of the chosen checkpoints."""
    n = len(choice.checkpoints)
    options = replace(asked.options, overwrite=replaces)
    rule = Linear(asked.coefficients(n))
    ordered = order(choice.ingredients, rule, method=asked.method, options=options)
    report = {**choice.report, "watched": os.path.realpath(asked.run), "identity": identity}
    soup = make(replace(ordered, report=report), output=asked.output, options=options)
    fewer = "" if asked.last in (None, n) else f", and {asked.last} were asked for"
    asked.tell(
        f"{printable(asked.output)}: {asked.method} of {count(n, 'checkpoint')}{fewer}: steps "
        f"{some(_steps(choice), 20)}"
    )
    return soup


def _steps(choice: Choice) -> Sequence[int | None]:
    return [each.step for each in choice.checkpoints]
