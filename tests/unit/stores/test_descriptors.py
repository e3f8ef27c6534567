"""Descriptors that no forked child keeps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.stores import descriptors
from async_ckpt.stores.leftovers import temporary_name


def is_open_in_child(fd: int) -> bool:
    """Fork a child, and tell whether *fd* is open there."""
    pid = os.fork()
    if pid == 0:
        try:
            os.fstat(fd)
        except OSError:
            os._exit(0)
        os._exit(1)
    return bool(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def opener(path: Path, then: Callable[[int], object] = lambda fd: None) -> Callable[[], int]:
    """Return what opens *path*, and does something more before it returns."""

    def open_() -> int:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        then(fd)
        return fd

    return open_


def test_a_child_has_none(tmp_path: Path) -> None:
    """What is open in a process is closed in its child, and nowhere else; what has been closed is forgotten."""
    fd = descriptors.opened(opener(tmp_path / "x"))
    assert not is_open_in_child(fd)
    os.fstat(fd)
    descriptors.close(fd)
    other = os.open(tmp_path / "y", os.O_CREAT | os.O_RDWR)
    assert other == fd, "its number is given out again"
    assert is_open_in_child(other)
    os.close(other)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("gone", [True, False])
def test_a_fork_in_the_midst_of_opening(tmp_path: Path, gone: bool) -> None:
    """A child that is forked when a file has just been opened, and nobody knows of it yet, does not keep it either."""
    in_child: list[bool] = []
    path = tmp_path / temporary_name()

    def fork(fd: int) -> None:
        if gone:
            path.unlink()
        in_child.append(is_open_in_child(fd))

    fd = descriptors.opened(opener(path, fork))
    assert in_child == [False]
    descriptors.close(fd)
    path.unlink(missing_ok=True)


def test_an_opening_that_fails(tmp_path: Path) -> None:
    """What could not be opened leaves nothing to be looked for."""
    with pytest.raises(FileNotFoundError):
        descriptors.opened(opener(tmp_path / "none" / "x"))
    assert not descriptors._opening
