"""The lock by which a file's owner shows that it lives, and what having it proves to somebody else.

Guarantees: a fresh file is locked, or made again, before it is used; a file counts as abandoned only if no living
process can be its owner, wherever that runs, and whether it could lock the file or not (D2).

What does not belong here: what becomes of an abandoned file.
"""

from __future__ import annotations

import errno

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import owner_is_dead

__all__ = ["hold_fresh", "is_abandoned"]

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK})


def hold_fresh(disk: Disk, fd: int) -> bool:
    """Lock a file of ours that has just been made; False if a sweeper was faster and it has to be made again.

    Raises:
        OSError: it cannot be locked, though its file system has locks.
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
    """Return whether the owner of the open file *fd* of that *name* surely lives no more; its lock is held then."""
    try:
        disk.lock(fd)
    except BlockingIOError:
        return False
    except OSError:
        return owner_is_dead(name)  # no locks here: the process id must tell
    # Some shared file systems keep each host's locks apart, or have them only now and then: there, having it proves
    # nothing.
    return owner_is_dead(name) or disk.is_of_one_host(fd)
