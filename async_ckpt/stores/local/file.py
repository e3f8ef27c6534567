"""The open file of an upload to a local or mounted file system.

Guarantees: parts are written concurrently if the file system accepts any order; otherwise one after the other, through
the one descriptor that was opened, as closing another one might complete the file there. Large parts go past the page
cache where that is possible and asked for (`direct`); ``seal`` syncs them as well. Once ``close`` has returned, nothing
is written any more.

What does not belong here: the file's name, and renaming it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from async_ckpt.stores.base import Content, Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.direct import STEP_BYTES, DirectFile
from async_ckpt.system.priority import bulk_work

__all__ = ["LocalFile"]


class LocalFile:
    """A file that is being written; thread-safe.

    Args:
        disk: the system calls.
        nbytes: its final length.
        fsync: whether to sync it to disk.
        drop: whether nothing of it is to be left in the page cache, once it is on disk.
    """

    in_order = False
    """Whether bytes must be written in the order of the file; set it before the first write."""

    def __init__(self, disk: Disk, nbytes: int, *, fsync: bool, drop: bool = False) -> None:
        self._disk = disk
        self._nbytes = nbytes
        self._fsync = fsync
        self._drop = drop
        self._lock = threading.Lock()  # guards what follows
        self._fd: int | None = None
        self._direct: DirectFile | None = None
        self._open: Callable[[], int] | None = None
        self._put: dict[int, int] = {}
        self._end = 0

    def hold(self, fd: int) -> None:
        """Take over an open descriptor; ``close`` closes it."""
        with self._lock:
            self._fd = fd

    def hold_direct(self, direct: DirectFile) -> None:
        """Take over the same file, open for direct I/O; ``close`` closes it."""
        with self._lock:
            self._direct = direct

    def open_later(self, open_file: Callable[[], int]) -> None:
        """Set the function that opens the file before the first byte."""
        with self._lock:
            self._open = open_file

    def descriptor(self) -> int:
        """Return the descriptor; open the file if necessary.

        Raises:
            OSError: the file is closed, or cannot be opened.
        """
        with self._lock:
            return self._descriptor()

    def write(self, part: Part, content: Content) -> None:
        """Write one part at its offset.

        Raises:
            OSError: the part was not written completely, or it is out of order.
        """
        if self.in_order:
            pieces = content.read(part.start, part.stop)
            with self._lock:
                if part.start != self._end:
                    raise OSError(errno.EINVAL, f"part {part.index} is written out of order")
                fd = self._descriptor()
                with bulk_work(part.nbytes):
                    written = self._disk.write(fd, pieces, part.start)
                self._end += written
                self._note(part, written)
            return
        # A descriptor of its own: if the file is closed meanwhile, its number may be reused for another file.
        with self._lock:
            fd, direct = self._disk.duplicate(self._descriptor()), self._direct
        try:
            if direct is not None and direct.is_open:
                written = direct.write(fd, part, content.steps(part.start, part.stop, STEP_BYTES))
            else:
                pieces = content.read(part.start, part.stop)
                with bulk_work(part.nbytes):
                    written = self._disk.write(fd, pieces, part.start)
            if self._fsync:
                self._disk.start_writeback(fd, part.start, part.nbytes)
        finally:
            self._disk.close(fd)
        with self._lock:
            self._note(part, written)

    def check_complete(self) -> None:
        """Raise OSError unless every byte was written."""
        with self._lock:
            fd = self._descriptor()
            complete = sum(self._put.values()) == self._nbytes
        # Some file systems that need the bytes in order report the length only after the close.
        if not complete or (not self.in_order and self._disk.fstat(fd).st_size != self._nbytes):
            raise OSError(errno.EINVAL, "not every byte was put")

    def seal(self) -> None:
        """Sync the file to disk, or at least hand it to the file system.

        Raises:
            OSError: the file could not be stored.
        """
        fd = self.descriptor()
        synced = self._fsync and self._disk.fsync(fd)
        if synced and self._drop:
            self._disk.drop_cache(fd)
        if self.in_order:
            self.close()
        elif not synced:
            # Some file systems (NFS) report only at a close that the bytes could not be stored. Closing a second
            # descriptor reports it, and the first one keeps the lock.
            self._disk.close(self._disk.duplicate(fd))

    def close(self) -> None:
        """Close the file. Idempotent.

        Raises:
            OSError: the file system reports only now that it could not store everything.
        """
        with self._lock:
            fd, self._fd, self._open = self._fd, None, None
            direct, self._direct = self._direct, None
        try:
            if direct is not None:
                direct.close()
        finally:
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
