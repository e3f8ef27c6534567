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
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

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
    assert f"is whole, at {str(tmp_path / name)!r}" in caplog.text
    assert (tmp_path / name).read_bytes() == OLD


class Telling(Unsteady):
    """A file system that renames, where others read meanwhile, and that tells only some things of its files.

    Attributes:
        keys: what it tells of a file that changes with its content, beside its length.
        replaces: whether it moves or copies a file onto another.
    """

    keys: tuple[str, ...] = ()
    replaces = True
    reads = 0

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file, as SFTP with the time at which it was read last."""
        info = super().info(path, **kwargs)
        self.reads += 1
        told = {key: info["created"] for key in self.keys if "created" in info}
        return {"name": info["name"], "size": info["size"], "type": info["type"], "time": self.reads, **told}

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Rename, maybe not, and lose the answer."""
        self._fail("mv before")
        self._refuse(path2)
        self.store[path2] = self.store.pop(path1)
        self._fail("mv after")

    def rm_file(self, path: str) -> None:
        """Remove a file, if that does not fail."""
        self._fail("rm")
        super().rm_file(path)

    def _refuse(self, path: str) -> None:
        if path in self.store and not self.replaces:
            raise FileExistsError(errno.EEXIST, "File exists")


class Copying(Telling):
    """One that copies and removes instead; a copy may end half-way."""

    mv = AbstractFileSystem.mv

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy, maybe not, or half of it."""
        self._fail("cp_file before")
        self._refuse(path2)
        self.make(path2, self.cat_file(path1)[:1500])
        self._fail("cp_file half-way")
        self.make(path2, self.cat_file(path1))
        self._fail("cp_file after")


RESET = ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("keys", [(), ("mtime",)])
@pytest.mark.parametrize("kind", [Telling, Copying])
@pytest.mark.parametrize("failing", ["nothing", "before", "half-way", "after"])
def test_a_move_while_others_read(
    workers: ThreadWorkers, failing: str, kind: type[Telling], keys: tuple[str, ...], replaces: bool
) -> None:
    """That the earlier file was read is not taken for the new file being in, nor for its being gone (D1, E3)."""
    call = "mv" if kind is Telling else "cp_file"
    file_system = kind({f"{call} {failing}": [RESET]}, x=OLD)
    file_system.keys, file_system.replaces = keys, replaces
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW
    assert file_system.names == [TARGET.path]


class Leaving(Telling):
    """One whose move leaves the source where it was."""

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy, maybe not, and lose the answer."""
        self._fail("mv before")
        self.make(path2, self.cat_file(path1))
        self._fail("mv after")


@pytest.mark.parametrize("keys", [(), ("mtime",)])
@pytest.mark.parametrize("failing", ["nothing", "before", "after"])
def test_a_move_that_leaves_its_source(workers: ThreadWorkers, failing: str, keys: tuple[str, ...]) -> None:
    """Where a file stays under its temporary name as well, it counts as moved, and that name goes."""
    file_system = Leaving({f"mv {failing}": [RESET]}, x=OLD)
    file_system.keys = keys
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW
    assert file_system.names == [TARGET.path]


def test_the_replaced_file_that_stays_aside(workers: ThreadWorkers, caplog: pytest.LogCaptureFixture) -> None:
    """If the earlier file cannot be removed once the new one is in, the save is durable, and a warning names it."""
    file_system = Telling({"rm": [PermissionError(errno.EACCES, "no")]}, x=OLD)
    file_system.replaces = False
    anyio.run(save, generic(file_system, workers))
    (aside,) = [name for name in file_system.names if name != TARGET.path]
    assert file_system.cat_file(TARGET.path) == NEW
    assert f"{aside!r}, which the new file has replaced" in caplog.text


def test_a_file_of_others_is_not_ours(workers: ThreadWorkers) -> None:
    """Where a move renames, another file of the same length under the name is not taken for the new one (D1)."""

    class Contested(Telling):
        keys = ("mtime",)

        def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
            if self.failing:
                self.make(path2, OLD)
            super().mv(path1, path2, **kwargs)

    file_system = Contested({"mv before": [RESET]}, x=OLD)
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW


def test_a_copy_whose_source_stays(workers: ThreadWorkers) -> None:
    """Where a move copies, the new file is in though its temporary name cannot be removed at once."""
    file_system = Copying({"rm": [PermissionError(errno.EACCES, "no")]}, x=OLD)
    file_system.keys = ("mtime",)
    anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == NEW
    assert file_system.names == [TARGET.path]


def test_half_a_copy_aside_while_others_read(workers: ThreadWorkers) -> None:
    """A copy of the earlier file that ended half-way never takes its place (D2)."""
    file_system = Copying({"cp_file half-way": [OSError(errno.EIO, "x")]}, x=OLD)
    file_system.keys, file_system.replaces = ("mtime",), False
    with pytest.raises(StoreError):
        anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == OLD
    assert file_system.names == [TARGET.path]


class Halting(Telling):
    """One that replaces nothing, and whose third move fails, as does what then follows."""

    keys = ("mtime",)
    replaces = False
    moves = 0
    then: dict[str, list[Exception]]

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Move, unless it is the third time: the new file in, with the earlier one aside."""
        self.moves += 1
        if self.moves == 3:
            self.failing = self.then
            raise OSError(errno.EIO, "Input/output error")
        super().mv(path1, path2, **kwargs)


def test_the_earlier_file_comes_first(workers: ThreadWorkers, caplog: pytest.LogCaptureFixture) -> None:
    """The earlier file is put back though the temporary one cannot be removed, and a warning tells of that (D2)."""
    file_system = Halting({}, x=OLD)
    file_system.then = {"rm": [PermissionError(errno.EACCES, "no")]}
    with pytest.raises(StoreError):
        anyio.run(save, generic(file_system, workers))
    assert file_system.cat_file(TARGET.path) == OLD
    assert "cleaning up" in caplog.text
    assert "previous" not in caplog.text


def test_a_server_that_stays_away_in_mid_commit(
    workers: ThreadWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    """If nothing can be looked at any more, the warning says where the earlier file is (D2)."""
    file_system = Halting({}, x=OLD)
    file_system.then = {"info": [RESET] * 99}
    with pytest.raises(StoreError):
        anyio.run(save, generic(file_system, workers))
    file_system.failing = {}
    (aside,) = [name for name in file_system.names if ".previous-" in name]
    assert file_system.cat_file(aside) == OLD
    assert repr(aside) in caplog.text


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
