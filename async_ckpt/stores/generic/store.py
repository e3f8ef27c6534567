"""The store for any other file system that fsspec knows, through its synchronous interface, in workers.

Guarantees, beyond those of every store: only repeatable steps are repeated after transient errors: opening, looking up,
moving, removing (E3).

What does not belong here: transferring bytes (`upload`, `source`), serializing calls and lost connections
(`connection`).
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import anyio

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Child, Location, Workers, aborted_on_error, markers_first
from async_ckpt.stores.fsspec_calls import (
    bound_waiting,
    children_of,
    end_connection,
    end_half_made,
    info_of,
    marks_lost,
    modified_in,
    remove_file,
    translating,
)
from async_ckpt.stores.generic.connection import Connection
from async_ckpt.stores.generic.source import HandleSource, RangeSource
from async_ckpt.stores.generic.upload import GenericUpload
from async_ckpt.stores.leftovers import owner_is_dead
from async_ckpt.stores.redaction import redacted_text

__all__ = ["GenericStore"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("async_ckpt.stores.generic")


class GenericStore:
    """The store for all other URLs.

    Args:
        file_system: an fsspec file system, or None.
        workers: run its calls.
        retrying: repeats failed steps.
        overwrite: whether a commit may replace an existing file; checked when a save begins, and before it moves the
            file.
        connect: makes the file system, if none was given, when it is first needed and after its connection is lost;
            called in a worker, as it may use the network.
        redacted: hides secrets in log messages.
    """

    repeats_parts = False

    def __init__(
        self,
        file_system: Any | None,
        *,
        workers: Workers,
        retrying: Retrying | None = None,
        overwrite: bool = True,
        connect: Callable[[], Any] | None = None,
        redacted: Callable[[str], str] = redacted_text,
    ) -> None:
        self.overwrite = overwrite
        self._connection = Connection(file_system, connect)
        self._workers = workers
        self._retrying = retrying or Retrying(RetryPolicy())
        self._redacted = redacted
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
        """Return a store with a file system of its own, as fsspec shares its cached instances."""
        retry = retry or RetryPolicy()

        def make() -> Any:
            try:
                file_system = file_system_class(**{**options, "skip_instance_cache": True})
            except Exception as raised:
                kind = TransientStoreError if marks_lost(raised) else StoreError
                end_half_made(raised)
                error = location.presentable(raised)
                raise kind.during("begin", location.url, error, "Check storage_options.") from error
            bound_waiting(file_system, retry.stall_seconds)
            return file_system

        retrying = Retrying(retry)
        return cls(
            None,
            workers=workers,
            retrying=retrying,
            overwrite=overwrite,
            connect=make,
            redacted=location.redacted,  # all locations of a group have one login
        )

    @property
    def file_system(self) -> Any:
        """The file system, for functions that ``once`` calls; replaced after its connection is lost."""
        return self._connection.file_system

    async def begin(self, location: Location, nbytes: int) -> GenericUpload:
        """Open a handle with a temporary name; see ``Store.begin``."""
        upload = GenericUpload(self, location, nbytes)
        async with aborted_on_error(upload):
            await self.once(upload.start)
        return upload

    async def delete(self, location: Location) -> None:
        """Delete a file or a directory tree."""
        await self.step(self._delete, location)

    async def exists(self, location: Location) -> bool:
        """Return whether a file or directory is at *location*."""
        return await self.step(self._exists, location)

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below a directory; see ``Store.list``. In one page: fsspec knows no others."""
        if page := await self.step(self._list, location, starting_with):
            yield page

    async def source(self, location: Location) -> HandleSource | RangeSource:
        """Open the file for reading."""

        def step(
            function: Callable[..., Any], /, *args: Any, position: Callable[[], int] = int
        ) -> Awaitable[Any]:
            once, call = self.once, _translated
            return self._retrying.advance(position, once, call, "read", location, function, *args)

        source: HandleSource | RangeSource
        if await self.step(lambda: self.file_system.async_impl):
            source = RangeSource(self.file_system, location, step)
        else:
            source = HandleSource(lambda: self.file_system, location, step, self.let_go)
        try:
            await step(source.start)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await source.aclose()
            raise
        return source

    async def aclose(self) -> None:
        """Close the connection of a file system that we made, if that is possible."""
        if (file_system := self._connection.close()) is not None:
            await self.run(end_connection, file_system)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function*, which does not use the file system, in a worker."""
        return await self._workers.run(function, *args, **kwargs)

    async def once(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Connect if necessary, and call *function* in a worker."""
        return await self._workers.run(self._connection.call, function, *args, **kwargs)

    async def let_go(self, file_system: Any, function: Callable[[], object]) -> None:
        """Call *function*, which frees a handle of *file_system*, in a worker; log errors."""
        try:
            await self._workers.run(self._connection.let_go, file_system, function)
        except Exception as error:
            _log.debug("cannot free a handle: %s", self._redacted(str(error)))

    async def step(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker, and repeat it as a whole after transient errors."""
        return await self._retrying.call(self.once, function, *args, **kwargs)

    def _exists(self, location: Location) -> bool:
        with translating("read", location):
            return info_of(self.file_system, location.path) is not None

    def _list(self, location: Location, starting_with: str) -> Sequence[Child]:
        with translating("list", location):
            found = []
            for each in children_of(self.file_system, location.path):
                name = posixpath.basename(each["name"].rstrip("/"))
                if not name.startswith(starting_with):
                    continue
                if each.get("type") not in ("file", "directory"):  # a link, by SFTP
                    each = info_of(self.file_system, posixpath.join(location.path, name)) or each
                is_directory = each.get("type") == "directory"
                found.append(
                    Child(
                        name=name,
                        is_directory=is_directory,
                        nbytes=None if is_directory else each.get("size"),
                        modified_seconds=modified_in(each),
                    )
                )
            return found

    def _delete(self, location: Location) -> None:
        with translating("delete", location):
            found = info_of(self.file_system, location.path)
            if found is None:
                return
            if found["type"] != "directory":
                remove_file(self.file_system, location.path)
                return
            # Not rm(recursive=True), which takes "[" and "*" in names for patterns.
            tree = self.file_system.find(location.path, withdirs=True, detail=True)
            tree[location.path] = found
            markers, others = markers_first(sorted(tree, reverse=True))  # what is inside comes first
            for path in (*markers, *others):
                self._delete_one(path, tree[path]["type"])

    def _delete_one(self, path: str, kind: str) -> None:
        with suppress(FileNotFoundError):
            if kind != "directory":
                remove_file(self.file_system, path)
                return
            with suppress(NotImplementedError):  # a directory that is a mere prefix goes with its last file
                self.file_system.rmdir(path)

    def sweep(self, directory: str) -> tuple[str, ...]:
        """Remove leftovers of dead processes in *directory*, once; only a lost connection is an error."""
        if directory in self._swept:
            return ()
        self._swept.add(directory)
        swept = []
        try:
            for path in self.file_system.ls(directory, detail=False):
                name = posixpath.basename(path)
                if owner_is_dead(name):
                    remove_file(self.file_system, posixpath.join(directory, name))
                    swept.append(name)
        except Exception as error:
            if marks_lost(error):
                self._swept.discard(directory)
                raise
            _log.debug("%s", self._redacted(f"cannot sweep {directory}: {error}"))
        if swept:
            told = f"removed from {directory} what dead processes left: {', '.join(swept)}"
            _log.info("%s", self._redacted(told))
        return tuple(swept)


def _translated(stage: str, location: Location, function: Callable[..., T], /, *args: Any) -> T:
    with translating(stage, location):
        return function(*args)
