"""The directories of the local store: made, synced and swept, each once.

Guarantees: ``sync`` returns once every directory entry that leads to a file there is on the medium, no
matter who made it. ``sweep`` removes a temporary file only while holding its lock, or where there are no
locks, if its process is of this host and gone: never one whose owner may live (D2).

What does not belong here: the temporary file of the save that is under way.
"""

from __future__ import annotations

import logging
import os
import threading

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import is_leftover, is_of_this_host, owner_is_dead

__all__ = ["Directories"]

_log = logging.getLogger("async_ckpt.stores.local")


class Directories:
    """What one store knows about directories; its methods block and may be called from any thread."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._swept: set[str] = set()
        self._synced: set[str] = set()

    def make(self, directory: str) -> list[str]:
        """Make *directory* and what is missing above it; return those made here, outermost first."""
        missing = []
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        made: list[str] = []
        for each in reversed(missing):
            try:
                self._disk.mkdir(each)
            except FileExistsError:
                continue
            except OSError:
                self.unmake(made)
                raise
            made.append(each)
            with self._lock:
                self._synced.discard(each)
        return made

    def unmake(self, made: list[str]) -> None:
        """Remove the directories that ``make`` returned, as far as they are empty."""
        while made:
            directory = made.pop()
            try:
                self._disk.rmdir(directory)
            except OSError as error:
                _log.debug("left the directory %s: %s", directory, error)

    def sync(self, directory: str) -> None:
        """Sync *directory* and, the first time, those above it: any of them may be fresh (D1)."""
        self._disk.sync_directory(directory)
        with self._lock:
            if directory in self._synced:
                return
        above = directory
        while (parent := os.path.dirname(above)) != above:
            try:
                self._disk.sync_directory(parent)
            except PermissionError:
                break  # not ours to read, hence not ours to have made
            above = parent
        with self._lock:
            self._synced.add(directory)

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove, the first time, what dead processes left in *directory*; return the names.

        That something cannot be removed is no reason for a save to fail.
        """
        with self._lock:
            if directory in self._swept:
                return ()
            self._swept.add(directory)
        try:
            names = sorted(filter(is_leftover, self._disk.names(directory)))
        except OSError as error:
            _log.debug("cannot list %s: %s", directory, error)
            return ()
        swept = tuple(name for name in names if self._sweep_one(os.path.join(directory, name)))
        if swept:
            _log.info("removed from %s what dead processes left: %s", directory, ", ".join(swept))
        return swept

    def _sweep_one(self, path: str) -> bool:
        try:
            fd = self._disk.open_existing(path)
            try:
                dead = self._is_dead(fd, os.path.basename(path))
                if dead:
                    self._disk.unlink(path)  # before the close gives the lock back
            finally:
                self._disk.close(fd)
        except OSError as error:
            _log.debug("left %s: %s", path, error)
            return False
        return dead

    def _is_dead(self, fd: int, name: str) -> bool:
        try:
            self._disk.lock(fd)
        except BlockingIOError:
            return False
        except OSError:
            return owner_is_dead(name)  # no locks here: the process id must tell
        # Some shared file systems keep each host's locks apart: there, having it proves nothing about others.
        return is_of_this_host(name) or self._disk.is_of_one_host(fd)
