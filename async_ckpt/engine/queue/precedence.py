"""Precedence: which operations go first at a location, and which an operation depends on, directly or not.

Guarantees: a query costs time in proportion to the depth of the location and the number of results, not to the number
of pending operations; except `any_depends`, which follows the dependencies.

What does not belong here: decisions (queue), what removals wait for besides (barriers).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import is_

from async_ckpt.engine.queue.names import Names, lies_in
from async_ckpt.engine.queue.operation import LOAD, QUEUED, RUNNING, SAVE, STAGING, WAITING, Op

__all__ = ["Precedence", "is_suspended_beneath"]


class Precedence:
    """The live operations by location and thread; loads separately, as they may run side by side (rule 2).

    Attributes:
        writes: everything but loads.
        loads: the loads.
    """

    def __init__(self) -> None:
        self.writes: Names[Op] = Names()
        self.loads: Names[Op] = Names()
        self._running_writes: Names[Op] = Names()
        self._running_loads: Names[Op] = Names()
        self._by_thread: dict[int, dict[int, Op]] = {}  # may be suspended: loads, and saves not staged

    # -- messages

    def add(self, op: Op) -> None:
        """Add *op*, and order operations that it interrupted after it (rule 6)."""
        if op.thread in self._by_thread and op.kind is not LOAD:
            self._overtake(op)
        if op.kind is LOAD:
            for key in op.keys:
                self.loads.add(key, op.id, op)
        else:
            self.writes.add(op.key, op.id, op)
        if op.kind is SAVE or op.kind is LOAD:
            self._by_thread.setdefault(op.thread, {})[op.id] = op

    def staged(self, op: Op) -> None:
        """Note that the caller of *op* can no longer be suspended in the call."""
        ops = self._by_thread.get(op.thread)
        if ops is not None and ops.pop(op.id, None) is not None and not ops:
            del self._by_thread[op.thread]

    def started(self, op: Op) -> None:
        """Note that *op* has started."""
        if op.kind is LOAD:
            for key in op.keys:
                self._running_loads.add(key, op.id, op)
        else:
            self._running_writes.add(op.key, op.id, op)

    def discard(self, op: Op) -> None:
        """Remove *op*, which has ended."""
        if op.kind is LOAD:
            for key in op.keys:
                self.loads.discard(key, op.id)
                self._running_loads.discard(key, op.id)
        else:
            self.writes.discard(op.key, op.id)
            self._running_writes.discard(op.key, op.id)
        if op.kind is SAVE or op.kind is LOAD:
            self.staged(op)

    # -- what an operation waits for

    def is_blocked(self, op: Op) -> bool:
        """Return whether a predecessor is live, or a *later* operation runs that had to overtake *op* (rule 6)."""
        for _ in self.predecessors(op):
            return True
        for found in _meeting(op, self._running_writes, self._running_loads):
            for other in found.values():
                if other is not op and not is_suspended_beneath(other, op):
                    return True
        return False

    def predecessors(self, op: Op) -> Iterator[Op]:
        """Yield the earlier operations at the same or related locations that have to go before *op* (O1).

        Those that wait for admission are not among them: their callers have submitted nothing after them yet, and two
        services whose accepted saves waited for each other's waiting ones would deadlock.
        """
        for found in _meeting(op, self.writes, self.loads):
            for number, other in found.items():
                if number >= op.id:
                    break
                if _comes_first(other, op):
                    yield other
        for other in op.overtaken_by:
            if other.id in self.writes.at(other.key):  # it has not ended
                yield other

    def nearest_predecessor(self, op: Op) -> Op | None:
        """Return the last of the `predecessors`."""
        nearest: Op | None = None
        for found in _meeting(op, self.writes, self.loads):
            for number, other in reversed(found.items()):
                if nearest is not None and number <= nearest.id:
                    break
                if number < op.id and _comes_first(other, op):
                    nearest = other
        return nearest

    def successors(self, op: Op) -> Iterator[Op]:
        """Yield operations that may have waited for *op*, which has ended; none that still wait for a later one."""
        writes, loads = self.writes, self.loads
        for key in op.keys:
            limit: int | None = None
            for found in chain((writes.at(key),), writes.above(key)):
                for number, other in found.items():
                    yield other
                    if other.phase is QUEUED or other.phase is RUNNING:
                        limit = number if limit is None else min(limit, number)
                        break
            further = [writes.below(key)]
            if op.kind is not LOAD and loads:
                further += loads.related(key)
            for found in further:
                for number, other in found.items():
                    if limit is not None and number > limit:
                        break
                    yield other

    def any_depends(self, ops: Iterable[Op], on: Callable[[Op], bool]) -> bool:
        """Return whether *on* is true for one of *ops*, or for one that they wait for, directly or not."""
        seen: set[int] = set()
        stack = list(ops)[::-1]  # newest first, as they are most likely
        while stack:
            op = stack.pop()
            if on(op):
                return True
            if op.id not in seen:
                seen.add(op.id)
                stack += self.predecessors(op)
                if op.barrier is not None:
                    stack += op.barrier.all_pending()
        return False

    # -- what is suspended (rule 6)

    def suspended(self, op: Op) -> list[Op]:
        """Return the operations that are suspended beneath *op*."""
        others = self._by_thread.get(op.thread)
        return [other for other in others.values() if is_suspended_beneath(other, op)] if others else []

    def would_deadlock(self, op: Op, thread: int) -> bool:
        """Return whether *op* cannot end before *thread* goes on with a call that is suspended there."""
        suspended = {other.id for other in self._by_thread.get(thread, {}).values() if other is not op}
        return bool(suspended) and self.any_depends((op,), lambda other: other.id in suspended)

    def _overtake(self, op: Op) -> None:
        """Order operations that *op* interrupted after it, unless *op* depends on them through another thread's."""
        for other in self.suspended(op):
            related = lies_in(other.key, op.key) or lies_in(op.key, other.key)
            if other.kind is not LOAD and related and not self.any_depends((op,), partial(is_, other)):
                other.overtaken_by += (op,)


def is_suspended_beneath(other: Op, op: Op) -> bool:
    """Return whether the caller of *other* cannot go on before the caller of *op* has returned (rule 6)."""
    return other.thread == op.thread and (
        other.phase in (WAITING, STAGING) or (other.kind is LOAD and other is not op)
    )


def _meeting(op: Op, writes: Names[Op], loads: Names[Op]) -> list[OrderedDict[int, Op]]:
    """Return, for each location, the operations that must not run beside *op*, including itself."""
    if op.kind is not LOAD:
        found = writes.related(op.key)
        return found + loads.related(op.key) if loads else found
    return [found for key in op.keys for found in writes.related(key)]


def _comes_first(earlier: Op, op: Op) -> bool:
    return (
        earlier.phase is not WAITING
        and not is_suspended_beneath(earlier, op)
        and op not in earlier.overtaken_by
    )
