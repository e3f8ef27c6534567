"""Checkpoints on any file system that fsspec knows, through its synchronous interface in workers.

Guarantees, beyond those of every store:

* The bytes go to a temporary name beside the target, which is then moved. How atomic the move is, is up
  to the file system; where it refuses to replace a file, the old one is first moved aside, to
  ``NAME.previous-…``, and back if the new one cannot be moved in (D2).
* A handle that was not written to its end is thrown away, never closed where closing means committing.
* One step at a time runs on a file system that is not made for several: fsspec promises no more.

Parts are taken in order, as fsspec's handles are. No part is repeated: whether a handle that failed has
taken the bytes, nothing tells. The writer begins the whole file again; what follows, is repeated here (E3).
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import anyio
import fsspec.spec

from async_ckpt.errors import StoreError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers
from async_ckpt.stores.generic_source import HandleSource, RangeSource
from async_ckpt.stores.leftovers import owner_is_dead, temporary_name
from async_ckpt.stores.move import Move
from async_ckpt.stores.target import exists_already

__all__ = ["GenericStore"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("async_ckpt.stores.generic")


class GenericStore:
    """The store of any other URL.

    Args:
        file_system: an fsspec file system.
        workers: where its calls run.
        retrying: how a failed step is tried again.
        overwrite: whether a commit may replace what is there; looked at when a save begins and before it moves.
    """

    repeats_parts = False

    def __init__(
        self, file_system: Any, *, workers: Workers, retrying: Retrying | None = None, overwrite: bool = True
    ) -> None:
        self.file_system = file_system
        self.overwrite = overwrite
        self._workers = workers
        self._retrying = retrying or Retrying(RetryPolicy())
        # An asynchronous file system brings every call to its own loop; any other may share one
        # connection, or none of its state safely, between threads.
        self._turn: AbstractContextManager[Any] = (
            nullcontext() if file_system.async_impl else threading.Lock()
        )
        self._swept: set[str] = set()

    @classmethod
    def connect(
        cls,
        file_system_class: Any,
        options: dict[str, Any],
        location: Location,
        *,
        workers: Workers,
        retry: RetryPolicy | None = None,
        overwrite: bool = True,
    ) -> GenericStore:
        """Make the file system too; it is our own, as fsspec's cached ones are shared with anyone."""
        try:
            file_system = file_system_class(**{**options, "skip_instance_cache": True})
        except Exception as error:
            raise StoreError.during("begin", location.url, error, "Check storage_options.") from error
        return cls(
            file_system, workers=workers, retrying=Retrying(retry or RetryPolicy()), overwrite=overwrite
        )

    async def begin(self, location: Location, nbytes: int) -> GenericUpload:
        """Open a handle for the temporary name; see ``Store.begin``."""
        upload = GenericUpload(self, location, nbytes)
        try:
            await self.once(upload.start)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await upload.abort()
            raise
        return upload

    async def delete(self, location: Location) -> None:
        """Delete a file or a directory tree."""
        await self.step(self._delete, location)

    async def exists(self, location: Location) -> bool:
        """Tell whether anything is at *location*."""
        return await self.step(self._exists, location)

    async def source(self, location: Location) -> HandleSource | RangeSource:
        """Open the file for reading."""

        def step(function: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
            return self.step(_translated, "read", location, function, *args)

        kind = RangeSource if self.file_system.async_impl else HandleSource
        source = kind(self.file_system, location, step)
        await step(source.start)
        return source

    async def aclose(self) -> None:
        """Do nothing: fsspec's file systems free themselves."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function*, which does not use the file system, in a worker."""
        return await self._workers.run(function, *args, **kwargs)

    async def once(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker, when it is its turn."""

        def in_turn() -> T:
            with self._turn:
                return function(*args, **kwargs)

        return await self._workers.run(in_turn)

    async def step(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function*, which may be repeated as a whole, in a worker; again after transient errors."""
        return await self._retrying.call(self.once, function, *args, **kwargs)

    def _exists(self, location: Location) -> bool:
        with translating("read", location):
            self.file_system.invalidate_cache()
            return bool(self.file_system.exists(location.path))

    def _delete(self, location: Location) -> None:
        with translating("delete", location):
            self.file_system.invalidate_cache()
            try:
                kind = self.file_system.info(location.path)["type"]
                if kind != "directory":
                    self.file_system.rm_file(location.path)
                    return
                # Not rm(recursive=True): it takes "[" and "*" in names for patterns.
                found = self.file_system.find(location.path, withdirs=True, detail=True)
            except FileNotFoundError:
                return
            found[location.path] = {"type": "directory"}
            for path in sorted(found, reverse=True):  # what is inside comes first
                remove = (
                    self.file_system.rmdir if found[path]["type"] == "directory" else self.file_system.rm_file
                )
                try:
                    remove(path)
                except (FileNotFoundError, NotImplementedError):
                    continue  # a directory that is a mere prefix goes with its last file

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove, the first time, what dead processes left in *directory*; failing is no failure."""
        if directory in self._swept:
            return ()
        self._swept.add(directory)
        swept = []
        try:
            for path in self.file_system.ls(directory, detail=False):
                name = posixpath.basename(path)
                if owner_is_dead(name):
                    self.file_system.rm_file(posixpath.join(directory, name))
                    swept.append(name)
        except Exception as error:
            _log.debug("cannot sweep %s: %s", directory, error)
        if swept:
            _log.info("removed from %s what dead processes left: %s", directory, ", ".join(swept))
        return tuple(swept)


class GenericUpload:
    """One temporary name on its way to becoming the target; made by ``GenericStore.begin``."""

    part_size = None
    max_concurrent_parts = 1
    is_paced = False

    def __init__(self, store: GenericStore, location: Location, nbytes: int) -> None:
        self.swept: tuple[str, ...] = ()
        self._store = store
        self._fs = store.file_system
        self._location = location
        self._nbytes = nbytes
        self._directory = posixpath.dirname(location.path)
        self._temporary = posixpath.join(self._directory, temporary_name())
        self._move = Move(self._fs, self._temporary, location.path, nbytes)
        self._handle: Any = None
        self._position = 0
        self._broken = False
        self._takes_views = True
        self._made: list[str] = []

    async def put(self, part: Part, content: Content) -> Receipt:
        """Write the next part."""
        pieces = await self._store.run(content.read, part.start, part.stop)
        return await self._store.once(self._write, part, pieces)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Close the handle, check the length, and move."""
        await self._store.once(self._close)
        await self._store.step(self._settle)
        self._made.clear()
        await self.abort()  # a move may leave its source

    async def abort(self) -> None:
        """Throw the handle away and remove the temporary name."""
        try:
            await self._store.step(self._clean)
        except Exception as error:
            _log.warning("cleaning up after a save to %s: %s", self._location.url, error)

    def start(self) -> None:
        """Do what ``begin`` does. Whoever calls this must abort if it raises."""
        with translating("begin", self._location):
            self._throw_away()
            self._fs.invalidate_cache()
            self._refuse_to_replace("begin")
            self._open()
            if self._fs.isdir(self._location.path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.swept = self._store.sweep(self._directory)

    def _open(self) -> None:
        try:
            self._handle = self._fs.open(self._temporary, "wb")
        except FileNotFoundError:
            self._make_directories()
            self._handle = self._fs.open(self._temporary, "wb")
        else:
            # FTP and the like look for the directory only when the first block is sent. Object stores
            # have none, and some would make a bucket.
            if not self._fs.async_impl:
                self._make_directories()

    def _make_directories(self) -> None:
        missing = []
        directory = self._directory
        while directory.strip("/") and not self._fs.isdir(directory):
            missing.append(directory)
            directory = posixpath.dirname(directory)
        if missing:
            self._fs.makedirs(self._directory, exist_ok=True)
            self._made += reversed(missing)

    def _write(self, part: Part, pieces: Sequence[memoryview]) -> Receipt:
        with translating("write", self._location):
            if self._broken:
                raise OSError(errno.EIO, "an earlier part failed, and a stream cannot go back")
            if part.start != self._position or self._handle is None:
                raise OSError(errno.EINVAL, "parts must be put once, and in order")
            try:
                for piece in pieces:
                    self._write_piece(piece.cast("B"))
                if self._position != part.stop:
                    raise OSError(errno.EIO, f"part {part.index} has not {part.nbytes} bytes")
            except BaseException:
                self._broken = True
                raise
        return Receipt(index=part.index)

    def _write_piece(self, piece: memoryview) -> None:
        while piece.nbytes:
            try:
                written = self._handle.write(piece if self._takes_views else bytes(piece))
            except TypeError:
                if not self._takes_views:
                    raise
                self._takes_views = False
                continue
            written = written if isinstance(written, int) else piece.nbytes
            if written <= 0:
                raise OSError(errno.EIO, "the handle takes no bytes")
            self._position += written
            piece = piece[written:]

    def _close(self) -> None:
        with translating("commit", self._location):
            if self._handle is None or self._broken or self._position != self._nbytes:
                raise OSError(errno.EINVAL, "not every byte was put")
            self._handle.close()
            self._handle = None

    def _settle(self) -> None:
        with translating("commit", self._location):
            if not self._move.begun:
                self._refuse_to_replace("commit")
            self._move.go()

    def _refuse_to_replace(self, stage: str) -> None:
        if not self._store.overwrite:
            self._fs.invalidate_cache()
            if self._fs.exists(self._location.path):
                raise exists_already(stage, self._location)

    def _clean(self) -> None:
        with translating("abort", self._location):
            self._throw_away()
            self._fs.invalidate_cache()
            if self._fs.exists(self._temporary):
                self._fs.rm_file(self._temporary)
        while self._made:
            directory = self._made.pop()
            try:
                self._fs.rmdir(directory)
            except Exception as error:
                _log.debug("left the directory %s: %s", directory, error)

    def _throw_away(self) -> None:
        """Free the handle; never by a close that commits."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.discard()
        except Exception as error:
            _log.debug("cannot discard %r: %s", handle, error)
        if isinstance(handle, fsspec.spec.AbstractBufferedFile):
            handle.closed = True  # or else __del__ sends what there is, and commits
        else:
            handle.close()  # a plain file: all that this completes is the temporary name


def _translated(stage: str, location: Location, function: Callable[..., T], /, *args: Any) -> T:
    with translating(stage, location):
        return function(*args)


@contextmanager
def translating(stage: str, location: Location) -> Iterator[None]:
    """Raise what goes wrong as a StoreError; FileNotFoundError of a read is raised as it is."""
    try:
        yield
    except StoreError:
        raise
    except NotImplementedError as error:
        advice = f"{type(error).__name__}: this file system cannot do that; save to another."
        raise StoreError.during(stage, location.url, error, advice) from error
    except Exception as error:
        if stage == "read" and isinstance(error, FileNotFoundError):
            raise
        raise StoreError.during(stage, location.url, error) from error
