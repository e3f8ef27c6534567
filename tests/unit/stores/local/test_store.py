"""The local store: names, permissions, the order of system calls."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.store import LocalStore, sync_path
from async_ckpt.testing import FaultyDisk, ThreadWorkers
from tests.local_saves import KNOWN, NEW, OLD, save
from tests.support import python


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_group_of_a_present_file_is_kept(tmp_path: Path) -> None:
    """Whoever may not give a file to its earlier owner still leaves it to its earlier group, which reads it."""
    program = """
import os, sys
from async_ckpt.stores.disk import Disk
fd, model = map(int, sys.argv[1:])
os.setgroups([23456])
os.setgid(11111)
os.setuid(11111)
Disk().copy_metadata(fd, "nothing", os.fstat(model))
"""
    earlier, new = tmp_path / "earlier", tmp_path / "new"
    for path, owner in ((earlier, (12345, 23456)), (new, (11111, 11111))):
        path.touch()
        os.chown(path, *owner)
    earlier.chmod(0o664)
    with open(earlier, "rb") as model, open(new, "rb") as file:
        fds = (file.fileno(), model.fileno())
        command = [sys.executable, "-c", program, *map(str, fds)]
        subprocess.run(command, timeout=100, check=True, pass_fds=fds)
    assert (new.stat().st_uid, new.stat().st_gid, mode(new)) == (11111, 23456, 0o664)


@pytest.mark.parametrize("earlier", [None, 0o600, 0o666])
def test_nobody_else_reads_a_file_that_is_not_complete(
    tmp_path: Path, workers: ThreadWorkers, earlier: int | None
) -> None:
    """Until the commit a checkpoint is its owner's alone, also where it will not be; nobody can keep it open."""
    target = tmp_path / "x.ckpt"
    if earlier is not None:
        target.write_bytes(OLD)
        target.chmod(earlier)
    seen = []

    class Watched(Disk):
        """Looks at the temporary file at every step."""

        def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
            """Look before and after."""
            seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
            written = super().write(fd, pieces, offset)
            seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
            return written

        def create(self, path: str) -> int:
            """Look as soon as it is there."""
            fd = super().create(path)
            seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
            return fd

        def preallocate(self, fd: int, nbytes: int) -> None:
            """Look when it could have been opened to others."""
            seen.append(stat.S_IMODE(os.fstat(fd).st_mode))

    before = os.umask(0)
    try:
        anyio.run(save, LocalStore(workers=workers, disk=Watched(), capability_cache=KNOWN), target)
    finally:
        os.umask(before)
    assert set(seen) == {0o600}
    assert mode(target) == (0o666 if earlier is None else earlier)


def test_a_mode_that_changes_meanwhile_is_kept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Who takes a checkpoint away from others while it is replaced, has the new one taken away as well."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    target.chmod(0o644)

    class Closing(Disk):
        def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
            """Close the earlier file to others."""
            target.chmod(0o600)
            return super().write(fd, pieces, offset)

    anyio.run(save, LocalStore(workers=workers, disk=Closing(), capability_cache=KNOWN), target)
    assert (target.read_bytes(), mode(target)) == (NEW, 0o600)


@pytest.mark.parametrize("call", ["copy_metadata", "set_mode"])
def test_a_file_system_without_modes_keeps_the_checkpoint(
    tmp_path: Path, workers: ThreadWorkers, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Where no mode can be changed, the checkpoint stays its owner's alone, and a warning says so."""
    target = tmp_path / "x.ckpt"
    if call == "copy_metadata":
        target.write_bytes(OLD)
    anyio.run(save, LocalStore(workers=workers, disk=FaultyDisk({call: (0, errno.EPERM)})), target)
    assert (target.read_bytes(), mode(target)) == (NEW, 0o600)
    assert "only its owner may read" in caplog.text


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX access list as the kernel has it: version, then tag, permissions and id of each entry."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


#: user::rw-, user:12345:rw-, group::---, mask::rw-, other::---
SHARED = access_list(
    (1, 6, 2**32 - 1), (2, 6, 12345), (4, 0, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)
)


def give(path: Path, kind: str) -> None:
    """Give *path* an access list, or skip the test where there is none."""
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", SHARED)
    except (OSError, AttributeError):
        pytest.skip("this file system has no access lists")


def test_access_list_of_a_present_file_is_kept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A replaced checkpoint keeps its access list; its mode alone would open it to its group."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    give(target, "access")
    anyio.run(save, LocalStore(workers=workers), target)
    assert os.getxattr(target, "system.posix_acl_access") == SHARED


@pytest.mark.parametrize("now", ["another file", "a link to another file"])
def test_access_list_of_another_file_is_not_taken(tmp_path: Path, now: str) -> None:
    """Whoever takes the name of the file that is replaced, before it is, cannot have the new one opened to others."""
    target, other = tmp_path / "x.ckpt", tmp_path / "other.ckpt"
    target.write_bytes(OLD)
    other.write_bytes(OLD)
    give(other, "access")
    target.chmod(0o640)
    model = target.lstat()
    target.rename(tmp_path / "aside.ckpt")
    if now == "another file":
        other.rename(target)
    else:
        target.symlink_to(other)
    disk = Disk()
    fd = disk.create(str(tmp_path / "new.ckpt"))
    disk.copy_metadata(fd, str(target), model)
    disk.close(fd)
    assert "system.posix_acl_access" not in os.listxattr(tmp_path / "new.ckpt")
    assert mode(tmp_path / "new.ckpt") == 0o640


def test_access_list_of_the_directory(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A new checkpoint gets the list that its directory gives; a replaced one that had none gets none."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    target.chmod(0o640)
    give(tmp_path, "default")
    for path in (target, tmp_path / "new.ckpt"):
        anyio.run(save, LocalStore(workers=workers), path)
    assert os.getxattr(tmp_path / "new.ckpt", "system.posix_acl_access") == SHARED
    assert "system.posix_acl_access" not in os.listxattr(target)
    assert mode(target) == 0o640


def test_group_of_the_directory(tmp_path: Path, workers: ThreadWorkers) -> None:
    """In a setgid directory, new files and directories belong to its group, as those that open() makes."""
    tmp_path.chmod(0o2775)
    (tmp_path / "opened").touch()
    anyio.run(save, LocalStore(workers=workers), tmp_path / "a" / "x.ckpt")
    assert (tmp_path / "a").stat().st_mode & stat.S_ISGID
    assert (tmp_path / "a" / "x.ckpt").stat().st_gid == (tmp_path / "opened").stat().st_gid


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
        anyio.run(store.delete, locate(tmp_path / name, follow=False))
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "folder" / "x.ckpt").read_bytes() == OLD


# -- the order of system calls


def test_order_of_a_durable_save(tmp_path: Path, workers: ThreadWorkers) -> None:
    """The file is synced before it gets its name, the directories that lead to it after (D1)."""
    disk = FaultyDisk()
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "a" / "x.ckpt")
    calls = [name for name in disk.calls if name in ("write", "fsync", "replace", "sync_directory")]
    ancestors = len((tmp_path / "a").resolve().parts)
    assert calls == ["write", "write", "fsync", "replace"] + ["sync_directory"] * ancestors
    assert disk.open_descriptors == 0


def test_ancestors_are_synced_once(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A second save to a directory syncs that directory alone."""
    disk = FaultyDisk()
    store = LocalStore(workers=workers, disk=disk, capability_cache=KNOWN)
    anyio.run(save, store, tmp_path / "x.ckpt")
    disk.calls.clear()
    anyio.run(save, store, tmp_path / "y.ckpt")
    assert disk.calls.count("sync_directory") == 1


class Recording(Disk):
    """A disk that tells which directories were synced."""

    def __init__(self) -> None:
        self.synced: set[str] = set()

    def sync_directory(self, path: str) -> None:
        """Sync, and remember."""
        self.synced.add(path)
        super().sync_directory(path)


@pytest.mark.parametrize("again", ["made", "moved"])
def test_another_directory_of_that_name_is_synced(tmp_path: Path, workers: ThreadWorkers, again: str) -> None:
    """Directories that take the place of those that were synced, as another program has it, are synced, too (D1)."""
    disk = Recording()
    store = LocalStore(workers=workers, disk=disk, capability_cache=KNOWN)
    target = tmp_path / "run" / "a" / "x.ckpt"
    anyio.run(save, store, target)
    if again == "made":
        shutil.rmtree(tmp_path / "run")
        target.parent.mkdir(parents=True)
    else:
        (tmp_path / "run").rename(tmp_path / "aside")
        (tmp_path / "other" / "a").mkdir(parents=True)
        (tmp_path / "other").rename(tmp_path / "run")
    disk.synced.clear()
    anyio.run(save, store, target)
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "a")} <= disk.synced


def test_times_that_count_seconds_prove_nothing(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Where a file system's times are too coarse to tell of a change, every directory is synced each time (D1)."""

    class Coarse(Recording):
        def stat(self, path: str) -> os.stat_result:
            """Leave the fractions of seconds out."""
            found = super().stat(path)
            return os.stat_result(found, {"st_ctime_ns": found.st_ctime_ns // 10**9 * 10**9})

    disk = Coarse()
    store = LocalStore(workers=workers, disk=disk, capability_cache=KNOWN)
    anyio.run(save, store, tmp_path / "x.ckpt")
    disk.synced.clear()
    anyio.run(save, store, tmp_path / "x.ckpt")
    assert len(disk.synced) == len(tmp_path.parts)


def test_what_others_wrote_is_synced(tmp_path: Path) -> None:
    """Each file and directory of a tree is synced, and what leads to it (D1); nothing there is fine."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "tree" / name).touch()
    disk = FaultyDisk()
    sync_path(str(tmp_path / "tree"), disk)
    assert disk.calls.count("fsync") == 2
    assert disk.calls.count("sync_directory") == 2 + len(tmp_path.parts)
    assert disk.open_descriptors == 0
    sync_path(str(tmp_path / "nothing" / "there"), disk)


def test_durability_of_the_process_syncs_nothing(tmp_path: Path, workers: ThreadWorkers) -> None:
    """With durability="process" nothing waits for the medium."""
    disk = FaultyDisk()
    anyio.run(
        save,
        LocalStore(workers=workers, disk=disk, capability_cache=KNOWN, durability="process"),
        tmp_path / "x.ckpt",
    )
    assert not {"fsync", "sync_directory", "start_writeback"} & set(disk.calls)
    assert (tmp_path / "x.ckpt").read_bytes() == NEW


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="shows its descriptors elsewhere")
def test_a_child_holds_no_file(tmp_path: Path) -> None:
    """A process that is forked while a file is written, a data loader's maybe, keeps neither it nor its lock."""
    program = """
    import os, sys
    import anyio
    from async_ckpt.stores import locate
    from async_ckpt.stores.local.store import LocalStore
    from async_ckpt.testing import ThreadWorkers

    def held():
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(sys.argv[1]) for link in links if os.path.islink(link))

    async def main():
        upload = await LocalStore(workers=ThreadWorkers(1)).begin(locate(sys.argv[1] + "/x.ckpt"), 1)
        assert held() == 1
        child = os.fork()
        if child == 0:
            os._exit(held())
        assert os.waitpid(child, 0)[1] == 0
        assert held() == 1
        await upload.abort()

    anyio.run(main)
    """
    done = python(program, tmp_path.resolve())
    assert done.returncode == 0, done.stderr


# -- what else a replaced file has


def test_attributes_of_a_present_file_are_kept(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A replaced checkpoint keeps what the user has noted about it in attributes, as one written in place does."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    try:
        os.setxattr(target, "user.origin", b"run 7")
    except (AttributeError, OSError) as error:
        pytest.skip(f"no attributes here: {error}")
    anyio.run(save, LocalStore(workers=workers), target)
    assert (target.read_bytes(), os.getxattr(target, "user.origin")) == (NEW, b"run 7")


def test_another_name_keeps_the_earlier_file(
    tmp_path: Path, workers: ThreadWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    """A hard link to a checkpoint is no part of it: it keeps the earlier one, and the log says so, once."""
    caplog.set_level("INFO", logger="async_ckpt.stores.local")
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    os.link(target, tmp_path / "kept.ckpt")
    for _ in range(2):
        anyio.run(save, LocalStore(workers=workers), target)
    assert (target.read_bytes(), (tmp_path / "kept.ckpt").read_bytes()) == (NEW, OLD)
    assert caplog.text.count("1 other name") == 1


def test_a_directory_that_may_not_be_read_is_synced_with_its_file_system(
    tmp_path: Path, workers: ThreadWorkers
) -> None:
    """Where a directory is not ours to open, the whole file system is synced, so that the name is as durable (D1)."""
    disk = FaultyDisk({"sync_directory": (1, errno.EACCES)})
    anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == NEW
    calls = disk.calls
    assert calls.index("replace") < calls.index("sync_directory") < calls.index("sync_file_system")
    disk = FaultyDisk({"sync_directory": (1, errno.EACCES), "sync_file_system": (1, errno.EIO)})
    with pytest.raises(StoreError, match="in place and whole"):
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=KNOWN), tmp_path / "x.ckpt")
