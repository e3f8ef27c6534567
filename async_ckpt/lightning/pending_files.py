"""Predicts which files will exist once a plugin's pending requests have ended.

Guarantees: a request counts from its call until it has ended, successfully or not; links, pending or on disk, are
followed as ``os.path.exists`` follows them.

What does not belong here: making requests (session).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from async_ckpt.handle import Handle
from async_ckpt.stores import is_local, locate_local
from async_ckpt.stores.base import Location

__all__ = ["PendingFiles"]

_FEW = 64  # up to this many, ended requests are not searched for
_MOST_LINKS = 40  # in a chain; the kernel's own limit


@dataclass(eq=False, slots=True, kw_only=True)
class _PendingFile:
    """The effect of one request on its location. The handle is not kept: its error would keep frames alive.

    Attributes:
        exists: whether the location will exist.
        target: the target, if the location will be a link.
    """

    exists: bool
    target: Location | None
    has_ended: bool = False

    def end(self, _: Handle) -> None:
        """Note that the request has ended."""
        self.has_ended = True


class PendingFiles:
    """The effects of one plugin's requests, by location."""

    def __init__(self) -> None:
        self._by_key: dict[str, _PendingFile] = {}
        self._most = _FEW

    def add(
        self, location: Location, handle: Handle, *, exists: bool, target: Location | None = None
    ) -> None:
        """Add a request; it replaces earlier ones for its *location*."""
        # Not at every call, as there may be thousands. A signal handler may come in between and do the same.
        if len(self._by_key) >= self._most:
            for key, earlier in list(self._by_key.items()):
                if earlier.has_ended:
                    self._by_key.pop(key, None)
            self._most = 2 * len(self._by_key) + _FEW
        self._by_key[location.key] = pending = _PendingFile(exists=exists, target=target)
        handle.add_done_callback(pending.end)

    def will_exist(self, location: Location, leaves: Callable[[str], bool]) -> bool | None:
        """Return whether *location* will exist; ``None`` if no pending request decides that.

        Args:
            location: the location of the name itself.
            leaves: returns whether the removal of a location's key is about to be requested.
        """
        decided = False
        for _ in range(_MOST_LINKS):
            pending = self._by_key.get(location.key)
            if pending is not None and pending.has_ended:
                pending = None
            if leaves(location.key) or (pending is not None and not pending.exists):
                return False
            target = _target_on_disk(location) if pending is None else pending.target
            if target is None:
                if pending is not None:
                    return True
                return os.path.exists(location.path) if decided else None
            location, decided = target, decided or pending is not None
        return False


def _target_on_disk(location: Location) -> Location | None:
    if not is_local(location) or not os.path.islink(location.path):
        return None
    return locate_local(
        os.path.join(os.path.dirname(location.path), os.readlink(location.path)), follow=False
    )
