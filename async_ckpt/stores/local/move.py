"""Gives a complete file its final name on a local or mounted file system.

Guarantees: one step, if the file system can replace files. Otherwise the earlier file is put aside, and renamed back if
the new one does not get its name (D2); if the process dies between the two steps, the earlier file remains, whole, as
``NAME.previous-…``, until another process calls ``recover_aside``.

What does not belong here: writing the file, and syncing.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import aside_of, name_aside

__all__ = ["move_in", "recover_aside"]

_log = logging.getLogger("async_ckpt.stores.local")

_ATTEMPTS = 10  # of two processes that replace one file again and again
# Errors of file systems that rename files only to free names.
_KEEPS_OTHERS_OUT = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
)


def move_in(
    disk: Disk, source: str, target: str, *, landed: Callable[[], bool], replaces: bool = True
) -> None:
    """Rename *source* to *target*.

    Args:
        disk: the system calls.
        source: a complete file.
        target: the final name; an existing file or link is replaced.
        landed: returns whether the file has the name, as only the answer may have been lost (E3).
        replaces: whether the file system can replace files, as far as known.

    Raises:
        OSError: the file does not have the name; the earlier file has it, or the message says where it is.
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


def recover_aside(disk: Disk, path: str) -> None:
    """Finish for a dead process: rename the file put aside at *path* back, or remove it if its name is taken.

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
