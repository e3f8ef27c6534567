"""Second names for checkpoints on a local disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt import StoreError
from async_ckpt.stores import link, locate
from async_ckpt.stores.base import Location


def make_link(location: Location, target: Location) -> None:
    """Make a link that survives the loss of power."""
    link.make_link(location, target, "fsync")


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


def test_what_a_killed_process_left_is_replaced(tmp_path: Path, target: Path) -> None:
    """A link that was made but not renamed stays no longer than until the next."""
    program = """
import os, sys
from async_ckpt.stores import link, locate
os.replace = lambda *paths: os._exit(9)
link.make_link(locate(sys.argv[1], follow=False), locate(sys.argv[2]), "fsync")
"""
    paths = [str(tmp_path / "last.ckpt"), str(target)]
    assert subprocess.run([sys.executable, "-c", program, *paths], timeout=100, check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    make_link(at(tmp_path / "last.ckpt"), at(target))
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt"]


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
from async_ckpt.stores import link, locate

def refuse(*_, **__):
    raise OSError(errno.EPERM, "no links here")

def look(source, copy):
    print(oct(os.fstat(copy.fileno()).st_mode & 0o777))
    copy.write(source.read())

os.symlink, shutil.copyfileobj = refuse, look
os.umask(0)
link.make_link(locate(sys.argv[1], follow=False), locate(sys.argv[2]), "fsync")
"""


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_copy_is_as_private_as_the_checkpoint(tmp_path: Path, target: Path, mode: int) -> None:
    """Where there are no links, the copy is its owner's alone while it is made, and then has the checkpoint's mode."""
    target.chmod(mode)
    paths = [str(tmp_path / "last.ckpt"), str(target)]
    done = subprocess.run(
        [sys.executable, "-c", COPY, *paths], timeout=100, check=True, capture_output=True, text=True
    )
    assert done.stdout == "0o600\n"
    assert (tmp_path / "last.ckpt").read_text() == "new"
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == mode
