"""The local store: permissions, system calls that fail, and what dead processes left."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.local import LocalStore
from async_ckpt.stores.target import check_local_target
from async_ckpt.testing import BytesContent, FaultyDisk, ThreadWorkers

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for the stores of one test."""
    pool = ThreadWorkers(4)
    yield pool
    pool.close()


async def save(store: LocalStore, path: Path, data: bytes = NEW) -> tuple[str, ...]:
    """Save as a writer does: abort after any error. Return what was swept."""
    upload = await store.begin(locate(path), len(data))
    try:
        half = len(data) // 2
        parts = [Part(index=0, start=0, stop=half), Part(index=1, start=half, stop=len(data))]
        await upload.commit([await upload.put(part, BytesContent(data)) for part in parts])
    except BaseException:
        await upload.abort()
        raise
    return upload.swept


def mode(path: Path) -> int:
    """Return the permission bits of *path*."""
    return stat.S_IMODE(path.stat().st_mode)


# -- names and permissions


def test_mode_of_a_new_file_is_that_of_open(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A new checkpoint has the mode that open() would give it under the same umask."""
    before = os.umask(0o027)
    try:
        anyio.run(save, LocalStore(workers=workers), tmp_path / "new.ckpt")
        (tmp_path / "opened").write_bytes(b"")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new.ckpt") == mode(tmp_path / "opened") == 0o640


def test_mode_of_a_present_file_is_kept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A replaced checkpoint keeps its mode, as one written in place does."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    target.chmod(0o604)
    anyio.run(save, LocalStore(workers=workers), target)
    assert (target.read_bytes(), mode(target)) == (NEW, 0o604)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_of_a_present_file_is_kept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A replaced checkpoint keeps its owner where that is permitted."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    os.chown(target, 12345, 23456)
    anyio.run(save, LocalStore(workers=workers), target)
    assert (target.stat().st_uid, target.stat().st_gid) == (12345, 23456)


def test_a_read_only_file_is_refused(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A present file that may not be written is refused with EACCES, although a rename would work."""

    class ReadOnly(Disk):
        def writable(self, path: str) -> bool:
            """Refuse the file itself."""
            return not path.endswith("x.ckpt")

    (tmp_path / "x.ckpt").write_bytes(OLD)
    with pytest.raises(StoreError) as caught:
        anyio.run(save, LocalStore(workers=workers, disk=ReadOnly()), tmp_path / "x.ckpt")
    assert (caught.value.errno, caught.value.stage) == (errno.EACCES, "begin")
    assert (tmp_path / "x.ckpt").read_bytes() == OLD


@pytest.mark.parametrize("dangling", [True, False])
def test_a_symlink_is_written_through(tmp_path: Path, workers: ThreadWorkers, dangling: bool) -> None:
    """A save to a symlink writes the file it leads to, in that file's directory, and keeps the link."""
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "x.ckpt", tmp_path / "last.ckpt"
    if not dangling:
        file.write_bytes(OLD)
    link.symlink_to("elsewhere/x.ckpt")
    anyio.run(save, LocalStore(workers=workers), link)
    assert link.is_symlink()
    assert file.read_bytes() == NEW
    assert not file.is_symlink()


def test_deleting_below_a_file_is_no_error(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Nothing can be there, and nothing there is not an error."""
    (tmp_path / "file").write_bytes(OLD)
    anyio.run(LocalStore(workers=workers).delete, locate(tmp_path / "file" / "x.ckpt"))
    assert (tmp_path / "file").read_bytes() == OLD


def test_deleting_a_symlink_keeps_its_file(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Delete takes the link, to a file or to a directory, not what it leads to."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.ckpt").write_bytes(OLD)
    store = LocalStore(workers=workers)
    for name, target in (("file", "folder/x.ckpt"), ("directory", "folder")):
        (tmp_path / name).symlink_to(target)
        anyio.run(store.delete, locate(tmp_path / name))
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "folder" / "x.ckpt").read_bytes() == OLD


# -- the order of system calls


def test_order_of_a_durable_save(tmp_path: Path, workers: ThreadWorkers) -> None:
    """The file is synced before it gets its name, the directories that lead to it after (D1)."""
    disk = FaultyDisk()
    anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "a" / "x.ckpt")
    calls = [name for name in disk.calls if name in ("write", "fsync", "replace", "sync_directory")]
    ancestors = len((tmp_path / "a").resolve().parts)
    assert calls == ["write", "write", "fsync", "replace"] + ["sync_directory"] * ancestors
    assert disk.open_descriptors == 0


def test_ancestors_are_synced_once(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A second save to a directory syncs that directory alone."""
    disk = FaultyDisk()
    store = LocalStore(workers=workers, disk=disk)
    anyio.run(save, store, tmp_path / "x.ckpt")
    disk.calls.clear()
    anyio.run(save, store, tmp_path / "y.ckpt")
    assert disk.calls.count("sync_directory") == 1


def test_durability_of_the_process_syncs_nothing(tmp_path: Path, workers: ThreadWorkers) -> None:
    """With durability="process" nothing waits for the medium."""
    disk = FaultyDisk()
    anyio.run(save, LocalStore(workers=workers, disk=disk, durability="process"), tmp_path / "x.ckpt")
    assert not {"fsync", "sync_directory", "start_writeback"} & set(disk.calls)
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


# -- system calls that fail

FATAL = ["create", "lock", "fstat", "stat", "preallocate", "duplicate", "write", "start_writeback", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [*FATAL, "take_after", "replace"])
def test_a_call_that_fails(tmp_path: Path, workers: ThreadWorkers, call: str, number: int) -> None:
    """Whatever fails up to the rename, the old file is whole, and no file or descriptor is left (D2)."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = FaultyDisk({call: (1, number)})
    with pytest.raises(StoreError) as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk), target)
    assert caught.value.errno == number
    assert caught.value.location == str(target)
    assert caught.value.stage in ("begin", "write", "commit")
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert disk.open_descriptors == 0


@pytest.mark.parametrize("call", ["create", "preallocate", "write", "fsync", "replace"])
def test_a_call_that_fails_in_a_new_directory(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """A failed save takes the directories away again that it made."""
    disk = FaultyDisk({call: (1, errno.EIO)})
    with pytest.raises(StoreError):
        anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "a" / "b" / "x.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If the second of two directories cannot be made, the first is taken away again."""
    disk = FaultyDisk({"mkdir": (2, errno.ENOSPC)})
    with pytest.raises(StoreError, match="Free space"):
        anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "a" / "b" / "x.ckpt")
    assert os.listdir(tmp_path) == []


def test_second_part_that_fails(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A full disk found in the middle is a StoreError of the stage "write" with advice."""
    disk = FaultyDisk({"write": (2, errno.ENOSPC)})
    with pytest.raises(StoreError, match="Free space") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt")
    assert caught.value.stage == "write"
    assert os.listdir(tmp_path) == []


def test_a_rename_of_which_only_the_answer_is_lost(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A rename that reports failure but took effect counts: the store looks before it claims (E3)."""
    disk = FaultyDisk({"replace": (1, errno.EIO)}, after=True)
    anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


def test_a_directory_that_cannot_be_synced(tmp_path: Path, workers: ThreadWorkers) -> None:
    """After the rename a failed sync is an error that says so; the new file is there and whole."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = FaultyDisk({"sync_directory": (1, errno.EIO)})
    with pytest.raises(StoreError, match="in place and whole") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk), target)
    assert caught.value.stage == "commit"
    assert target.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert disk.open_descriptors == 0


@pytest.mark.parametrize("call", ["unlink", "close", "rmdir"])
def test_cleaning_that_fails_is_no_second_error(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """If the cleaning fails as well, the first error is the one that is raised."""
    disk = FaultyDisk({"fsync": (1, errno.EIO), call: (0, errno.EPERM)}, after=True)
    with pytest.raises(StoreError) as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, durability="fsync"), tmp_path / "x.ckpt")
    assert caught.value.errno in (errno.EIO, errno.EPERM)


def test_a_directory_that_vanishes(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A directory that another save's abort removes in the wrong moment is made again."""
    disk = FaultyDisk({"create": (1, errno.ENOENT)})
    anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "a" / "x.ckpt")
    assert (tmp_path / "a" / "x.ckpt").read_bytes() == NEW


def test_a_directory_that_always_vanishes(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Trying again has an end (B2)."""
    disk = FaultyDisk({"create": (0, errno.ENOENT)})
    with pytest.raises(StoreError, match="vanishes"):
        anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt")


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
    anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt")
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


# -- what dead processes left


def leave(folder: Path, *, pid: int | None = None, host: str | None = None) -> Path:
    """Make the temporary file of a process that holds no lock on it."""
    _, ours, own_host, own_pid, rest = temporary_name().split(".", 4)
    path = folder / f".{ours}.{host or own_host}.{pid or own_pid}.{rest}"
    path.write_bytes(b"partial")
    return path


def dead_pid() -> int:
    """Return the id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def test_a_killed_process_is_swept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """SIGKILL in the middle of a save leaves the old file, and the next begin removes the rest (D2)."""
    program = """
import sys, anyio
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.local import LocalStore
from async_ckpt.stores.target import check_local_target
from async_ckpt.testing import BytesContent, ThreadWorkers, crash
async def main():
    upload = await LocalStore(workers=ThreadWorkers(1)).begin(locate(sys.argv[1]), 100)
    await upload.put(Part(index=0, start=0, stop=50), BytesContent(bytes(100)))
    crash()
anyio.run(main)
"""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    done = subprocess.run([sys.executable, "-c", program, str(target)], timeout=100, check=False)
    assert done.returncode == -9
    left = [name for name in os.listdir(tmp_path) if name != "x.ckpt"]
    assert len(left) == 1
    assert target.read_bytes() == OLD
    store = LocalStore(workers=workers)
    assert list(anyio.run(save, store, target)) == left
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_directory_is_swept_once(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Only the first save to a directory looks for leftovers."""
    store = LocalStore(workers=workers)
    assert anyio.run(save, store, tmp_path / "x.ckpt") == ()
    left = leave(tmp_path, pid=dead_pid())
    assert anyio.run(save, store, tmp_path / "x.ckpt") == ()
    left.unlink()


def test_a_living_save_is_not_swept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """The file of a save that is under way, of another store of this process, is left alone."""

    async def both() -> None:
        upload = await LocalStore(workers=workers).begin(locate(tmp_path / "x.ckpt"), len(NEW))
        assert await save(LocalStore(workers=workers), tmp_path / "y.ckpt") == ()
        receipt = await upload.put(Part(index=0, start=0, stop=len(NEW)), BytesContent(NEW))
        await upload.commit([receipt])

    anyio.run(both)
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


@pytest.mark.parametrize(("of_one_host", "swept"), [(True, 1), (False, 0)])
def test_another_host(tmp_path: Path, workers: ThreadWorkers, of_one_host: bool, swept: int) -> None:
    """A free lock proves another host's process dead only where all locks are this kernel's."""

    class Mounted(Disk):
        def is_of_one_host(self, fd: int) -> bool:
            """Answer as told."""
            return of_one_host

    left = leave(tmp_path, host="0" * 12)
    names = anyio.run(save, LocalStore(workers=workers, disk=Mounted()), tmp_path / "x.ckpt")
    assert len(names) == swept
    assert left.exists() is not of_one_host
    left.unlink(missing_ok=True)


def test_without_locks_the_process_id_tells(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Where files cannot be locked, only files of dead processes of this host are swept."""
    dead, own, elsewhere = leave(tmp_path, pid=dead_pid()), leave(tmp_path), leave(tmp_path, host="0" * 12)
    disk = FaultyDisk({"lock": (0, errno.ENOTSUP)})
    assert anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt") == (dead.name,)
    assert not dead.exists()
    for path in (own, elsewhere):
        path.unlink()


@pytest.mark.parametrize("call", ["names", "open_existing", "unlink"])
def test_sweeping_that_fails_is_no_error(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """A leftover that cannot be removed does not keep a save from being made."""
    left = leave(tmp_path, pid=dead_pid())
    disk = FaultyDisk({call: (0, errno.EACCES)})
    assert anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt") == ()
    assert disk.open_descriptors == 0
    left.unlink()


def test_a_sweeper_that_is_faster(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A fresh file that a sweeper took before it was locked is made again."""

    class Swept(Disk):
        created: list[str]

        def create(self, path: str) -> int:
            """Create, and remember."""
            self.created.append(path)
            return super().create(path)

        def lock(self, fd: int) -> None:
            """Lock, but be too late twice."""
            if len(self.created) == 1:
                os.unlink(self.created[0])
            if len(self.created) == 2:
                raise BlockingIOError(errno.EWOULDBLOCK, "a sweeper has it")
            super().lock(fd)

    disk = Swept()
    disk.created = []
    anyio.run(save, LocalStore(workers=workers, disk=disk), tmp_path / "x.ckpt")
    assert len(disk.created) == 3
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_an_ordinary_disk_is_known(tmp_path: Path) -> None:
    """Whether a file system is this host's alone is read from the kernel's table of mounts."""
    disk = Disk()
    fd = disk.create(str(tmp_path / "x"))
    known = disk.is_of_one_host(fd)
    disk.close(fd)
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True)
    assert known is (kind.stdout.strip() in {"ext2/ext3", "tmpfs", "xfs", "overlayfs", "zfs", "f2fs"})


class Vanishing(Disk):
    """A disk on which a file goes away between two looks at it."""

    def stat(self, path: str) -> os.stat_result:
        """Describe a file, and remove it."""
        found = super().stat(path)
        os.unlink(path)
        return found


def test_a_file_that_goes_away_meanwhile_is_no_refusal(tmp_path: Path) -> None:
    """A save is not refused because a removal on another thread takes the earlier file between two checks."""
    (tmp_path / "x.ckpt").write_bytes(OLD)
    check_local_target(locate(tmp_path / "x.ckpt"), str(tmp_path / "x.ckpt"), Vanishing())
    assert not (tmp_path / "x.ckpt").exists()
