"""The records of the queue: an operation, one service's lane, and the possible decisions.

What does not belong here: deciding (queue).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from async_ckpt.engine.queue.history import History
from async_ckpt.options import Overflow

__all__ = [
    "LINK",
    "LOAD",
    "QUEUED",
    "REMOVE",
    "RUNNING",
    "SAVE",
    "STAGING",
    "WAITING",
    "Action",
    "Admit",
    "Barrier",
    "Cancel",
    "Drop",
    "Kind",
    "Lane",
    "Op",
    "Phase",
    "Refuse",
    "Start",
    "Supersede",
]


class Kind(Enum):
    """The kinds of operation."""

    SAVE = "save"
    LINK = "link"
    REMOVE = "remove"
    LOAD = "load"


class Phase(Enum):
    """The phases of a live operation. One that has ended is no longer in the queue."""

    WAITING = "waiting"  # a save that is not admitted; its caller is blocked
    STAGING = "staging"  # admitted; its caller is taking the snapshot
    QUEUED = "queued"
    RUNNING = "running"


# The members by their own names: before Python 3.12, finding one in its class takes longer than comparing it.
SAVE, LINK, REMOVE, LOAD = Kind
WAITING, STAGING, QUEUED, RUNNING = Phase


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One service's share of the queue.

    Attributes:
        history: how its saves ended.
    """

    queue_depth: int
    max_concurrent_saves: int
    overflow: Overflow
    history: History = field(default_factory=History)


@dataclass(slots=True, kw_only=True, eq=False)
class Op:
    """One operation.

    Attributes:
        id: increases in order of arrival; assigned when the operation is added.
        key: of the location. A key that begins with another one and a slash lies in that one.
        through: for a load, the keys of the links on the path to its location.
        group: operations of the same group never run at the same time; with ``None``, there is no such limit.
        place: identifies the file system with all its options, as several may reach the same location.
        nbytes: host bytes that a save's snapshot needs.
        thread: the caller's thread.
        urgent: whether it is admitted whatever the bounds, because its caller interrupted another save on the same
            thread, which cannot free its memory and its place before the caller returns. Set by the queue.
        overtaken_by: operations at related locations that interrupted it on its thread, and so go first. Set by the
            queue.
        target: for a link, the key of its target.
        before: for a removal, the id of its last predecessor when it arrived, or 0. Set by the queue.
        barrier: for a removal or a link, what still has to become durable first. Set by the queue.
        failed_save: the id of one of those that failed.
        failed_before: for a removal, the id of the last save or link that had failed when it arrived, or 0.
    """

    id: int
    lane: Lane
    kind: Kind
    key: str
    phase: Phase
    thread: int
    through: tuple[str, ...] = ()
    group: str | None = None
    place: str = ""
    nbytes: int = 0
    urgent: bool = False
    overtaken_by: tuple[Op, ...] = ()
    target: str | None = None
    before: int = 0
    barrier: Barrier | None = None
    failed_save: int | None = None
    failed_before: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all locations that it concerns."""
        return (self.key, *self.through)


class Barrier:
    """Holds up its waiters until its pending operations, and those of the barriers before it, have ended.

    Attributes:
        lane: the lane whose chain of barriers it belongs to; ``None`` if it is not in a chain.
        pending: operations that have not ended, by id.
        waiters: operations that wait for them, by id.
        before: the previous barrier of the chain.
        behind: the next barrier of the chain.
    """

    __slots__ = ("before", "behind", "lane", "pending", "position", "waiters")

    def __init__(self, lane: Lane | None, pending: dict[int, Op], before: Barrier | None = None) -> None:
        self.lane = lane
        self.pending = pending
        self.waiters: dict[int, Op] = {}
        self.before = before
        self.behind: Barrier | None = None
        self.position = 0
        if before is not None:
            before.behind = self
            self.position = before.position + 1

    def is_before(self, other: Barrier) -> bool:
        """Return whether *other* is behind it in the same chain, so that its waiters wait for this one, too."""
        return self.lane is not None and self.lane is other.lane and self.position < other.position

    def covers(self, other: Barrier) -> bool:
        """Return whether waiters of this one wait for everything that waiters of *other* wait for."""
        return self is other or other.is_before(self)

    def all_pending(self) -> Iterator[Op]:
        """Yield all operations that its waiters wait for."""
        barrier: Barrier | None = self
        while barrier is not None:
            yield from barrier.pending.values()
            barrier = barrier.before

    def all_waiters(self) -> Iterator[Op]:
        """Yield all operations that wait for what is pending here."""
        barrier: Barrier | None = self
        while barrier is not None:
            yield from barrier.waiters.values()
            barrier = barrier.behind


@dataclass(frozen=True, slots=True)
class Admit:
    """Admit the save: give it its place and its memory."""

    op: Op


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse the save: there is no room, and its lane does not wait."""

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
    """End the removal or link *op* without effect, because the save *failed_save* failed."""

    op: Op
    failed_save: int


@dataclass(frozen=True, slots=True)
class Start:
    """Start the operation."""

    op: Op


Action: TypeAlias = Admit | Refuse | Supersede | Cancel | Drop | Start
