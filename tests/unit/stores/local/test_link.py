"""Second names for checkpoints on a local disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location
from async_ckpt.stores.local import link
from async_ckpt.testing.faults import FaultyDisk


def make_link(location: Location, target: Location) -> None:
    """Make a link that survives the loss of power."""
    link.Links("fsync").make(location, target, asked_ns=0)


def at(path: Path) -> Location:
    """Return the location of the name itself."""
    return locate(path, follow=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file to lead to."""
    (tmp_path / "new.ckpt").write_text("new")
    return tmp_path / "new.ckpt"


@pytest.mark.parametrize("before", ["nothing", "a file", "a link", "a dangling link", "a directory"])
def test_whatever_was_there_is_replaced(tmp_path: Path, target: Path, before: str) -> None:
    """The name leads to the target afterwards, and nothing else is left in the directory."""
    last = tmp_path / "last.ckpt"
    if before == "a file":
        last.write_text("old")
    elif before == "a link":
        last.symlink_to("new.ckpt")
    elif before == "a dangling link":
        last.symlink_to("gone.ckpt")
    elif before == "a directory":
        last.mkdir()
        (last / "shard").write_text("old")
    make_link(at(last), at(target))
    assert last.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt"]


def test_the_link_is_relative(tmp_path: Path, target: Path) -> None:
    """The directory may be moved as a whole."""
    make_link(at(tmp_path / "sub" / "last.ckpt"), at(target))
    assert os.readlink(tmp_path / "sub" / "last.ckpt") == os.path.join("..", "new.ckpt")


def test_what_a_killed_process_left_is_swept(tmp_path: Path, target: Path) -> None:
    """A link that was made but not renamed stays no longer than until the next link in that directory."""
    program = """
import os, sys
from async_ckpt.stores.local import link
from async_ckpt.stores import locate
os.replace = lambda *paths: os._exit(9)
link.Links("fsync").make(locate(sys.argv[1], follow=False), locate(sys.argv[2]), asked_ns=0)
"""
    paths = [str(tmp_path / "last.ckpt"), str(target)]
    assert subprocess.run([sys.executable, "-c", program, *paths], timeout=100, check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    make_link(at(tmp_path / "other.ckpt"), at(target))
    assert sorted(os.listdir(tmp_path)) == ["new.ckpt", "other.ckpt"]


CONTEND = """
import sys
from async_ckpt.stores.local import link
from async_ckpt.stores import locate
links = link.Links("process")
sys.stdin.readline()
for number in range(int(sys.argv[4])):
    links.make(locate(sys.argv[1], follow=False), locate(sys.argv[2 + number % 2]), asked_ns=0)
"""


def test_processes_that_link_one_name_do_not_fail_each_other(tmp_path: Path, target: Path) -> None:
    """Of 2,000 links of one name, by four processes at a time, each is made, and nothing else is left."""
    (tmp_path / "old.ckpt").write_text("old")
    arguments = [str(tmp_path / "last.ckpt"), str(target), str(tmp_path / "old.ckpt"), "500"]
    processes = [
        subprocess.Popen([sys.executable, "-c", CONTEND, *arguments], stdin=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=100)
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt", "old.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") in ("new.ckpt", "old.ckpt")


def test_a_link_is_as_old_as_the_wish_for_it(tmp_path: Path, target: Path) -> None:
    """Its time is when it was asked for, or just after its checkpoint's: before all that is saved later."""
    last, written_ns = tmp_path / "last.ckpt", target.stat().st_mtime_ns
    for asked_ns, expected_ns in ((0, written_ns + 1), (written_ns + 10**9, written_ns + 10**9)):
        link.Links("process").make(at(last), at(target), asked_ns=asked_ns)
        assert last.lstat().st_mtime_ns == expected_ns
    assert target.stat().st_mtime_ns == written_ns


def test_a_name_as_long_as_can_be(tmp_path: Path, target: Path) -> None:
    """What becomes the link has a short name of its own."""
    name = "ü" * 127 + "x"
    make_link(at(tmp_path / name), at(target))
    assert (tmp_path / name).read_text() == "new"


def test_a_directory_stays_until_the_link_is_made(tmp_path: Path, target: Path) -> None:
    """A checkpoint of many files is not removed before there is what takes its place (D2)."""
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "shard").write_text("old")
    too_deep = tmp_path.joinpath(*["x" * 250] * 17)  # a link cannot be that long
    with pytest.raises(StoreError, match="too long"):
        make_link(at(tmp_path / "last.ckpt"), Location(url="x", path=str(too_deep), key="x", group="file"))
    assert (tmp_path / "last.ckpt" / "shard").read_text() == "old"


def test_what_cannot_be_made_is_told(tmp_path: Path, target: Path) -> None:
    """The error names the location and the stage, and nothing is left behind."""
    with pytest.raises(StoreError, match=r"link.*new\.ckpt/last\.ckpt"):
        make_link(at(target / "last.ckpt"), at(target))
    assert os.listdir(tmp_path) == ["new.ckpt"]


COPY = """
import errno, os, shutil, sys
from async_ckpt.stores.local import link
from async_ckpt.stores import locate
from async_ckpt.stores.local.directories import Directories
from async_ckpt.stores.disk import Disk

def refuse(*_, **__):
    raise OSError(errno.EPERM, "no links here")

def look(source, copy):
    directory = os.path.dirname(sys.argv[1])
    assert Directories(Disk()).sweep(directory) == ()
    print(oct(os.fstat(copy.fileno()).st_mode & 0o777))
    copy.write(source.read())

os.symlink, shutil.copyfileobj = refuse, look
os.umask(0)
link.Links("fsync").make(locate(sys.argv[1], follow=False), locate(sys.argv[2]), asked_ns=0)
"""


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_copy_is_as_private_as_the_checkpoint(tmp_path: Path, target: Path, mode: int) -> None:
    """Where there are no links, the copy is its owner's alone while it is made, and then has the checkpoint's mode.

    Nobody sweeps it meanwhile.
    """
    target.chmod(mode)
    paths = [str(tmp_path / "last.ckpt"), str(target)]
    done = subprocess.run(
        [sys.executable, "-c", COPY, *paths], timeout=100, check=True, capture_output=True, text=True
    )
    assert done.stdout == "0o600\n"
    assert (tmp_path / "last.ckpt").read_text() == "new"
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("before", ["a link", "a link to a link"])
def test_a_detached_link_is_a_copy(tmp_path: Path, target: Path, before: str) -> None:
    """What is written into it afterwards is in no other file."""
    last = tmp_path / "last.ckpt"
    (tmp_path / "between.ckpt").symlink_to("new.ckpt")
    last.symlink_to("new.ckpt" if before == "a link" else "between.ckpt")
    target.chmod(0o600)
    link.detach(at(last))
    assert not last.is_symlink()
    assert (last.read_text(), last.stat().st_mode) == ("new", target.stat().st_mode)
    last.write_text("newer")
    assert target.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["between.ckpt", "last.ckpt", "new.ckpt"]


@pytest.mark.parametrize("to", ["gone.ckpt", "last.ckpt"])
def test_a_detached_link_to_nothing_is_nothing(tmp_path: Path, to: str) -> None:
    """What is written there afterwards has that name, and no other."""
    (tmp_path / "last.ckpt").symlink_to(to)
    link.detach(at(tmp_path / "last.ckpt"))
    assert os.listdir(tmp_path) == []


def test_what_is_no_link_is_not_detached(tmp_path: Path, target: Path) -> None:
    """Files, directories, links to directories and nothing stay as they are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    before = sorted(os.listdir(tmp_path))
    for name in ("new.ckpt", "folder", "link", "nothing"):
        link.detach(at(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "link").is_symlink()


def test_a_link_that_cannot_be_detached_stays(tmp_path: Path, target: Path) -> None:
    """Where there is no room for the copy, the link leads where it has led, and nothing else is left."""
    (tmp_path / "last.ckpt").symlink_to("new.ckpt")
    with pytest.raises(StoreError, match="No space"):
        link.detach(at(tmp_path / "last.ckpt"), FaultyDisk({"create": (1, errno.ENOSPC)}))
    assert os.readlink(tmp_path / "last.ckpt") == "new.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt"]


@pytest.mark.parametrize("to", ["pipe", "/dev/zero"])
def test_a_link_to_what_has_no_end_is_not_copied(tmp_path: Path, to: str) -> None:
    """A pipe is not waited for, and a device not read: who may put a link there must not hold us up."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "last.ckpt").symlink_to(to)
    with pytest.raises(StoreError, match="no regular file"):
        link.detach(at(tmp_path / "last.ckpt"))
    assert os.readlink(tmp_path / "last.ckpt") == to
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "pipe"]


def test_a_copy_that_a_sweeper_took_is_made_again(tmp_path: Path, target: Path) -> None:
    """Another process may be faster than our lock."""
    (tmp_path / "last.ckpt").symlink_to("new.ckpt")
    link.detach(at(tmp_path / "last.ckpt"), FaultyDisk({"lock": (1, errno.EWOULDBLOCK)}))
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "last.ckpt").read_text() == "new"
