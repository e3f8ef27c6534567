"""The rules of the write-behind queue.

1. Saves are admitted first come, first served, while fewer than ``queue_depth`` are accepted and their
   memory fits (B1).
2. Operations on one location take effect in the order in which they came, whichever service they came
   through; loads with no other operation between them run side by side. So do operations of which one is on
   what the other's location lies in, as a directory is, or on a link that the other passes. Other locations do
   not wait for each other (O1, O2).
3. A removal cancels a queued save of its location (O3). It runs once every save accepted before it in its
   service is durable, and is dropped when one of them fails (D3), or had failed already and no newer
   checkpoint, but what is to be removed, is durable by then.
4. Where a queued save is cancelled or superseded, removals that waited for it wait for what its replacer
   waits for. So the last good checkpoint outlives any sequence of the above. A save supersedes only one of
   its own service, and only where that lets it in: nothing that is accepted ever waits for what is not (D4).
5. A link to a location, which makes it known by a second name, runs once the newest save of that location is
   durable, and is dropped when it fails. Removals that come later wait for it as for a save (D3), so what the
   second name has stood for until then is not deleted beneath it.
6. An operation never waits for one that is suspended beneath it on its own thread: a signal handler that
   interrupted ``save`` may save, wait and load (L1). A removal does, but for what lies in what it removes, as it
   would delete the last good checkpoint before the next is durable (D3); ``is_held_up`` tells who may not wait for it.

``decide`` looks only at what a message since the last call may have changed: what has ended leaves word with those
that it held up. So a message costs the same, on average, however many operations are pending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import is_
from weakref import WeakSet

from async_ckpt.engine.queue.barriers import Barriers
from async_ckpt.engine.queue.history import History
from async_ckpt.engine.queue.names import lies_in
from async_ckpt.engine.queue.operation import (
    Action,
    Admit,
    Cancel,
    Drop,
    Kind,
    Lane,
    Op,
    Phase,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.engine.queue.shares import Located, Share
from async_ckpt.engine.queue.turns import Agenda, Slots

__all__ = ["Queue"]


class Queue:
    """The live operations of all services of the process, in order of arrival."""

    def __init__(self) -> None:
        self._ops: dict[int, Op] = {}
        self._located = Located()
        self._running = Located()
        self._shares: dict[Lane, Share] = {}
        self._groups: dict[str, Slots] = {}
        self._barriers = Barriers()
        self._staging: dict[int, Op] = {}
        self._by_thread: dict[int, dict[int, Op]] = {}  # what may be suspended: saves not staged, and loads
        self._histories: WeakSet[History] = WeakSet()
        self._to_end = Agenda()
        self._to_start = Agenda()
        self._freed: dict[Slots, None] = {}
        self._waiting: dict[Lane, Share] = {}  # where saves wait for admission
        self._decision: Action | None = None

    def __len__(self) -> int:
        return len(self._ops)

    def live(self, lane: Lane) -> Iterator[Op]:
        """Yield the operations of *lane* that have not ended, oldest first."""
        share = self._shares.get(lane)
        return iter(share.live.values() if share is not None else ())

    def one_waits(self, lane: Lane) -> bool:
        """Return whether a save of *lane* waits for admission."""
        share = self._shares.get(lane)
        return share is not None and bool(share.waiting)

    def lanes_met(self, lane: Lane) -> set[Lane]:
        """Return *lane*, and those of which it may have to wait for an operation."""
        if len(self._shares) <= 1:
            return {lane}
        ops = list(self.live(lane))
        keys = {key for op in ops for key in (*op.keys, op.target) if key is not None}
        groups = {op.group for op in ops if op.group is not None}
        located = (self._located.writes, self._located.loads)
        related = (found for key in keys for names in located for found in names.related(key))
        met = {op.lane for found in related for op in found.values()}
        return met | {op.lane for op in self._ops.values() if op.group in groups} | {lane}

    def changing(self, name: str) -> Op | None:
        """Return the last live operation that decides what is at the location *name*, a link maybe."""
        writes = self._located.writes
        found = chain(writes.at(name).values(), *(each.values() for each in writes.above(name)))
        return max((op for op in found if op.phase is not Phase.WAITING), key=lambda op: op.id, default=None)

    def is_changing(self, key: str) -> bool:
        """Return whether a live operation may change whether *key* can be saved to."""
        return bool(self._located.writes.related(key))

    def is_held_up(self, op: Op, thread: int) -> bool:
        """Return whether *op* cannot end before *thread* goes on with a call that is suspended there (rule 6)."""
        suspended = {other.id for other in self._by_thread.get(thread, {}).values() if other is not op}
        return bool(suspended) and self._any_depends((op,), lambda other: other.id in suspended)

    # -- messages

    def add(self, op: Op) -> None:
        """Take in a new operation. A removal or a link learns here which saves it has to wait for (D3)."""
        share = self._shares.get(op.lane)
        if share is None:
            share = self._shares[op.lane] = Share(op.lane)
        if op.kind is Kind.SAVE:
            op.urgent = bool(self._suspended(op))
            share.waiting[op.id] = op
            self._waiting[op.lane] = share
        elif op.kind is Kind.REMOVE:
            suspended = [other for other in self._suspended(op) if other.id in share.accepted]
            beneath = [other for other in suspended if lies_in(other.key, op.key)]
            if beneath:
                others = [
                    other
                    for other in share.accepted.values()
                    if not self._any_depends((other,), beneath.__contains__)
                ]
                self._barriers.wait_for(op, others)
            else:
                self._barriers.wait_for_all(op)
            op.missing = op.lane.history.last_failure
            share.cautious += bool(op.missing)
            op.lane.history.given_up(op.key)
        elif op.kind is Kind.LINK:
            save = self._newest_save(op)
            self._barriers.wait_for(op, () if save is None else (save,))
            op.failed_save = op.lane.history.failure(Kind.SAVE, op.target or "") if save is None else None
            share.accepted[op.id] = op
            self._barriers.accept(op)
        if op.kind in (Kind.SAVE, Kind.LOAD):
            self._by_thread.setdefault(op.thread, {})[op.id] = op
        self._ops[op.id] = op
        share.live[op.id] = op
        self._pass_by(op)
        self._located.add(op)
        if op.kind is Kind.REMOVE:
            before = self._nearest_predecessor(op)
            op.before = 0 if before is None else before.id
        self._look_at((op,))

    def foresee(self, op: Op) -> None:
        """Take in a save and admit it, whatever the bounds: what interrupted it counts on it (rule 6)."""
        self.add(op)
        self._admit(op, self._shares[op.lane])
        op.phase = Phase.STAGING

    def durable(self, op: Op) -> None:
        """The operation has taken effect."""
        history = op.lane.history
        history.succeeded(op.kind, op.key, op.id)
        if op.kind is Kind.SAVE:
            history.durable(op.key, op.id)
            self._histories.add(history)
        self._end(op)

    def failed(self, op: Op) -> None:
        """The operation has failed: what waits for it, and removals that come later, must not run (D3)."""
        if op.kind in (Kind.SAVE, Kind.LINK):
            op.lane.history.failed(op.kind, op.key, op.id)
        for other in self._barriers.waiting_for(op):
            other.failed_save = op.id
            self._to_end.add(other.id)
        self._end(op)

    def withdraw(self, op: Op) -> None:
        """The operation came to nothing: refused, dropped, or its caller was interrupted.

        Where it was accepted, or took another's place, what waits for it fares as after a failure.
        """
        if op.phase is Phase.WAITING and not self._barriers.is_awaited(op):
            self._end(op)
        else:
            self.failed(op)

    def replaced(self, op: Op, by: Op) -> None:
        """The queued save *op* ended in favour of *by*: what waited for it waits for what *by* stands for (rule 4)."""
        if by.kind is Kind.REMOVE:
            self._barriers.cancelled(op, by)
        else:
            self._barriers.superseded(op, by)
        self._end(op)
        if by.kind is Kind.REMOVE:  # what it cancelled may have stood before another that it makes needless
            before = self._nearest_predecessor(by)
            by.before = 0 if before is None else before.id

    # -- decisions

    def decide(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        """Return the next thing to do, or ``None`` if nothing can be done now.

        Args:
            fits: tells whether the memory for the waiting save given first can be had now, or could be if the
                accepted save given second ended.

        The action is not carried out here; ask again once it has been. Until then it stays the same.
        """
        if self._decision is None or not self._is_open(self._decision):
            self._decision = self._decide(fits)
        return self._decision

    def _is_open(self, decision: Action) -> bool:
        """Return whether *decision* is yet to be carried out."""
        op = decision.op
        if op.id not in self._ops:
            return False
        before = {Start: Phase.QUEUED, Admit: Phase.WAITING}.get(type(decision))
        return before is None or op.phase is before

    def _decide(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        if self._staging:
            for op in [op for op in self._staging.values() if op.phase is Phase.QUEUED]:
                self._staged(op)
        return self._next_ending() or self._next_start() or self._next_admission(fits)

    def _staged(self, op: Op) -> None:
        del self._staging[op.id]
        self._leave_thread(op)
        self._look_at((op,))
        for other in reversed(self._located.writes.at(op.key).values()):
            if other is op:
                break
            self._look_at((other,))  # a removal may cancel it

    def _next_ending(self) -> Action | None:
        while (number := self._to_end.pop()) is not None:
            op = self._ops.get(number)
            if op is None or op.phase is not Phase.QUEUED:
                continue
            if op.failed_save is not None:
                return Drop(op, op.failed_save)
            if op.kind is Kind.REMOVE:
                if _is_made_up_for(op):
                    victim = self._replaceable_save(op)
                    if victim is not None:
                        self._to_end.add(number)
                        return Cancel(victim, op)
                elif op.barrier is None:  # nothing may yet make up for it
                    return Drop(op, op.missing)
        return None

    def _next_start(self) -> Action | None:
        while (number := self._next_to_try()) is not None:
            op = self._ops.get(number)
            if op is None or op.phase is not Phase.QUEUED or op.barrier is not None or self._is_blocked(op):
                continue
            if op.kind is Kind.REMOVE and not _is_made_up_for(op):
                return Drop(op, op.missing)
            if self._takes_slots(op):
                self._start(op)
                return Start(op)
        return None

    def _next_to_try(self) -> int | None:
        number = self._to_start.pop()
        while number is None and self._freed:
            slots = next(iter(self._freed))
            number = slots.pop()
            if number is None:
                del self._freed[slots]
        return number

    def _takes_slots(self, op: Op) -> bool:
        needed = []
        if op.kind is Kind.SAVE:
            needed.append(self._shares[op.lane].slots)
        if op.group is not None:
            needed.append(self._groups.setdefault(op.group, Slots(1)))
        for slots in needed:
            if not slots.admits(op.id):
                slots.wait(op.id)
                self._freed[slots] = None  # unless it is full, an older one comes first
                return False
        for slots in needed:
            slots.take(op.id)
        return True

    def _start(self, op: Op) -> None:
        self._running.add(op)
        if op.kind is Kind.REMOVE:
            for history in list(self._histories):
                history.removed(op.key)

    def _next_admission(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        for lane, share in self._waiting.items():
            blocked = False
            for op in share.waiting.values():
                if blocked and not op.urgent:
                    continue
                action = self._admission(op, lane, share, fits)
                if action is not None:
                    return action
                blocked = True
        return None

    def _admission(
        self, op: Op, lane: Lane, share: Share, fits: Callable[[Op, Op | None], bool]
    ) -> Action | None:
        room = share.accepted_saves < lane.queue_depth
        if op.urgent or (room and fits(op, None)):
            self._admit(op, share)
            return Admit(op)
        if lane.overflow == "raise":
            return Refuse(op, "memory" if room else "queue")
        # Not for one that would still have to wait: it may wait for memory that a save behind a removal
        # holds, and that removal would inherit the wait for it, and wait for ever.
        if lane.overflow == "supersede" and share.accepted_saves <= lane.queue_depth:
            victim = self._replaceable_save(op)
            if victim is not None and fits(op, victim):
                return Supersede(victim, op)
        return None

    def _admit(self, op: Op, share: Share) -> None:
        self._no_longer_waits(op, share)
        share.accepted[op.id] = op
        share.accepted_saves += 1
        self._staging[op.id] = op
        self._barriers.accept(op)

    # -- what holds an operation up

    def _is_blocked(self, op: Op) -> bool:
        """Return whether something comes first, or a *later* operation runs that had to pass *op* by (rule 6)."""
        if next(self._predecessors(op), None) is not None:
            return True
        return any(
            other is not op and not _is_suspended_beneath(other, op)
            for found in self._running.meeting(op)
            for other in found.values()
        )

    def _predecessors(self, op: Op) -> Iterator[Op]:
        """Yield the earlier operations of the same and related locations that *op* has to let go first (O1).

        Not those that wait for admission: their callers have nothing after them yet, and two services whose
        accepted saves waited for each other's unaccepted ones would wait for ever.
        """
        for found in self._located.meeting(op):
            for number, other in found.items():
                if number >= op.id:
                    break
                if _comes_first(other, op):
                    yield other
        yield from (other for other in op.passed_by if other.id in self._ops)

    def _pass_by(self, op: Op) -> None:
        """Have what *op* interrupted come after it, where it does not come after that by way of another thread's."""
        if op.kind is Kind.LOAD:
            return
        for other in self._suspended(op):
            related = lies_in(other.key, op.key) or lies_in(op.key, other.key)
            if other.kind is not Kind.LOAD and related and not self._any_depends((op,), partial(is_, other)):
                other.passed_by += (op,)

    def _nearest_predecessor(self, op: Op) -> Op | None:
        nearest: Op | None = None
        for found in self._located.meeting(op):
            for number, other in reversed(found.items()):
                if nearest is not None and number <= nearest.id:
                    break
                if number < op.id and _comes_first(other, op):
                    nearest = other
        return nearest

    def _look_at(self, ops: Iterable[Op]) -> None:
        """Have what may be done about *ops* now decided anew."""
        for op in ops:
            if op.phase is Phase.QUEUED:
                if op.kind in (Kind.REMOVE, Kind.LINK):
                    self._to_end.add(op.id)
                self._to_start.add(op.id)

    def _look_behind(self, op: Op) -> None:
        """Look at what waited for *op*, which has ended, to come first: no further than something else does so."""
        writes, loads = self._located.writes, self._located.loads
        for key in op.keys:
            limit: int | None = None
            for found in chain((writes.at(key),), writes.above(key)):
                for number, other in found.items():
                    self._look_at((other,))
                    if other.phase in (Phase.QUEUED, Phase.RUNNING):
                        limit = number if limit is None else min(limit, number)
                        break
            further = [writes.below(key)]
            if op.kind is not Kind.LOAD:
                further += loads.related(key)
            for found in further:
                for number, other in found.items():
                    if limit is not None and number > limit:
                        break
                    self._look_at((other,))

    # -- replacing

    def _newest_save(self, link: Op) -> Op | None:
        """Return the newest accepted save of what *link* leads to, in its own lane and not beneath it (rule 6)."""
        for op in reversed(self._located.writes.at(link.target or "").values()):
            if op.lane is link.lane and _is_accepted_save(op) and not _is_suspended_beneath(op, link):
                return op
        return None

    def _replaceable_save(self, by: Op) -> Op | None:
        """Return a save that has not started and that *by* makes needless, if ending it harms nobody."""
        # Where another comes between the two, somebody counts on the save: a load, a removal.
        op = self._ops.get(by.before) if by.kind is Kind.REMOVE else self._nearest_predecessor(by)
        if op is None or op.kind is not Kind.SAVE or op.phase is not Phase.QUEUED or op.key != by.key:
            return None
        if op.place != by.place:
            return None  # the same location, as far as anybody can tell, but reached with other options
        if by.kind is Kind.SAVE and op.lane is not by.lane:
            return None  # its removals do not wait for our saves, nor is its memory ours
        if by.kind is Kind.REMOVE and self._barriers.has_link_waiting_for(op):
            return None
        return None if self._would_deadlock(op, by) else op

    def _would_deadlock(self, op: Op, by: Op) -> bool:
        """Return whether what inherits from *op* would wait for a save that itself waits for the heir."""
        return any(self._any_depends(more, is_heir) for is_heir, more in self._barriers.would_gain(op, by))

    def _any_depends(self, ops: Iterable[Op], on: Callable[[Op], bool]) -> bool:
        """Return whether one of *ops* waits for one for which *on* is true, or for one that does, and so on."""
        seen: set[int] = set()
        stack = list(ops)[::-1]  # the newest first: they are the most likely
        while stack:
            op = stack.pop()
            if on(op):
                return True
            if op.id not in seen:
                seen.add(op.id)
                stack += self._predecessors(op)
                if op.barrier is not None:
                    stack += op.barrier.everything()
        return False

    # -- bookkeeping

    def _suspended(self, op: Op) -> list[Op]:
        """Return what is suspended beneath *op* (rule 6)."""
        others = self._by_thread.get(op.thread, {}).values()
        return [other for other in others if _is_suspended_beneath(other, op)]

    def _leave_thread(self, op: Op) -> None:
        ops = self._by_thread.get(op.thread)
        if ops is not None and ops.pop(op.id, None) is not None and not ops:
            del self._by_thread[op.thread]

    def _end(self, op: Op) -> None:
        share = self._shares[op.lane]
        del self._ops[op.id], share.live[op.id]
        self._no_longer_waits(op, share)
        if share.accepted.pop(op.id, None) is not None:
            share.accepted_saves -= op.kind is Kind.SAVE
        share.cautious -= op.kind is Kind.REMOVE and bool(op.missing)
        self._staging.pop(op.id, None)
        self._leave_thread(op)
        self._located.discard(op)
        self._running.discard(op)
        self._give_back_slots(op, share)
        self._barriers.leave(op)
        self._look_at(self._barriers.ended(op))
        self._look_behind(op)
        if not share.cautious:
            op.lane.history.forget_before(next(iter(share.live), op.id + 1))
        if not share.live:
            del self._shares[op.lane]

    def _no_longer_waits(self, op: Op, share: Share) -> None:
        if share.waiting.pop(op.id, None) is not None and not share.waiting:
            del self._waiting[op.lane]

    def _give_back_slots(self, op: Op, share: Share) -> None:
        if op.kind is Kind.SAVE:
            share.slots.give_back(op.id)
            self._freed[share.slots] = None
        if op.group is not None and op.group in self._groups:
            slots = self._groups[op.group]
            slots.give_back(op.id)
            if slots.is_used:
                self._freed[slots] = None
            else:
                del self._groups[op.group]


def _is_accepted_save(op: Op) -> bool:
    return op.kind is Kind.SAVE and op.phase is not Phase.WAITING


def _comes_first(earlier: Op, op: Op) -> bool:
    return (
        earlier.phase is not Phase.WAITING
        and not _is_suspended_beneath(earlier, op)
        and op not in earlier.passed_by
    )


def _is_suspended_beneath(other: Op, op: Op) -> bool:
    """Return whether *other*'s caller cannot go on before *op*'s caller has returned (rule 6)."""
    return other.thread == op.thread and (
        other.phase in (Phase.WAITING, Phase.STAGING) or (other.kind is Kind.LOAD and other is not op)
    )


def _is_made_up_for(removal: Op) -> bool:
    """Return whether another checkpoint is durable that is newer than what had failed when *removal* came (D3)."""
    return removal.lane.history.makes_up_for(removal.missing, without=removal.key)
