"""The lock of a temporary file, by which its owner shows that it lives.

Guarantees: a new file is locked, or made again, before it is used; a file counts as abandoned only if no living process
can be its owner, on any host, whether it could lock the file or not (D2).

What does not belong here: removing abandoned files.
"""

from __future__ import annotations

import errno

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import owner_is_dead

__all__ = ["hold_fresh", "is_abandoned"]

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK})


def hold_fresh(disk: Disk, fd: int) -> bool:
    """Lock a new file of ours; return False if a sweeper took it first, so that it has to be made again.

    Raises:
        OSError: it cannot be locked, though its file system supports locks.
    """
    try:
        disk.lock(fd)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return disk.fstat(fd).st_nlink > 0


def is_abandoned(disk: Disk, fd: int, name: str) -> bool:
    """Return whether the owner of the open file *fd*, called *name*, has certainly ended; its lock is held then."""
    try:
        disk.lock(fd)
    except BlockingIOError:
        return False
    except OSError:
        return owner_is_dead(name)  # no locks here: the process id must tell
    # On some shared file systems, locks are per host, or unreliable: there, getting the lock proves nothing.
    return owner_is_dead(name) or disk.is_of_one_host(fd)
