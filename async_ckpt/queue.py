"""The write-behind queue: who may come in, who may start, who is not needed any more.

It decides and does nothing else: no thread, no clock, no storage, no awaiting. ``decide`` looks at plain
records and returns one action; the service carries it out and tells the queue what came of it.

Rules:

1. Saves are admitted first come, first served, while fewer than ``queue_depth`` are accepted and their
   memory fits (B1).
2. Operations on one location take effect in the order in which they came, whichever service they came
   through; loads with no other operation between them run side by side. Different locations do not wait for
   each other (O1, O2).
3. A removal cancels a queued save of its location (O3). It runs once every save accepted before it in its
   service is durable, and is dropped when one of them fails (D3), or had failed already and no newer
   checkpoint, but the one to be removed, is durable by then.
4. Where a queued save is cancelled or superseded, removals that waited for it wait for what its replacer
   waits for. So the last good checkpoint outlives any sequence of the above. A save supersedes only one of
   its own service, and only where that lets it in: nothing that is accepted ever waits for what is not (D4).
5. A link to a location, which makes it known by a second name, runs once the newest save of that location is
   durable, and is dropped when it fails. Removals that come later wait for it as for a save (D3), so what the
   second name has stood for until then is not deleted beneath it.
6. An operation never waits for one that is suspended beneath it on its own thread: a signal handler that
   interrupted ``save`` may save, wait and load (L1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from async_ckpt.options import Overflow

__all__ = [
    "Action",
    "Admit",
    "Cancel",
    "Drop",
    "Kind",
    "Lane",
    "Op",
    "Phase",
    "Queue",
    "Refuse",
    "Start",
    "Supersede",
]


class Kind(Enum):
    """What is asked for."""

    SAVE = "save"
    LINK = "link"
    REMOVE = "remove"
    LOAD = "load"


class Phase(Enum):
    """How far a live operation is. One that has ended is no longer in the queue."""

    WAITING = "waiting"  # a save that is not admitted; its caller is blocked
    STAGING = "staging"  # admitted; its caller is taking the snapshot
    QUEUED = "queued"
    RUNNING = "running"


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One service's share of the queue.

    Attributes:
        lost: per location, the save, and the link, that failed there last, until one of its kind takes effect or the
            location is removed.
        newest: id and location of the newest save that is durable and not removed.
    """

    queue_depth: int
    max_concurrent_saves: int
    overflow: Overflow
    lost: dict[tuple[Kind, str], int] = field(default_factory=dict)
    newest: tuple[int, str] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Op:
    """One operation.

    Attributes:
        id: rises in order of arrival; given by whoever adds the operation, as it does so.
        key: of the location.
        group: operations with the same group never run at the same time; ``None`` has no such bound.
        nbytes: host bytes that a save's snapshot needs.
        thread: the caller's thread.
        urgent: admitted whatever the bounds: its caller interrupted another save on the same thread,
            whose memory and place cannot come free before the caller returns. The queue finds out.
        target: for a link, the key of the location that it leads to.
        after: for a removal and a link, the saves that must be durable first; for a removal, the links too.
        failed_save: one of those that did not become durable.
        missing: for a removal, the last save or link that had failed when it came; 0 where none had.
    """

    id: int
    lane: Lane
    kind: Kind
    key: str
    phase: Phase
    thread: int
    group: str | None = None
    nbytes: int = 0
    urgent: bool = False
    target: str | None = None
    after: set[int] = field(default_factory=set)
    failed_save: int | None = None
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the save its place and its memory."""

    op: Op


@dataclass(frozen=True, slots=True)
class Refuse:
    """There is no room of the kind named, and the lane does not wait."""

    op: Op
    lacking: Literal["queue", "memory"]


@dataclass(frozen=True, slots=True)
class Supersede:
    """End the queued save *op*; *by* takes its place, and is admitted next."""

    op: Op
    by: Op


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the queued save *op*; the removal *by* makes it pointless."""

    op: Op
    by: Op


@dataclass(frozen=True, slots=True)
class Drop:
    """End the removal or link *op* without effect: the save *failed_save* failed."""

    op: Op
    failed_save: int


@dataclass(frozen=True, slots=True)
class Start:
    """Let the operation run."""

    op: Op


Action: TypeAlias = Admit | Refuse | Supersede | Cancel | Drop | Start


class Queue:
    """The live operations of all services of the process, in order of arrival."""

    def __init__(self) -> None:
        self._ops: dict[int, Op] = {}

    def __len__(self) -> int:
        return len(self._ops)

    def live(self, lane: Lane) -> Iterator[Op]:
        """Yield the operations of *lane* that have not ended, oldest first."""
        return (op for op in self._ops.values() if op.lane is lane)

    def add(self, op: Op) -> None:
        """Take in a new operation. A removal or a link learns here which saves it has to wait for (D3)."""
        if op.kind is Kind.SAVE:
            op.urgent = any(
                other.kind is Kind.SAVE and _suspended_beneath(other, op) for other in self._ops.values()
            )
        if op.kind is Kind.REMOVE:
            op.after = {
                other.id
                for other in self.live(op.lane)
                if (_is_accepted_save(other) or other.kind is Kind.LINK) and not _suspended_beneath(other, op)
            }
            op.missing = max(op.lane.lost.values(), default=0)
            for kind in (Kind.SAVE, Kind.LINK):
                op.lane.lost.pop((kind, op.key), None)  # the program counts on that one no longer
        if op.kind is Kind.LINK:
            saves = [
                other.id
                for other in self.live(op.lane)
                if _is_accepted_save(other) and other.key == op.target
            ]
            op.after = set(saves[-1:])
            op.failed_save = None if saves else op.lane.lost.get((Kind.SAVE, op.target or ""))
        self._ops[op.id] = op

    def durable(self, op: Op) -> None:
        """The operation has taken effect."""
        self._end(op)
        lane = op.lane
        if lane.lost.get((op.kind, op.key), op.id) < op.id:
            del lane.lost[op.kind, op.key]
        if op.kind is Kind.SAVE:
            lane.newest = max(lane.newest or (0, ""), (op.id, op.key))
        elif op.kind is Kind.REMOVE and lane.newest is not None and lane.newest[1] == op.key:
            lane.newest = None
        for other in self._waiting_for(op):
            other.after.discard(op.id)

    def failed(self, op: Op) -> None:
        """The operation has failed: what waits for it, and removals that come later, must not run (D3)."""
        self._end(op)
        if op.kind in (Kind.SAVE, Kind.LINK):
            op.lane.lost[op.kind, op.key] = op.id
        for other in self._waiting_for(op):
            other.failed_save = op.id

    def withdraw(self, op: Op) -> None:
        """The operation came to nothing: refused, dropped, or its caller was interrupted.

        Where it was accepted, what waits for it fares as after a failure.
        """
        if op.phase is Phase.WAITING:
            self._end(op)
        else:
            self.failed(op)

    def replaced(self, op: Op, by: Op) -> None:
        """The queued save *op* ended in favour of *by*: what waited for it waits for what *by* stands for (rule 4)."""
        self._end(op)
        heirs = _stands_for(by) - {op.id}
        for other in self._waiting_for(op):
            other.after = (other.after | heirs) - {op.id}

    def decide(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        """Return the next thing to do, or ``None`` if nothing can be done now.

        Args:
            fits: tells whether the memory for the waiting save given first can be had now, or could be if the
                accepted save given second ended.

        The action is not carried out here; ask again once it has been.
        """
        return self._next_ending() or self._next_start() or self._next_admission(fits)

    def _next_ending(self) -> Action | None:
        for op in self._ops.values():
            if op.phase is Phase.QUEUED and op.failed_save is not None:
                return Drop(op, op.failed_save)
            if op.kind is Kind.REMOVE and op.phase is Phase.QUEUED:
                if _is_made_up_for(op):
                    victim = self._replaceable_save(op)
                    if victim is not None:
                        return Cancel(victim, op)
                elif not any(other in self._ops for other in op.after):  # nothing may yet make up for it
                    return Drop(op, op.missing)
        return None

    def _next_start(self) -> Action | None:
        for op in self._ops.values():
            if op.phase is Phase.QUEUED and self._may_start(op):
                return Start(op)
        return None

    def _next_admission(self, fits: Callable[[Op, Op | None], bool]) -> Action | None:
        blocked: list[Lane] = []
        for op in self._ops.values():
            if op.phase is not Phase.WAITING or (op.lane in blocked and not op.urgent):
                continue
            accepted = sum(1 for other in self.live(op.lane) if _is_accepted_save(other))
            room = accepted < op.lane.queue_depth
            if op.urgent or (room and fits(op, None)):
                return Admit(op)
            if op.lane.overflow == "raise":
                return Refuse(op, "memory" if room else "queue")
            victim = self._replaceable_save(op) if op.lane.overflow == "supersede" else None
            # Not for one that would still have to wait: it may wait for memory that a save behind a removal
            # holds, and that removal would inherit the wait for it, and wait for ever.
            if victim is not None and accepted <= op.lane.queue_depth and fits(op, victim):
                return Supersede(victim, op)
            blocked.append(op.lane)
        return None

    def _may_start(self, op: Op) -> bool:
        if self._predecessors(op) or self._location_is_busy(op) or self._group_is_busy(op):
            return False
        if any(other in self._ops for other in op.after):
            return False
        if op.kind is Kind.SAVE:
            running = sum(
                1 for other in self.live(op.lane) if other.kind is Kind.SAVE and other.phase is Phase.RUNNING
            )
            return running < op.lane.max_concurrent_saves
        return True

    def _location_is_busy(self, op: Op) -> bool:
        """Tell whether a *later* operation of the location runs: one that had to pass *op* by (rule 6)."""
        return any(
            other.phase is Phase.RUNNING and _must_not_meet(other, op) and not _suspended_beneath(other, op)
            for other in self._ops.values()
        )

    def _group_is_busy(self, op: Op) -> bool:
        return op.group is not None and any(
            other.phase is Phase.RUNNING and other.group == op.group for other in self._ops.values()
        )

    def _predecessors(self, op: Op) -> list[Op]:
        """Return the earlier operations of the same location that *op* has to let go first (O1).

        Not those that wait for admission: their callers have nothing after them yet, and two services whose
        accepted saves waited for each other's unaccepted ones would wait for ever.
        """
        return [
            other
            for other in self._ops.values()
            if other.id < op.id
            and _must_not_meet(other, op)
            and other.phase is not Phase.WAITING
            and not _suspended_beneath(other, op)
        ]

    def _replaceable_save(self, by: Op) -> Op | None:
        """Return a save that has not started and that *by* makes needless, if ending it harms nobody."""
        for op in self._ops.values():
            if by.kind is Kind.SAVE and op.lane is not by.lane:
                continue  # its removals do not wait for our saves, nor is its memory ours
            if op.kind is Kind.SAVE and op.phase is Phase.QUEUED and op.key == by.key and op.id < by.id:
                if any(op.id < other.id < by.id for other in self._predecessors(by)):
                    continue  # somebody between the two counts on it: a load, a removal
                if by.kind is Kind.REMOVE and any(w.kind is Kind.LINK for w in self._waiting_for(op)):
                    continue  # a link leads to it
                if not self._would_deadlock(op, by):
                    return op
        return None

    def _would_deadlock(self, op: Op, by: Op) -> bool:
        """Tell whether what inherits from *op* would wait for a save that itself waits for the heir."""
        heirs = [self._ops[i] for i in _stands_for(by) if i in self._ops]
        return any(self._depends(heir, waiter) for waiter in self._waiting_for(op) for heir in heirs)

    def _depends(self, op: Op, on: Op) -> bool:
        seen: set[int] = set()
        stack = [op]
        while stack:
            current = stack.pop()
            if current.id in seen:
                continue
            seen.add(current.id)
            if current is on:
                return True
            stack += self._predecessors(current)
            stack += [self._ops[i] for i in current.after if i in self._ops]
        return False

    def _waiting_for(self, other: Op) -> list[Op]:
        return [op for op in self._ops.values() if other.id in op.after]

    def _end(self, op: Op) -> None:
        del self._ops[op.id]


def _is_accepted_save(op: Op) -> bool:
    return op.kind is Kind.SAVE and op.phase is not Phase.WAITING


def _must_not_meet(one: Op, other: Op) -> bool:
    """Tell whether the two are of one location and not both loads (rule 2)."""
    return one.key == other.key and (one.kind is not Kind.LOAD or other.kind is not Kind.LOAD)


def _stands_for(by: Op) -> set[int]:
    return by.after if by.kind is Kind.REMOVE else {by.id}


def _suspended_beneath(other: Op, op: Op) -> bool:
    """Tell whether *other*'s caller cannot go on before *op*'s caller has returned (rule 6)."""
    return other.thread == op.thread and (
        other.phase in (Phase.WAITING, Phase.STAGING) or (other.kind is Kind.LOAD and other is not op)
    )


def _is_made_up_for(removal: Op) -> bool:
    """Tell whether another checkpoint is durable that is newer than what had failed when *removal* came (D3)."""
    newest_id, newest_key = removal.lane.newest or (0, "")
    return removal.missing <= (newest_id if newest_key != removal.key else 0)
