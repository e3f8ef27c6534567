"""The files of a directory, kept open from one part to the next.

Guarantees: files are not opened anew for each part, and a bounded number stays open beside those in use (B2). No file
gets more reads at a time than its store allows.

What does not belong here: which ranges are read (`reading.fetching`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

import anyio

from async_ckpt.stores.base import Source

__all__ = ["OpenFiles"]

_MOST_OPEN = 64


class OpenFiles:
    """Opens files and keeps them open. Used on the loop thread only.

    Args:
        open_source: opens a file by its path.
        most: how many files may stay open.
    """

    def __init__(self, open_source: Callable[[str], Awaitable[Source]], most: int = _MOST_OPEN) -> None:
        self._open_source = open_source
        self._most = most
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._given_back = anyio.Event()

    async def open(self, path: str) -> Source:
        """Return an open file; close it like any other."""
        file = self._files.setdefault(path, _File())
        self._files.move_to_end(path)
        file.users += 1
        try:
            async with file.lock:
                if file.source is None:
                    source = file.source = await self._open_source(path)
                    if source.max_concurrent_reads is not None:
                        file.turns = anyio.CapacityLimiter(source.max_concurrent_reads)
                return _Borrowed(file.source, file, self)
        except BaseException:
            file.users -= 1
            self._given_back.set()
            raise

    async def give_back(self, file: _File) -> None:
        """Note that *file* has one user less; close the files that were used least recently, if there are too many."""
        file.users -= 1
        self._given_back.set()
        idle = [path for path, each in self._files.items() if not each.users]
        await self._close(idle[: max(0, len(self._files) - self._most)])

    async def aclose(self) -> None:
        """Close all files as soon as nobody uses them."""
        while any(file.users for file in self._files.values()):
            self._given_back = anyio.Event()
            await self._given_back.wait()
        await self._close(list(self._files))

    async def _close(self, paths: list[str]) -> None:
        # All at once, because other tasks may open these files anew while one is being closed.
        files = [self._files.pop(path) for path in paths]
        for file in files:
            if file.source is not None:
                with anyio.CancelScope(shield=True):
                    await file.source.aclose()


class _File:
    def __init__(self) -> None:
        self.source: Source | None = None
        self.turns: anyio.CapacityLimiter | None = None
        self.lock = anyio.Lock()
        self.users = 0


class _Borrowed:
    """A file that `aclose` leaves open."""

    max_concurrent_reads = None  # `read_into` keeps to it, for all users together

    def __init__(self, source: Source, file: _File, files: OpenFiles) -> None:
        self.nbytes = source.nbytes
        self._source = source
        self._file = file
        self._files = files

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets*."""
        if self._file.turns is None:
            return await self._source.read_into(start, *targets)
        async with self._file.turns:
            await self._source.read_into(start, *targets)

    async def aclose(self) -> None:
        """Give the file back."""
        await self._files.give_back(self._file)
