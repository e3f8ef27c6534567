"""The records of the queue: an operation, the share of a service, and what may be decided about them.

What does not belong here: deciding (queue).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

from async_ckpt.options import Overflow
from async_ckpt.queue.history import History

if TYPE_CHECKING:
    from async_ckpt.queue.barriers import Barrier

__all__ = ["Action", "Admit", "Cancel", "Drop", "Kind", "Lane", "Op", "Phase", "Refuse", "Start", "Supersede"]


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
        passed_by: what interrupted it on its thread, came to a related location, and so comes first; the queue's own.
        target: for a link, the key of the location that it leads to.
        before: for a removal, the last of what had to come first when it came, 0 where nothing had to; the queue's own.
        barrier: for a removal and a link, what must be durable first, until it is; the queue's own.
        failed_save: one of those that did not become durable.
        missing: for a removal, the last save or link that had failed when it came; 0 where none had.
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
    passed_by: tuple[Op, ...] = ()
    target: str | None = None
    before: int = 0
    barrier: Barrier | None = None
    failed_save: int | None = None
    missing: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """All locations that it concerns."""
        return (self.key, *self.through)


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
