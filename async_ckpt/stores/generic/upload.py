"""The upload of one file to any file system that fsspec knows.

Guarantees: the bytes are written to a temporary file beside the target, which is then moved (`move`). An incomplete
handle is discarded, and never closed if closing would commit it (D2).

Parts are written in order, as fsspec's handles demand. No part is repeated, as nobody knows which bytes a failed handle
has taken; the writer begins the whole file again. So the handle is closed with the last part, which may send buffered
bytes. Later steps are repeated here, on a new connection if necessary (E3).
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import fsspec.spec

from async_ckpt.errors import TransientStoreError
from async_ckpt.stores.base import Content, Location, Part, Receipt, exists_already
from async_ckpt.stores.fsspec_calls import (
    info_of,
    marks_lost,
    mode_of,
    remove_empty_directory,
    remove_file,
    set_mode,
    translating,
)
from async_ckpt.stores.generic.move import Move
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.telemetry.patience import moved

__all__ = ["GenericUpload"]

_log = logging.getLogger("async_ckpt.stores.generic")

P = ParamSpec("P")
T = TypeVar("T")

_WRITE_BYTES = 4 << 20  # at a time: on a slow line, whoever waits sees that something moves


class Calls(Protocol):
    """The store's methods that an upload needs.

    Attributes:
        overwrite: whether a commit may replace an existing file.
    """

    overwrite: bool

    @property
    def file_system(self) -> Any:
        """The file system; replaced after its connection is lost."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function*, which does not use the file system, in a worker."""

    async def once(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Connect if necessary, and call *function* in a worker."""

    async def step(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker, and repeat it as a whole after transient errors."""

    async def let_go(self, file_system: Any, function: Callable[[], object]) -> None:
        """Call *function*, which frees a handle of *file_system*, in a worker; log errors."""

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove leftovers of dead processes in *directory*, once."""


class GenericUpload:
    """The upload of one file; made by ``GenericStore.begin``."""

    part_size = None
    max_concurrent_parts = 1
    is_paced = False

    def __init__(self, store: Calls, location: Location, nbytes: int) -> None:
        self.swept: tuple[str, ...] = ()
        self._store = store
        self._location = location
        self._nbytes = nbytes
        self._directory = posixpath.dirname(location.path)
        self._temporary = posixpath.join(self._directory, temporary_name())
        self._move: Move | None = None  # until it has begun
        self._handle: Any = None
        self._handle_fs: Any = None  # on which it was opened
        self._mode: int | None = None  # of a new file
        self._position = 0
        self._broken = False  # or ended
        self._takes_views = True
        self._made: list[str] = []

    async def put(self, part: Part, content: Content) -> Receipt:
        """Write the next part."""
        pieces = await self._store.run(content.read, part.start, part.stop)
        return await self._store.once(self._write, part, pieces)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Check the length, and move the file."""
        await self._store.step(self._settle)
        self._made.clear()
        await self.abort()  # a move may leave its source

    async def abort(self) -> None:
        """Discard the handle, and remove the temporary file."""
        if self._move is None:
            return
        await self._store.let_go(self._handle_fs, self._throw_away)
        try:
            await self._store.step(self._clean, self._move)
        except Exception as error:
            told = "; ".join(filter(None, [str(error), self._move.left_aside]))
            _log.warning(
                "cleaning up after a save to %s: %s", self._location.url, self._location.redacted(told)
            )

    def start(self) -> None:
        """Begin the upload. The caller must abort it if this raises."""
        with translating("begin", self._location):
            self._move = Move(self._temporary, self._location.path, self._nbytes)
            self._refuse_to_replace("begin")
            self._open()
            self._keep_private()
            if self._is_directory(self._location.path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self.swept = self._store.sweep(self._directory)

    @property
    def _fs(self) -> Any:
        return self._store.file_system

    def _open(self) -> None:
        self._handle_fs = self._fs
        try:
            self._handle = self._fs.open(self._temporary, "wb")
        except FileNotFoundError:
            self._make_directories()
            self._handle = self._fs.open(self._temporary, "wb")
        else:
            # FTP and the like need the directory only when the first block is sent. Object stores have no directories,
            # and some would create a bucket.
            if not self._fs.async_impl:
                self._make_directories()

    def _keep_private(self) -> None:
        """Make the file private, if the file system supports it."""
        self._mode = mode_of(self._fs, self._temporary)
        if self._mode is not None:
            set_mode(self._fs, self._temporary, 0o600)

    def _share(self) -> None:
        """Give the complete file the mode of the file that it replaces, or of a new file."""
        if self._mode is not None:
            earlier = mode_of(self._fs, self._location.path)
            set_mode(self._fs, self._temporary, self._mode if earlier is None else earlier)

    def _make_directories(self) -> None:
        missing = []
        directory = self._directory
        while directory.strip("/") and not self._is_directory(directory):
            missing.append(directory)
            directory = posixpath.dirname(directory)
        self._made += reversed(missing)
        for left in reversed(range(len(missing))):
            try:
                self._fs.makedirs(self._directory, exist_ok=True)
            except (
                Exception
            ):  # another process made one of them meanwhile, which not every file system allows for
                if self._is_directory(self._directory):
                    return
                if not left:
                    raise
            else:
                return

    def _is_directory(self, path: str) -> bool:
        found = info_of(self._fs, path)
        return found is not None and found["type"] == "directory"

    def _write(self, part: Part, pieces: Sequence[memoryview]) -> Receipt:
        with translating("write", self._location):
            if self._broken:
                raise OSError(errno.EIO, "an earlier part failed, and a stream cannot seek back")
            if part.start != self._position or self._handle is None:
                raise OSError(errno.EINVAL, "parts must be put once, and in order")
            try:
                if self._handle_fs is not self._fs:  # not a ConnectionError, as the present connection works
                    lost = f"cannot write {self._location.url!r}: the connection on which the file was begun was lost"
                    raise TransientStoreError(lost, location=self._location.url, stage="write")
                for piece in pieces:
                    self._write_piece(piece.cast("B"))
                if self._position != part.stop:
                    raise OSError(errno.EIO, f"part {part.index} does not have {part.nbytes} bytes")
                if self._position == self._nbytes:
                    self._handle.close()
                    self._handle = None
            except BaseException:
                self._broken = True
                raise
        return Receipt(index=part.index)

    def _write_piece(self, piece: memoryview) -> None:
        while piece.nbytes:
            try:
                some = piece[:_WRITE_BYTES]
                written = self._handle.write(some if self._takes_views else bytes(some))
            except TypeError:
                if not self._takes_views:
                    raise
                self._takes_views = False
                continue
            written = written if isinstance(written, int) else some.nbytes
            moved()
            if written <= 0:
                raise OSError(errno.EIO, "the handle accepts no bytes")
            self._position += written
            piece = piece[written:]

    def _settle(self) -> None:
        with translating("commit", self._location):
            if (
                self._move is None
                or self._handle is not None
                or self._broken
                or self._position != self._nbytes
            ):
                raise OSError(errno.EINVAL, "not every byte was put")
            if not self._move.begun:
                self._refuse_to_replace("commit")
                self._share()
            self._move.go(self._fs)

    def _refuse_to_replace(self, stage: str) -> None:
        if not self._store.overwrite and info_of(self._fs, self._location.path) is not None:
            raise exists_already(stage, self._location)

    def _clean(self, move: Move) -> None:
        with translating("abort", self._location):
            try:
                move.tidy(self._fs)  # first, as all that was there before may be aside (D2)
            except Exception as error:
                if not marks_lost(error):  # or else nothing works before it is connected again
                    self._remove_temporary()
                raise
            self._remove_temporary()
        while self._made:
            directory = self._made.pop()
            try:
                remove_empty_directory(self._fs, directory)
            except Exception as error:
                _log.debug("%s", self._location.redacted(f"left the directory {directory}: {error}"))

    def _remove_temporary(self) -> None:
        if info_of(self._fs, self._temporary) is not None:
            remove_file(self._fs, self._temporary)

    def _throw_away(self) -> None:
        """Free the handle, but never by a close that commits."""
        self._broken = True
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.discard()
        finally:
            if isinstance(handle, fsspec.spec.AbstractBufferedFile):
                handle.closed = True  # or else __del__ sends what there is, and commits
            else:
                handle.close()  # a plain file: all that this completes is the temporary name
