"""The local store: system calls that fail."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.target import check_local_target
from async_ckpt.testing import FaultyDisk, ThreadWorkers
from tests.local_saves import KNOWN, NEW, OLD, save

FATAL = ["create", "lock", "fstat", "lstat", "preallocate", "duplicate", "write", "start_writeback", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [*FATAL, "copy_metadata", "replace"])
def test_a_call_that_fails(tmp_path: Path, workers: ThreadWorkers, call: str, number: int) -> None:
    """Whatever fails up to the rename, the old file is whole, and no file or descriptor is left (D2)."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = FaultyDisk({call: (1, number)})
    with pytest.raises(StoreError) as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), target)
    assert caught.value.errno == number
    assert caught.value.location == str(target)
    assert caught.value.stage in ("begin", "write", "commit")
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert disk.open_descriptors == 0


@pytest.mark.parametrize(
    "call", ["create", "default_mode", "preallocate", "write", "set_mode", "fsync", "replace"]
)
def test_a_call_that_fails_in_a_new_directory(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """A failed save takes the directories away again that it made."""
    disk = FaultyDisk({call: (1, errno.EIO)})
    with pytest.raises(StoreError):
        anyio.run(
            save,
            LocalStore(workers=workers, disk=disk, capability_cache=KNOWN),
            tmp_path / "a" / "b" / "x.ckpt",
        )
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If the second of two directories cannot be made, the first is taken away again."""
    disk = FaultyDisk({"mkdir": (2, errno.ENOSPC)})
    with pytest.raises(StoreError, match="Free space"):
        anyio.run(
            save,
            LocalStore(workers=workers, disk=disk, capability_cache=KNOWN),
            tmp_path / "a" / "b" / "x.ckpt",
        )
    assert os.listdir(tmp_path) == []


def test_second_part_that_fails(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A full disk found in the middle is a StoreError of the stage "write" with advice."""
    disk = FaultyDisk({"write": (2, errno.ENOSPC)})
    with pytest.raises(StoreError, match="Free space") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
    assert caught.value.stage == "write"
    assert os.listdir(tmp_path) == []


def test_a_rename_of_which_only_the_answer_is_lost(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A rename that reports failure but took effect counts: the store looks before it claims (E3)."""
    disk = FaultyDisk({"replace": (1, errno.EIO)}, after=True)
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


def test_a_directory_that_cannot_be_synced(tmp_path: Path, workers: ThreadWorkers) -> None:
    """After the rename a failed sync is an error that says so; the new file is there and whole."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = FaultyDisk({"sync_directory": (1, errno.EIO)})
    with pytest.raises(StoreError, match="in place and whole") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), target)
    assert caught.value.stage == "commit"
    assert target.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert disk.open_descriptors == 0


@pytest.mark.parametrize("call", ["unlink", "close", "rmdir"])
def test_cleaning_that_fails_is_no_second_error(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """If the cleaning fails as well, the first error is the one that is raised."""
    disk = FaultyDisk({"fsync": (1, errno.EIO), call: (0, errno.EPERM)}, after=True)
    with pytest.raises(StoreError) as caught:
        anyio.run(
            save,
            LocalStore(workers=workers, disk=disk, capability_cache=KNOWN, durability="fsync"),
            tmp_path / "x.ckpt",
        )
    assert caught.value.errno in (errno.EIO, errno.EPERM)


def test_a_directory_that_vanishes(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A directory that another save's abort removes in the wrong moment is made again."""
    disk = FaultyDisk({"create": (1, errno.ENOENT)})
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "a" / "x.ckpt")
    assert (tmp_path / "a" / "x.ckpt").read_bytes() == NEW


def test_a_directory_that_vanishes_under_the_temporary_file(tmp_path: Path, workers: ThreadWorkers) -> None:
    """What had been begun there is let go of before it is begun anew."""
    disk = FaultyDisk({"default_mode": (1, errno.ENOENT)})
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert disk.open_descriptors == 0


def test_a_directory_that_always_vanishes(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Trying again has an end (B2)."""
    disk = FaultyDisk({"create": (0, errno.ENOENT)})
    with pytest.raises(StoreError, match="vanishes"):
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")


def test_no_room_is_told_before_the_first_byte(tmp_path: Path, workers: ThreadWorkers) -> None:
    """The kernel's own refusal to reserve the room fails begin, and leaves nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(StoreError) as caught:
            anyio.run(LocalStore(workers=workers).begin, locate(tmp_path / "x.ckpt"), 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.stage, caught.value.errno) == ("begin", errno.EFBIG)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_cannot_preallocate_or_lock(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Without locks and preallocation a save works all the same."""

    class Plain(FaultyDisk):
        def preallocate(self, fd: int, nbytes: int) -> None:
            """Do nothing."""
            return None

    disk = Plain({"lock": (0, errno.ENOTSUP)})
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


def test_thousands_of_pieces(tmp_path: Path) -> None:
    """More pieces than one call takes, some of them empty, are written in order and at their place."""
    pieces = [memoryview(bytes([number % 256]) * (number % 5)) for number in range(5000)]
    path = tmp_path / "x"
    disk = Disk()
    fd = disk.create(str(path))
    assert disk.write(fd, pieces, 7) == sum(piece.nbytes for piece in pieces)
    disk.close(fd)
    assert path.read_bytes() == bytes(7) + b"".join(pieces)


def test_a_write_that_is_cut_short(tmp_path: Path) -> None:
    """A partial write is gone on with; what cannot be written is an error, not a short file."""
    disk = Disk()
    fd = disk.create(str(tmp_path / "x"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            disk.write(fd, [memoryview(bytes(1000)), memoryview(bytes(1000))], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk.fstat(fd).st_size == 1500
    disk.close(fd)


class Vanishing(Disk):
    """A disk on which a file goes away between two looks at it."""

    def lstat(self, path: str) -> os.stat_result:
        """Describe a file, and remove it."""
        found = super().lstat(path)
        os.unlink(path)
        return found


def test_a_file_that_goes_away_meanwhile_is_no_refusal(tmp_path: Path) -> None:
    """A save is not refused because a removal on another thread takes the earlier file between two checks."""
    (tmp_path / "x.ckpt").write_bytes(OLD)
    check_local_target(locate(tmp_path / "x.ckpt"), Vanishing())
    assert not (tmp_path / "x.ckpt").exists()


def test_a_tree_that_two_delete(
    tmp_path: Path, workers: ThreadWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody else deletes first does not save the others."""
    unlink = os.unlink
    calls: list[None] = []

    def second(*arguments: Any, **options: Any) -> None:
        unlink(*arguments, **options)
        calls.append(None)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, "somebody else was faster")

    for name in "abc":
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / "tree" / name).touch()
    monkeypatch.setattr(os, "unlink", second)
    anyio.run(LocalStore(workers=workers).delete, locate(tmp_path / "tree"))
    assert os.listdir(tmp_path) == []


def test_a_read_only_file_system_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the file system, not the user, is at fault, the error says so."""

    class ReadOnly(Disk):
        def writable(self, path: str) -> bool:
            """Refuse."""
            return False

        def takes_names(self, directory: str) -> bool:
            """Refuse."""
            return False

    answer = os.statvfs(tmp_path)
    fields = [*answer[:8], os.ST_RDONLY, *answer[9:]]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(StoreError, match=r"[Rr]ead-only") as caught:
        check_local_target(locate(tmp_path / "x.ckpt"), ReadOnly())
    assert caught.value.errno == errno.EROFS
