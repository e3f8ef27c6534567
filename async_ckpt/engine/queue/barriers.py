"""Barriers: they hold up removals and links until certain saves and links are durable (D3).

A removal waits for everything that its service accepted before it. Removals share a barrier if nothing was accepted
between them. The barriers of a service form a chain, so each pending operation is listed only once, in the first
barrier that it holds up, however many removals wait for it.

Guarantees: adding, ending and replacing an operation takes constant time on average, however many wait.

What does not belong here: what happens to the waiting operations (queue).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from async_ckpt.engine.queue.operation import LINK, REMOVE, Barrier, Lane, Op

__all__ = ["Barriers"]


class Barriers:
    """All barriers of the queue."""

    def __init__(self) -> None:
        self._holding: dict[int, list[Barrier]] = {}  # by id of what is pending
        self._last: dict[Lane, Barrier] = {}
        self._accepted: dict[Lane, dict[int, Op]] = {}  # since the last barrier of the lane

    def accept(self, op: Op) -> None:
        """Let later removals of its lane wait for *op*."""
        if not any(barrier.lane is op.lane for barrier in self._held_up_by(op)):  # it inherited that
            self._accepted.setdefault(op.lane, {})[op.id] = op

    def wait_for_all(self, op: Op) -> None:
        """Let *op* wait for everything that is accepted in its lane and has not ended."""
        last = self._last.get(op.lane)
        accepted = self._accepted.pop(op.lane, None)
        if accepted:
            last = self._last[op.lane] = Barrier(op.lane, accepted, before=last)
            for number in accepted:
                self._holding.setdefault(number, []).append(last)
        if last is not None:
            last.waiters[op.id] = op
        op.barrier = last

    def wait_for(self, op: Op, others: Iterable[Op]) -> None:
        """Let *op* wait only for *others*."""
        pending = {other.id: other for other in others}
        if pending:
            op.barrier = Barrier(None, pending)
            op.barrier.waiters[op.id] = op
            for number in pending:
                self._holding.setdefault(number, []).append(op.barrier)

    def leave(self, op: Op) -> None:
        """Remove *op*, which has ended, from the waiters."""
        barrier, op.barrier = op.barrier, None
        if barrier is not None:
            del barrier.waiters[op.id]
            if not barrier.waiters and barrier.behind is not None:
                self._merge(barrier, barrier.behind)

    def is_awaited(self, op: Op) -> bool:
        """Return whether anything waits for *op*."""
        return op.id in self._holding

    def waiting_for(self, op: Op) -> Iterator[Op]:
        """Yield the operations that wait for *op*."""
        for barrier in self._held_up_by(op):
            yield from barrier.all_waiters()

    def has_link_waiting_for(self, op: Op) -> bool:
        """Return whether a link waits for *op*."""
        alone = (barrier for barrier in self._held_up_by(op) if barrier.lane is None)
        return any(waiter.kind is LINK for barrier in alone for waiter in barrier.waiters.values())

    def ended(self, op: Op) -> list[Op]:
        """Let nothing wait for *op* any more; return the operations that now wait for nothing."""
        accepted = self._accepted.get(op.lane)
        if accepted is not None and accepted.pop(op.id, None) is not None and not accepted:
            del self._accepted[op.lane]
        passed: list[Op] = []
        for barrier in self._holding.pop(op.id, ()):
            del barrier.pending[op.id]
            passed += self._remove_passed(barrier)
        return passed

    def superseded(self, op: Op, by: Op) -> None:
        """Let those that wait for *op* also wait for the save *by*."""
        for barrier in self._held_up_by(op):
            self._hold(barrier, by)

    def cancelled(self, op: Op, by: Op) -> None:
        """Let those that wait for *op* also wait for everything that the removal *by* waits for."""
        for holding in [*self._held_up_by(op)]:
            barrier = by.barrier
            if barrier is None or holding.covers(barrier):
                continue
            if holding.is_before(barrier):
                while holding is not by.barrier:
                    assert holding.behind is not None
                    holding = self._merge(holding, holding.behind)
            else:
                for other in list(barrier.all_pending()):
                    self._hold(holding, other)

    def would_gain(self, op: Op, by: Op) -> Iterator[tuple[Callable[[Op], bool], Iterator[Op]]]:
        """Yield what would wait for more if *by* replaced *op*, as a test, and what it would wait for."""
        for holding in self._held_up_by(op):
            barrier = by.barrier if by.kind is REMOVE else None
            if by.kind is not REMOVE:
                yield partial(_waits_behind, holding, None), iter((by,))
            elif barrier is not None and not holding.covers(barrier):
                in_row = holding.is_before(barrier)
                more = _between(holding, barrier) if in_row else barrier.all_pending()
                yield partial(_waits_behind, holding, barrier if in_row else None), more

    def _held_up_by(self, op: Op) -> list[Barrier]:
        return self._holding.get(op.id, [])

    def _hold(self, barrier: Barrier, op: Op) -> None:
        if op.id not in barrier.pending:
            barrier.pending[op.id] = op
            self._holding.setdefault(op.id, []).append(barrier)

    def _remove_passed(self, barrier: Barrier | None) -> list[Op]:
        """Remove *barrier* and those behind it, until one has something pending; return their waiters."""
        passed: list[Op] = []
        while barrier is not None and not barrier.pending and barrier.before is None:
            for waiter in barrier.waiters.values():
                waiter.barrier = None
                passed.append(waiter)
            if barrier.behind is not None:
                barrier.behind.before = None
            elif barrier.lane is not None:
                del self._last[barrier.lane]
            barrier = barrier.behind
        return passed

    def _merge(self, one: Barrier, other: Barrier) -> Barrier:
        """Merge *one* and *other*, the next behind it, into the larger of them; return that."""
        before, behind, position = one.before, other.behind, other.position
        stays, goes = (other, one) if _size(one) <= _size(other) else (one, other)
        for number, op in goes.pending.items():
            self._holding[number].remove(goes)
            self._hold(stays, op)
        for number, waiter in goes.waiters.items():
            waiter.barrier = stays
            stays.waiters[number] = waiter
        stays.before, stays.behind, stays.position = before, behind, position
        if before is not None:
            before.behind = stays
        if behind is not None:
            behind.before = stays
        else:
            assert stays.lane is not None
            self._last[stays.lane] = stays
        return stays


def _waits_behind(one: Barrier, other: Barrier | None, op: Op) -> bool:
    """Return whether *op* waits at *one* or behind it, but before *other*."""
    barrier = op.barrier
    return barrier is not None and barrier.covers(one) and not (other is not None and barrier.covers(other))


def _between(one: Barrier, other: Barrier) -> Iterator[Op]:
    """Yield what is pending behind *one*, up to *other*."""
    barrier: Barrier | None = other
    while barrier is not None and barrier is not one:
        yield from barrier.pending.values()
        barrier = barrier.before


def _size(barrier: Barrier) -> int:
    return len(barrier.pending) + len(barrier.waiters)
