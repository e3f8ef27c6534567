"""The files of a directory, kept open from one part to the next.

Guarantees: at most so many are open beside those that are being read (B2). A file that is replaced is not read on with
other bytes in it.

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
    """Opens each file once, as long as there is room. For one thread, the loop's.

    Args:
        open_source: opens a file by its path.
        most: how many stay open.
    """

    def __init__(self, open_source: Callable[[str], Awaitable[Source]], most: int = _MOST_OPEN) -> None:
        self._open_source = open_source
        self._most = most
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._given_back = anyio.Event()

    async def open(self, path: str) -> Source:
        """Return a file, which is to be closed as any other."""
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
        """One user less; close those that have been of no use for longest."""
        file.users -= 1
        self._given_back.set()
        idle = [path for path, each in self._files.items() if not each.users]
        await self._close(idle[: max(0, len(self._files) - self._most)])

    async def aclose(self) -> None:
        """Close all of them, once nobody reads them."""
        while any(file.users for file in self._files.values()):
            self._given_back = anyio.Event()
            await self._given_back.wait()
        await self._close(list(self._files))

    async def _close(self, paths: list[str]) -> None:
        for path in paths:
            source = self._files.pop(path).source
            if source is not None:
                with anyio.CancelScope(shield=True):
                    await source.aclose()


class _File:
    def __init__(self) -> None:
        self.source: Source | None = None
        self.turns: anyio.CapacityLimiter | None = None
        self.lock = anyio.Lock()
        self.users = 0


class _Borrowed:
    """A file that stays open when it is closed."""

    max_concurrent_reads = None  # seen to here, for all who read it

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
        """Give it back."""
        await self._files.give_back(self._file)
