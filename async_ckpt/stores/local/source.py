"""Reads a local file, straight into the reader's memory.

Guarantees: the open descriptor keeps the file that was opened, even if its name is replaced. If the file is truncated
in place, reading raises a ``StoreError``.

What does not belong here: writing (`upload`), and the meaning of the bytes.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence

from async_ckpt.stores.base import Location, Workers
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.target import translated

__all__ = ["LocalSource"]


class LocalSource:
    """One open file; see ``stores.base.Source``.

    Args:
        location: the file.
        workers: run system calls.
        disk: the system calls.
        max_concurrent_reads: how many reads run at a time.
    """

    def __init__(
        self, location: Location, *, workers: Workers, disk: Disk, max_concurrent_reads: int
    ) -> None:
        self.nbytes = 0
        self.max_concurrent_reads: int | None = max_concurrent_reads
        self._location = location
        self._workers = workers
        self._disk = disk
        self._lock = threading.Lock()  # guards what follows
        self._fd: int | None = None

    def start(self, path: str = "") -> None:
        """Open the file, at *path* if given; blocks. The caller must close the source if this raises."""
        try:
            fd = self._disk.open_to_read(path or self._location.path)
            with self._lock:
                self._fd = fd
            found = self._disk.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise translated("read", self._location, error) from error
        self.nbytes = found.st_size

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* from the file."""
        await self._workers.run(self._read_into, start, targets)

    async def aclose(self) -> None:
        """Close the file."""
        await self._workers.run(self.close)

    def close(self) -> None:
        """Like ``aclose``, but blocking."""
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            self._disk.close(fd)

    def _read_into(self, start: int, targets: Sequence[memoryview]) -> None:
        try:
            # A descriptor of its own: if the file is closed meanwhile, its number may be reused for another file.
            with self._lock:
                if self._fd is None:
                    raise OSError(errno.EBADF, "the file has been closed")
                fd = self._disk.duplicate(self._fd)
            try:
                for target in targets:
                    if self._disk.read(fd, target, start) < target.nbytes:
                        raise OSError(errno.EIO, "it has become shorter while it was read")
                    start += target.nbytes
            finally:
                self._disk.close(fd)
        except OSError as error:
            raise translated("read", self._location, error) from error
