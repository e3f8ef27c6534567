"""The generic store up to the commit, on file systems that misbehave."""

from __future__ import annotations

import errno
import gc
import io
import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.retry import is_transient
from async_ckpt.stores.base import Location
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.testing import BytesContent, ManualClock, ThreadWorkers
from tests.generic_doubles import HALVES, NEW, OLD, TARGET, Memory, Unsteady, generic, save

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


class Holding(Handle):
    """A handle that sends everything when it is closed, over a line that breaks then."""

    def close(self) -> None:
        """Lose the connection, the first time."""
        broken, self.closing = self.closing, False
        if broken:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        super().close()

    closing = True


class HoldingBack(Memory):
    """A file system of such handles."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return Holding(self, path) if mode == "wb" else super()._open(path, mode, **kwargs)


def test_what_is_sent_by_closing_is_a_matter_of_the_last_part(workers: ThreadWorkers) -> None:
    """A handle that fails as it is closed fails the last put, so that the file is begun again (E3)."""

    async def put_all() -> None:
        upload = await generic(file_system, workers).begin(TARGET, len(NEW))
        await upload.put(HALVES[0], BytesContent(NEW))
        with pytest.raises(StoreError) as caught:
            await upload.put(HALVES[1], BytesContent(NEW))
        assert is_transient(caught.value)
        with pytest.raises(StoreError, match="not every byte"):
            await upload.commit([])
        await upload.abort()

    file_system = HoldingBack(x=OLD)
    anyio.run(put_all)
    assert file_system.names == [TARGET.path]
    assert file_system.cat_file(TARGET.path) == OLD


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


class Unsure(Memory):
    """A file system whose ``exists`` is no whenever it cannot tell, as fsspec's own."""

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Be unable to tell."""
        return False


def test_what_cannot_be_told_is_not_absent(workers: ThreadWorkers) -> None:
    """With overwrite=False, what ``exists`` says is not relied on: the earlier file stays."""
    file_system = Unsure(x=OLD)
    with pytest.raises(CheckpointExistsError):
        anyio.run(save, generic(file_system, workers, overwrite=False))
    assert file_system.cat_file(TARGET.path) == OLD


def test_a_file_system_is_made_where_it_may_block(workers: ThreadWorkers) -> None:
    """It is made in a worker, by the first call: connecting takes as long as the network likes."""
    makers: list[str] = []

    class Connecting(Memory):
        def __init__(self, **options: Any) -> None:
            makers.append(threading.current_thread().name)
            super().__init__()

    store = GenericStore.connect(Connecting, {}, TARGET, workers=workers)
    assert makers == []
    anyio.run(save, store)
    anyio.run(store.delete, TARGET)
    (maker,) = makers
    assert maker != threading.current_thread().name


def test_a_file_system_that_cannot_be_made(workers: ThreadWorkers) -> None:
    """Whoever first needs it is told, with what to look at, and nothing is tried again to clean up."""
    calls: list[None] = []

    def refuse(**options: Any) -> None:
        calls.append(None)
        raise ValueError("no such option")

    store = GenericStore.connect(refuse, {"nonsense": 1}, TARGET, workers=workers)
    with pytest.raises(StoreError, match=r"no such option. Check storage_options"):
        anyio.run(save, store)
    assert len(calls) == 1


class Halfway(LocalFileSystem):  # type: ignore[misc]
    """A file system that makes one directory of two."""

    cachable = False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make the outer one."""
        os.mkdir(os.path.dirname(path))
        raise PermissionError(errno.EACCES, "no")


def test_directories_that_are_made_in_part(tmp_path: Path, workers: ThreadWorkers) -> None:
    """What was made on the way to a directory that cannot be made is taken away again."""
    path = str(tmp_path / "a" / "b" / "x")
    with pytest.raises(StoreError):
        anyio.run(save, generic(Halfway(), workers), Location(url=path, path=path, key="x", group="double"))
    assert os.listdir(tmp_path) == []


class Sweeping(LocalFileSystem):  # type: ignore[misc]
    """A file system that removes directories with all that is in them, as Arrow's do."""

    cachable = False

    def rmdir(self, path: str) -> None:
        """Remove a tree."""
        self.rm(path, recursive=True)


def test_a_directory_that_others_use_stays(tmp_path: Path, workers: ThreadWorkers) -> None:
    """An abort takes no directory away in which another save has ended meanwhile (D2)."""

    async def race() -> None:
        path = str(tmp_path / "run" / "x")
        upload = await generic(Sweeping(), workers).begin(
            Location(url=path, path=path, key="x", group="double"), 1
        )
        (tmp_path / "run" / "other.ckpt").write_bytes(OLD)
        await upload.abort()

    anyio.run(race)
    assert os.listdir(tmp_path / "run") == ["other.ckpt"]
