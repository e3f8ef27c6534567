"""The system calls of the local store, as one object, so that tests can make any of them fail.

Guarantees: each method is one step, which either succeeds or raises ``OSError``; only ``write`` and ``read`` continue
after a part of the bytes. No policy: the local store decides on the calls and their order.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

from async_ckpt.stores import descriptors
from async_ckpt.stores.base import MARKER
from async_ckpt.system import permissions
from async_ckpt.telemetry.patience import moved

__all__ = ["Alignment", "Disk"]

_IOV_MAX = min(os.sysconf("SC_IOV_MAX"), 1024)
_SYNC_FILE_RANGE_WRITE = 2
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
# Errors of file systems on which no file can be open for reading and writing at once.
_NOT_BOTH = frozenset({errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})
_STATX_INO, _STATX_DIOALIGN, _STATX_MNT_ID_UNIQUE = 0x100, 0x2000, 0x4000
_STATX_ATTR_MOUNT_ROOT = 0x2000
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_A_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OF_ONE_HOST = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
# Errors of preallocation that foretell a failure of the save; any other one only means that this file system or sandbox
# cannot preallocate.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class Alignment(NamedTuple):
    """What direct I/O of one file needs.

    Attributes:
        place: identifies the mounted file system.
        is_told: whether the system tells the rest.
        memory: what addresses are to be multiples of; 0 if the file has no direct I/O.
        offset: what offsets and lengths are to be multiples of; 0 if the file has no direct I/O.
    """

    place: tuple[int, int]
    is_told: bool = False
    memory: int = 0
    offset: int = 0


class Disk:
    """The real disk."""

    def create(self, path: str) -> int:
        """Create a new file, for its owner only; opened for writing and, if possible, for reading."""
        try:
            return descriptors.opened(permissions.create_private, path)
        except OSError as error:
            if error.errno not in _NOT_BOTH:
                raise
            return descriptors.opened(permissions.create_private, path, to_read=False)

    def open_in_place(self, path: str, *, fresh: bool) -> int:
        """Open the file at *path* for writing: a new one, or an existing one, truncated."""
        how = os.O_CREAT | os.O_EXCL if fresh else os.O_TRUNC
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | how
        return descriptors.opened(os.open, path, flags, 0o666)

    def open_existing(self, path: str) -> int:
        """Open a file for a lock."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return descriptors.opened(os.open, path, flags)

    def open_to_read(self, path: str) -> int:
        """Open the file that *path* leads to for reading, without waiting for the other end of a pipe."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def alignment(self, path: str) -> Alignment | None:
        """Return what direct I/O of the file at *path* needs; ``None`` where there is none at all."""
        about = _statx(path, _STATX_DIOALIGN | _STATX_MNT_ID_UNIQUE, follow=False)
        if about is None or not hasattr(os, "O_DIRECT"):
            return None
        is_told = bool(about.answered & _STATX_DIOALIGN)
        return Alignment((about.device, about.mount), is_told, about.memory, about.offset)

    def open_direct(self, path: str) -> int:
        """Open an existing file for writing past the page cache."""
        flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return descriptors.opened(os.open, path, flags)

    def duplicate(self, fd: int) -> int:
        """Return a second descriptor of the same open file."""
        return descriptors.opened(os.dup, fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        descriptors.close(fd)

    def lock(self, fd: int) -> None:
        """Take the file's exclusive lock, or raise BlockingIOError at once."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_of_one_host(self, fd: int) -> bool:
        """Return whether no other host can have mounted the file's file system; False if unknown."""
        device = os.fstat(fd).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        # "36 35 98:0 /root /mount options… - type source …", see proc(5)
        for fields in map(str.split, mounts.splitlines()):
            if fields[2] == number:
                return fields[fields.index("-") + 1] in _OF_ONE_HOST
        return False

    def fstat(self, fd: int) -> os.stat_result:
        """Return the status of an open file."""
        return os.fstat(fd)

    def stat(self, path: str) -> os.stat_result:
        """Return the status of the file that *path* leads to."""
        return os.stat(path)

    def lstat(self, path: str) -> os.stat_result:
        """Return the status of *path* itself."""
        return os.lstat(path)

    def identity(self, path: str) -> tuple[int, int, int]:
        """Return a unique identity of the file or directory, which changes when it is mounted again."""
        about = _statx(path, _STATX_INO | _STATX_MNT_ID_UNIQUE, follow=True)
        if about is not None:
            return about.device, about.inode, about.mount
        found = os.stat(path)
        return found.st_dev, found.st_ino, 0

    def is_mount(self, path: str) -> bool:
        """Return whether *path*, even if a file, is a mount point; False if unknown."""
        about = _statx(path, 0, follow=False)
        return about is not None and bool(about.attributes & about.known & _STATX_ATTR_MOUNT_ROOT)

    def writable(self, path: str) -> bool:
        """Return whether the file may be written, or files may be created in the directory."""
        return self._may(path, os.W_OK | os.X_OK if os.path.isdir(path) else os.W_OK)

    @staticmethod
    def _may(path: str, mode: int) -> bool:
        return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)

    def takes_names(self, directory: str) -> bool:
        """Return whether *directory* is a directory in which files may be created."""
        return self._may(f"{directory}/.", os.W_OK | os.X_OK)

    def default_mode(self, path: str) -> int:
        """Return the mode that ``open`` gives to new files, found out by creating and removing a file at *path*."""
        return permissions.default_mode(path)

    def set_mode(self, fd: int, mode: int) -> None:
        """Set the file's mode."""
        permissions.set_mode(fd, mode)

    def copy_metadata(self, fd: int, path: str, model: os.stat_result) -> None:
        """Copy mode and access list of the file at *path*, and, if possible, its owner, group and attributes."""
        permissions.copy_metadata(fd, path, model)

    def preallocate(self, fd: int, nbytes: int) -> None:
        """Reserve disk space, if the kernel can; raise only if there is certainly none."""
        fallocate = _libc_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        # fallocate(2) itself: posix_fallocate would write zeros where the file system cannot.
        if fallocate is None or nbytes == 0:
            return
        number = fallocate(fd, 0, 0, nbytes)
        if number in _NO_ROOM:
            raise OSError(number, os.strerror(number))

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Write *pieces* one after the other from *offset* on; return the bytes written."""
        waiting = [piece for piece in pieces if piece.nbytes]
        waiting.reverse()
        position = offset
        while waiting:
            batch = waiting[: -_IOV_MAX - 1 : -1]
            written = os.pwritev(fd, batch, position)
            if written == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            moved()
            position += written
            while written:
                piece = waiting.pop()
                if written < piece.nbytes:
                    waiting.append(piece.cast("B")[written:])
                    break
                written -= piece.nbytes
        return position - offset

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        """Fill *target* from *offset* on; return the number of bytes read."""
        done = 0
        while done < target.nbytes:
            count = os.preadv(fd, [target[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def start_writeback(self, fd: int, offset: int, nbytes: int) -> None:
        """Let the kernel begin to write these pages to disk, so that fsync has less to do."""
        sync = _libc_function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        if sync is not None and sync(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE) == errno.EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fsync(self, fd: int) -> bool:
        """Sync the file to disk; return False if the file system does not support it."""
        return _is_synced(fd)

    def drop_cache(self, fd: int) -> None:
        """Take what is on disk of the file out of the page cache, if the system can."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync_directory(self, path: str) -> None:
        """Sync the directory's entries to disk, if the file system supports it."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _is_synced(fd)
        finally:
            os.close(fd)

    def sync_file_system(self, path: str) -> None:
        """Sync the whole file system of the file at *path* to disk, names included."""
        sync = _libc_function("syncfs", ctypes.c_int)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # a link, or not ours to read
            os.sync()
            return
        try:
            if sync is None:
                os.sync()
            elif (number := sync(fd)) != 0:
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)

    def truncate(self, path: str) -> None:
        """Truncate a file to nothing."""
        os.truncate(path, 0)

    def replace(self, source: str, target: str) -> None:
        """Rename *source* over *target*."""
        os.replace(source, target)

    def link(self, source: str, target: str) -> None:
        """Link *source* to the name *target*, or raise FileExistsError if the name exists."""
        os.link(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def rmtree(self, path: str) -> None:
        """Remove a directory tree, even if another process does the same.

        A file that takes its name meanwhile stays, and a pipe there is not waited for.
        """
        with suppress(FileNotFoundError):
            fd = os.open(path, _A_DIRECTORY)
            try:
                _empty(fd)
            finally:
                os.close(fd)
            os.rmdir(path)

    def names(self, path: str) -> list[str]:
        """List a directory."""
        return os.listdir(path)

    def scan(self, path: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
        """Open a directory, to be looked through entry by entry."""
        return os.scandir(path)


def _is_synced(fd: int) -> bool:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return False
    return True


class _About(NamedTuple):
    """The results of statx(2) that stat(2) does not have."""

    attributes: int
    known: int
    inode: int
    device: int
    mount: int
    answered: int
    memory: int
    offset: int


def _statx(path: str, wanted: int, *, follow: bool) -> _About | None:
    """Call statx; return None if it is not supported."""
    statx = _libc_function(
        "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p
    )
    if statx is None:
        return None
    answer = ctypes.create_string_buffer(256)
    flags = 0 if follow else _AT_SYMLINK_NOFOLLOW
    if statx(_AT_FDCWD, os.fsencode(path), flags, wanted, answer) != 0:
        return None
    numbers = [struct.unpack_from("=Q", answer, offset)[0] for offset in (8, 56, 32, 136, 144)]
    return _About(*numbers, *(struct.unpack_from("=I", answer, offset)[0] for offset in (0, 152, 156)))


def _empty(directory: int) -> None:
    """Remove everything in an open directory, without following links."""
    with suppress(OSError):  # if it is there and cannot be removed, that is told below
        os.unlink(MARKER, dir_fd=directory)  # first (D5)
        os.fsync(directory)
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        with suppress(FileNotFoundError):
            if not is_directory:
                os.unlink(name, dir_fd=directory)
                continue
            fd = os.open(name, _A_DIRECTORY, dir_fd=directory)
            try:
                _empty(fd)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=directory)


@functools.cache
def _libc_function(name: str, *argument_types: type) -> Callable[..., int] | None:
    """Return the C library's function *name*, which returns an errno or 0; None if it does not exist."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.argtypes = argument_types
    function.restype = ctypes.c_int

    def errno_of(*arguments: int) -> int:
        while function(*arguments) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                return number
        return 0

    return errno_of
