"""The output file of one upload: a temporary file beside the target, or the target itself.

Guarantees of a ``TemporaryOutput``: it is private until it is complete; then it gets the permissions of the file that
it replaces, or of a new file, and its name: in one step, or after the earlier file is put aside (`move`). It is locked
while its owner lives; any process that gets the lock may sweep it. It is removed after a failure, or truncated if it
cannot be removed.

Guarantees of an ``InPlaceOutput``, which the user has to allow: an earlier file is untouched until the first byte.
After a failure, the name is gone, or an empty file if it cannot be removed; after a kill, the file is torn.

What does not belong here: the choice between them (`strategy`), and writing (`file`).
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
from async_ckpt.stores.local.capabilities import Capabilities
from async_ckpt.stores.local.file import LocalFile
from async_ckpt.stores.local.move import move_in
from async_ckpt.stores.local.strategy import is_refusal, refused_in_place
from async_ckpt.stores.local.target import refuse_foreign_file
from async_ckpt.stores.locking import hold_fresh
from async_ckpt.system.permissions import REFUSALS

__all__ = ["InPlaceOutput", "Output", "TemporaryOutput"]

_log = logging.getLogger("async_ckpt.stores.local")

_NO_HARD_LINKS = frozenset(
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK}
)


class Output(Protocol):
    """The file that becomes the target."""

    @property
    def path(self) -> str:
        """Where the bytes are."""

    def begin(self, nbytes: int) -> bool:
        """Open it; return False if another process has removed it at once, so that it has to be begun again."""

    def share(self) -> None:
        """Set the permissions of the complete file."""

    def settle(self) -> None:
        """Give the complete and synced file its name."""

    def drop(self) -> None:
        """Close it, and remove it unless it is settled. Idempotent."""


class TemporaryOutput:
    """A locked temporary file.

    Args:
        location: its final location.
        earlier: the status of the earlier file.
        file: writes to the opened file.
        disk: the system calls.
        capabilities: the capabilities of its directory.
        overwrite: whether it may replace an existing file.
    """

    def __init__(
        self,
        location: Location,
        earlier: os.stat_result | None,
        file: LocalFile,
        disk: Disk,
        *,
        capabilities: Capabilities,
        overwrite: bool,
    ) -> None:
        self._location = location
        self._target = location.path
        self._directory = os.path.dirname(location.path)
        self._earlier = earlier if earlier is not None and stat.S_ISREG(earlier.st_mode) else None
        self._file = file
        self._disk = disk
        self._capabilities = capabilities
        self._overwrite = overwrite
        self._mode: int | None = None  # of a new file
        self._complete: os.stat_result | None = None
        self._temporary: str | None = None

    @property
    def path(self) -> str:
        """Where the bytes are."""
        return self._temporary or self._target

    def begin(self, nbytes: int) -> bool:
        """Create and lock the file, and reserve its disk space."""
        path = os.path.join(self._directory, temporary_name())
        fd = self._disk.create(path)
        self._temporary = path
        self._file.hold(fd)
        if not hold_fresh(self._disk, fd):
            self.drop()
            return False
        # A file that only serves to find out the mode would stay where nothing can be removed.
        if self._earlier is None and not self._capabilities.unlink:
            self._mode = self._disk.default_mode(os.path.join(self._directory, temporary_name()))
        if not self._file.in_order:
            self._disk.preallocate(fd, nbytes)
        return True

    def share(self) -> None:
        """Set the permissions of the complete file, which has been private until now."""
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
                self._disk.copy_metadata(fd, self._target, model)
            elif self._mode is not None:
                self._disk.set_mode(fd, self._mode)
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
            _log.info("%s: the earlier file remains under %d other name(s)", self._location.url, others)

    def settle(self) -> None:
        """Give the file its name."""
        temporary = self._temporary
        if temporary is None:
            raise OSError(errno.EBADF, "the upload has ended")
        if self._overwrite:
            replaces = not self._capabilities.replace
            move_in(self._disk, temporary, self._target, landed=self._has_landed, replaces=replaces)
        else:
            self._link(temporary)
        self._temporary = None

    def drop(self) -> None:
        """Close it, and remove it unless it has its name."""
        path, self._temporary = self._temporary, None
        # Unlink it while the lock is held: after the close, a sweeper may take it.
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
        """Give the file its name unless it is taken, in one step if the file system has hard links."""
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
        """Return whether the file has its name: a network file system may have lost only the answer (E3)."""
        try:
            own = self._complete or self._disk.fstat(self._file.descriptor())
            return os.path.samestat(self._disk.lstat(self._target), own)
        except OSError:
            return False


class InPlaceOutput:
    """The target itself, written in place.

    Args:
        location: the target.
        file: writes to the opened file.
        disk: the system calls.
        overwrite: whether it may replace an existing file.
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
        """Have the file opened with the first byte."""
        self._nbytes = nbytes
        self._file.open_later(self._open)
        return True

    def share(self) -> None:
        """Do nothing: it has the permissions of a new file, or those it had."""

    def settle(self) -> None:
        """Keep the file."""
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
            _log.warning("%s: a save in place failed, and the earlier file is lost", self._location.url)

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
