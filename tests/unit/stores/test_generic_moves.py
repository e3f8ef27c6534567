"""The generic store from the commit on: moving, deleting, sweeping, on file systems that misbehave."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.generic import GenericStore
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.testing import ManualClock, ThreadWorkers
from tests.generic_doubles import NEW, OLD, TARGET, Memory, Unsteady, generic, save

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


def test_the_earlier_file_is_never_lost(
    tmp_path: Path, workers: ThreadWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    """If it cannot even be put back, a warning says where it is, whole."""
    file_system = Refusing()
    file_system.failing = frozenset({3, 4})
    with pytest.raises(StoreError, match="Input/output error"):
        anyio.run(save, generic(file_system, workers), on_disk(tmp_path))
    (name,) = os.listdir(tmp_path)
    assert f"it is whole, at {str(tmp_path / name)!r}" in caplog.text
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


class OnlyRm(Memory):
    """A file system that has ``rm`` alone, as that of Databricks."""

    def rm_file(self, path: str) -> None:
        """Be missing."""
        raise NotImplementedError

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove a file."""
        del self.store[path]


def test_a_file_system_with_rm_alone(workers: ThreadWorkers) -> None:
    """Saving, aborting and deleting leave nothing behind there."""

    async def abort() -> None:
        await (await store.begin(TARGET, 1)).abort()

    file_system = OnlyRm()
    store = generic(file_system, workers)
    anyio.run(abort)
    assert file_system.names == []
    anyio.run(save, store)
    assert file_system.names == [TARGET.path]
    anyio.run(store.delete, Location(url="u", path="/run", key="run", group="double"))
    assert file_system.names == []


class Undeletable(Memory):
    """A file system that removes nothing."""

    def rm_file(self, path: str) -> None:
        """Be missing, as ``rm``."""
        raise NotImplementedError

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Be missing."""
        raise NotImplementedError


def test_deleting_that_does_nothing_is_told(workers: ThreadWorkers) -> None:
    """Where nothing can be removed, neither a file nor a directory is said to be deleted."""
    file_system = Undeletable(x=OLD)
    for path in (TARGET.path, "/run"):
        with pytest.raises(StoreError, match="cannot do that"):
            anyio.run(
                generic(file_system, workers).delete, Location(url=path, path=path, key=path, group="double")
            )
    assert file_system.names == [TARGET.path]


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
        await upload.abort()

    file_system = Unsteady({})
    anyio.run(abort)
    assert "cleaning up" in caplog.text


# -- reading


class Paramiko:
    """A handle whose ``seek`` returns nothing, as that of SFTP."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)
        self.tell, self.read, self.close = self._inner.tell, self._inner.read, self._inner.close

    def seek(self, offset: int, whence: int = 0) -> None:
        """Seek."""
        self._inner.seek(offset, whence)


class Ranged(AbstractBufferedFile):  # type: ignore[misc]
    """A handle that asks for every range by the file's name, as that of FTP."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.store[self.path].getvalue()[start:end])


class Unseekable(io.RawIOBase):
    """A handle that breaks before its length is known."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Break."""
        raise OSError(errno.EIO, "broken")


class Handing(Memory):
    """A file system that hands out one of these."""

    def __init__(self, kind: Callable[[Handing, str], Any], **files: bytes) -> None:
        super().__init__(**files)
        self.kind = kind
        self.handles: list[Any] = []

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        self.handles.append(self.kind(self, path))
        return self.handles[-1]


async def read_half(store: GenericStore, between: Callable[[], object] = lambda: None) -> bytes:
    """Open the file, do something, and read its second half."""
    source = await store.source(TARGET)
    try:
        between()
        data = bytearray(source.nbytes // 2)
        await source.read_into(source.nbytes - len(data), memoryview(data))
        return bytes(data)
    finally:
        await source.aclose()


def test_a_seek_that_returns_nothing(workers: ThreadWorkers) -> None:
    """The length of a file is known where ``seek`` does not return it, as over SFTP."""
    file_system = Handing(lambda fs, path: Paramiko(OLD), x=OLD)
    assert anyio.run(read_half, generic(file_system, workers)) == OLD[1500:]


def test_a_file_that_is_read_by_its_name(workers: ThreadWorkers) -> None:
    """Where a handle asks for ranges by name, a replaced file is told of, not mixed with the earlier one."""
    file_system = Handing(lambda fs, path: Ranged(fs, path, block_size=500, cache_type="none"), x=OLD)
    assert anyio.run(read_half, generic(file_system, workers)) == OLD[1500:]
    with pytest.raises(StoreError, match="replaced while it was read"):
        anyio.run(read_half, generic(file_system, workers), lambda: file_system.make(TARGET.path, NEW))


def test_a_handle_that_breaks_at_once_is_closed(workers: ThreadWorkers) -> None:
    """A file that cannot be opened to its end leaves no open handle."""
    file_system = Handing(lambda fs, path: Unseekable(), x=OLD)
    with pytest.raises(StoreError, match="broken"):
        anyio.run(read_half, generic(file_system, workers))
    assert [handle.closed for handle in file_system.handles] == [True]
