"""Who may read a local file that takes another's place: nobody else before it does, and then who was able to before.

Guarantees: a file that is made here is its owner's alone until its permissions are asked for; it is a new one, never
what somebody has put in its place, a link least of all. Nothing is shared with more users on the way than in the end.

What does not belong here: what is in the file, and its name.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress

__all__ = ["REFUSALS", "create_private", "mode_of_new", "take_after", "take_mode", "take_place_of"]

_log = logging.getLogger("async_ckpt.permissions")

REFUSALS = frozenset({errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL})
"""What a file system says to a change of mode that it does not make for anybody."""

_ACCESS_LIST = "system.posix_acl_access"
_FRESH = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def create_private(path: str, *, to_read: bool = True) -> int:
    """Create a file that is not there yet, for its owner alone; return its descriptor."""
    return os.open(path, _FRESH | (os.O_RDWR if to_read else os.O_WRONLY), 0o600)


def mode_of_new(path: str) -> int:
    """Return the mode that ``open`` would give to a new file, here and now, by making one at *path* and removing it.

    The umask cannot be read without changing it for all threads, and a directory may have an access list of its own.
    """
    fd = os.open(path, _FRESH | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):  # a sweeper of dead processes' files was faster
            os.unlink(path)


def take_mode(fd: int, mode: int) -> None:
    """Give the file this mode; some file systems refuse whatever call there is, so make none that changes nothing."""
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def take_after(fd: int, path: str, model: os.stat_result) -> None:
    """Give the file what the one at *path* has: mode and access list; owner, group, own attributes where possible."""
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
    take_mode(fd, stat.S_IMODE(model.st_mode))  # after the owner, whose change clears set-id bits
    if _is_at(path, model):
        _take_attributes(fd, path)


def take_place_of(fd: int, path: str, probe: str) -> None:
    """Give the file what the one at *path* has, which it is to replace; else what a new file has, as *probe* shows.

    Where the file system refuses that, the file stays its owner's alone.
    """
    try:
        model = os.lstat(path)
    except FileNotFoundError:
        model = None
    try:
        if model is not None and stat.S_ISREG(model.st_mode):
            take_after(fd, path, model)
        else:
            take_mode(fd, mode_of_new(probe))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def _take_attributes(fd: int, path: str) -> None:
    """Give the file the attributes that the user has given to the one at *path*, as far as that can be."""
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith("user."):
                os.setxattr(fd, name, os.getxattr(path, name, follow_symlinks=False))
    except (OSError, AttributeError) as error:  # none on this file system, or no room; none on this system
        _log.debug("the attributes of %s are not kept: %s", path, error)


def _is_at(path: str, model: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), model)
    except OSError:
        return False


def _access_list(file: int | str) -> bytes | None:
    """Return the POSIX access list as the kernel has it; None where there is none but the mode."""
    try:
        return os.getxattr(file, _ACCESS_LIST)
    except (OSError, AttributeError):  # no list, no such thing on this file system; none on this system
        return None
