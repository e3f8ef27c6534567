"""A file on any file system that fsspec knows, open for reading.

Guarantees: where the file system is asynchronous, as HTTP is, ranges are read several at a time; elsewhere
through one handle, opened once, one read after the other. A server that sends the whole file whatever it is
asked for is served from memory.

fsspec has no notion of one version of a file. Some handles hold on to what they have opened; of a file read by
ranges, as others do behind their handles, length, time and tag are looked at after each of them, as far as the file
system tells them. Who loads a checkpoint compares checksums as well.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from fsspec.spec import AbstractBufferedFile

from async_ckpt.stores.base import Location
from async_ckpt.stores.scatter import Scatter

# What file systems call the things that change with a file's content.
_VERSION = (
    "size",
    "ETag",
    "etag",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "created",
    "mtime",
    "modified",
    "modificationTime",
    "modify",  # of FTP, as the next
    "unique",
    "ino",
    "generation",
)

# At a time from a handle, which holds it twice.
_READ_BYTES = 8 << 20
_LONGEST_RANGE_BYTES = 2 << 20

__all__ = ["HandleSource", "RangeSource", "Step"]


class Step(Protocol):
    """Calls a function that may be repeated in a worker, translating errors; again after transient ones."""

    def __call__(self, function: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        """Call *function*."""


class HandleSource:
    """A file behind one of fsspec's handles; see ``stores.base.Source``."""

    max_concurrent_reads: int | None = 1

    def __init__(self, file_system: Any, location: Location, step: Step) -> None:
        self.nbytes = 0
        self._fs = file_system
        self._location = location
        self._step = step
        self._handle: Any = None
        self._version: list[Any] | None = None

    def start(self) -> None:
        """Open the file; blocks. Whoever calls this must close if it raises."""
        self._close()  # what an earlier attempt has opened
        self._handle = handle = self._fs.open(self._location.path, "rb")
        if isinstance(handle, io.BytesIO):
            # The memory file system gives every reader the same object, and with it one position.
            self._handle = handle = io.BytesIO(handle.getvalue())
        elif isinstance(handle, AbstractBufferedFile):  # asks for ranges, by the name
            self._version = _version_of(self._fs, self._location.path)
        handle.seek(0, io.SEEK_END)
        # Not what seek returns, which over SFTP is nothing; and 0 may mean there that it could not be told.
        self.nbytes = handle.tell() or _info(self._fs, self._location.path).get("size") or 0

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* from the file."""
        await self._step(self._read_into, start, targets)

    async def aclose(self) -> None:
        """Close the handle."""
        if self._handle is not None:
            await self._step(self._close)

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def _read_into(self, start: int, targets: Sequence[memoryview]) -> None:
        if self._handle is None:
            raise OSError(errno.EBADF, "the file has been closed")
        self._handle.seek(start)
        scatter = Scatter(targets)
        while scatter.left:
            data = self._handle.read(min(scatter.left, _READ_BYTES))
            if not data:
                raise OSError(errno.EIO, "it has become shorter while it was read")
            scatter.take(data)
        if self._version is not None and _version_of(self._fs, self._location.path) != self._version:
            raise _replaced()


class RangeSource:
    """A file that is asked for by ranges; see ``stores.base.Source``."""

    max_concurrent_reads: int | None = 4  # each holds a range in memory, maybe twice

    def __init__(self, file_system: Any, location: Location, step: Step) -> None:
        self.nbytes = 0
        self._fs = file_system
        self._location = location
        self._step = step
        self._version: list[Any] = []
        self._whole: memoryview | None = None

    def start(self) -> None:
        """Learn the length of the file; blocks."""
        info = _info(self._fs, self._location.path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self._version = _version(info)
        self.nbytes = info.get("size") or 0
        if info.get("size") is None or not info.get("partial", True):
            self._keep(self._fs.cat_file(self._location.path))

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* with a range of the file."""
        if any(target.nbytes for target in targets):
            await self._step(self._read_into, start, targets)

    async def aclose(self) -> None:
        """Forget what was kept."""
        self._whole = None

    def _read_into(self, start: int, targets: Sequence[memoryview]) -> None:
        scatter = Scatter(targets)
        while self._whole is None and scatter.left:
            begin = start + scatter.done
            wanted = min(scatter.left, _LONGEST_RANGE_BYTES)
            data = self._fs.cat_file(self._location.path, start=begin, end=begin + wanted)
            if len(data) == wanted:
                scatter.take(data)
            elif len(data) == self.nbytes:
                self._keep(data)  # from a server that knows no ranges
            else:
                raise OSError(errno.EIO, f"{len(data)} bytes came instead of {wanted}")
        if self._whole is not None:
            scatter.take(self._whole[start + scatter.done :])
        elif _version_of(self._fs, self._location.path) != self._version:
            raise _replaced()

    def _keep(self, data: bytes) -> None:
        self._whole = memoryview(data)
        self.nbytes = len(data)


def _info(file_system: Any, path: str) -> dict[str, Any]:
    file_system.invalidate_cache()
    return dict(file_system.info(path))


def _version(info: dict[str, Any]) -> list[Any]:
    return [info.get(key) for key in _VERSION]


def _version_of(file_system: Any, path: str) -> list[Any]:
    return _version(_info(file_system, path))


def _replaced() -> OSError:
    return OSError(errno.ESTALE, "it was replaced while it was read")
