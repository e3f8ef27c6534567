"""What is under way and what has ended, added up from events for progress bars, metrics and hooks.

Guarantees: it is asked from any thread while the loop thread tells it of events, without a lock; it keeps
a bounded number of ended saves (B2).

What does not belong here: showing it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from async_ckpt.events import (
    Abandoned,
    Accepted,
    Cancelled,
    Durable,
    Event,
    Failed,
    LaidOut,
    PartWritten,
    Staged,
    Superseded,
)

__all__ = ["Meter", "SaveProgress"]

_KEPT = 4096
_ENDS = (Durable, Failed, Superseded, Cancelled, Abandoned)


@dataclass(slots=True, kw_only=True, eq=False)
class SaveProgress:
    """How far one save is.

    Attributes:
        request_id: the number that its events carry.
        url: the location, as events have it.
        nbytes: length of the file; until that is known, and where a base CheckpointIO writes it, of the snapshot.
        written_bytes: how many of them the store has.
        accepted_seconds: when it was accepted, in seconds since the epoch.
        stall_seconds: how long ``save`` held its caller.
        staged_seconds: the part of it for the snapshot's copy; the rest was waiting for room.
        durable_seconds: from the call until it was durable.
        end: the kind of event it ended with; ``None`` while it is pending.
    """

    request_id: int
    url: str
    nbytes: int
    accepted_seconds: float
    written_bytes: int = 0
    stall_seconds: float = 0.0
    staged_seconds: float = 0.0
    durable_seconds: float = 0.0
    end: type[Event] | None = None


class Meter:
    """An observer that knows how far every save is."""

    def __init__(self) -> None:
        self._pending: dict[int, SaveProgress] = {}
        self._ended: deque[SaveProgress] = deque(maxlen=_KEPT)

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, Accepted):
            self._pending[event.request_id] = SaveProgress(
                request_id=event.request_id,
                url=event.url,
                nbytes=event.nbytes,
                accepted_seconds=event.time_seconds,
            )
            return
        save = self._pending.get(event.request_id)
        if save is None:
            return
        match event:
            case Staged():
                save.stall_seconds = event.stall_seconds
                save.staged_seconds = event.time_seconds - save.accepted_seconds
            case LaidOut():
                save.nbytes, save.written_bytes = event.nbytes, 0  # also where the whole file is sent again
            case PartWritten():
                save.written_bytes += event.nbytes
        if isinstance(event, _ENDS):
            if isinstance(event, Durable):
                save.durable_seconds = event.seconds
                save.nbytes = event.nbytes or save.nbytes
            save.end = type(event)  # no more: an error would keep its frames, and what is in them
            self._ended.append(save)  # first, so that it is never in neither
            del self._pending[event.request_id]

    @property
    def pending(self) -> list[SaveProgress]:
        """The accepted saves that have not ended, oldest first; their figures go on changing."""
        return list(self._pending.values())

    def take_ended(self) -> list[SaveProgress]:
        """Return the saves that have ended since this was last asked, in that order."""
        ended = []
        while True:
            try:
                ended.append(self._ended.popleft())
            except IndexError:
                return ended
