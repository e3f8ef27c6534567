"""The generic store beside its saves: deleting, sweeping, reading, on file systems that misbehave."""

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
from async_ckpt.stores.base import Location, Part
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.testing import BytesContent, ThreadWorkers
from tests.generic_doubles import NEW, OLD, TARGET, Memory, Unsteady, generic, save


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
        with pytest.raises(StoreError, match="does not support the operation"):
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


class Unlisted(Memory):
    """A file system whose connection is lost when it is to list a directory for the first time."""

    lists = 0

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        """List."""
        self.lists += 1
        if self.lists == 1:
            raise EOFError
        return super().ls(path, detail=detail, **kwargs)


def test_a_sweep_that_was_cut(workers: ThreadWorkers) -> None:
    """What was not swept because the connection was lost is swept by the next save."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    dead = temporary_name().replace(f".{os.getpid()}.", f".{child.pid}.")
    file_system = Unlisted()
    file_system.make(f"/run/{dead}", b"partial")
    store = generic(file_system, workers)
    with pytest.raises(StoreError):
        anyio.run(save, store)
    assert anyio.run(save, store) == (dead,)


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


@pytest.mark.parametrize("earlier", [None, 0o600])
def test_a_local_file_system_of_fsspecs_keeps_others_out(
    tmp_path: Path, workers: ThreadWorkers, earlier: int | None
) -> None:
    """What is written through fsspec to a disk is its owner's alone as well, until it is whole."""
    path = tmp_path / "x.ckpt"
    if earlier is not None:
        path.touch()
        path.chmod(earlier)
    (tmp_path / "new").touch()

    def seen() -> int:
        [temporary] = tmp_path.glob(".async_ckpt.*")
        return temporary.stat().st_mode & 0o777

    async def write() -> int:
        store = generic(LocalFileSystem(skip_instance_cache=True), workers)
        upload = await store.begin(Location(url="u", path=str(path), key="x", group="double"), len(NEW))
        receipt = await upload.put(Part(index=0, start=0, stop=len(NEW)), BytesContent(NEW))
        mode = seen()
        await upload.commit([receipt])
        return mode

    assert anyio.run(write) == 0o600
    assert path.read_bytes() == NEW
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode if earlier is None else 0o100600


def test_directories_that_another_process_makes_meanwhile(workers: ThreadWorkers) -> None:
    """A file system that fails where a directory has come up since it looked does not fail the save."""

    class Raced(Memory):
        """Somebody else is always one directory ahead."""

        async_impl = False

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            if path.rpartition("/")[0] not in self.pseudo_dirs:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return super()._open(path, mode, **kwargs)

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            missing = [each for each in ("/run", "/run/a", "/run/a/b") if not self.isdir(each)]
            if missing:
                self.pseudo_dirs.append(missing[0])
                raise OSError(errno.EEXIST, "File exists")

    file_system = Raced()
    place = Location(url="double://run/a/b/x.ckpt", path="/run/a/b/x.ckpt", key="x", group="double")
    anyio.run(save, generic(file_system, workers), place)
    assert file_system.names == ["/run/a/b/x.ckpt"]
