"""Reads a file on any file system that fsspec knows.

Guarantees: on an asynchronous file system, such as HTTP, ranges are read concurrently; on others, through one handle,
one after the other, which is reopened if its connection is lost. If a server ignores ranges and sends the whole file,
that is kept in memory.

fsspec has no versions of files. Some handles keep the file that they opened. For a file read by ranges, as some handles
do internally, length, time and tag are checked after each range, if the file system reports them. Loading a checkpoint
verifies checksums as well.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

from fsspec.spec import AbstractBufferedFile

from async_ckpt.stores.base import Location
from async_ckpt.stores.fsspec_calls import info_of_file, version_in
from async_ckpt.stores.scatter import Scatter

# The largest read of a handle, which holds the bytes twice.
_READ_BYTES = 8 << 20
_LONGEST_RANGE_BYTES = 2 << 20

__all__ = ["HandleSource", "RangeSource", "Step"]


class Step(Protocol):
    """Calls a repeatable function in a worker, translates its errors, and repeats it after transient ones."""

    def __call__(
        self, function: Callable[..., Any], /, *args: Any, position: Callable[[], int] = int
    ) -> Awaitable[Any]:
        """Call *function*; when *position* has changed, attempts and time are counted anew."""


class HandleSource:
    """A file that is read through one of fsspec's handles; see ``stores.base.Source``."""

    max_concurrent_reads: int | None = 1

    def __init__(
        self,
        file_system: Callable[[], Any],
        location: Location,
        step: Step,
        let_go: Callable[[Any, Callable[[], object]], Awaitable[None]],
    ) -> None:
        self.nbytes = 0
        self._connected = file_system
        self._location = location
        self._step = step
        self._let_go = let_go
        self._fs: Any = None  # on which the handle was opened
        self._handle: Any = None
        self._version: list[Any] = []
        self._is_closed = False

    def start(self) -> None:
        """Open the file; blocks. The caller must close the source if this raises."""
        self._version, self.nbytes = self._open()

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* from the file."""
        scatter = Scatter(targets)
        await self._step(self._read_into, start, scatter, position=lambda: scatter.done)

    async def aclose(self) -> None:
        """Close the handle."""
        self._is_closed = True
        if self._handle is not None:
            await self._let_go(self._fs, self._close)

    def _open(self) -> tuple[list[Any], int]:
        """Open the file on the present connection, and return its version and length."""
        with suppress(Exception):  # of an earlier attempt, or connection
            self._close()
        self._fs = self._connected()
        version = _version_of(self._fs, self._location.path)  # first: it must not be that of a later file
        self._handle = handle = self._fs.open(self._location.path, "rb")
        if isinstance(handle, io.BytesIO):
            # The memory file system gives all readers the same object, with one position.
            self._handle = handle = io.BytesIO(handle.getvalue())
        handle.seek(0, io.SEEK_END)
        # Not the result of seek, which is None over SFTP; and there, 0 may mean that the length is unknown.
        return version, handle.tell() or info_of_file(self._fs, self._location.path).get("size") or 0

    def _open_again(self) -> None:
        """Open the file on another connection, if it is still the same file."""
        try:
            same = self._open() == (self._version, self.nbytes)
        except FileNotFoundError as error:
            raise _replaced() from error
        if not same:
            with suppress(Exception):
                self._close()  # no later read may be of it
            raise _replaced()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def _read_into(self, start: int, scatter: Scatter) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, "the file has been closed")
        if self._handle is None or self._fs is not self._connected():
            self._open_again()
        self._handle.seek(start + scatter.done)
        while scatter.left:
            data = self._handle.read(min(scatter.left, _READ_BYTES))
            if not data:
                # Fails if the connection is lost, which paramiko's handles take for the end of the file.
                info_of_file(self._fs, self._location.path)
                raise OSError(errno.EIO, "it has become shorter while it was read")
            scatter.take(data)
        # A handle that requests ranges by name does not keep the file that it opened.
        if isinstance(self._handle, AbstractBufferedFile) and (
            _version_of(self._fs, self._location.path) != self._version
        ):
            raise _replaced()


class RangeSource:
    """A file that is read by ranges; see ``stores.base.Source``."""

    max_concurrent_reads: int | None = 4  # each holds a range in memory, maybe twice

    def __init__(self, file_system: Any, location: Location, step: Step) -> None:
        self.nbytes = 0
        self._fs = file_system
        self._location = location
        self._step = step
        self._version: list[Any] = []
        self._whole: memoryview | None = None

    def start(self) -> None:
        """Get the length of the file; blocks."""
        info = info_of_file(self._fs, self._location.path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self._version = version_in(info)
        self.nbytes = info.get("size") or 0
        if info.get("size") is None or not info.get("partial", True):
            self._keep(self._fs.cat_file(self._location.path))

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* with a range of the file."""
        if any(target.nbytes for target in targets):
            scatter = Scatter(targets)
            await self._step(self._read_into, start, scatter, position=lambda: scatter.done)

    async def aclose(self) -> None:
        """Free the file's content, if it was kept."""
        self._whole = None

    def _read_into(self, start: int, scatter: Scatter) -> None:
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


def _version_of(file_system: Any, path: str) -> list[Any]:
    return version_in(info_of_file(file_system, path))


def _replaced() -> OSError:
    return OSError(errno.ESTALE, "it was replaced while it was read")
