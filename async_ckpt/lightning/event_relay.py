"""Passes the events of a session's services to the meter, the observers, and other ranks.

Guarantees: it refers to neither the session nor a service, so it keeps neither alive.

What does not belong here: what an observer does with an event.
"""

from __future__ import annotations

from async_ckpt.events import Event, Observer, PartWritten
from async_ckpt.lightning.dircache import forget_changed
from async_ckpt.lightning.group_pending import pending_of_group
from async_ckpt.telemetry.meter import Meter

__all__ = ["EventRelay"]


class EventRelay:
    """The observer of a session's service.

    Args:
        observer: the user's own, if there is one.

    Attributes:
        observers: the others; anybody may add some.
        meter: the progress of the saves.
        addresses: full addresses by the URL that events have; only where these differ, because of secrets.
    """

    def __init__(self, observer: Observer | None) -> None:
        self.observers: list[Observer] = []
        self._own = observer
        self.reset()

    def reset(self) -> None:
        """Forget the saves so far."""
        self.meter = Meter()
        self.addresses: dict[str, str] = {}

    def address_of(self, url: str) -> str:
        """Return the full address of the location that an event names."""
        return self.addresses.get(url, url)

    def __call__(self, event: Event) -> None:
        """Pass *event* on."""
        # ModelCheckpoint lists files through fsspec, which caches listings.
        forget_changed(event, self.address_of(event.url))
        self.meter(event)
        if isinstance(event, PartWritten) and (group := pending_of_group()) is not None:
            group.beat()
        for observer in (*self.observers, self._own):
            if observer is not None:
                observer(event)
