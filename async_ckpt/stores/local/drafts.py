"""Where the bytes of one upload are until it is complete: in a temporary file beside the target, or under its name.

Guarantees of a ``TemporaryDraft``: until it is complete it is its owner's alone; then it has the permissions of the
file that it replaces, or those that ``open`` gives, and its name in one step, or by way of the earlier file's being put
aside (`move`). It is locked while its owner lives; whoever gets the lock may sweep it. What is given up of it is
removed; where that is refused, its bytes are.

Guarantees of an ``InPlaceDraft``, which the user has to allow: what was there is untouched until the first byte. After
a failure nothing is left under the name, or an empty file where it cannot be removed; after a kill, what had been
written.

What does not belong here: which of them it is to be (`ways`), and writing (`file`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from typing import Protocol

from async_ckpt.stores.base import Location, exists_already
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.local.file import LocalFile
from async_ckpt.stores.local.move import move_in
from async_ckpt.stores.local.places import Place
from async_ckpt.stores.local.target import refuse_foreign_file
from async_ckpt.stores.local.ways import is_refusal, refused_in_place
from async_ckpt.stores.locking import hold_fresh
from async_ckpt.system.permissions import REFUSALS

__all__ = ["Draft", "InPlaceDraft", "TemporaryDraft"]

_log = logging.getLogger("async_ckpt.stores.local")

_NO_HARD_LINKS = frozenset(
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK}
)


class Draft(Protocol):
    """What becomes the file at the target."""

    @property
    def path(self) -> str:
        """Where the bytes are."""

    def begin(self, nbytes: int) -> bool:
        """Open it; False if another process was faster to remove it, so that it has to be begun again."""

    def share(self) -> None:
        """Give the complete file the permissions that the user expects."""

    def settle(self) -> None:
        """Give the complete and sealed file its name."""

    def drop(self) -> None:
        """Close it and, unless it is settled, remove it; again and again does no harm."""


class TemporaryDraft:
    """A locked file of its own.

    Args:
        location: what it is to become.
        earlier: what is there.
        file: takes what is opened.
        disk: the system calls.
        place: what its directory refuses.
        overwrite: whether it may replace what is there.
    """

    def __init__(
        self,
        location: Location,
        earlier: os.stat_result | None,
        file: LocalFile,
        disk: Disk,
        *,
        place: Place,
        overwrite: bool,
    ) -> None:
        self._location = location
        self._target = location.path
        self._directory = os.path.dirname(location.path)
        self._earlier = earlier if earlier is not None and stat.S_ISREG(earlier.st_mode) else None
        self._file = file
        self._disk = disk
        self._place = place
        self._overwrite = overwrite
        self._mode: int | None = None  # of a new file
        self._complete: os.stat_result | None = None
        self._temporary: str | None = None

    @property
    def path(self) -> str:
        """Where the bytes are."""
        return self._temporary or self._target

    def begin(self, nbytes: int) -> bool:
        """Make the locked file, and reserve its room."""
        path = os.path.join(self._directory, temporary_name())
        fd = self._disk.create(path)
        self._temporary = path
        self._file.hold(fd)
        if not hold_fresh(self._disk, fd):
            self.drop()
            return False
        # Where nothing can be removed, one that only shows its mode would stay.
        if self._earlier is None and not self._place.unlink:
            self._mode = self._disk.mode_of_new(os.path.join(self._directory, temporary_name()))
        if not self._file.in_order:
            self._disk.preallocate(fd, nbytes)
        return True

    def share(self) -> None:
        """Give the complete file, until now its owner's alone, the permissions that the user expects."""
        try:
            now = self._disk.lstat(self._target)
        except FileNotFoundError:
            now = None
        model = now if now is not None and stat.S_ISREG(now.st_mode) else self._earlier
        if model is now is not None:
            refuse_foreign_file("commit", self._location, now)
        fd = self._file.descriptor()
        try:
            if model is not None:
                self._disk.take_after(fd, self._target, model)
            elif self._mode is not None:
                self._disk.take_mode(fd, self._mode)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            _log.warning(
                "only its owner may read %s, as its mode cannot be changed: %s", self._location.url, error
            )
        if self._file.in_order:  # it is closed before it moves
            self._complete = self._disk.fstat(fd)
        if now is not None and now.st_nlink > 1:
            others = now.st_nlink - 1
            _log.info("%s: %d other name(s) keep the earlier file", self._location.url, others)

    def settle(self) -> None:
        """Take the name."""
        temporary = self._temporary
        if temporary is None:
            raise OSError(errno.EBADF, "the upload has ended")
        if self._overwrite:
            replaces = not self._place.replace
            move_in(self._disk, temporary, self._target, landed=self._has_landed, replaces=replaces)
        else:
            self._link(temporary)
        self._temporary = None

    def drop(self) -> None:
        """Close it and, unless it has its name, remove it."""
        path, self._temporary = self._temporary, None
        # Unlinked while the lock is held: after the close, a sweeper may have it.
        if path is not None and self._is_removed(path, logs=False):
            path = None
        _quietly(self._location, self._file.close)
        if path is not None and not self._is_removed(path):  # some places remove no file that is open
            _quietly(self._location, self._disk.truncate, path)

    def _is_removed(self, path: str, *, logs: bool = True) -> bool:
        try:
            self._disk.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if logs:
                _log.warning("cleaning up after a save to %s: %s", self._location.url, error)
            return False
        return True

    def _link(self, temporary: str) -> None:
        """Take the name unless something has it, in one step where the file system has hard links."""
        try:
            self._disk.link(temporary, self._target)
        except OSError as error:
            if not self._has_landed():  # it may have, as by a rename (E3)
                if error.errno == errno.EEXIST or os.path.lexists(self._target):
                    raise exists_already("commit", self._location) from error
                if error.errno not in _NO_HARD_LINKS:
                    raise
                try:
                    self._disk.replace(temporary, self._target)
                except OSError:
                    if not self._has_landed():
                        raise
                return
        _quietly(self._location, self._disk.unlink, temporary)

    def _has_landed(self) -> bool:
        """Return whether the file has its name: a network file system may lose the answer alone (E3)."""
        try:
            own = self._complete or self._disk.fstat(self._file.descriptor())
            return os.path.samestat(self._disk.lstat(self._target), own)
        except OSError:
            return False


class InPlaceDraft:
    """The file at the target itself.

    Args:
        location: the target.
        file: takes what is opened.
        disk: the system calls.
        overwrite: whether it may replace what is there.
    """

    def __init__(self, location: Location, file: LocalFile, disk: Disk, *, overwrite: bool) -> None:
        self.path = location.path
        self._location = location
        self._file = file
        self._disk = disk
        self._overwrite = overwrite
        self._is_begun = False
        self._nbytes = 0

    def begin(self, nbytes: int) -> bool:
        """Let it be opened as the first byte comes."""
        self._nbytes = nbytes
        self._file.open_later(self._open)
        return True

    def share(self) -> None:
        """Do nothing: it has what ``open`` gives, or what it had."""

    def settle(self) -> None:
        """Let it stay."""
        self._is_begun = False

    def drop(self) -> None:
        """Close it and, unless it is settled, remove it."""
        is_torn, self._is_begun = self._is_begun, False
        _quietly(self._location, self._file.close)
        if is_torn:
            try:
                self._disk.unlink(self.path)
            except FileNotFoundError:
                pass
            except OSError:
                _quietly(self._location, self._disk.truncate, self.path)
            _log.warning("%s: a save in place has failed, and what was there is lost", self._location.url)

    def _open(self) -> int:
        if os.path.islink(self.path):  # not what it leads to is to be written to
            self._disk.unlink(self.path)
        fresh = not self._overwrite or not os.path.lexists(self.path)
        try:
            fd = self._disk.open_in_place(self.path, fresh=fresh)
        except FileExistsError:
            raise exists_already("write", self._location) from None
        except OSError as error:
            if not is_refusal(error.errno):
                raise
            raise refused_in_place(error) from error
        self._is_begun = True
        if not self._file.in_order:
            try:
                self._disk.preallocate(fd, self._nbytes)
            except OSError:
                self._disk.close(fd)
                raise
        return fd


def _quietly(location: Location, function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("cleaning up after a save to %s: %s", location.url, error)
