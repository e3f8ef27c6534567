"""The removal of a directory tree: all of it, nothing else, and without waiting for anybody."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.stores.disk import Disk


def make_tree(folder: Path) -> None:
    """Make a directory with files, links, pipes and directories in it."""
    for place in (folder, folder / "sub", folder / "sub" / "deep"):
        place.mkdir()
        for number in range(20):
            (place / f"{number}.ckpt").write_bytes(b"x")
        (place / "link").symlink_to(folder.parent / "kept")
        (place / "nothing").symlink_to("nowhere")
        os.mkfifo(place / "pipe")
    (folder / "read only").mkdir(mode=0o555)


def test_a_tree_is_removed_and_nothing_that_it_leads_to(tmp_path: Path) -> None:
    """Files, links, pipes and directories in it; what its links lead to stays."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x.ckpt").write_bytes(b"kept")
    make_tree(tmp_path / "run")
    Disk().rmtree(str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "x.ckpt").read_bytes() == b"kept"


@pytest.mark.parametrize(
    "take",
    [os.mkfifo, Path.touch, lambda path: path.symlink_to(path.parent), lambda path: None],
    ids=["a pipe", "a file", "a link to a directory", "nothing"],
)
def test_what_is_no_directory_is_left(tmp_path: Path, take: Callable[[Path], object]) -> None:
    """Whatever has taken the directory's name is neither opened, which a pipe answers with waiting, nor removed."""
    path = tmp_path / "run"
    take(path)
    before = os.listdir(tmp_path)
    if before:
        with pytest.raises(NotADirectoryError):
            Disk().rmtree(str(path))
    else:
        Disk().rmtree(str(path))
    assert os.listdir(tmp_path) == before


def test_who_takes_the_name_afterwards_keeps_it(tmp_path: Path) -> None:
    """A directory that another process makes, once the one before is gone, stays with what is in it."""
    path = tmp_path / "run"

    def take() -> None:
        while True:
            try:
                path.mkdir()
            except FileExistsError:
                continue
            (path / "new.ckpt").write_bytes(b"new")
            return

    for _ in range(30):
        path.mkdir()
        (path / "old.ckpt").write_bytes(b"old")
        other = threading.Thread(target=take)
        other.start()
        Disk().rmtree(str(path))
        other.join()
        assert os.listdir(path) == ["new.ckpt"]
        (path / "new.ckpt").unlink()
        path.rmdir()


def test_two_may_remove_one_tree(tmp_path: Path) -> None:
    """Several threads or processes that remove one directory at the same time all succeed."""
    failed: list[BaseException] = []

    def remove() -> None:
        try:
            Disk().rmtree(str(tmp_path / "run"))
        except BaseException as error:
            failed.append(error)

    for _ in range(20):
        make_tree(tmp_path / "run")
        threads = [threading.Thread(target=remove) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert os.listdir(tmp_path) == []
