"""The progress of pending and ended saves, summed up from events, for progress bars, metrics and hooks.

Guarantees: any thread may read it while the loop thread passes events to it, without a lock; the number of ended saves
is bounded (B2).

What does not belong here: displaying it.
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
        request_id: the request's id in events.
        url: the location, as in events.
        nbytes: length of the file; of the snapshot until that is known, or if a base CheckpointIO writes the file.
        written_bytes: how many bytes the store has.
        accepted_seconds: when it was accepted, in seconds since the epoch.
        stall_seconds: how long ``save`` blocked its caller.
        staged_seconds: the part of it that the snapshot's copy took; the rest was waiting for room.
        durable_seconds: the time from the call until it was durable.
        end: the class of its last event; ``None`` while it is pending.
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
    """An observer that keeps the progress of every save."""

    def __init__(self) -> None:
        self._pending: dict[int, SaveProgress] = {}
        self._ended: deque[SaveProgress] = deque(maxlen=_KEPT)

    def __call__(self, event: Event) -> None:
        """Process one event."""
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
                save.nbytes, save.written_bytes = event.nbytes, 0  # even if the whole file is sent again
            case PartWritten():
                save.written_bytes += event.nbytes
        if isinstance(event, _ENDS):
            if isinstance(event, Durable):
                save.durable_seconds = event.seconds
                save.nbytes = event.nbytes or save.nbytes
            save.end = type(
                event
            )  # only the class: an error would keep its frames alive, and the objects in them
            self._ended.append(save)  # first, so that a save is never in neither
            del self._pending[event.request_id]

    @property
    def pending(self) -> list[SaveProgress]:
        """The pending saves, oldest first; their values go on changing."""
        return list(self._pending.values())

    def take_ended(self) -> list[SaveProgress]:
        """Return the saves that have ended since the last call, in that order."""
        ended = []
        while True:
            try:
                ended.append(self._ended.popleft())
            except IndexError:
                return ended
