"""The records of the queue: an operation, the share of a service, and what may be decided about them.

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


# The members by their own names: before Python 3.12, finding one in its class takes longer than comparing it.
SAVE, LINK, REMOVE, LOAD = Kind
WAITING, STAGING, QUEUED, RUNNING = Phase


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One service's share of the queue.

    Attributes:
        history: what its saves came to.
    """

    queue_depth: int
    max_concurrent_saves: int
    overflow: Overflow
    history: History = field(default_factory=History)


@dataclass(slots=True, kw_only=True, eq=False)
class Op:
    """One operation.

    Attributes:
        id: rises in order of arrival; given by whoever adds the operation, as it does so.
        key: of the location. One that begins with another and a slash lies in that one.
        through: for a load, the keys of the links that it passes on its way to the location.
        group: operations with the same group never run at the same time; ``None`` has no such bound.
        place: names the file system, with all its options, where one location may be reached by several.
        nbytes: host bytes that a save's snapshot needs.
        thread: the caller's thread.
        urgent: admitted whatever the bounds: its caller interrupted another save on the same thread,
            whose memory and place cannot come free before the caller returns. The queue finds out.
        overtaken_by: what interrupted it on its thread at a related location, and so comes first; the queue's own.
        target: for a link, the key of the location that it leads to.
        before: for a removal, the last of what had to come first when it came, 0 where nothing had to; the queue's own.
        barrier: for a removal and a link, what must be durable first, until it is; the queue's own.
        failed_save: one of those that did not become durable.
        failed_before: for a removal, the last save or link that had failed when it came; 0 where none had.
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
        """All locations that it concerns."""
        return (self.key, *self.through)


class Barrier:
    """Stands until everything that is pending here, and at the barriers before it, has ended.

    Attributes:
        lane: of the row that it stands in; ``None`` for one that stands alone.
        pending: operations, by id.
        waiters: who waits here, by id.
        before: the one before it in its row.
        behind: the one behind it.
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
        """Return whether *other* stands behind it in one row, so that who waits there waits for this one, too."""
        return self.lane is not None and self.lane is other.lane and self.position < other.position

    def covers(self, other: Barrier) -> bool:
        """Return whether who waits here waits for all that *other* stands for."""
        return self is other or other.is_before(self)

    def all_pending(self) -> Iterator[Op]:
        """Yield all that it stands for."""
        barrier: Barrier | None = self
        while barrier is not None:
            yield from barrier.pending.values()
            barrier = barrier.before

    def all_waiters(self) -> Iterator[Op]:
        """Yield all who wait for what is pending here."""
        barrier: Barrier | None = self
        while barrier is not None:
            yield from barrier.waiters.values()
            barrier = barrier.behind


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
