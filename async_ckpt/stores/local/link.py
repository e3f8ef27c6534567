"""Makes a second name for a checkpoint on a local disk: a symbolic link, which is replaced in one step.

Guarantees: at any moment, the name leads to the old file or to the new one (D2); the old target is not written to. When
``make`` returns, the link survives the loss of power (D1). Each link is made under a temporary name, so any number of
threads and processes may replace one link; leftovers of a killed process are swept like other temporary files.

What does not belong here: when the link may be made, which the queue decides (rule 5).
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
from async_ckpt.stores.local.capabilities import Capabilities
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.local.move import move_in
from async_ckpt.stores.local.target import refuse_foreign_link, translated
from async_ckpt.stores.locking import hold_fresh
from async_ckpt.system.permissions import REFUSALS, copy_metadata

__all__ = ["Links", "detach"]

_NO_LINKS = {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_ATTEMPTS = 10  # a sweeper may take a fresh copy, and another process the directory, but not for long


class Links:
    """Makes the links of one service; thread-safe.

    Args:
        durability: the durability of the links.
        disk: the system calls.
    """

    def __init__(self, durability: Durability, disk: Disk | None = None) -> None:
        self._fsync = durability == "fsync"
        self._disk = disk or Disk()
        self._directories = Directories(self._disk)

    def make(self, location: Location, target: Location, *, asked_ns: int) -> None:
        """Make *location* a link to *target*, replacing an existing file or link.

        The link is relative, so that the directory may be moved as a whole. If the file system has no links, a copy is
        made.

        Args:
            location: the link.
            target: the checkpoint.
            asked_ns: when the link was requested. It becomes the link's modification time, or, if later, a time just
                after the target's, so that later saves are newer.

        Raises:
            StoreError: the link could not be made; an existing file or link stays.
        """
        refuse_foreign_link("link", target)  # whoever follows ours would be led there
        path = location.path
        directory = os.path.dirname(path)

        def link(made: str) -> None:
            capabilities = self._directories.capabilities(directory, [])
            with _linked(target.path, made, directory, self._disk, capabilities):
                _date(made, max(asked_ns, _modified_ns(target.path) + 1))
                # A checkpoint of many files, written by another strategy.
                if os.path.isdir(path) and not os.path.islink(path):
                    self._disk.rmtree(path)
                _move(self._disk, made, path, capabilities)

        with _translating("link", location):
            self._directories.make(directory, lambda: refuse_foreign_link("link", location))
            _under_a_fresh_name(directory, link)
            self._directories.sweep(directory)
            if self._fsync:
                self._directories.sync(directory, path)


def detach(location: Location, disk: Disk | None = None) -> None:
    """Replace a link by a copy of its target, or remove a dangling one, so that the name may be written in place.

    Raises:
        StoreError: the link could not be replaced; it stays.
    """
    path = location.path
    disk = disk or Disk()
    with _translating("begin", location):
        if not os.path.islink(path) or os.path.isdir(path):
            return
        if not os.path.exists(path):
            disk.unlink(path)
            return

        capabilities = Directories(disk).capabilities(os.path.dirname(path), [])

        def copy(made: str) -> None:
            with _copied(path, made, disk, capabilities):
                _move(disk, made, path, capabilities)

        _under_a_fresh_name(os.path.dirname(path), copy)


class _SweptError(OSError):
    """A sweeper took the file before we locked it."""


def _under_a_fresh_name(directory: str, make: Callable[[str], None]) -> None:
    """Call *make* with a fresh name in *directory*, and remove a file of that name afterwards."""
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
def _linked(target: str, made: str, directory: str, disk: Disk, capabilities: Capabilities) -> Iterator[None]:
    """Make a link, or a copy if there are no links, for the body to rename."""
    try:
        os.symlink(os.path.relpath(target, directory), made)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _copied(target, made, disk, capabilities):
            yield
    else:
        yield


@contextmanager
def _copied(source: str, made: str, disk: Disk, capabilities: Capabilities) -> Iterator[None]:
    """Make a copy, locked against sweepers until it is renamed, and private until it is complete."""
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
        if (
            capabilities.offset
        ):  # where bytes go in order, a file is complete, and can be moved, once it is closed
            closing.close()
        yield


def _share(fd: int, source: str, model: os.stat_result) -> None:
    try:
        copy_metadata(fd, source, model)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def _move(disk: Disk, made: str, path: str, capabilities: Capabilities) -> None:
    own = os.lstat(made)

    def landed() -> bool:
        with suppress(OSError):
            return os.path.samestat(os.lstat(path), own)
        return False

    move_in(disk, made, path, landed=landed, replaces=not capabilities.replace)


@contextmanager
def _opened(path: str, disk: Disk) -> Iterator[BinaryIO]:
    """Open the file to copy; refuse a pipe, which would block, and a device, which may have no end."""
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
