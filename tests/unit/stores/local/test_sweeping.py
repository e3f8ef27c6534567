"""The local store: what dead processes left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import BytesContent, FaultyDisk, ThreadWorkers
from tests.local_saves import KNOWN, NEW, OLD, save


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
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.target import check_local_target
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


def test_links_of_the_dead_are_swept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A link that a killed process has left on its way to a name is removed, and not what it leads to; others stay."""
    (tmp_path / "best.ckpt").write_bytes(OLD)
    dead, own = leave(tmp_path, pid=dead_pid()), leave(tmp_path)
    for path in (dead, own):
        path.unlink()
        path.symlink_to("best.ckpt")
    assert anyio.run(save, LocalStore(workers=workers), tmp_path / "x.ckpt") == (dead.name,)
    assert own.is_symlink()
    assert (tmp_path / "best.ckpt").read_bytes() == OLD
    own.unlink()


def test_another_directory_of_that_name_is_swept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A directory that has taken the place of one that was swept is swept, too."""
    store = LocalStore(workers=workers)
    run, other = tmp_path / "run", tmp_path / "other"
    anyio.run(save, store, run / "x.ckpt")
    other.mkdir()
    left = leave(other, pid=dead_pid())
    run.rename(tmp_path / "aside")
    other.rename(run)
    assert anyio.run(save, store, run / "x.ckpt") == (left.name,)


def test_a_lock_that_its_owner_may_not_have(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Where a file system is not known to be one host's, a living process's file is left, locked or not (D2)."""

    class Shared(Disk):
        def is_of_one_host(self, fd: int) -> bool:
            """Answer as NFS."""
            return False

    dead, own = leave(tmp_path, pid=dead_pid()), leave(tmp_path)
    assert anyio.run(save, LocalStore(workers=workers, disk=Shared()), tmp_path / "x.ckpt") == (dead.name,)
    own.unlink()


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
    assert anyio.run(
        save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt"
    ) == (dead.name,)
    assert not dead.exists()
    for path in (own, elsewhere):
        path.unlink()


@pytest.mark.parametrize("call", ["names", "open_existing", "unlink"])
def test_sweeping_that_fails_is_no_error(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """A leftover that cannot be removed does not keep a save from being made."""
    left = leave(tmp_path, pid=dead_pid())
    disk = FaultyDisk({call: (0, errno.EACCES)})
    assert (
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
        == ()
    )
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
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
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
