"""The order of work: leaves to make, and the measuring passes that some rules need first.

A *group* is the tensors whose statistics a rule takes together. Its leaves are measured, each by
any thread, and merged in order; when the rule needs no more passes, they are made. Threads that
find nothing ready in one group begin the next, so at most one group more than there are threads is
under way, and what was read for measuring is still in the page cache when it is read again.

Why merging in order cannot deadlock:

1. Tasks are handed out in the order of leaves, so the earliest unmerged leaf has a thread.
2. `merge` waits for earlier leaves of the group only, so that thread does not wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from streamsoup.engine.plan import Leaf
from streamsoup.errors import RecipeError
from streamsoup.rule import Reduction

__all__ = ["Group", "Schedule", "Task"]


class Group:
    """Tensors that a rule measures together, in the order in which leaves are merged."""

    def __init__(self, reduction: Reduction, leaves: Sequence[Leaf], n_measuring: int) -> None:
        """Begin before the first pass; there are `n_measuring` measuring passes at most."""
        self.reduction, self.leaves, self.n_measuring = reduction, leaves, n_measuring
        self.to_make: list[Leaf] = []
        """Leaves that are still to be made when measuring has ended."""
        self.n_measured = 0
        """Measuring passes that have ended."""
        self.n_merged = 0
        self.n_open = 0
        """Tasks of the present pass that are not finished."""


class Task(msgspec.Struct, frozen=True):
    """One leaf to be measured, or to be made."""

    leaf: Leaf
    group: Group | None = None
    """The group that it belongs to, if its rule works on groups."""
    place: int | None = None
    """Its place in the group when it is to be measured; None when it is to be made."""
    restores: bool = False
    """True if an earlier run noted it as made; if its bytes do not match, `put_off` it."""


class Schedule:
    """The tasks of a run, handed out to threads one by one."""

    def __init__(
        self,
        leaves: Iterable[Leaf],
        groups: Iterable[Group] = (),
        noted: Callable[[Leaf], bool] = lambda leaf: False,
    ) -> None:
        """Make `leaves` first; then, group by group, measure and make those of `groups`.

        `noted` tells which leaves an earlier run has finished: a group of nothing else is not
        measured again.
        """
        self._leaves, self._groups, self._noted = iter(leaves), iter(groups), noted
        self._ready: deque[Task] = deque()
        self._n_open = 0
        """Tasks of groups that are not finished: each may make others ready."""
        self._changed = threading.Condition()
        self._stopped = False

    def tasks(self) -> Iterator[Task]:
        """Yield the tasks of one thread, until there are none; wait where others must end first."""
        while (task := self._take()) is not None:
            yield task

    def stop(self) -> None:
        """Hand out no more tasks, and end all waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def merge(self, task: Task, state: Any) -> None:
        """Merge the state of a measured leaf, after those of the leaves before it."""
        group = task.group
        assert group is not None
        assert task.place is not None
        with self._changed:
            while group.n_merged < task.place and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                group.reduction.merge(state)
                group.n_merged += 1
                self._changed.notify_all()

    def put_off(self, task: Task) -> None:
        """Postpone a leaf until its group is measured."""
        assert task.group is not None
        with self._changed:
            task.group.to_make.append(task.leaf)

    def finish(self, task: Task) -> None:
        """Note that a task is done; the last one of a pass makes the next pass ready."""
        group = task.group
        if group is None:
            return
        with self._changed:
            group.n_open -= 1
            self._n_open -= 1
            if group.n_open == 0:
                if task.place is not None:
                    group.reduction.end_pass()
                    group.n_measuring -= 1
                    group.n_measured += 1
                self._begin_pass(group)
            self._changed.notify_all()

    def _take(self) -> Task | None:
        with self._changed:
            while not self._stopped:
                leaf = next(self._leaves, None)
                if leaf is not None:
                    return Task(leaf)
                if self._ready:
                    return self._ready.popleft()
                group = next(self._groups, None)
                if group is not None:
                    self._begin_group(group)
                elif self._n_open == 0:
                    return None
                else:
                    self._changed.wait()
            return None

    def _begin_group(self, group: Group) -> None:
        """Restore what an earlier run has made; measure and make what it has not."""
        noted = [self._noted(leaf) for leaf in group.leaves]
        group.to_make = [leaf for leaf, known in zip(group.leaves, noted, strict=True) if not known]
        restored = [leaf for leaf, known in zip(group.leaves, noted, strict=True) if known]
        if restored:
            self._hand_out(group, [Task(leaf, group, restores=True) for leaf in restored])
        else:
            self._begin_pass(group)

    def _begin_pass(self, group: Group) -> None:
        """Measure all leaves of a group, or if that is done, make what is left."""
        if not group.to_make:
            return
        if group.reduction.measuring:
            if group.n_measuring == 0:
                raise RecipeError(
                    f"{type(group.reduction).__name__}: still measures after all the passes that "
                    "its rule has announced (n_passes)"
                )
            group.n_merged = 0
            tasks = [Task(leaf, group, i) for i, leaf in enumerate(group.leaves)]
        else:
            tasks = [Task(leaf, group) for leaf in sorted(group.to_make, key=_number)]
            group.to_make = []
        self._hand_out(group, tasks)

    def _hand_out(self, group: Group, tasks: Sequence[Task]) -> None:
        """Put tasks before those of other groups."""
        group.n_open = len(tasks)
        self._n_open += len(tasks)
        self._ready.extendleft(reversed(tasks))


def _number(leaf: Leaf) -> int:
    return leaf.number
