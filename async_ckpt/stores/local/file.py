"""The open file behind one upload to a local, or mounted, file system.

Guarantees: parts are written side by side where the place takes them in any order, else one after the other through
the one descriptor that was opened, since a close of any other might end the file there. Once ``close`` has returned,
nothing is written any more.

What does not belong here: names, and how the file gets its own.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence

from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk

__all__ = ["LocalFile"]


class LocalFile:
    """A file that is being written; threads may share it.

    Args:
        disk: the system calls.
        nbytes: the length that it will have.
        fsync: whether it is to survive the loss of power.
    """

    in_order = False
    """Whether the place takes bytes in the order of the file only; to be set before the first of them."""

    def __init__(self, disk: Disk, nbytes: int, *, fsync: bool) -> None:
        self._disk = disk
        self._nbytes = nbytes
        self._fsync = fsync
        self._lock = threading.Lock()  # guards what follows
        self._fd: int | None = None
        self._open: Callable[[], int] | None = None
        self._put: dict[int, int] = {}
        self._end = 0

    def hold(self, fd: int) -> None:
        """Take what has been opened; from now on ``close`` closes it."""
        with self._lock:
            self._fd = fd

    def open_later(self, open_file: Callable[[], int]) -> None:
        """Take how it is opened, when the first byte comes."""
        with self._lock:
            self._open = open_file

    def descriptor(self) -> int:
        """Return the open file's, opened if need be.

        Raises:
            OSError: it has been closed, or cannot be opened.
        """
        with self._lock:
            return self._descriptor()

    def write(self, part: Part, pieces: Sequence[memoryview]) -> None:
        """Write one part where it belongs.

        Raises:
            OSError: not all of it was written, or it is not its turn.
        """
        if self.in_order:
            with self._lock:
                if part.start != self._end:
                    raise OSError(errno.EINVAL, f"part {part.index} is written out of order")
                written = self._disk.write(self._descriptor(), pieces, part.start)
                self._end += written
                self._note(part, written)
            return
        # A descriptor of its own: were the file closed meanwhile, its number could be another file's.
        with self._lock:
            fd = self._disk.duplicate(self._descriptor())
        try:
            written = self._disk.write(fd, pieces, part.start)
            if self._fsync:
                self._disk.start_writeback(fd, part.start, part.nbytes)
        finally:
            self._disk.close(fd)
        with self._lock:
            self._note(part, written)

    def check_complete(self) -> None:
        """Raise OSError unless every byte was put."""
        with self._lock:
            fd = self._descriptor()
            complete = sum(self._put.values()) == self._nbytes
        # Where bytes go in order, some tell the length only once it is closed.
        if not complete or (not self.in_order and self._disk.fstat(fd).st_size != self._nbytes):
            raise OSError(errno.EINVAL, "not every byte was put")

    def seal(self) -> None:
        """Wait until what was written is on the medium, or at least with the file system.

        Raises:
            OSError: it could not be stored.
        """
        fd = self.descriptor()
        synced = self._fsync and self._disk.fsync(fd)
        if self.in_order:
            self.close()
        elif not synced:
            # Some file systems (NFS) tell only at a close that the bytes could not be stored. A second descriptor's
            # does, and the first keeps the lock.
            self._disk.close(self._disk.duplicate(fd))

    def close(self) -> None:
        """Close it; again and again does no harm.

        Raises:
            OSError: the file system tells only now that it could not store everything.
        """
        with self._lock:
            fd, self._fd, self._open = self._fd, None, None
        if fd is not None:
            self._disk.close(fd)

    def _descriptor(self) -> int:
        if self._fd is None and self._open is not None:
            self._fd, self._open = self._open(), None
        if self._fd is None:
            raise OSError(errno.EBADF, "the upload has ended")
        return self._fd

    def _note(self, part: Part, written: int) -> None:
        if written != part.nbytes:
            raise OSError(errno.EIO, f"part {part.index} has {written} bytes instead of {part.nbytes}")
        self._put[part.index] = written
