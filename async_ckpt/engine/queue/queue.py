"""The rules of the write-behind queue.

1. Saves are admitted first come, first served, while fewer than ``queue_depth`` are accepted and their memory fits
   (B1).
2. Operations at one location take effect in order of arrival, whichever service they came through. The same holds if
   the location of one lies in that of the other, as a file in a directory, or is a link on its path. Loads run side
   by side if there is no other operation between them. Operations at other locations do not wait for each other (O1,
   O2).
3. A removal cancels a queued save of its location (O3). It runs once every save that was accepted before it in its
   service is durable. It is dropped if one of them fails; or if one had failed before, and no newer checkpoint, apart
   from those to be removed, is durable by then (D3).
4. If a queued save is cancelled or superseded, removals that waited for it wait for what its replacement waits for.
   So the last good checkpoint survives any sequence of operations. A save supersedes only a save of its own service,
   and only if it is admitted by that: no accepted operation ever waits for one that is not accepted (D4).
5. A link runs once the newest save of its target is durable, and is dropped if that save fails. Later removals wait
   for a link as for a save (D3), so the previous target of the link is not deleted too early.
6. An operation never waits for one that is suspended beneath it on its own thread: a signal handler that interrupted
   ``save`` may save, wait and load (L1). Only a removal does wait, except for a save in the location that it removes:
   it would delete the last good checkpoint before the next is durable (D3). ``would_deadlock`` finds the operations
   for which a thread must not wait.

``decide`` checks only operations that may be affected by messages since the last call: one that ends lists those that
it held up. So a message costs constant time on average, however many operations are pending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from weakref import ref

from async_ckpt.engine.queue.barriers import Barriers
from async_ckpt.engine.queue.history import History
from async_ckpt.engine.queue.lanes import LaneState
from async_ckpt.engine.queue.names import lies_in
from async_ckpt.engine.queue.operation import (
    LINK,
    LOAD,
    QUEUED,
    REMOVE,
    SAVE,
    STAGING,
    WAITING,
    Action,
    Admit,
    Cancel,
    Drop,
    Lane,
    Op,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.engine.queue.precedence import Precedence, is_suspended_beneath
from async_ckpt.engine.queue.slots import Slots, WorkList

__all__ = ["Queue"]


class Queue:
    """The live operations of all services of the process, in order of arrival."""

    def __init__(self) -> None:
        self._ops: dict[int, Op] = {}
        self._precedence = Precedence()
        self._lanes: dict[Lane, LaneState] = {}
        self._groups: dict[str, Slots] = {}
        self._barriers = Barriers()
        self._staging: dict[int, Op] = {}
        self._histories: set[ref[History]] = set()  # those that contain durable checkpoints
        self._to_end = WorkList()
        self._to_start = WorkList()
        self._freed: dict[Slots, None] = {}
        self._waiting: dict[Lane, LaneState] = {}  # lanes with saves that wait for admission
        self._decision: Action | None = None

    def __len__(self) -> int:
        return len(self._ops)

    def is_live(self, op: Op) -> bool:
        """Return whether *op* has been added and has not ended."""
        return op.id in self._ops

    def live(self, lane: Lane) -> Iterator[Op]:
        """Yield the operations of *lane* that have not ended, oldest first."""
        share = self._lanes.get(lane)
        return iter(share.live.values() if share is not None else ())

    def has_waiting_save(self, lane: Lane) -> bool:
        """Return whether a save of *lane* waits for admission."""
        share = self._lanes.get(lane)
        return share is not None and bool(share.waiting)

    def related_lanes(self, lane: Lane) -> set[Lane]:
        """Return *lane*, and the lanes whose operations it may have to wait for."""
        if len(self._lanes) <= 1:
            return {lane}
        ops = list(self.live(lane))
        keys = {key for op in ops for key in (*op.keys, op.target) if key is not None}
        groups = {op.group for op in ops if op.group is not None}
        located = (self._precedence.writes, self._precedence.loads)
        related = (found for key in keys for names in located for found in names.related(key))
        met = {op.lane for found in related for op in found.values()}
        return met | {op.lane for op in self._ops.values() if op.group in groups} | {lane}

    def changing(self, name: str) -> Op | None:
        """Return the last live operation that determines what the location *name* is, perhaps a link."""
        writes = self._precedence.writes
        found = chain(writes.at(name).values(), *(each.values() for each in writes.above(name)))
        return max((op for op in found if op.phase is not WAITING), key=lambda op: op.id, default=None)

    def is_changing(self, key: str) -> bool:
        """Return whether a live operation may change whether *key* can be saved to."""
        return bool(self._precedence.writes.related(key))

    def would_deadlock(self, op: Op, thread: int) -> bool:
        """Return whether *op* cannot end before *thread* goes on with a call that is suspended there (rule 6)."""
        return self._precedence.would_deadlock(op, thread)

    # -- messages

    def add(self, op: Op) -> None:
        """Add a new operation. For a removal or a link, this determines which saves it waits for (D3)."""
        share = self._lanes.get(op.lane)
        if share is None:
            share = self._lanes[op.lane] = LaneState(op.lane)
        if op.kind is SAVE:
            op.urgent = bool(self._precedence.suspended(op))
            share.waiting[op.id] = op
            self._waiting[op.lane] = share
        elif op.kind is REMOVE:
            self._wait_for_saves(op, share)
            op.failed_before = op.lane.history.last_failure
            share.after_failure += bool(op.failed_before)
            op.lane.history.forget_failures(op.key)
        elif op.kind is LINK:
            save = self._newest_save(op)
            self._barriers.wait_for(op, () if save is None else (save,))
            op.failed_save = op.lane.history.failure(SAVE, op.target or "") if save is None else None
            share.accepted[op.id] = op
            self._barriers.accept(op)
        self._ops[op.id] = op
        share.live[op.id] = op
        self._precedence.add(op)
        if op.kind is REMOVE:
            before = self._precedence.nearest_predecessor(op)
            op.before = 0 if before is None else before.id
        self._recheck(op)

    def _wait_for_saves(self, removal: Op, share: LaneState) -> None:
        """Let *removal* wait for everything accepted before it, except what depends on saves that it interrupted."""
        beneath = [
            other
            for other in self._precedence.suspended(removal)
            if other.id in share.accepted and lies_in(other.key, removal.key)
        ]
        if beneath:
            depends = self._precedence.any_depends
            accepted = share.accepted.values()
            others = [other for other in accepted if not depends((other,), beneath.__contains__)]
            self._barriers.wait_for(removal, others)
        else:
            self._barriers.wait_for_all(removal)

    def preadmit(self, op: Op) -> None:
        """Add a save and admit it, whatever the bounds, as a handler that interrupted it depends on it (rule 6)."""
        self.add(op)
        self._admit(op, self._lanes[op.lane])
        op.phase = STAGING

    def durable(self, op: Op) -> None:
        """End *op*, which has taken effect."""
        history = op.lane.history
        history.succeeded(op.kind, op.key, op.id)
        if op.kind is SAVE:
            history.durable(op.key, op.id)
            self._histories.add(ref(history, self._histories.discard))
        self._end(op)

    def failed(self, op: Op) -> None:
        """End *op*, which has failed: operations that wait for it, and later removals, must not run (D3)."""
        if op.kind in (SAVE, LINK):
            op.lane.history.failed(op.kind, op.key, op.id)
        for other in self._barriers.waiting_for(op):
            other.failed_save = op.id
            self._to_end.add(other.id)
        self._end(op)

    def withdraw(self, op: Op) -> None:
        """End *op* without effect: it was refused or dropped, or its caller was interrupted.

        If it was accepted, or replaced another, this counts as a failure for operations that wait for it.
        """
        if op.phase is WAITING and not self._barriers.is_awaited(op):
            self._end(op)
        else:
            self.failed(op)

    def replaced(self, op: Op, by: Op) -> None:
        """End the queued save *op*; what waited for it now waits for *by*, or for what *by* waits for (rule 4)."""
        if by.kind is REMOVE:
            self._barriers.cancelled(op, by)
        else:
            self._barriers.superseded(op, by)
        self._end(op)
        if by.kind is REMOVE:  # it may also cancel the save before that one
            before = self._precedence.nearest_predecessor(by)
            by.before = 0 if before is None else before.id

    # -- decisions

    def decide(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        """Return the next action, or ``None`` if there is none now.

        Args:
            fits: returns whether there is memory for the waiting save given first; or would be, if the accepted save
                given second ended.

        The caller carries the action out, and calls this again. Until then, it returns the same action.
        """
        decision = self._decision
        if decision is None or not self._is_open(decision):
            decision = self._decision = self._decide(fits)
        return decision

    def _is_open(self, decision: Action) -> bool:
        """Return whether *decision* has not been carried out yet."""
        op = decision.op
        if op.id not in self._ops:
            return False
        if isinstance(decision, Start):
            return op.phase is QUEUED
        return op.phase is WAITING or not isinstance(decision, Admit)

    def _decide(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        if self._staging:
            for op in [op for op in self._staging.values() if op.phase is QUEUED]:
                self._staged(op)
        action: Action | None = None
        if self._to_end:
            action = self._next_ending()
        if action is None and (self._to_start or self._freed):
            action = self._next_start()
        if action is None and self._waiting:
            action = self._next_admission(fits)
        return action

    def _staged(self, op: Op) -> None:
        del self._staging[op.id]
        self._precedence.staged(op)
        self._recheck(op)
        for other in reversed(self._precedence.writes.at(op.key).values()):
            if other is op:
                break
            self._recheck(other)  # a removal may cancel it

    def _next_ending(self) -> Action | None:
        while (number := self._to_end.pop()) is not None:
            op = self._ops.get(number)
            if op is None or op.phase is not QUEUED:
                continue
            if op.failed_save is not None:
                return Drop(op, op.failed_save)
            if op.kind is REMOVE:
                if _is_safe(op):
                    victim = self._replaceable_save(op)
                    if victim is not None:
                        self._to_end.add(number)
                        return Cancel(victim, op)
                elif op.barrier is None:  # no newer checkpoint can become durable first
                    return Drop(op, op.failed_before)
        return None

    def _next_start(self) -> Action | None:
        while (number := self._next_to_try()) is not None:
            op = self._ops.get(number)
            if op is None or op.phase is not QUEUED or op.barrier is not None:
                continue
            if self._precedence.is_blocked(op):
                continue
            if op.kind is REMOVE and not _is_safe(op):
                return Drop(op, op.failed_before)
            if (op.kind is not SAVE and op.group is None) or self._takes_slots(op):
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
        if op.kind is SAVE:
            needed.append(self._lanes[op.lane].slots)
        if op.group is not None:
            needed.append(self._groups.setdefault(op.group, Slots(1)))
        for slots in needed:
            if not slots.admits(op.id):
                slots.wait(op.id)
                if slots.has_room:  # an older one comes first
                    self._freed[slots] = None
                return False
        for slots in needed:
            slots.take(op.id)
        return True

    def _start(self, op: Op) -> None:
        self._precedence.started(op)
        if op.kind is REMOVE:
            for known in self._histories.copy():
                history = known()
                if history is not None:
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
        self, op: Op, lane: Lane, share: LaneState, fits: Callable[[Op, Op | None], bool]
    ) -> Action | None:
        room = share.accepted_saves < lane.queue_depth
        if op.urgent or (room and fits(op, None)):
            self._admit(op, share)
            return Admit(op)
        if lane.overflow == "raise":
            return Refuse(op, "memory" if room else "queue")
        # Not if it would still have to wait: it could wait for memory of a save behind a removal, and that removal,
        # which would inherit the wait for it, would deadlock.
        if lane.overflow == "supersede" and share.accepted_saves <= lane.queue_depth:
            victim = self._replaceable_save(op)
            if victim is not None and fits(op, victim):
                return Supersede(victim, op)
        return None

    def _admit(self, op: Op, share: LaneState) -> None:
        self._no_longer_waits(op, share)
        share.accepted[op.id] = op
        share.accepted_saves += 1
        self._staging[op.id] = op
        self._barriers.accept(op)

    # -- replacing

    def _newest_save(self, link: Op) -> Op | None:
        """Return the newest accepted save of the target of *link*, in its lane and not beneath it (rule 6)."""
        for op in reversed(self._precedence.writes.at(link.target or "").values()):
            if op.lane is link.lane and _is_accepted_save(op) and not is_suspended_beneath(op, link):
                return op
        return None

    def _replaceable_save(self, by: Op) -> Op | None:
        """Return a save that has not started and that *by* can replace, if no other operation depends on it."""
        # An operation between the two, such as a load or a removal, depends on the save.
        op = self._ops.get(by.before) if by.kind is REMOVE else self._precedence.nearest_predecessor(by)
        if op is None or op.kind is not SAVE or op.phase is not QUEUED or op.key != by.key:
            return None
        if op.place != by.place:
            return None  # probably the same location, but reached with other options
        if by.kind is SAVE and op.lane is not by.lane:
            return None  # its removals do not wait for our saves, nor is its memory ours
        if by.kind is REMOVE and self._barriers.has_link_waiting_for(op):
            return None
        return None if self._would_make_cycle(op, by) else op

    def _would_make_cycle(self, op: Op, by: Op) -> bool:
        """Return whether an operation that inherits the waits of *op* would then wait for itself."""
        depends = self._precedence.any_depends
        return any(depends(more, is_heir) for is_heir, more in self._barriers.would_gain(op, by))

    # -- bookkeeping

    def _recheck(self, op: Op) -> None:
        """List *op* to be checked by the next decisions."""
        if op.phase is QUEUED:
            if op.kind is REMOVE or op.kind is LINK:
                self._to_end.add(op.id)
            if op.barrier is None:  # otherwise, this is called again once it is gone
                self._to_start.add(op.id)

    def _end(self, op: Op) -> None:
        share = self._lanes[op.lane]
        del self._ops[op.id], share.live[op.id]
        if op.kind is REMOVE:
            share.after_failure -= bool(op.failed_before)
        elif op.kind is not LOAD:
            self._no_longer_waits(op, share)
            if share.accepted.pop(op.id, None) is not None:
                share.accepted_saves -= op.kind is SAVE
            self._staging.pop(op.id, None)
        self._precedence.discard(op)
        self._release_slots(op, share)
        self._barriers.leave(op)
        for other in self._barriers.ended(op):
            self._recheck(other)
        for other in self._precedence.successors(op):
            self._recheck(other)
        if not share.after_failure:
            op.lane.history.forget_before(next(iter(share.live), op.id + 1))
        if not share.live:
            del self._lanes[op.lane]

    def _no_longer_waits(self, op: Op, share: LaneState) -> None:
        if share.waiting.pop(op.id, None) is not None and not share.waiting:
            del self._waiting[op.lane]

    def _release_slots(self, op: Op, share: LaneState) -> None:
        if op.kind is SAVE:
            share.slots.release(op.id)
            if share.slots.has_room:
                self._freed[share.slots] = None
        if op.group is not None and op.group in self._groups:
            slots = self._groups[op.group]
            slots.release(op.id)
            if slots.is_used:
                self._freed[slots] = None
            else:
                del self._groups[op.group]


def _is_accepted_save(op: Op) -> bool:
    return op.kind is SAVE and op.phase is not WAITING


def _is_safe(removal: Op) -> bool:
    """Return whether another checkpoint is durable that is newer than what had failed when *removal* came (D3)."""
    return removal.lane.history.has_newer_checkpoint(removal.failed_before, without=removal.key)
