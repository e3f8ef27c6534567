"""Direct I/O: writes to a file past the page cache, through a little memory that is aligned as the disk needs it.

Guarantees: the file has the same bytes as without. Only whole grains are written directly; what is left at the ends of
a part goes through the page cache, whose pages hold nothing of a grain. So neighbouring parts may be written at once.
Where direct I/O is refused, be it in the midst of a file, the bytes go through the page cache, and the file system is
not asked again as long as the process runs. Memory is bounded: one buffer for each part that is being written.

What does not belong here: syncing (`file`), which is needed as ever: a disk has a cache of its own.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.system.addresses import copy_bytes

__all__ = [
    "BUFFER_BYTES",
    "GRAIN_BYTES",
    "LEAST_BYTES",
    "REFUSALS",
    "STEP_BYTES",
    "DirectFile",
    "Refusals",
    "cut_at_grains",
    "is_worthwhile",
]

LEAST_BYTES = 128 << 20
"""Shorter files go through the page cache unless the user says otherwise."""

_log = logging.getLogger("async_ckpt.stores.local")

GRAIN_BYTES = 64 << 10
"""A multiple of what any disk asks for, and of the blocks and pages of file systems."""

BUFFER_BYTES = 2 << 20
"""What is written at a time: enough for a disk, and little enough to stay in the CPU's caches."""

STEP_BYTES = 512 << 10
"""What is copied at a time, while it is in the cache of its checksum."""

_REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def is_worthwhile(page_cache: Literal["auto", "keep", "drop"], nbytes: int, *, fsync: bool) -> bool:
    """Return whether a file of *nbytes* is to be written past the page cache if that is possible.

    By itself, only where that was measured to be faster and to take less of a CPU. A file that is not synced is there
    sooner if it goes no further than the page cache.
    """
    if page_cache == "auto":
        return fsync and nbytes >= LEAST_BYTES
    return page_cache == "drop"


class Refusals:
    """The mounted file systems that have refused direct I/O; thread-safe."""

    def __init__(self) -> None:
        self._places: set[tuple[int, int]] = set()

    def open(self, path: str, fd: int, disk: Disk, *, untold: bool) -> DirectFile | None:
        """Open a file a second time, for direct I/O.

        Args:
            path: the file.
            fd: its descriptor.
            disk: the system calls.
            untold: whether to try it where the system does not tell what direct I/O needs.

        Returns:
            The file; ``None`` where there is no direct I/O, or none that is known.
        """
        about = disk.alignment(path)
        if about is None or about.place in self._places:
            return None
        if about.is_told and not (
            0 < about.memory <= mmap.PAGESIZE and about.offset and GRAIN_BYTES % about.offset == 0
        ):
            return None
        if not (about.is_told or untold):
            return None
        try:
            direct = disk.open_direct(path)
        except OSError as error:
            if error.errno in _REFUSED:
                self.note(about.place, path, error)
            return None
        try:
            if os.path.samestat(disk.fstat(direct), disk.fstat(fd)):
                return DirectFile(disk, path, direct, about.place, self)
        except BaseException:
            disk.close(direct)
            raise
        disk.close(direct)
        return None

    def note(self, place: tuple[int, int], path: str, error: OSError) -> None:
        """Note that *place* refuses."""
        self._places.add(place)
        _log.info("no direct I/O on the file system of %s: %s", path, error)


REFUSALS = Refusals()
"""What this process has found out."""


class DirectFile:
    """A file that is open for direct I/O; thread-safe. Made by `Refusals.open`, closed once."""

    def __init__(self, disk: Disk, path: str, fd: int, place: tuple[int, int], refusals: Refusals) -> None:
        self._disk = disk
        self._path = path
        self._place = place
        self._refusals = refusals
        self._lock = threading.Lock()  # guards what follows
        self._fd: int | None = fd
        self._idle: list[mmap.mmap] = []

    @property
    def is_open(self) -> bool:
        """Whether it has been neither refused nor closed."""
        return self._fd is not None

    def write(self, fd: int, part: Part, steps: Iterable[Sequence[memoryview]]) -> int:
        """Write a part; return the bytes written.

        Args:
            fd: a descriptor of the file, for what is not written directly.
            part: where.
            steps: its bytes.

        Raises:
            OSError: not all of it could be written.
        """
        with self._lock:
            buffer = self._idle.pop() if self._idle else mmap.mmap(-1, BUFFER_BYTES, flags=_PRIVATE)
            # A descriptor of its own: if the file is closed meanwhile, its number may be reused for another file.
            direct = None if self._fd is None else self._disk.duplicate(self._fd)
        source, memory, written = _Source(steps), memoryview(buffer), 0
        try:
            for start, stop in cut_at_grains(part.start, part.stop):
                filled = memory[: source.fill(memory[: stop - start])]
                is_whole = start % GRAIN_BYTES == filled.nbytes % GRAIN_BYTES == 0
                if direct is None or not is_whole or not self._is_written(direct, filled, start):
                    self._disk.write(fd, [filled], start)
                written += filled.nbytes
            return written
        finally:
            if direct is not None:
                self._disk.close(direct)
            with self._lock:
                if self.is_open:
                    self._idle.append(buffer)

    def close(self) -> None:
        """Close the descriptor, and free the memory. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, None
            self._idle.clear()
        if fd is not None:
            self._disk.close(fd)

    def _is_written(self, direct: int, memory: memoryview, offset: int) -> bool:
        """Write directly, unless that has been refused, or is now."""
        if not self.is_open:
            return False
        try:
            self._disk.write(direct, [memory], offset)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._refusals.note(self._place, self._path, error)
            self.close()
            return False
        return True


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class _Source:
    """The bytes of a part, as they come."""

    def __init__(self, steps: Iterable[Sequence[memoryview]]) -> None:
        self._pieces = (piece for pieces in steps for piece in pieces)
        self._left = memoryview(b"")

    def fill(self, memory: memoryview) -> int:
        """Fill *memory* with the next bytes; return how many there were."""
        done = 0
        while done < memory.nbytes:
            if not self._left.nbytes:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._left = piece.cast("B")
                continue
            count = min(memory.nbytes - done, self._left.nbytes)
            copy_bytes(memory[done : done + count], self._left[:count])
            self._left = self._left[count:]
            done += count
        return done


def cut_at_grains(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield ranges that cover *start* to *stop*, none longer than a buffer; only the ends may be no whole grains."""
    first, last = -(-start // GRAIN_BYTES) * GRAIN_BYTES, stop // GRAIN_BYTES * GRAIN_BYTES
    if first > last:  # within one grain
        yield start, stop
        return
    if start < first:
        yield start, first
    for at in range(first, last, BUFFER_BYTES):
        yield at, min(at + BUFFER_BYTES, last)
    if last < stop:
        yield last, stop
