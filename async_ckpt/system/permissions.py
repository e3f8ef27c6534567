"""Permissions of a local file that replaces another: private at first, then those of the replaced file.

Guarantees: a file that is created here is private until its permissions are set; it is always a new file, never an
existing one or a link that somebody has put there. At no time have more users access than in the end.

What does not belong here: the file's content and name.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress

__all__ = ["REFUSALS", "copy_metadata", "create_private", "default_mode", "inherit_metadata", "set_mode"]

_log = logging.getLogger("async_ckpt.permissions")

REFUSALS = frozenset({errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL})
"""Errors of file systems that do not support changes of the mode."""

_ACCESS_LIST = "system.posix_acl_access"
_FRESH = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def create_private(path: str, *, to_read: bool = True) -> int:
    """Create a new private file; return its descriptor."""
    return os.open(path, _FRESH | (os.O_RDWR if to_read else os.O_WRONLY), 0o600)


def default_mode(path: str) -> int:
    """Return the mode that ``open`` gives to new files, by creating and removing a file at *path*.

    The umask cannot be read without changing it for all threads, and a directory may have a default access list.
    """
    fd = os.open(path, _FRESH | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):  # a sweeper of dead processes' files was faster
            os.unlink(path)


def set_mode(fd: int, mode: int) -> None:
    """Set the file's mode; skip the call if nothing would change, as some file systems refuse it in any case."""
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def copy_metadata(fd: int, path: str, model: os.stat_result) -> None:
    """Copy mode and access list of the file at *path*, and, if possible, its owner, group and attributes."""
    for uid, gid in ((-1, model.st_gid), (model.st_uid, -1)):
        with suppress(OSError):  # not permitted, unknown in this user namespace, not of this file system
            os.fchown(fd, uid, gid)
    access = _access_list(path)
    if access is not None and not _is_at(path, model):
        access = None  # it is that of another file, which somebody has put there since
    if access is not None:
        os.setxattr(
            fd, _ACCESS_LIST, access
        )  # first: of the mode alone, the group would get what the list bounds
    elif _access_list(fd) is not None:
        os.removexattr(fd, _ACCESS_LIST)  # what the directory gives to new files
    set_mode(fd, stat.S_IMODE(model.st_mode))  # after the owner, whose change clears set-id bits
    if _is_at(path, model):
        _copy_attributes(fd, path)


def inherit_metadata(fd: int, path: str, probe: str) -> None:
    """Copy the metadata of the file at *path*, which is to be replaced; if there is none, set that of a new file.

    A new file at *probe* shows the latter. If the file system refuses the change, the file stays private.
    """
    try:
        model = os.lstat(path)
    except FileNotFoundError:
        model = None
    try:
        if model is not None and stat.S_ISREG(model.st_mode):
            copy_metadata(fd, path, model)
        else:
            set_mode(fd, default_mode(probe))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def _copy_attributes(fd: int, path: str) -> None:
    """Copy the user's extended attributes of the file at *path*, as far as possible."""
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith("user."):
                os.setxattr(fd, name, os.getxattr(path, name, follow_symlinks=False))
    except (OSError, AttributeError) as error:  # none on this file system, or no room; none on this system
        _log.debug("the extended attributes of %s cannot be kept: %s", path, error)


def _is_at(path: str, model: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), model)
    except OSError:
        return False


def _access_list(file: int | str) -> bytes | None:
    """Return the POSIX access list in the kernel's format; None if there is only the mode."""
    try:
        return os.getxattr(file, _ACCESS_LIST)
    except (OSError, AttributeError):  # no list, no such thing on this file system; none on this system
        return None
