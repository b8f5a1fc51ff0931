"""What every search does around its own question: lock, known already?, search, make, finish.

A search is a question: which recipe? Around it there is always the same:

1. before anything is opened, an output that must not be replaced is refused;
2. the folder ``OUT.search`` is locked, and its journal read;
3. a soup that an earlier run of this very search put in place, before it was killed, is the answer;
4. the output is checked again, as another run may have finished meanwhile;
5. the recipe is searched for, and written by the one pass that writes every soup;
6. the folder is removed: until then, the same call resumes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from streamsoup.errors import OutputExistsError, RecipeError, option
from streamsoup.formats.ingredients import Ingredient
from streamsoup.options import Options
from streamsoup.output.destination import check_output
from streamsoup.output.make import Order, Soup, make
from streamsoup.output.verification import read_provenance

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SearchRun"]


class _Journal(Protocol):
    def is_of(self, run: object) -> bool: ...

    def finish(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


_J = TypeVar("_J", bound=_Journal)


class SearchRun:
    """One run of a search: where its soup goes, and whether an earlier run began it."""

    def __init__(
        self,
        output: str | os.PathLike[str],
        ingredients: Sequence[Ingredient],
        *,
        restart: bool,
        options: Options,
    ) -> None:
        """Raise `OutputExistsError` for an output that may not be replaced."""
        if options.part is not None:
            raise RecipeError(
                f"{option('part')}: a search is not made in parts, as each trial depends on those "
                f"before it; leave out {option('part')}"
            )
        self._output, self._ingredients, self._options = output, ingredients, options
        self.target = os.path.realpath(os.fsdecode(output))
        """The real path of the output."""
        self._resumes = os.path.lexists(self.folder) and not restart
        if not self._resumes:
            self._check_output()

    @property
    def folder(self) -> str:
        """The folder of the search, beside the output."""
        return f"{self.target}.search"

    def soup(
        self,
        open_journal: Callable[[], _J],
        identity: str,
        search: Callable[[_J], Order],
        model: nn.Module | None,
    ) -> Soup:
        """Search for a soup, write it, and put it into a live model if there is one.

        Args:
            open_journal: Locks the search folder; see `SearchFolder` for what it raises.
            identity: Equal for searches that find the same soup; in the report of `search`.
            search: Finds what to make, with scores of the journal.
            model: A model to leave the soup in.

        Returns:
            The soup; `Soup.finished` if an earlier run had put it in place.
        """
        with open_journal() as journal:
            soup = self._known(identity, journal)
            if soup is None:
                self._check_output()
                ordered = search(journal)
                try:
                    soup = make(ordered, output=self._output, options=self._options)
                except OutputExistsError:
                    # Where a kill came as `make` tidied up, only the soup itself says whose it is.
                    soup = self._known(identity, journal)
                    if soup is None:
                        raise
            if model is not None:
                from streamsoup.live.mix import put_into  # which imports torch

                put_into(model, soup, self._options)
            journal.finish()
        return soup

    def _check_output(self) -> None:
        check_output(
            os.fsdecode(self._output),
            self._ingredients,
            overwrite=self._options.overwrite,
            resumes=self._resumes,
        )

    def _known(self, identity: str, journal: _Journal) -> Soup | None:
        """Return the soup of this very search, if an earlier run had put it in place."""
        started = time.monotonic()
        if not self._resumes or os.path.lexists(f"{self.target}.partial"):
            return None  # in the second case, `make` knows more
        try:
            provenance = read_provenance(self.target)
        except RecipeError:
            return None
        # A search of these very things may have ended long ago, and this be another one.
        report = provenance.report
        if report.get("search") != identity or not journal.is_of(report.get("run")):
            return None
        elapsed_s = time.monotonic() - started
        return Soup(
            self.target,
            provenance.recipe,
            provenance,
            nbytes_read=0,
            nbytes_written=0,
            elapsed_s=elapsed_s,
            finished=True,
        )
