"""Sources of local files and of fsspec's, and saves that may not replace anything."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location, Part, Store
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import BytesContent, FaultyDisk, ManualClock, ThreadWorkers

DATA = bytes(range(256)) * 40
TARGET = Location(url="double://run/x.ckpt", path="/run/x.ckpt", key="x", group="double")


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for the stores of one test."""
    pool = ThreadWorkers(4)
    yield pool
    pool.close()


async def read(store: Store, location: Location, start: int = 0, stop: int = len(DATA)) -> bytes:
    """Return a range of the file."""
    source = await store.source(location)
    try:
        data = bytearray(stop - start)
        await source.read_into(start, memoryview(data))
    finally:
        await source.aclose()
    return bytes(data)


async def save(store: Store, location: Location, data: bytes = DATA) -> None:
    """Save as a writer does."""
    upload = await store.begin(location, len(data))
    try:
        part = Part(index=0, start=0, stop=len(data))
        await upload.commit([await upload.put(part, BytesContent(data))])
    except BaseException:
        await upload.abort()
        raise


# -- local files


@pytest.mark.parametrize("call", ["open_to_read", "fstat", "duplicate", "read"])
def test_a_local_file_whose_reading_fails(call: str, tmp_path: Path, workers: ThreadWorkers) -> None:
    """A system call that fails is a StoreError of the stage "read", and no descriptor is left open."""
    (tmp_path / "x").write_bytes(DATA)
    disk = FaultyDisk({call: (1, errno.EIO)})
    with pytest.raises(StoreError, match="Input/output") as caught:
        anyio.run(read, LocalStore(workers=workers, disk=disk), locate(tmp_path / "x"))
    assert (caught.value.stage, disk.open_descriptors) == ("read", 0)


def test_what_is_no_regular_file(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A directory and a pipe are refused at once, without waiting for who would write into the pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(StoreError, match=name):
            anyio.run(read, LocalStore(workers=workers), locate(tmp_path / name))


def test_a_file_that_becomes_shorter(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Bytes that are gone when they are read are a StoreError."""

    async def run() -> None:
        store = LocalStore(workers=workers)
        source = await store.source(locate(tmp_path / "x"))
        try:
            os.truncate(tmp_path / "x", 100)
            await source.read_into(0, memoryview(bytearray(100)))
            await source.read_into(50, memoryview(bytearray(100)))
        finally:
            await source.aclose()

    (tmp_path / "x").write_bytes(DATA)
    with pytest.raises(StoreError, match="shorter"):
        anyio.run(run)


def test_a_closed_source_reads_nothing(tmp_path: Path, workers: ThreadWorkers) -> None:
    """After it was closed, a source raises StoreError instead of reading some other file."""

    async def run(store: Store, location: Location) -> None:
        source = await store.source(location)
        await source.aclose()
        await source.read_into(0, memoryview(bytearray(1)))

    (tmp_path / "x").write_bytes(DATA)
    file_system = MemoryFileSystem(skip_instance_cache=True)
    file_system.pipe_file(TARGET.path, DATA)
    try:
        for store, location in (
            (LocalStore(workers=workers), locate(tmp_path / "x")),
            (GenericStore(file_system, workers=workers), TARGET),
        ):
            with pytest.raises(StoreError, match="closed"):
                anyio.run(run, store, location)
    finally:
        file_system.rm_file(TARGET.path)


# -- fsspec's


class Ranges(AsyncFileSystem):  # type: ignore[misc]
    """An asynchronous file system of one file, read by ranges.

    Attributes:
        asked: the ranges.
    """

    cachable = False

    def __init__(self, *, size: int | None = len(DATA), knows_ranges: bool = True, failing: int = 0) -> None:
        super().__init__()
        self.asked: list[tuple[Any, Any]] = []
        self.version = 0
        self._size = size
        self._knows_ranges = knows_ranges
        self._failing = failing

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        if path != TARGET.path:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": self._size, "ETag": str(self.version)}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.asked.append((start, end))
        if len(self.asked) <= self._failing:
            raise ConnectionResetError
        return DATA[start:end] if self._knows_ranges else DATA


def generic(file_system: Any, workers: ThreadWorkers, **options: Any) -> GenericStore:
    """Return a store that waits for nothing."""
    clock = ManualClock()
    retrying = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 1.0)
    return GenericStore(file_system, workers=workers, retrying=retrying, **options)


def test_ranges_are_asked_for_and_repeated(workers: ThreadWorkers) -> None:
    """An asynchronous file system is asked for what is wanted, and again when its connection breaks."""
    file_system = Ranges(failing=2)
    assert anyio.run(read, generic(file_system, workers), TARGET, 100, 300) == DATA[100:300]
    assert file_system.asked == [(100, 300)] * 3


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_server_without_ranges_is_asked_once(size: int | None, workers: ThreadWorkers) -> None:
    """Where ranges are not known, the file comes whole, once, and is read from memory."""

    async def run() -> None:
        source = await generic(file_system, workers).source(TARGET)
        assert source.nbytes == len(DATA)
        for start in (500, 100, 9000):
            data = bytearray(100)
            await source.read_into(start, memoryview(data))
            assert data == DATA[start : start + 100]
        await source.aclose()

    file_system = Ranges(size=size, knows_ranges=False)
    anyio.run(run)
    assert len(file_system.asked) == 1


def test_a_file_with_another_tag_is_another_file(workers: ThreadWorkers) -> None:
    """A range that was read of a file which has replaced the first is not given out."""

    async def run() -> None:
        source = await generic(file_system, workers).source(TARGET)
        await source.read_into(0, memoryview(bytearray(100)))
        file_system.version += 1
        await source.read_into(100, memoryview(bytearray(100)))

    file_system = Ranges()
    with pytest.raises(StoreError, match="replaced"):
        anyio.run(run)


# -- overwrite=False


def test_without_hard_links_it_looks_and_renames(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Where the file system has no hard links a save still refuses to replace what is there."""
    place = locate(tmp_path / "x")

    def careful() -> LocalStore:
        return LocalStore(workers=workers, overwrite=False, disk=FaultyDisk({"link": (0, errno.EPERM)}))

    async def both() -> None:
        store = careful()
        upload = await store.begin(place, len(DATA))
        try:
            receipt = await upload.put(Part(index=0, start=0, stop=len(DATA)), BytesContent(DATA))
            (tmp_path / "x").write_bytes(b"another's")
            await upload.commit([receipt])
        finally:
            await upload.abort()

    with pytest.raises(CheckpointExistsError, match="overwrite=False"):
        anyio.run(both)
    assert (tmp_path / "x").read_bytes() == b"another's"
    (tmp_path / "x").unlink()
    anyio.run(save, careful(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == DATA


def test_a_lost_answer_to_a_link(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A link that took effect although its answer was lost is a success, and one that did not, is none (E3)."""
    place = locate(tmp_path / "x")
    for number in (errno.EIO, errno.EEXIST):
        disk = FaultyDisk({"link": (1, number)}, after=True)
        anyio.run(save, LocalStore(workers=workers, overwrite=False, disk=disk), place)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        (tmp_path / "x").unlink()
    disk = FaultyDisk({"link": (1, errno.EIO)})
    with pytest.raises(StoreError, match="Input/output"):
        anyio.run(save, LocalStore(workers=workers, overwrite=False, disk=disk), place)
    assert list(tmp_path.iterdir()) == []


def test_generic_repeats_a_commit_whose_answer_was_lost(workers: ThreadWorkers) -> None:
    """With overwrite=False, our own file in the target's place is not taken for another's (E3)."""

    class Forgetful(MemoryFileSystem):  # type: ignore[misc]
        cachable = False
        store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
        pseudo_dirs = [""]  # noqa: RUF012 - as in the base class
        lost = 0

        def mv(self, source: str, target: str, **_: Any) -> None:
            super().mv(source, target)
            self.lost += 1
            if self.lost == 1:
                raise ConnectionResetError

    file_system = Forgetful()
    store = generic(file_system, workers, overwrite=False)
    anyio.run(save, store, TARGET)
    assert anyio.run(read, store, TARGET) == DATA
    with pytest.raises(CheckpointExistsError):
        anyio.run(save, store, TARGET)
    assert list(file_system.store) == [TARGET.path]
