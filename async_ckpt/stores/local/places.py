"""What a directory lets be done with files: learnt by trying it with an empty one, before the first byte of any.

Guarantees: a directory is tried once in a process, not once a save; what it refused is asked again after a while, since
somebody may have mounted it anew. Nothing is left of the trial, but where nothing can be removed: there an empty file.

What does not belong here: what follows from it for a save (`ways`).
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import ParamSpec

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name

__all__ = ["PLACES", "PLAIN", "Place", "Places"]

P = ParamSpec("P")

_log = logging.getLogger("async_ckpt.stores.local")

_REMEMBERED_SECONDS = 600.0
_ATTEMPTS = 10  # a sweeper may take a file that nobody has locked, but not for long
# What says nothing about the place: there is no room, the file, the directory or the mount is gone, we are at fault.
_NO_REFUSALS = frozenset(
    {
        errno.EBADF,
        errno.EDQUOT,
        errno.EINTR,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENOENT,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.ENOTDIR,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_NO_NEW_FILES = frozenset(
    {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a directory refuses, each thing by the number that it answers; 0 is what it does.

    Attributes:
        create: making a file.
        offset: writing anywhere but at the end of the file.
        rename: giving a file a name that is free.
        replace: giving it the name of another file.
        unlink: removing a file.
    """

    create: int = 0
    offset: int = 0
    rename: int = 0
    replace: int = 0
    unlink: int = 0


PLAIN = Place()
"""Nothing is refused: any local disk, and most networks'."""


class Places:
    """What is known of directories; threads may share it.

    Args:
        clock: tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[int, int, int], tuple[Place, float]] = {}

    def of(self, directory: str, disk: Disk, *, parent: str | None = None) -> Place:
        """Return what *directory* refuses; blocks.

        Args:
            directory: one that is there.
            disk: the system calls.
            parent: where we have just made it; what is known of that holds for it.

        Raises:
            OSError: it cannot be tried, as there is no room, or it is gone.
        """
        key = disk.identity(directory)
        place, until = self._known.get(key, (PLAIN, -1.0))
        if until <= self._clock() and parent is not None:
            place, until = self._known.get(disk.identity(parent), (PLAIN, -1.0))
            self._known[key] = place, until
        if until <= self._clock():
            place = _tried(directory, disk)
            until = float("inf") if place == PLAIN else self._clock() + _REMEMBERED_SECONDS
            self._known[key] = place, until
            if place != PLAIN:
                _log.info("%s refuses: %s", directory, _told(place))
        return place

    def known(self, directory: str, disk: Disk) -> Place:
        """Return what is known of *directory* to be refused, without trying it."""
        return self._known.get(disk.identity(directory), (PLAIN, 0.0))[0]

    def forget(self, directory: str, disk: Disk) -> None:
        """Let the next save try *directory* again: it has refused what it did before."""
        self._known.pop(disk.identity(directory), None)


PLACES = Places()
"""What this process knows."""


def _told(place: Place) -> str:
    refused = {field.name: getattr(place, field.name) for field in fields(place)}
    return ", ".join(f"{name} ({os.strerror(number)})" for name, number in refused.items() if number)


def _tried(directory: str, disk: Disk) -> Place:
    for _ in range(_ATTEMPTS):
        try:
            return _try(directory, disk)
        except FileNotFoundError:
            disk.stat(directory)  # it may be that which is gone
    raise OSError(errno.EBUSY, "what is made there vanishes at once")


def _try(directory: str, disk: Disk) -> Place:
    first, second = (os.path.join(directory, temporary_name()) for _ in range(2))
    unlink = 0
    try:
        try:
            fd = disk.create(first)
        except OSError as error:
            if error.errno not in _NO_NEW_FILES:
                raise
            return Place(create=error.errno)
        offset = _refusal(_write_ahead, disk, fd)
        if offset and not (unlink := _refusal(_remove, disk, first)):  # that may have spoilt the file
            disk.close(disk.create(first))
        replace = rename = _refusal(disk.replace, first, second)
        if not rename:
            disk.close(disk.create(first))
            replace = _refusal(disk.replace, first, second)
    finally:
        for name in (first, second):
            unlink = _refusal(_remove, disk, name) or unlink
    return Place(offset=offset, rename=rename, replace=replace, unlink=unlink)


def _write_ahead(disk: Disk, fd: int) -> None:
    """Write where the file has not come to yet, and close it: some places tell of it only then."""
    try:
        disk.write(fd, [memoryview(b"\0")], 1)
    except BaseException:
        with suppress(OSError):
            disk.close(fd)
        raise
    disk.close(fd)


def _remove(disk: Disk, path: str) -> None:
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return
    except OSError:
        with suppress(OSError):
            disk.truncate(path)
        raise


def _refusal(function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> int:
    """Return the number with which the place refuses a call, 0 if it does not."""
    try:
        function(*args, **kwargs)
    except OSError as error:
        if error.errno is None or error.errno in _NO_REFUSALS:
            raise
        return error.errno
    return 0
