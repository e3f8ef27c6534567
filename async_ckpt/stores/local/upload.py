"""The upload of one file to a local or mounted file system.

Guarantees, beyond those of every upload:

* The bytes are written to a temporary file beside the target, which then replaces the target by the safest strategy
  that the directory supports (D2). The strategy is chosen before the first byte; without one, the save fails then. Only
  if there is no other way, and the user allows it, the target is written in place. If the location is a symlink itself,
  the link is replaced.
* ``durability="fsync"``: when ``commit`` returns, the file, its name and the directories on its path survive the loss
  of power (D1), as far as the file system can sync. ``"process"`` leaves that to the kernel.
* ``page_cache``: how the bytes get there; they are the same.
* ``overwrite=False``: the file gets its name by a hard link, which fails if the name is taken. Without hard links, the
  name is checked before the rename: of two writers at that instant, the later one wins.

If ``commit`` fails, the old file is in place and whole, unless the error says otherwise: if the rename succeeded and
only the directory could not be synced, the *new* file is in place and whole, but may be lost with the power. Neither is
ever torn.

What does not belong here: the system calls (`disk`), the directories (`directories`), the choice of the strategy
(`strategy`), the output file (`output`), and direct I/O (`direct`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers, exists_already
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.direct import Refusals, is_worthwhile
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.local.file import LocalFile
from async_ckpt.stores.local.output import InPlaceOutput, Output, TemporaryOutput
from async_ckpt.stores.local.strategy import (
    Existing,
    NoStrategyError,
    choose_strategy,
    is_of_another,
    is_refusal,
    late_advice,
    refusal_to_replace,
)
from async_ckpt.stores.local.target import check_local_target, refuse_foreign_link, translated
from async_ckpt.stores.removed_directories import refuse_removed_directory

__all__ = ["HALF_OF_THE_CPUS", "LocalUpload"]

# Another process may remove a directory or a new file of ours before we hold it, but not again and again.
_BEGIN_ATTEMPTS = 10
_CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
HALF_OF_THE_CPUS = max(1, _CPUS // 2)
# Past the page cache, parts wait for the disk and not for a CPU: one is filled while another is written.
_DIRECT_PARTS = min(max(2, HALF_OF_THE_CPUS), 8)


class LocalUpload:
    """The upload of one file; made by ``LocalStore.begin``."""

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
        page_cache: Literal["auto", "keep", "drop"],
        refusals: Refusals,
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
        self._page_cache = page_cache
        self._refusals = refusals
        self._directories = directories
        self._directory = os.path.dirname(location.path)
        self._made: list[str] = []  # directories, outermost first
        self._file = LocalFile(disk, nbytes, fsync=fsync, drop=page_cache == "drop")
        self._output: Output | None = None

    async def put(self, part: Part, content: Content) -> Receipt:
        """Write one part at its offset."""
        return await self._workers.run(self._write, part, content)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Sync the file, rename it, and sync the directory; see the module about failures in between."""
        await self._workers.run(self._commit)

    async def abort(self) -> None:
        """Remove the temporary file, and empty directories that were made for it."""
        await self._workers.run(self._clean)

    def start(self) -> None:
        """Begin the upload. The caller must abort it if this raises."""
        with self._translating("begin"):
            earlier = check_local_target(self._location, self._disk, in_place=self._in_place)
            if earlier is not None and not self._overwrite:  # sooner than after gigabytes
                raise exists_already("begin", self._location)
            refuse_removed_directory(self._location)
            self._begin(earlier)
        self.swept = self._directories.sweep(self._directory)

    def _begin(self, earlier: os.stat_result | None) -> None:
        """Make missing directories, and begin the output file."""
        for _ in range(_BEGIN_ATTEMPTS):
            try:
                made = self._directories.make(
                    self._directory, lambda: refuse_foreign_link("begin", self._location)
                )
                self._made += made
                self._output = self._choose_output(earlier, made)
                if self._output.begin(self._nbytes):
                    self._write_directly(self._output)
                    return
            except FileNotFoundError:  # another upload's abort took a directory away, or somebody else
                refuse_removed_directory(self._location)
                if self._output is not None:
                    self._output.drop()
        raise OSError(errno.EBUSY, "what is made there vanishes at once")

    def _choose_output(self, earlier: os.stat_result | None, made: list[str]) -> Output:
        """Return the output file, by the safest strategy that the directory supports."""
        capabilities = self._directories.capabilities(self._directory, made)
        strategy = choose_strategy(capabilities, self._found(earlier), in_place=self._in_place)
        self._file.in_order = strategy.in_order
        if strategy.in_order:
            self.max_concurrent_parts = 1
        if strategy.in_place:
            return InPlaceOutput(self._location, self._file, self._disk, overwrite=self._overwrite)
        return TemporaryOutput(
            self._location,
            earlier,
            self._file,
            self._disk,
            capabilities=capabilities,
            overwrite=self._overwrite,
        )

    def _write_directly(self, output: Output) -> None:
        """Have the file written past the page cache, if that is wanted and possible."""
        if self._file.in_order or not isinstance(output, TemporaryOutput):
            return
        if not is_worthwhile(self._page_cache, self._nbytes, fsync=self._fsync):
            return
        untold = self._page_cache == "drop"
        direct = self._refusals.open(output.path, self._file.descriptor(), self._disk, untold=untold)
        if direct is not None:
            self._file.hold_direct(direct)
            self.max_concurrent_parts = _DIRECT_PARTS

    def _found(self, earlier: os.stat_result | None) -> Existing:
        if earlier is None:
            return Existing()
        if self._disk.is_mount(self._location.path):
            return Existing(taken=True, fixed=errno.EBUSY)
        if not is_of_another(earlier):
            return Existing(taken=True)
        return Existing(taken=True, fixed=refusal_to_replace(earlier, self._disk.stat(self._directory)))

    def _write(self, part: Part, content: Content) -> Receipt:
        with self._translating("write"):
            self._file.write(part, content)
        return Receipt(index=part.index)

    def _commit(self) -> None:
        with self._translating("commit"):
            if self._output is None:
                raise OSError(errno.EBADF, "the upload has ended")
            self._file.check_complete()
            self._output.share()
            self._file.seal()
            if self._file.in_order and (size := self._disk.lstat(self._output.path).st_size) != self._nbytes:
                raise OSError(errno.EIO, f"it has {size} bytes after {self._nbytes} were written")
            self._output.settle()
            self._made.clear()
        if self._fsync:
            advice = "The new file is in place and whole, but might not survive a loss of power."
            with self._translating("commit", advice):
                self._directories.sync(self._directory, self._location.path)
        self._clean()

    def _clean(self) -> None:
        """Close the file, and remove it unless it has its name. Idempotent."""
        if self._output is not None:
            self._output.drop()
        self._directories.unmake(self._made)

    @contextmanager
    def _translating(self, stage: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except NoStrategyError as error:
            raise translated(stage, self._location, error, error.advice) from error
        except OSError as error:
            if stage != "begin" and not advice and is_refusal(error.errno):
                advice = late_advice(stage)
                self._directories.forget(self._directory)
            raise translated(stage, self._location, error, advice) from error
