"""A second name for a checkpoint on a local disk: a symbolic link, replaced in one step.

Guarantees: whoever looks at the name of a file or link finds what it was before or what it is now, never nothing (D2);
what the name stood for is not written to. When ``make`` returns, the link survives the loss of power (D1). Each one is
made under a name of its own, so any number of threads and processes may link one name; what a killed process left is
swept as its other temporary files are.

What does not belong here: when the link may be made; that is the queue's (rule 5).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

from async_ckpt.errors import StoreError
from async_ckpt.options import Durability
from async_ckpt.stores.base import Location
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.local.move import move_in
from async_ckpt.stores.local.places import Place
from async_ckpt.stores.local.target import refuse_foreign_link, translated
from async_ckpt.stores.locking import hold_fresh
from async_ckpt.system.permissions import REFUSALS, take_after

__all__ = ["Links", "detach"]

_NO_LINKS = {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_ATTEMPTS = 10  # a sweeper may take a fresh copy, and another process the directory, but not for long


class Links:
    """Makes the links of one service; threads may share it.

    Args:
        durability: of the links.
        disk: the system calls.
    """

    def __init__(self, durability: Durability, disk: Disk | None = None) -> None:
        self._fsync = durability == "fsync"
        self._disk = disk or Disk()
        self._directories = Directories(self._disk)

    def make(self, location: Location, target: Location, *, asked_ns: int) -> None:
        """Let *location* lead to *target*, in place of what was there.

        The link is relative, so that the directory may be moved as a whole. Where the file system has no links, it is
        a copy.

        Args:
            location: the second name.
            target: the checkpoint.
            asked_ns: when that was asked for, which is the link's modification time, but just after the target's: what
                is saved later is newer, however soon after the target that is written.

        Raises:
            StoreError: it could not be made; a file or link that was there stays.
        """
        refuse_foreign_link("link", target)  # whoever follows ours would be led there
        path = location.path
        directory = os.path.dirname(path)

        def link(made: str) -> None:
            place = self._directories.place(directory, [])
            with _linked(target.path, made, directory, self._disk, place):
                _date(made, max(asked_ns, _modified_ns(target.path) + 1))
                # A checkpoint of many files, which another strategy has written.
                if os.path.isdir(path) and not os.path.islink(path):
                    self._disk.rmtree(path)
                _move(self._disk, made, path, place)

        with _translating("link", location):
            self._directories.make(directory, lambda: refuse_foreign_link("link", location))
            _under_a_fresh_name(directory, link)
            self._directories.sweep(directory)
            if self._fsync:
                self._directories.sync(directory, path)


def detach(location: Location, disk: Disk | None = None) -> None:
    """Make of a link to a file, or to nothing, a name whose file may be written to in place: a copy, or nothing.

    Raises:
        StoreError: that could not be done; the link stays.
    """
    path = location.path
    disk = disk or Disk()
    with _translating("begin", location):
        if not os.path.islink(path) or os.path.isdir(path):
            return
        if not os.path.exists(path):
            disk.unlink(path)
            return

        place = Directories(disk).place(os.path.dirname(path), [])

        def copy(made: str) -> None:
            with _copied(path, made, disk, place):
                _move(disk, made, path, place)

        _under_a_fresh_name(os.path.dirname(path), copy)


class _SweptError(OSError):
    """A sweeper was faster than our lock."""


def _under_a_fresh_name(directory: str, make: Callable[[str], None]) -> None:
    """Call *make* with a name in *directory* that nobody else has, and leave nothing of that name."""
    for _ in range(_ATTEMPTS):
        made = os.path.join(directory, temporary_name())
        try:
            return make(made)
        except _SweptError:
            continue
        finally:
            with suppress(FileNotFoundError):  # mostly: it has got another name
                os.remove(made)
    raise OSError(errno.EBUSY, "what is made there vanishes at once")


@contextmanager
def _linked(target: str, made: str, directory: str, disk: Disk, place: Place) -> Iterator[None]:
    """Make a link, or where there are none a copy, for who gives it its place."""
    try:
        os.symlink(os.path.relpath(target, directory), made)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _copied(target, made, disk, place):
            yield
    else:
        yield


@contextmanager
def _copied(source: str, made: str, disk: Disk, place: Place) -> Iterator[None]:
    """Make a copy, locked against sweepers until it has its place, and nobody else's before it is whole."""
    fd = disk.create(made)
    with ExitStack() as closing:
        closing.callback(disk.close, fd)
        if not hold_fresh(disk, fd):
            raise _SweptError(errno.EBUSY, os.strerror(errno.EBUSY))
        with _opened(source, disk) as original, open(fd, "wb", closefd=False) as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            _share(fd, source, os.fstat(original.fileno()))
            disk.fsync(fd)
        if place.offset:  # where bytes go in order, a file is complete, and can be moved, once it is closed
            closing.close()
        yield


def _share(fd: int, source: str, model: os.stat_result) -> None:
    try:
        take_after(fd, source, model)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def _move(disk: Disk, made: str, path: str, place: Place) -> None:
    own = os.lstat(made)

    def landed() -> bool:
        with suppress(OSError):
            return os.path.samestat(os.lstat(path), own)
        return False

    move_in(disk, made, path, landed=landed, replaces=not place.replace)


@contextmanager
def _opened(path: str, disk: Disk) -> Iterator[BinaryIO]:
    """Open what is copied: neither a pipe, which would be waited for, nor a device, which may have no end."""
    with open(disk.open_to_read(path), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it leads to no regular file")
        yield file


def _modified_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _date(path: str, modified_ns: int) -> None:
    with suppress(OSError, NotImplementedError):  # not every system, or file system, dates links
        os.utime(path, ns=(modified_ns, modified_ns), follow_symlinks=False)


@contextmanager
def _translating(stage: str, location: Location) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise translated(stage, location, error) from error
