"""What happened to a request, as frozen values, in the order in which it happened.

Each change of state is one event, so an observer sees the whole life of every save::

    accepted → staged → writing → laid out → begun → part written (×n) → committing → durable
                                                                        ↘ failed, superseded, cancelled, abandoned

An observer is called on the service's loop thread, one event at a time: it must not block, and must
not call the service. What it raises is logged and goes no further. A removal has events of its own.
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
    """The base of every event.

    Attributes:
        request_id: the same for all events of one request, rising in order of acceptance.
        url: the location as the caller wrote it, but with its passwords and signatures hidden.
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
    """The exact bytes of the file are known: *nbytes* of them, in *parts* parts."""

    nbytes: int
    parts: int


class Begun(Event):
    """The store has begun the file, under a name of its own."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWritten(Event):
    """The store has part *index*, *nbytes* long."""

    index: int
    nbytes: int


class Committing(Event):
    """Every part is written; the file is about to become visible."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable(Event):
    """The checkpoint survives the loss of this process; *seconds* since ``save`` was called."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The request failed; what was there before is there still."""

    error: BaseException


class Superseded(Event):
    """A newer save of the same location took its place before it had started."""

    __slots__ = ()


class Cancelled(Event):
    """A removal of the same location came before it had started."""

    __slots__ = ()


class Abandoned(Event):
    """The service was closed, or its caller interrupted, before it could finish."""

    __slots__ = ()


class Linked(Event):
    """A second name leads to the checkpoint, which is durable."""

    __slots__ = ()


class Removed(Event):
    """Nothing is at the location any more."""

    __slots__ = ()


class RemovalDropped(Event):
    """Nothing was deleted: a save before it did not become durable (D3), or a base CheckpointIO did not do it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept(Event):
    """What a process that has died left beside the location was removed: *names*."""

    names: tuple[str, ...]


Observer: TypeAlias = Callable[[Event], object]
"""Anything that can be called with one event."""
