"""One file on its way to a local, or mounted, file system.

Guarantees, beyond those of every upload:

* The bytes go to a temporary file beside the target, which then takes the target's place by the safest way that the
  directory has (D2); that is known before the first byte, and a save that has none ends there. Only where there is no
  other way, and the user allows it, they go right under the name. Where the location is that of a symlink itself, it
  is the link that is replaced.
* ``durability="fsync"``: ``commit`` returns once the file, its name and the directories that lead to it
  would survive the loss of power (D1), as far as the file system can sync. ``"process"`` leaves that to the kernel.
* ``overwrite=False``: the file takes its name by a hard link, which fails if the name is taken. Where there
  are no hard links, it looks and then renames: of two writers in that instant, the later one wins.

When ``commit`` fails, the old file is in place and whole, except where the error says otherwise: if the
rename succeeded and only the directory could not be synced, the *new* file is in place and whole, but
might not be after a loss of power. Neither is ever torn.

What does not belong here: the system calls (`disk`), the directories on the way (`directories`), the ways (`ways`), and
what becomes of the bytes in each (`drafts`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers, exists_already
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.local.drafts import Draft, InPlaceDraft, TemporaryDraft
from async_ckpt.stores.local.file import LocalFile
from async_ckpt.stores.local.target import check_local_target, refuse_foreign_link, translated
from async_ckpt.stores.local.ways import (
    Found,
    WayRefused,
    choose,
    is_of_another,
    is_refusal,
    late_advice,
    refusal_to_replace,
)
from async_ckpt.stores.vanished import refuse_vanished

__all__ = ["HALF_OF_THE_CPUS", "LocalUpload"]

# Another process may remove a directory or a fresh file of ours in the moment before we hold it; that
# cannot go on for long.
_BEGIN_ATTEMPTS = 10
_CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
HALF_OF_THE_CPUS = max(1, _CPUS // 2)


class LocalUpload:
    """One file on its way to becoming the target; made by ``LocalStore.begin``."""

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
        in_place: bool,
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
        self._in_place = in_place
        self._directories = directories
        self._directory = os.path.dirname(location.path)
        self._made: list[str] = []  # directories, outermost first
        self._file = LocalFile(disk, nbytes, fsync=fsync)
        self._draft: Draft | None = None

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
        """Begin the upload. The caller must abort it if this raises."""
        with self._translating("begin"):
            earlier = check_local_target(self._location, self._disk, in_place=self._in_place)
            if earlier is not None and not self._overwrite:  # sooner than after gigabytes
                raise exists_already("begin", self._location)
            refuse_vanished(self._location)
            self._begin(earlier)
        self.swept = self._directories.sweep(self._directory)

    def _begin(self, earlier: os.stat_result | None) -> None:
        """Make the directories on the way, and begin what the bytes go to."""
        for _ in range(_BEGIN_ATTEMPTS):
            try:
                made = self._directories.make(
                    self._directory, lambda: refuse_foreign_link("begin", self._location)
                )
                self._made += made
                self._draft = self._drafted(earlier, made)
                if self._draft.begin(self._nbytes):
                    return
            except FileNotFoundError:  # another upload's abort took a directory away, or somebody else
                refuse_vanished(self._location)
                if self._draft is not None:
                    self._draft.drop()
        raise OSError(errno.EBUSY, "what is made there vanishes at once")

    def _drafted(self, earlier: os.stat_result | None, made: list[str]) -> Draft:
        """Return what the bytes will go to, by the safest way that the place has."""
        place = self._directories.place(self._directory, made)
        way = choose(place, self._found(earlier), in_place=self._in_place)
        self._file.in_order = way.in_order
        if way.in_order:
            self.max_concurrent_parts = 1
        if way.in_place:
            return InPlaceDraft(self._location, self._file, self._disk, overwrite=self._overwrite)
        return TemporaryDraft(
            self._location, earlier, self._file, self._disk, place=place, overwrite=self._overwrite
        )

    def _found(self, earlier: os.stat_result | None) -> Found:
        if earlier is None:
            return Found()
        if self._disk.is_mount(self._location.path):
            return Found(taken=True, fixed=errno.EBUSY)
        if not is_of_another(earlier):
            return Found(taken=True)
        return Found(taken=True, fixed=refusal_to_replace(earlier, self._disk.stat(self._directory)))

    def _write(self, part: Part, content: Content) -> Receipt:
        pieces = content.read(part.start, part.stop)
        with self._translating("write"):
            self._file.write(part, pieces)
        return Receipt(index=part.index)

    def _commit(self) -> None:
        with self._translating("commit"):
            if self._draft is None:
                raise OSError(errno.EBADF, "the upload has ended")
            self._file.check_complete()
            self._draft.share()
            self._file.seal()
            if self._file.in_order and (size := self._disk.lstat(self._draft.path).st_size) != self._nbytes:
                raise OSError(errno.EIO, f"it has {size} bytes after {self._nbytes} were written")
            self._draft.settle()
            self._made.clear()
        if self._fsync:
            advice = "The new file is in place and whole, but might not survive a loss of power."
            with self._translating("commit", advice):
                self._directories.sync(self._directory, self._location.path)
        self._clean()

    def _clean(self) -> None:
        """Close and remove what there is; again and again does no harm."""
        if self._draft is not None:
            self._draft.drop()
        self._directories.unmake(self._made)

    @contextmanager
    def _translating(self, stage: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except WayRefused as error:
            raise translated(stage, self._location, error, error.advice) from error
        except OSError as error:
            if stage != "begin" and not advice and is_refusal(error.errno):
                advice = late_advice(stage)
                self._directories.forget(self._directory)
            raise translated(stage, self._location, error, advice) from error
