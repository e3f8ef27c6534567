"""A complete file takes its name on a local, or mounted, file system.

Guarantees: where the file system replaces a file, that is one step. Where it does not, the earlier file is put aside,
and back if the new one does not get in (D2); a process that dies right between the two leaves it, whole, as
``NAME.previous-…``, until the next one calls ``settle_aside``.

What does not belong here: making the file, and syncing.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import aside_of, name_aside

__all__ = ["move_in", "settle_aside"]

_log = logging.getLogger("async_ckpt.stores.local")

_ATTEMPTS = 10  # of two processes that replace one file again and again
# How a file is kept from another's place, though it may go to a free one.
_KEEPS_OTHERS_OUT = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
)


def move_in(
    disk: Disk, source: str, target: str, *, landed: Callable[[], bool], replaces: bool = True
) -> None:
    """Give the file *source* the name *target*; return once it has it.

    Args:
        disk: the system calls.
        source: a complete file.
        target: its name; if something is there, a file or a link, that is replaced.
        landed: tells whether the file has the name, as the answer alone may be lost (E3).
        replaces: whether the file system is known, or believed, to replace a file.

    Raises:
        OSError: it does not have the name; what was there before has, or the message says where it is.
    """
    try:
        disk.replace(source, target)
    except OSError as error:
        if landed():
            return
        if (replaces and error.errno not in _KEEPS_OTHERS_OUT) or not os.path.lexists(target):
            raise
        _move_with_earlier_aside(disk, source, target, landed, error)


def _move_with_earlier_aside(
    disk: Disk, source: str, target: str, landed: Callable[[], bool], refused: OSError
) -> None:
    directory, name = os.path.split(target)
    for _ in range(_ATTEMPTS):
        aside = os.path.join(directory, name_aside(name))
        try:
            disk.replace(target, aside)
        except OSError as error:
            if error.errno != errno.ENOENT and not os.path.lexists(aside):
                raise refused from error  # else it is aside already, by us or another process
        try:
            disk.replace(source, target)
        except OSError as error:
            if not landed():
                if os.path.lexists(target):  # another process was faster: now its file is the earlier one
                    _forget(disk, aside, target)
                    continue
                _put_back(disk, aside, target, error)
                raise
        _forget(disk, aside, target)
        return
    raise refused


def _forget(disk: Disk, aside: str, target: str) -> None:
    try:
        disk.unlink(aside)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s, which %s has replaced, cannot be removed: %s", aside, target, error)


def _put_back(disk: Disk, aside: str, target: str, error: OSError) -> None:
    try:
        disk.replace(aside, target)
    except OSError as second:
        if not os.path.lexists(target) and os.path.lexists(aside):
            text = f"{error.strerror}; the earlier file is whole, at {aside!r}, as it cannot be put back: {second}"
            raise OSError(error.errno, text) from error


def settle_aside(disk: Disk, path: str) -> None:
    """Do what a dead process has not come to: give the file at *path* its name back, or remove it if that is taken.

    Raises:
        OSError: that could not be done.
    """
    directory, name = os.path.split(path)
    original = aside_of(name)
    assert original is not None, name
    target = os.path.join(directory, original)
    if os.path.lexists(target):
        disk.unlink(path)
    else:
        disk.replace(path, target)
