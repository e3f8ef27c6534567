"""Events: the state changes of a request, as frozen values, in the order in which they happen.

Every change of state is one event, so an observer sees the whole life of every save::

    accepted → staged → writing → laid out → begun → part written (×n) → committing → durable
                                                                        ↘ failed, superseded, cancelled, abandoned

An observer is called on the service's loop thread, one event at a time: it must not block, and must not call the
service. An exception that it raises is logged and otherwise ignored. Removals have events of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import time
from typing import TypeAlias

__all__ = [
    "Abandoned",
    "Accepted",
    "Begun",
    "Cancelled",
    "Committing",
    "Durable",
    "Event",
    "Failed",
    "LaidOut",
    "Linked",
    "Observer",
    "PartWritten",
    "RemovalDropped",
    "Removed",
    "Staged",
    "Superseded",
    "Swept",
    "Writing",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base class of all events.

    Attributes:
        request_id: identifies the request; rises in order of acceptance.
        url: the location as the caller wrote it, with passwords and signatures hidden.
        time_seconds: seconds since the epoch.
    """

    request_id: int
    url: str
    time_seconds: float = field(default_factory=time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(Event):
    """The save has a place in the queue and *nbytes* host bytes for its snapshot."""

    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(Event):
    """The state may be mutated again; *stall_seconds* is how long ``save`` held its caller."""

    stall_seconds: float


class Writing(Event):
    """A writer has taken the save from the queue."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut(Event):
    """The layout of the file is known: *nbytes* bytes, in *parts* parts."""

    nbytes: int
    parts: int


class Begun(Event):
    """The store has begun the file, under a temporary name."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWritten(Event):
    """The store has written part *index*, which is *nbytes* long."""

    index: int
    nbytes: int


class Committing(Event):
    """Every part is written; the file is about to become visible."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable(Event):
    """The checkpoint survives the loss of this process, *seconds* after ``save`` was called."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The request failed; an earlier file at the location is untouched."""

    error: BaseException


class Superseded(Event):
    """A newer save of the same location replaced this one before it started."""

    __slots__ = ()


class Cancelled(Event):
    """A removal of the same location cancelled this save before it started."""

    __slots__ = ()


class Abandoned(Event):
    """The service was closed, or the caller was interrupted, before the request finished."""

    __slots__ = ()


class Linked(Event):
    """A link to the checkpoint was made; the checkpoint is durable."""

    __slots__ = ()


class Removed(Event):
    """The location is empty now."""

    __slots__ = ()


class RemovalDropped(Event):
    """Nothing was deleted: an earlier save did not become durable (D3), or a base CheckpointIO did not delete."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept(Event):
    """Leftovers of a dead process beside the location were removed: *names*."""

    names: tuple[str, ...]


Observer: TypeAlias = Callable[[Event], object]
"""A callable that takes one event."""
