"""Refuses to re-create a directory that was removed between a save's request and its turn.

Somebody has removed such a directory, for example a temporary one after its use; files in a re-created one would fill
the disk unnoticed. Directories that this process removed itself, on request or after a failed save, do not count: a
save that is accepted after a removal comes after it (O1).

What does not belong here: directories that did not exist at the request; those are created.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location

__all__ = ["refuse_removed_directory", "removing", "with_directory_seen"]

_MOST = 4096  # entries; a save waits for far fewer removals

_removed: dict[str, float] = {}
"""By path, when this process last finished removing it; infinite while it is removing it. Newest last."""


@contextmanager
def removing(path: str) -> Iterator[None]:
    """Note that this process removes the directory *path* in the body.

    A directory that is seen meanwhile is about to be removed.
    """
    _note(path, math.inf)  # first: another save may look at any moment
    try:
        yield
    finally:
        _note(path, monotonic())


def _note(path: str, seconds: float) -> None:
    _removed.pop(path, None)
    _removed[path] = seconds
    while len(_removed) > _MOST:
        _removed.pop(next(iter(_removed)), None)


def with_directory_seen(location: Location) -> Location:
    """Return the local *location* of a save that was just requested, noting when its directory was seen to exist."""
    if location.in_directory or os.path.isdir(os.path.dirname(location.path)):
        return replace(location, seen_seconds=monotonic())
    return location


def refuse_removed_directory(location: Location) -> None:
    """Refuse a save into a directory that was removed since the request.

    Args:
        location: the location, with ``seen_seconds``.

    Raises:
        StoreError: the directory existed, is gone, and was not removed by this process.
    """
    directory = os.path.dirname(location.path)
    if location.seen_seconds is None or os.path.isdir(directory):
        return
    at = directory
    while True:
        if _removed.get(at, -1.0) >= location.seen_seconds:
            return
        if os.path.dirname(at) == at:
            break
        at = os.path.dirname(at)
    error = OSError(errno.ENOENT, "the directory has been removed since the save was asked for")
    raise StoreError.during(
        "begin",
        location.url,
        error,
        "It is not created again; wait for a save before you remove its directory.",
    )
