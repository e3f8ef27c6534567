"""One file on its way to a local, or mounted, file system.

Guarantees, beyond those of every upload:

* The bytes go to a temporary file beside the target, which takes the target's place by one rename
  (D2). Where the location is that of a symlink itself, it is the link that is replaced. Until the file is complete
  it is its owner's alone; then it has the permissions of the file that it replaces, or those that ``open`` gives.
* ``durability="fsync"``: ``commit`` returns once the file, its name and the directories that lead to it
  would survive the loss of power (D1). ``"process"`` leaves that to the kernel.
* ``overwrite=False``: the file takes its name by a hard link, which fails if the name is taken. Where there
  are no hard links, it looks and then renames: of two writers in that instant, the later one wins.
* A temporary file is locked while its owner lives; whoever gets the lock may sweep it.

When ``commit`` fails, the old file is in place and whole, except where the error says otherwise: if the
rename succeeded and only the directory could not be synced, the *new* file is in place and whole, but
might not be after a loss of power. Neither is ever torn.

What does not belong here: the system calls (`disk`), the directories on the way (`directories`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from async_ckpt.errors import StoreError
from async_ckpt.permissions import REFUSALS
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers
from async_ckpt.stores.directories import Directories
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.locking import hold_fresh
from async_ckpt.stores.target import (
    check_local_target,
    exists_already,
    refuse_foreign_file,
    refuse_foreign_link,
    translated,
)

__all__ = ["HALF_OF_THE_CPUS", "LocalUpload"]

T = TypeVar("T")

_log = logging.getLogger("async_ckpt.stores.local")

_NO_HARD_LINKS = frozenset(
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK}
)
# Another process may remove a directory or a fresh file of ours in the moment before we hold it; that
# cannot go on for long.
_BEGIN_ATTEMPTS = 10
_CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
HALF_OF_THE_CPUS = max(1, _CPUS // 2)


class LocalUpload:
    """One temporary file on its way to becoming the target; made by ``LocalStore.begin``."""

    max_concurrent_parts = HALF_OF_THE_CPUS  # the others are for training
    is_paced = False

    def __init__(
        self,
        location: Location,
        nbytes: int,
        *,
        part_size: int | None,
        workers: Workers,
        disk: Disk,
        fsync: bool,
        overwrite: bool,
        directories: Directories,
    ) -> None:
        self.part_size = part_size
        self.swept: tuple[str, ...] = ()
        self._location = location
        self._nbytes = nbytes
        self._workers = workers
        self._disk = disk
        self._fsync = fsync
        self._overwrite = overwrite
        self._directories = directories
        self._target = location.path
        self._directory = os.path.dirname(location.path)
        self._earlier: os.stat_result | None = None  # the file that was there as this began
        self._mode = 0o600  # of a new file
        self._made: list[str] = []  # directories, outermost first
        self._lock = threading.Lock()  # guards what follows
        self._fd: int | None = None
        self._temporary: str | None = None
        self._put: dict[int, int] = {}

    async def put(self, part: Part, content: Content) -> Receipt:
        """Write one part where it belongs."""
        return await self._workers.run(self._write, part, content)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Sync, rename, sync the directory; see the module about a failure in between."""
        await self._workers.run(self._commit)

    async def abort(self) -> None:
        """Remove the temporary file, and the directories that were made for it and are empty."""
        await self._workers.run(self._clean)

    def start(self) -> None:
        """Do what ``begin`` does. Whoever calls this must abort if it raises."""
        with self._translating("begin"):
            earlier = check_local_target(self._location, self._disk)
            if earlier is not None and not self._overwrite:  # sooner than after gigabytes
                raise exists_already("begin", self._location)
            self._create()
            refuse_foreign_link(
                "begin", self._location
            )  # again, as somebody may have been faster on the way there
            assert self._fd is not None
            self._earlier = earlier if earlier is not None and stat.S_ISREG(earlier.st_mode) else None
            if self._earlier is None:
                self._mode = self._disk.mode_of_new(os.path.join(self._directory, temporary_name()))
            self._disk.preallocate(self._fd, self._nbytes)
        self.swept = self._directories.sweep(self._directory)

    def _create(self) -> None:
        """Make the locked temporary file, and the directories on the way."""
        for _ in range(_BEGIN_ATTEMPTS):
            path = os.path.join(self._directory, temporary_name())
            try:
                self._made += self._directories.make(self._directory)
                fd = self._disk.create(path)
            except FileNotFoundError:
                continue  # another upload's abort took a directory away
            with self._lock:
                self._fd, self._temporary = fd, path
            if hold_fresh(self._disk, fd):
                return
            self._drop_file()
        raise OSError(errno.EBUSY, "what is made there vanishes at once")

    def _write(self, part: Part, content: Content) -> Receipt:
        pieces = content.read(part.start, part.stop)
        with self._translating("write"):
            # A descriptor of its own: were the file aborted meanwhile, its number could be another file's.
            with self._lock:
                if self._fd is None:
                    raise OSError(errno.EBADF, "the upload has ended")
                fd = self._disk.duplicate(self._fd)
            try:
                written = self._disk.write(fd, pieces, part.start)
                if written != part.nbytes:
                    raise OSError(
                        errno.EIO, f"part {part.index} has {written} bytes instead of {part.nbytes}"
                    )
                if self._fsync:
                    self._disk.start_writeback(fd, part.start, part.nbytes)
            finally:
                self._disk.close(fd)
        with self._lock:
            self._put[part.index] = written
        return Receipt(index=part.index)

    def _commit(self) -> None:
        with self._translating("commit"):
            with self._lock:
                fd, temporary = self._fd, self._temporary
                complete = sum(self._put.values()) == self._nbytes
            if fd is None or temporary is None:
                raise OSError(errno.EBADF, "the upload has ended")
            if not complete or self._disk.fstat(fd).st_size != self._nbytes:
                raise OSError(errno.EINVAL, "not every byte was put")
            self._share(fd)
            if self._fsync:
                self._disk.fsync(fd)
            else:
                # Some file systems (NFS) tell only at a close that the bytes could not be stored. A second
                # descriptor's does, and the first keeps the lock.
                self._disk.close(self._disk.duplicate(fd))
            if self._overwrite:
                self._rename(fd, temporary)
            else:
                self._link(fd, temporary)
            self._made.clear()
            with self._lock:
                self._temporary = None
        if self._fsync:
            advice = "The new file is in place and whole, but might not survive a loss of power."
            with self._translating("commit", advice):
                self._directories.sync(self._directory)
        self._clean()

    def _share(self, fd: int) -> None:
        """Give the complete file, until now its owner's alone, the permissions that the user expects."""
        try:
            now = self._disk.lstat(self._target)
        except FileNotFoundError:
            now = None
        model = now if now is not None and stat.S_ISREG(now.st_mode) else self._earlier
        if model is now is not None:
            refuse_foreign_file("commit", self._location, now)
        try:
            if model is not None:
                self._disk.take_after(fd, self._target, model)
            else:
                self._disk.take_mode(fd, self._mode)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            _log.warning(
                "only its owner may read %s, as its mode cannot be changed: %s", self._location.url, error
            )

    def _rename(self, fd: int, temporary: str) -> None:
        try:
            self._disk.replace(temporary, self._target)
        except OSError:
            # A network file system may lose the answer alone: look before claiming either (E3).
            if not self._is_at_target(fd):
                raise

    def _link(self, fd: int, temporary: str) -> None:
        """Take the name unless something has it, in one step where the file system has hard links."""
        try:
            self._disk.link(temporary, self._target)
        except OSError as error:
            if not self._is_at_target(fd):  # it may be, as for the rename (E3)
                if error.errno == errno.EEXIST or os.path.lexists(self._target):
                    raise exists_already("commit", self._location) from error
                if error.errno not in _NO_HARD_LINKS:
                    raise
                self._rename(fd, temporary)
                return
        self._quietly(self._disk.unlink, temporary)

    def _is_at_target(self, fd: int) -> bool:
        try:
            return os.path.samestat(self._disk.lstat(self._target), self._disk.fstat(fd))
        except OSError:
            return False

    def _clean(self) -> None:
        """Close and remove what there is; again and again does no harm."""
        self._drop_file()
        self._directories.unmake(self._made)

    def _drop_file(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, None
            path, self._temporary = self._temporary, None
        # Unlinked while the lock is held: after the close, a sweeper may have it.
        if path is not None:
            self._quietly(self._disk.unlink, path)
        if fd is not None:
            self._quietly(self._disk.close, fd)

    def _quietly(self, function: Callable[[T], object], argument: T) -> None:
        try:
            function(argument)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("cleaning up after a save to %s: %s", self._location.url, error)

    @contextmanager
    def _translating(self, stage: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise translated(stage, self._location, error, advice) from error
