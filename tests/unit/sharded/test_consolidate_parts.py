"""What consolidating is made of: files that stay open, and checksums of pieces."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.format import checksum
from async_ckpt.sharded.consolidating.files import OpenFiles
from async_ckpt.sharded.consolidating.sums import Sums
from async_ckpt.stores.base import Source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")

# -- open files


def test_files_stay_open_while_there_is_room() -> None:
    """Those that nobody reads are closed, the oldest first; each is opened once, and read by as many as it can be."""
    opened: list[str] = []
    closed: list[str] = []
    reading, most = 0, 0

    class File:
        nbytes, max_concurrent_reads = 10, 1

        def __init__(self, path: str) -> None:
            self.path = path

        async def read_into(self, start: int, *targets: memoryview) -> None:
            nonlocal reading, most
            reading += 1
            most = max(most, reading)
            await anyio.lowlevel.checkpoint()
            reading -= 1

        async def aclose(self) -> None:
            closed.append(self.path)

    async def open_file(path: str) -> Source:
        await anyio.lowlevel.checkpoint()
        if path == "missing":
            raise FileNotFoundError(path)
        opened.append(path)
        return File(path)

    async def play() -> None:
        files = OpenFiles(open_file, most=1)
        first, again, other = await files.open("a"), await files.open("a"), await files.open("b")
        async with anyio.create_task_group() as group:
            for each in (first, again):
                group.start_soon(each.read_into, 0)
        assert (opened, closed, most) == (["a", "b"], [], 1)
        await first.aclose()
        assert closed == []
        await again.aclose()
        assert closed == ["a"]
        await other.aclose()
        with pytest.raises(FileNotFoundError):
            await files.open("missing")
        await (await files.open("b")).aclose()
        assert (opened, closed) == (["a", "b"], ["a"])
        await files.aclose()
        assert closed == ["a", "b"]

    anyio.run(play)


def test_files_that_are_given_back_at_the_same_time() -> None:
    """Of more files than may stay open, each is closed once, and never one that has just been opened again."""
    closed: list[str] = []

    class File:
        nbytes, max_concurrent_reads = 10, None

        def __init__(self, path: str) -> None:
            self.path, self.is_open = path, True

        async def read_into(self, start: int, *targets: memoryview) -> None:
            await anyio.lowlevel.checkpoint()
            assert self.is_open

        async def aclose(self) -> None:
            assert self.is_open
            self.is_open = False
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            closed.append(self.path)

    async def open_file(path: str) -> Source:
        await anyio.lowlevel.checkpoint()
        return File(path)

    async def read(files: OpenFiles, number: int) -> None:
        for turn in range(6):
            file = await files.open(str((number + turn) % 12))
            await file.read_into(0)
            await file.aclose()

    async def play() -> None:
        files = OpenFiles(open_file, most=2)
        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(read, files, number)
        await files.aclose()
        assert len(closed) >= 12

    anyio.run(play)


# -- checksums


def test_sums_of_pieces_that_are_read_again() -> None:
    """A store that sends a piece of a part again reads less of it; what is known of more stays."""
    sums = Sums()
    for start, stop in ((0, 10), (10, 30), (10, 20), (30, 40)):
        sums.add(start, stop, checksum.crc32(b"x" * (stop - start), 0))
    assert sums.total(0, 40) == checksum.crc32(b"x" * 40, 0)
