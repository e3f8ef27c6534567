"""A disk on which chosen operations are refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.capabilities import UNRESTRICTED, Capabilities


class Refusing(Disk):
    """A disk that refuses what a place does.

    Args:
        place: what it refuses.

    Attributes:
        written: how many bytes have been.
    """

    def __init__(self, place: Capabilities) -> None:
        self.place = place
        self.written = 0
        self.calls: list[str] = []

    def create(self, path: str) -> int:
        self._refuse(self.place.create)
        return super().create(path)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        if offset != os.fstat(fd).st_size:
            self._refuse(self.place.offset)
        done = super().write(fd, pieces, offset)
        self.written += done
        return done

    def preallocate(self, fd: int, nbytes: int) -> None:
        if self.place.offset:
            raise AssertionError("it would be longer than what has been written")

    def replace(self, source: str, target: str) -> None:
        self.calls.append("replace")
        self._refuse(self.place.replace if os.path.lexists(target) else self.place.rename)
        super().replace(source, target)

    def link(self, source: str, target: str) -> None:
        self._refuse(errno.EPERM)

    def unlink(self, path: str) -> None:
        self._refuse(self.place.unlink)
        super().unlink(path)

    def _refuse(self, number: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))


REFUSALS = [
    UNRESTRICTED,
    Capabilities(offset=errno.EINVAL),
    Capabilities(replace=errno.EEXIST),
    Capabilities(replace=errno.EIO, offset=errno.EIO),
    Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS),
    Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS, unlink=errno.EPERM, offset=errno.EINVAL),
    Capabilities(replace=errno.EPERM, unlink=errno.EPERM),
    Capabilities(create=errno.EROFS),
]
