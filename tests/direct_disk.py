"""A disk with direct I/O as strict as any, wherever the tests run; and what is really in the page cache."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from async_ckpt.stores.disk import Alignment, Disk
from async_ckpt.system.addresses import address_of

__all__ = ["DirectDisk", "cached_bytes"]


class DirectDisk(Disk):
    """A disk that takes nothing directly that is not aligned.

    Args:
        memory: what addresses are to be multiples of.
        offset: what offsets and lengths are.
        told: whether it says so.
        refuses: which direct write, counted from 1, is refused, and all that follow; 0 refuses none.
        error: with which number.
        opens: 0, or the number with which it refuses to open a file for direct I/O.

    Attributes:
        opened: how many files were to be opened for direct I/O.
        asked: how many direct writes were asked for.
        direct: the ranges that were written directly, in order.
        cached: the ranges that were written through the page cache.
        calls: what was done, in order: ``"direct"``, ``"cached"``, ``"fsync"``, ``"drop"``, ``"replace"``.
    """

    def __init__(
        self,
        *,
        memory: int = 4096,
        offset: int = 4096,
        told: bool = True,
        refuses: int = 0,
        error: int = errno.EINVAL,
        opens: int = 0,
    ) -> None:
        self.opened = 0
        self.direct: list[tuple[int, int]] = []
        self.cached: list[tuple[int, int]] = []
        self.calls: list[str] = []
        self._memory, self._offset, self._told = memory, offset, told
        self._refuses, self._error, self._opens = refuses, error, opens
        self.asked = 0
        self._direct_fds: set[int] = set()

    def alignment(self, path: str) -> Alignment:
        """Say what it needs."""
        return Alignment((0, 0), self._told, self._memory, self._offset)

    def open_direct(self, path: str) -> int:
        """Open a file as any, and remember that it is to be strict."""
        self.opened += 1
        if self._opens:
            raise OSError(self._opens, os.strerror(self._opens))
        fd = self.open_existing(path)
        self._direct_fds.add(fd)
        return fd

    def duplicate(self, fd: int) -> int:
        """A second descriptor of the same open file is as strict."""
        copy = super().duplicate(fd)
        if fd in self._direct_fds:
            self._direct_fds.add(copy)
        return copy

    def close(self, fd: int) -> None:
        """Forget it first: its number may be another file's at once."""
        self._direct_fds.discard(fd)
        super().close(fd)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Write; directly, only what is aligned."""
        nbytes = sum(piece.nbytes for piece in pieces)
        if fd not in self._direct_fds:
            self.cached.append((offset, offset + nbytes))
            self.calls.append("cached")
            return super().write(fd, pieces, offset)
        self.asked += 1
        if 0 < self._refuses <= self.asked:
            raise OSError(self._error, os.strerror(self._error))
        for piece in pieces:
            if address_of(piece) % self._memory or piece.nbytes % self._offset or offset % self._offset:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.direct.append((offset, offset + nbytes))
        self.calls.append("direct")
        return super().write(fd, pieces, offset)

    def fsync(self, fd: int) -> bool:
        """Sync."""
        self.calls.append("fsync")
        return super().fsync(fd)

    def drop_cache(self, fd: int) -> None:
        """Drop."""
        self.calls.append("drop")
        super().drop_cache(fd)

    def replace(self, source: str, target: str) -> None:
        """Rename."""
        self.calls.append("replace")
        super().replace(source, target)


def cached_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    nbytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        states = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        start = (ctypes.c_char * nbytes).from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(nbytes), states)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(state & 1 for state in states) * mmap.PAGESIZE
