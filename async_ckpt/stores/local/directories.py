"""The directories of the local store: made, synced and swept, each no more often than needed.

Guarantees: ``sync`` returns once every directory entry that leads to a file there is on the medium, no
matter who made it, or made it again. ``sweep`` removes a temporary file, and gives a file that was put aside its name
back, only if its owner surely lives no more (D2).

What does not belong here: the temporary file of the save that is under way.
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
from async_ckpt.stores.local.move import settle_aside
from async_ckpt.stores.local.places import PLACES, Place, Places
from async_ckpt.stores.locking import is_abandoned
from async_ckpt.stores.vanished import removing
from async_ckpt.system.trust import is_foreign

__all__ = ["Directories"]

# How a place says that no present file is opened for writing there.
_NO_WRITING = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})

_log = logging.getLogger("async_ckpt.stores.local")


class Directories:
    """What one store knows about directories; its methods block and may be called from any thread."""

    def __init__(self, disk: Disk, places: Places | None = None) -> None:
        self._disk = disk
        self._places = places or PLACES
        self._lock = threading.Lock()
        # A path may be another directory's by now, and so may a number: whether something in it has changed tells that.
        self._synced: dict[str, tuple[int, int, int]] = {}
        self._swept: set[tuple[int, int]] = set()  # a number given out again is that of an empty directory

    def make(self, directory: str, check: Callable[[], object]) -> list[str]:
        """Make *directory* and what is missing above it; return those made here, outermost first.

        Args:
            directory: which.
            check: raises if what is on the way now leads where nothing is to be made.
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
        """Remove the directories that ``make`` returned, as far as they are empty."""
        while made:
            directory = made.pop()
            try:
                with removing(directory):
                    self._disk.rmdir(directory)
            except OSError as error:
                _log.debug("left the directory %s: %s", directory, error)

    def place(self, directory: str, made: list[str]) -> Place:
        """Return what *directory* refuses, which lies in the first of those that ``make`` has *made*, if any.

        Raises:
            OSError: it cannot be tried, as there is no room, or it is gone.
        """
        return self._places.of(directory, self._disk, parent=os.path.dirname(made[0]) if made else None)

    def forget(self, directory: str) -> None:
        """Let the next save try what *directory* refuses: it has refused what it did not before."""
        with suppress(OSError):
            self._places.forget(directory, self._disk)

    def sync(self, directory: str, path: str) -> None:
        """Sync *directory* and those above it in which something has changed since: any of them may be fresh (D1).

        Args:
            directory: where an entry is fresh.
            path: a file in it, by which the whole file system is synced where the directory is not ours to read.
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
        """Return what is another once an entry of *directory* has changed; ``None`` where that cannot be told."""
        try:
            found = self._disk.stat(directory)
        except OSError:
            return None
        if found.st_ctime_ns % 1_000_000_000 == 0:  # it counts seconds, in which much may change
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove, the first time, what dead processes left in *directory*; return the names.

        That something cannot be removed is no reason for a save to fail.
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
            _log.info("removed from %s what dead processes left: %s", directory, ", ".join(swept))
        return swept

    def whereabouts(self, path: str) -> str:
        """Return where the file at *path*, which is not there, is as another process has put it aside.

        One that is dead has it no longer: the file is back. Empty if there is none.
        """
        asides = sorted(self._asides(path), key=self._age)
        settled = [self._sweep_one(each) for each in asides]
        if any(settled):
            return path
        return asides[0] if asides else ""

    def give_up(self, path: str) -> None:
        """Remove what processes, dead or not, have put aside of *path*, that it may not come back to that name.

        Raises:
            OSError: that could not be done.
        """
        if os.path.lexists(path):
            with suppress(OSError):
                if not self._places.known(os.path.dirname(path), self._disk).replace:
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
        """Return what is less for a file that was written later: of several put aside, that one is the earlier file."""
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
                    settle_aside(self._disk, path)
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
