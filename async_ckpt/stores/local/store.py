"""The store for local and mounted file systems, and syncing files that others wrote.

Guarantees: see `upload` for saves and `source` for reading. Deleting a symlink removes the link, not its target.

What does not belong here: the system calls (`disk`), and the knowledge of directories (`directories`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Literal

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Child, Location, Workers, aborted_on_error
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.capabilities import CapabilityCache
from async_ckpt.stores.local.direct import REFUSALS, Refusals
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.local.listing import Listing
from async_ckpt.stores.local.source import LocalSource
from async_ckpt.stores.local.target import refuse_foreign_link, translated
from async_ckpt.stores.local.upload import HALF_OF_THE_CPUS, LocalUpload
from async_ckpt.stores.removed_directories import removing

__all__ = ["LocalStore", "sync_path"]

_ATTEMPTS = 10  # another process may replace a file again and again
_MOST_PART_BYTES = 32 << 20
_NO_DELETING = (
    "The directory refuses to remove files. A mount may need an option: Mountpoint for S3, --allow-delete."
)


class LocalStore:
    """The store for local paths.

    Args:
        workers: run system calls.
        durability: ``"fsync"`` or ``"process"``.
        overwrite: whether a commit may replace an existing file.
        in_place: whether a file may be written under its final name if the directory has no other way.
        page_cache: what is to become of a file in it: ``"drop"`` writes past it, and what cannot be is taken out of it;
            ``"auto"`` writes past it where that is known to be better.
        part_size: the preferred size of a part; at most 32 MiB is used, so that the kernel begins early to write to
            disk. ``None`` leaves it to the caller.
        disk: the system calls themselves.
        capability_cache: the known capabilities of directories; the process's by default.
        refusals: the file systems without direct I/O; those that the process knows by default.
    """

    repeats_parts = True

    def __init__(
        self,
        *,
        workers: Workers,
        durability: Literal["fsync", "process"] = "fsync",
        overwrite: bool = True,
        in_place: bool = False,
        page_cache: Literal["auto", "keep", "drop"] = "auto",
        part_size: int | None = None,
        disk: Disk | None = None,
        capability_cache: CapabilityCache | None = None,
        refusals: Refusals = REFUSALS,
    ) -> None:
        self._workers = workers
        self._disk = disk or Disk()
        self._fsync = durability == "fsync"
        self._overwrite = overwrite
        self._in_place = in_place
        self._page_cache: Literal["auto", "keep", "drop"] = page_cache
        self._refusals = refusals
        self._part_size = None if part_size is None else min(part_size, _MOST_PART_BYTES)
        self._directories = Directories(self._disk, capability_cache)

    async def begin(self, location: Location, nbytes: int) -> LocalUpload:
        """Create the temporary file, and reserve its disk space; see ``Store.begin``."""
        upload = LocalUpload(
            location,
            nbytes,
            part_size=self._part_size,
            workers=self._workers,
            disk=self._disk,
            fsync=self._fsync,
            overwrite=self._overwrite,
            in_place=self._in_place,
            page_cache=self._page_cache,
            refusals=self._refusals,
            directories=self._directories,
        )
        async with aborted_on_error(upload):
            await self._workers.run(upload.start)
        return upload

    async def delete(self, location: Location) -> None:
        """Delete a file, a symlink (not its target) or a directory tree."""
        await self._workers.run(self._delete, location)

    async def exists(self, location: Location) -> bool:
        """Return whether anything is at *location*."""
        return await self._workers.run(os.path.exists, location.path)

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below a directory; see ``Store.list``."""
        listing = Listing(location, starting_with, self._disk)
        try:
            while page := await self._workers.run(listing.page):
                yield page
        finally:
            listing.close()

    async def source(self, location: Location) -> LocalSource:
        """Open the file for reading."""
        source = LocalSource(
            location, workers=self._workers, disk=self._disk, max_concurrent_reads=HALF_OF_THE_CPUS
        )
        try:
            await self._workers.run(self._open, source, location.path)
        except BaseException:
            source.close()
            raise
        return source

    async def aclose(self) -> None:
        """Do nothing: there is nothing to free."""

    def _open(self, source: LocalSource, path: str) -> None:
        for _ in range(_ATTEMPTS):
            with suppress(FileNotFoundError):
                return source.start()
            aside = self._directories.find_aside(path)
            if not aside:
                break
            with suppress(FileNotFoundError):
                return source.start(aside)
        source.start()  # it may have come back, or the new one to its place, since it was looked for

    def _delete(self, location: Location) -> None:
        refuse_foreign_link("delete", location)
        # A file that a dead process put aside must not get the free name back.
        self._directories.sweep(os.path.dirname(location.path))
        try:
            self._directories.give_up(location.path)
            found = self._disk.lstat(location.path)
            refuse_foreign_link(
                "delete", location
            )  # again: it may be there only because of a link put there just now
            if stat.S_ISREG(found.st_mode):
                self._disk.unlink(location.path)
                return
            with removing(location.path):  # a directory, or a link, maybe to one
                (self._disk.rmtree if stat.S_ISDIR(found.st_mode) else self._disk.unlink)(location.path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except StoreError:
            raise
        except OSError as error:
            advice = _NO_DELETING if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP) else ""
            raise translated("delete", location, error, advice) from error


def sync_path(path: str, disk: Disk | None = None) -> None:
    """Sync a file or a directory tree that somebody else wrote, so that it survives the loss of power (D1).

    Args:
        path: the file or directory; it need not exist.
        disk: the system calls themselves.

    Raises:
        OSError: it cannot be synced.
    """
    disk = disk or Disk()
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_file(disk, os.path.join(folder, name))
        with suppress(FileNotFoundError):
            disk.sync_directory(folder)
    if not os.path.isdir(path):
        _sync_file(disk, path)
    directories = Directories(disk)
    for each in {os.path.abspath(path), os.path.realpath(path)}:  # a link, and what it leads to
        with suppress(FileNotFoundError):
            directories.sync(os.path.dirname(each), each)


def _sync_file(disk: Disk, path: str) -> None:
    with suppress(FileNotFoundError):
        fd = disk.open_to_read(path)
        try:
            disk.fsync(fd)
        finally:
            disk.close(fd)
