"""Makes, syncs and sweeps the directories of the local store, no more often than needed.

Guarantees: when ``sync`` returns, every directory entry on the path to a file there is synced to disk, whoever made it.
``sweep`` removes a temporary file, and renames back a file that was put aside, only if its owner has certainly ended
(D2).

What does not belong here: the temporary file of the running save.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import aside_of, is_leftover, owner_is_dead
from async_ckpt.stores.local.capabilities import CAPABILITIES, Capabilities, CapabilityCache
from async_ckpt.stores.local.move import recover_aside
from async_ckpt.stores.locking import is_abandoned
from async_ckpt.stores.removed_directories import removing
from async_ckpt.system.trusted_paths import is_foreign

__all__ = ["Directories"]

# Errors of file systems on which existing files cannot be opened for writing.
_NO_WRITING = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})

_log = logging.getLogger("async_ckpt.stores.local")


class Directories:
    """A store's knowledge of directories; its methods block, and are thread-safe."""

    def __init__(self, disk: Disk, capability_cache: CapabilityCache | None = None) -> None:
        self._disk = disk
        self._capability_cache = capability_cache or CAPABILITIES
        self._lock = threading.Lock()
        # A path may lead to another directory by now, and an inode may be reused; the time of the last change shows
        # that.
        self._synced: dict[str, tuple[int, int, int]] = {}
        self._swept: set[tuple[int, int]] = set()  # a number given out again is that of an empty directory

    def make(self, directory: str, check: Callable[[], object]) -> list[str]:
        """Make *directory* and missing ones above it; return those that were made, outermost first.

        Args:
            directory: the directory.
            check: raises if the path now leads somewhere where nothing may be made.
        """
        missing = []
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        made: list[str] = []
        try:
            check()  # now that it is known what is there
            for each in reversed(missing):
                try:
                    self._disk.mkdir(each)
                except FileExistsError:
                    check()  # somebody was faster
                else:
                    made.append(each)
        except OSError:
            self.unmake(made)
            raise
        return made

    def unmake(self, made: list[str]) -> None:
        """Remove the directories that ``make`` returned, if they are empty."""
        while made:
            directory = made.pop()
            try:
                with removing(directory):
                    self._disk.rmdir(directory)
            except OSError as error:
                _log.debug("left the directory %s: %s", directory, error)

    def capabilities(self, directory: str, made: list[str]) -> Capabilities:
        """Return the capabilities of *directory*; *made* are the directories that ``make`` made for it.

        Raises:
            OSError: they cannot be tried, as there is no room, or the directory is gone.
        """
        return self._capability_cache.of(
            directory, self._disk, parent=os.path.dirname(made[0]) if made else None
        )

    def forget(self, directory: str) -> None:
        """Let the next save try the capabilities of *directory* again: it refused what it did not refuse before."""
        with suppress(OSError):
            self._capability_cache.forget(directory, self._disk)

    def sync(self, directory: str, path: str) -> None:
        """Sync *directory* and those above it that have changed since the last sync: any of them may be new (D1).

        Args:
            directory: a directory with a new entry.
            path: a file in it, used to sync the whole file system if the directory is not readable.
        """
        try:
            self._disk.sync_directory(directory)
        except PermissionError:
            self._disk.sync_file_system(path)
        above = directory
        while (parent := os.path.dirname(above)) != above:
            now = self._state(parent)  # first: what changes while it is synced may not be
            if now is None or now != self._synced.get(parent):
                try:
                    self._disk.sync_directory(parent)
                except PermissionError:
                    break  # not ours to read, hence not ours to have made
                if now is not None:
                    self._synced[parent] = now
            above = parent

    def _state(self, directory: str) -> tuple[int, int, int] | None:
        """Return a value that changes with the entries of *directory*; ``None`` if there is none."""
        try:
            found = self._disk.stat(directory)
        except OSError:
            return None
        if found.st_ctime_ns % 1_000_000_000 == 0:  # it counts seconds, in which much may change
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove leftovers of dead processes in *directory*, once; return their names.

        A save does not fail if something cannot be removed.
        """
        try:
            found = self._disk.stat(directory)
            with self._lock:
                if (found.st_dev, found.st_ino) in self._swept:
                    return ()
                self._swept.add((found.st_dev, found.st_ino))
            names = sorted(
                name for name in self._disk.names(directory) if is_leftover(name) or aside_of(name)
            )
            names.sort(key=lambda name: self._age(os.path.join(directory, name)))
        except OSError as error:
            _log.debug("cannot list %s: %s", directory, error)
            return ()
        swept = tuple(name for name in names if self._sweep_one(os.path.join(directory, name)))
        if swept:
            _log.info("removed leftovers of dead processes from %s: %s", directory, ", ".join(swept))
        return swept

    def find_aside(self, path: str) -> str:
        """Return the path to which another process has put aside the missing file *path*; empty if there is none.

        If that process has ended, the file is renamed back first.
        """
        asides = sorted(self._asides(path), key=self._age)
        settled = [self._sweep_one(each) for each in asides]
        if any(settled):
            return path
        return asides[0] if asides else ""

    def give_up(self, path: str) -> None:
        """Remove all files that processes, ended or not, have put aside for *path*, so that none gets that name again.

        Raises:
            OSError: a file cannot be removed.
        """
        if os.path.lexists(path):
            with suppress(OSError):
                if not self._capability_cache.known(os.path.dirname(path), self._disk).replace:
                    return  # nothing is put aside there
        for each in self._asides(path):
            with suppress(FileNotFoundError):
                self._disk.unlink(each)

    def _asides(self, path: str) -> list[str]:
        directory, name = os.path.split(path)
        try:
            names = [each for each in self._disk.names(directory) if aside_of(each) == name]
        except OSError:
            return []
        return [each for each in (os.path.join(directory, name) for name in names) if self._is_trusted(each)]

    def _is_trusted(self, path: str) -> bool:
        try:
            return not is_foreign(self._disk.lstat(path), os.path.dirname(path))
        except OSError:  # it is back
            return False

    def _age(self, path: str) -> int:
        """Return a sort key that puts the latest file first: of several put aside, that one is the earlier file."""
        try:
            return -self._disk.lstat(path).st_mtime_ns
        except OSError:
            return 0

    def _sweep_one(self, path: str) -> bool:
        name = os.path.basename(path)
        try:
            if aside_of(name) is not None:  # nobody locks it
                dead = owner_is_dead(name) and self._is_trusted(path)
                if dead:
                    recover_aside(self._disk, path)
                return dead
            if stat.S_ISLNK(self._disk.lstat(path).st_mode):  # on its way to a link's place; it has no lock
                return self._removed_if_dead(path)
            try:
                fd = self._disk.open_existing(path)
            except OSError as error:
                if error.errno not in _NO_WRITING:
                    raise
                return self._removed_if_dead(path)  # there, nor can it be locked
            try:
                dead = is_abandoned(self._disk, fd, name)
                if dead:
                    self._disk.unlink(path)  # before the close gives the lock back
            finally:
                self._disk.close(fd)
        except OSError as error:
            _log.debug("left %s: %s", path, error)
            return False
        return dead

    def _removed_if_dead(self, path: str) -> bool:
        dead = owner_is_dead(os.path.basename(path))
        if dead:
            self._disk.unlink(path)
        return dead
