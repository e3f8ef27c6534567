"""The generic store on file systems that misbehave."""

from __future__ import annotations

import errno
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from async_ckpt.errors import StoreError
from async_ckpt.retry import Retrying, RetryPolicy, is_transient
from async_ckpt.stores.base import Location, Part
from async_ckpt.stores.generic import GenericStore
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.testing import BytesContent, ManualClock, ThreadWorkers

OLD, NEW = b"old" * 1000, b"new" * 1000  # of one length, as checkpoints of one model are
HALVES = [Part(index=0, start=0, stop=1500), Part(index=1, start=1500, stop=3000)]
TARGET = Location(url="double://run/x.ckpt", path="/run/x.ckpt", key="x", group="double")


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for the stores of one test."""
    pool = ThreadWorkers(4)
    yield pool
    pool.close()


class Memory(MemoryFileSystem):  # type: ignore[misc]
    """A memory file system of its own."""

    cachable = False

    def __init__(self, **files: bytes) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        for name, data in files.items():
            self.make(f"/run/{name}.ckpt", data)

    def make(self, path: str, data: bytes) -> None:
        """Make a file, past all handles."""
        self.store[path] = MemoryFile(self, path, data)

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return sorted(self.store)


def generic(file_system: Any, workers: ThreadWorkers, clock: ManualClock | None = None) -> GenericStore:
    """Return a store that waits for nothing."""
    clock = clock or ManualClock()
    retrying = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 1.0)
    return GenericStore(file_system, workers=workers, retrying=retrying)


async def save(store: GenericStore, location: Location = TARGET) -> tuple[str, ...]:
    """Save as a writer does: abort after any error. Return what was swept."""
    upload = await store.begin(location, len(NEW))
    try:
        await upload.commit([await upload.put(part, BytesContent(NEW)) for part in HALVES])
    except BaseException:
        await upload.abort()
        raise
    return upload.swept


# -- handles


class CommittingFile(AbstractBufferedFile):  # type: ignore[misc]
    """A handle like those of object stores: closing it, or losing it, commits what it has."""

    def _upload_chunk(self, final: bool = False) -> bool:
        if final:
            self.fs.make(self.path, self.buffer.getvalue())
        return False


class Committing(Memory):
    """A file system of such handles."""

    discarded = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "wb":
            return CommittingFile(self, path, mode, block_size=1000)
        return super()._open(path, mode, **kwargs)


def test_an_abandoned_handle_never_commits(workers: ThreadWorkers) -> None:
    """A handle whose close and whose loss would commit is neither closed nor lost open."""
    file_system = Committing(x=OLD)
    closed: list[str] = []
    file_system.make = lambda path, data: closed.append(path)  # type: ignore[method-assign]

    async def half() -> None:
        upload = await generic(file_system, workers).begin(TARGET, len(NEW))
        await upload.put(HALVES[0], BytesContent(NEW))
        await upload.abort()

    anyio.run(half)
    gc.collect()
    assert closed == []
    assert file_system.cat_file(TARGET.path) == OLD
    assert file_system.names == [TARGET.path]


def test_a_buffering_handle_commits_whole_files(workers: ThreadWorkers) -> None:
    """The same handle, written to its end, makes the file."""
    file_system = Committing(x=OLD)
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW


class Handle(io.BytesIO):
    """A handle that takes bytes alone, and few at a time."""

    def __init__(self, file_system: Memory, path: str) -> None:
        super().__init__()
        self._file_system = file_system
        self._path = path

    def write(self, data: Any) -> int:
        """Take at most 700 bytes."""
        if not isinstance(data, bytes):
            raise TypeError("bytes, please")
        return super().write(data[:700])

    def close(self) -> None:
        """Make the file."""
        if not self.closed:
            self._file_system.make(self._path, self.getvalue())
        super().close()


class Particular(Memory):
    """A file system of such handles."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return (
            Handle(self, path)
            if mode == "wb" and "data" not in kwargs
            else super()._open(path, mode, **kwargs)
        )


def test_a_handle_that_takes_little(workers: ThreadWorkers) -> None:
    """Handles that refuse memoryviews, or take fewer bytes than given, get every byte."""
    file_system = Particular()
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW


class Breaking(Memory):
    """A file system whose first handle loses its connection at the second write."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        if mode == "wb":
            answers = iter([None, ConnectionResetError(errno.ECONNRESET, "reset")])

            def write(data: memoryview) -> int:
                if error := next(answers, None):
                    raise error
                return io.BytesIO.write(file, data)

            file.write = write
        return file


def test_a_broken_stream_is_not_gone_on_with(workers: ThreadWorkers) -> None:
    """After a failed write, putting the part again is a permanent error: bytes might be there twice."""

    async def put_again() -> tuple[StoreError, StoreError]:
        upload = await generic(file_system, workers).begin(TARGET, len(NEW))
        try:
            with pytest.raises(StoreError) as first:
                await upload.put(HALVES[0], BytesContent(NEW))
            with pytest.raises(StoreError) as second:
                await upload.put(HALVES[0], BytesContent(NEW))
            with pytest.raises(StoreError):
                await upload.commit([])
        finally:
            await upload.abort()
        return first.value, second.value

    file_system = Breaking()
    first, second = anyio.run(put_again)
    assert first.errno == errno.ECONNRESET
    assert not is_transient(second)
    assert file_system.names == []


def test_parts_out_of_order(workers: ThreadWorkers) -> None:
    """The upload says that it takes one part at a time, and refuses the second before the first."""

    async def backwards() -> None:
        upload = await generic(Memory(), workers).begin(TARGET, len(NEW))
        assert upload.max_concurrent_parts == 1
        with pytest.raises(StoreError, match="in order"):
            await upload.put(HALVES[1], BytesContent(NEW))
        await upload.abort()

    anyio.run(backwards)


# -- begin


class ReadOnly(Memory):
    """A file system that cannot be written to, like http."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError
        return super()._open(path, mode, **kwargs)


def test_a_read_only_file_system(workers: ThreadWorkers) -> None:
    """A file system that cannot be written to is told at begin, with what to do."""
    with pytest.raises(StoreError, match="save to another") as caught:
        anyio.run(save, generic(ReadOnly(), workers))
    assert caught.value.stage == "begin"
    assert caught.value.location == TARGET.url


class Unsteady(Memory):
    """A file system whose first calls of some methods fail."""

    def __init__(self, failing: dict[str, list[Exception]], **files: bytes) -> None:
        self.failing: dict[str, list[Exception]] = {}
        super().__init__(**files)
        self.failing = failing

    def _fail(self, name: str) -> None:
        if self.failing.get(name):
            raise self.failing[name].pop(0)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._fail(f"open {mode}")
        return super()._open(path, mode, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file, if it does not fail."""
        self._fail("info")
        return super().info(path, **kwargs)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy, and lose the answer."""
        self._fail("cp_file before")
        super().cp_file(path1, path2, **kwargs)
        self._fail("cp_file after")


def test_transient_errors_of_begin(workers: ThreadWorkers) -> None:
    """A lost connection is raised as transient, for the writer to begin again (E3), and leaves nothing."""
    clock = ManualClock()
    file_system = Unsteady({"open wb": [ConnectionError()]})
    with pytest.raises(StoreError) as caught:
        anyio.run(save, generic(file_system, workers, clock))
    assert is_transient(caught.value)
    assert (clock.naps, file_system.names) == ([], [])


def test_permanent_error_of_begin(workers: ThreadWorkers) -> None:
    """A refusal is raised at once, as a StoreError with the number."""
    clock = ManualClock()
    file_system = Unsteady({"open wb": [PermissionError(errno.EACCES, "Permission denied")]}, x=OLD)
    with pytest.raises(StoreError) as caught:
        anyio.run(save, generic(file_system, workers, clock))
    assert (caught.value.errno, clock.naps) == (errno.EACCES, [])
    assert file_system.cat_file(TARGET.path) == OLD


# -- the move


def test_a_move_of_which_the_answer_is_lost(workers: ThreadWorkers) -> None:
    """A copy that took effect before the connection was lost counts, though the length tells nothing."""
    file_system = Unsteady({"cp_file after": [ConnectionResetError(errno.ECONNRESET, "reset")]}, x=OLD)
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW
    assert file_system.names == [TARGET.path]


def test_a_move_that_did_not_take_effect(workers: ThreadWorkers) -> None:
    """A copy that failed without effect, on a lost connection, is tried again."""
    clock = ManualClock()
    file_system = Unsteady({"cp_file before": [ConnectionResetError(errno.ECONNRESET, "reset")]}, x=OLD)
    anyio.run(save, generic(file_system, workers, clock))
    assert len(clock.naps) == 1
    assert file_system.cat_file(TARGET.path) == NEW


@pytest.mark.parametrize("failures", [1, 3])
def test_a_move_that_is_refused(workers: ThreadWorkers, failures: int) -> None:
    """When moving is not permitted, or not possible, the earlier file is whole and under its name (D2)."""
    error = PermissionError(errno.EACCES, "x") if failures == 1 else OSError(errno.EIO, "x")
    file_system = Unsteady({"cp_file before": [error] * failures}, x=OLD)
    with pytest.raises(StoreError) as caught:
        anyio.run(save, generic(file_system, workers))
    assert caught.value.stage == "commit"
    assert file_system.cat_file(TARGET.path) == OLD
    assert file_system.names == [TARGET.path]


class Refusing(LocalFileSystem):  # type: ignore[misc]
    """A file system that replaces nothing, and whose n-th move fails."""

    cachable = False
    moves = 0
    failing: frozenset[int] = frozenset()

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Move, or raise."""
        self.moves += 1
        if self.moves in self.failing:
            raise OSError(errno.EIO, "Input/output error")
        if os.path.exists(path2):
            raise FileExistsError(errno.EEXIST, "File exists")
        os.rename(path1, path2)


def on_disk(folder: Path) -> Location:
    """Return the location of a file that is there."""
    path = folder / "x.ckpt"
    path.write_bytes(OLD)
    return Location(url=str(path), path=str(path), key="x", group="double")


def test_the_earlier_file_is_put_back(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If the new file cannot be moved in after the earlier one was moved aside, that one comes back."""
    file_system = Refusing()
    file_system.failing = frozenset({3})  # 1: onto the earlier one; 2: that one aside; 3: in
    with pytest.raises(StoreError):
        anyio.run(save, generic(file_system, workers), on_disk(tmp_path))
    assert (tmp_path / "x.ckpt").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_the_earlier_file_is_never_lost(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If it cannot even be put back, the error says where it is, whole."""
    file_system = Refusing()
    file_system.failing = frozenset({3, 4})
    with pytest.raises(StoreError, match="it is whole, at") as caught:
        anyio.run(save, generic(file_system, workers), on_disk(tmp_path))
    (name,) = os.listdir(tmp_path)
    assert name in str(caught.value)
    assert (tmp_path / name).read_bytes() == OLD


class Losing(Memory):
    """A file system that stores less than it is given."""

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file as one byte shorter."""
        info = super().info(path, **kwargs)
        return {**info, "size": max(info["size"] - 1, 0)}


def test_a_file_that_is_too_short_is_not_moved(workers: ThreadWorkers) -> None:
    """The length that storage reports is checked before the earlier file is touched."""
    file_system = Losing(x=OLD)
    with pytest.raises(StoreError, match="2999 bytes after 3000"):
        anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == OLD


# -- deleting, sweeping, reading


def test_deleting_takes_names_literally(workers: ThreadWorkers) -> None:
    """Deleting a directory named like a pattern deletes that directory alone."""
    file_system = Memory()
    for name in ("/run[1]/x", "/run1/x", "/run*/x"):
        file_system.make(name, b"x")
    store = generic(file_system, workers)
    for name in ("/run[1]", "/run*"):
        anyio.run(store.delete, Location(url=name, path=name, key=name, group="double"))
    assert file_system.names == ["/run1/x"]


def test_dead_processes_are_swept(workers: ThreadWorkers) -> None:
    """What a dead process of this host left beside the target goes; what is alive or elsewhere stays."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    alive = temporary_name()
    dead = temporary_name().replace(f".{os.getpid()}.", f".{child.pid}.")
    elsewhere = dead.replace(dead.split(".")[2], "0" * 12)
    file_system = Memory()
    for name in (alive, dead, elsewhere):
        file_system.make(f"/run/{name}", b"partial")
    store = generic(file_system, workers)
    assert anyio.run(save, store) == (dead,)
    assert anyio.run(save, store) == ()
    assert file_system.names == sorted([f"/run/{alive}", f"/run/{elsewhere}", TARGET.path])


def test_errors_of_reading(workers: ThreadWorkers) -> None:
    """Whatever else goes wrong when a file is opened is a StoreError of the stage "read"."""
    store = generic(Unsteady({"open rb": [ValueError("what?")]}, x=OLD), workers)
    with pytest.raises(StoreError, match="what") as caught:
        anyio.run(store.source, TARGET)
    assert caught.value.stage == "read"


def test_errors_of_cleaning_are_logged(workers: ThreadWorkers, caplog: pytest.LogCaptureFixture) -> None:
    """An abort that cannot remove the temporary name logs it and raises nothing."""

    async def abort() -> None:
        upload = await generic(file_system, workers).begin(TARGET, 1)
        file_system.failing["info"] = [PermissionError(errno.EACCES, "no")]
        file_system.exists = lambda path: bool(file_system.info(path))
        await upload.abort()

    file_system = Unsteady({})
    anyio.run(abort)
    assert "cleaning up" in caplog.text
