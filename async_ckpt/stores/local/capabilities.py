"""The capabilities of a directory: which operations it refuses, found out by trying them with an empty file.

Guarantees: a directory is tried once per process, not once per save; refusals are tried again after a while, as the
directory may have been mounted with other options. The trial leaves nothing, or an empty file where nothing can be
removed.

What does not belong here: how to save with these capabilities (`strategy`).
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

__all__ = ["CAPABILITIES", "UNRESTRICTED", "Capabilities", "CapabilityCache"]

P = ParamSpec("P")

_log = logging.getLogger("async_ckpt.stores.local")

_REMEMBERED_SECONDS = 600.0
_ATTEMPTS = 10  # a sweeper may take a file that nobody has locked, but not for long
# Errors that say nothing about capabilities: no room; the file, directory or mount is gone; a fault of ours.
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
class Capabilities:
    """The operations that a directory refuses, each with the errno of the refusal; 0 if it supports the operation.

    Attributes:
        create: creating a file.
        offset: writing beyond the end of the file.
        rename: renaming a file to a free name.
        replace: renaming a file over another one.
        unlink: removing a file.
    """

    create: int = 0
    offset: int = 0
    rename: int = 0
    replace: int = 0
    unlink: int = 0


UNRESTRICTED = Capabilities()
"""Nothing is refused, as on local disks and most network file systems."""


class CapabilityCache:
    """The known capabilities of directories; thread-safe.

    Args:
        clock: returns a monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[int, int, int], tuple[Capabilities, float]] = {}

    def of(self, directory: str, disk: Disk, *, parent: str | None = None) -> Capabilities:
        """Return the capabilities of *directory*; blocks.

        Args:
            directory: an existing directory.
            disk: the system calls.
            parent: the directory in which we have just made it, and whose capabilities it shares.

        Raises:
            OSError: they cannot be tried, as there is no room, or the directory is gone.
        """
        key = disk.identity(directory)
        capabilities, until = self._known.get(key, (UNRESTRICTED, -1.0))
        if until <= self._clock() and parent is not None:
            capabilities, until = self._known.get(disk.identity(parent), (UNRESTRICTED, -1.0))
            self._known[key] = capabilities, until
        if until <= self._clock():
            capabilities = _tried(directory, disk)
            until = float("inf") if capabilities == UNRESTRICTED else self._clock() + _REMEMBERED_SECONDS
            self._known[key] = capabilities, until
            if capabilities != UNRESTRICTED:
                _log.info("%s refuses: %s", directory, _told(capabilities))
        return capabilities

    def known(self, directory: str, disk: Disk) -> Capabilities:
        """Return the known capabilities of *directory*, without trying them."""
        return self._known.get(disk.identity(directory), (UNRESTRICTED, 0.0))[0]

    def forget(self, directory: str, disk: Disk) -> None:
        """Let the next save try *directory* again: it refused what it did not refuse before."""
        self._known.pop(disk.identity(directory), None)


CAPABILITIES = CapabilityCache()
"""The capabilities that this process has found out."""


def _told(capabilities: Capabilities) -> str:
    refused = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    return ", ".join(f"{name} ({os.strerror(number)})" for name, number in refused.items() if number)


def _tried(directory: str, disk: Disk) -> Capabilities:
    for _ in range(_ATTEMPTS):
        try:
            return _try(directory, disk)
        except FileNotFoundError:
            disk.stat(directory)  # it may be that which is gone
    raise OSError(errno.EBUSY, "what is made there vanishes at once")


def _try(directory: str, disk: Disk) -> Capabilities:
    first, second = (os.path.join(directory, temporary_name()) for _ in range(2))
    unlink = 0
    try:
        try:
            fd = disk.create(first)
        except OSError as error:
            if error.errno not in _NO_NEW_FILES:
                raise
            return Capabilities(create=error.errno)
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
    return Capabilities(offset=offset, rename=rename, replace=replace, unlink=unlink)


def _write_ahead(disk: Disk, fd: int) -> None:
    """Write beyond the end of the file, and close it: some file systems refuse only then."""
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
    """Return the errno with which a call is refused, 0 if it is not."""
    try:
        function(*args, **kwargs)
    except OSError as error:
        if error.errno is None or error.errno in _NO_REFUSALS:
            raise
        return error.errno
    return 0
