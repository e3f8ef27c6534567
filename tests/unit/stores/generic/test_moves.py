"""The generic store at the commit: how a file takes the place of another on file systems that misbehave."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.testing import ManualClock, ThreadWorkers
from tests.generic_doubles import NEW, OLD, TARGET, Memory, Unsteady, generic, save


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
    assert f"is whole, either under its own name or at {str(tmp_path / name)!r}" in caplog.text
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
