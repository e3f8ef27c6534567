"""A sharded checkpoint ceases to be one before the first of its parts is gone (D5), on every kind of storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import anyio

from async_ckpt.stores import locate
from async_ckpt.stores.base import Location, markers_first
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import ThreadWorkers
from tests.generic_doubles import Memory, generic

NAMES = ("!before", ".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt")


def test_markers_of_all_directories_come_first() -> None:
    """What only ends like a marker is none; the order is kept otherwise."""
    names = ["a/z", "a/.metadata", "b/x.metadata", "b/.metadata", ".metadata"]
    assert markers_first(names) == (["a/.metadata", "b/.metadata", ".metadata"], ["a/z", "b/x.metadata"])


def test_on_a_local_disk(tmp_path: Path, workers: ThreadWorkers) -> None:
    """In each directory the marker is removed first."""
    for folder in ("run/step-1", "run/step-2"):
        (tmp_path / folder).mkdir(parents=True)
        for name in NAMES:
            (tmp_path / folder / name).write_bytes(b"x")
    removed: list[str] = []
    unlink = os.unlink

    def note(path: Any, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        unlink(path, dir_fd=dir_fd)
        removed.append(os.path.join(folder, path))

    with mock.patch("os.unlink", note):
        anyio.run(LocalStore(workers=workers).delete, locate(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for folder in ("run/step-1", "run/step-2"):
        ours = [Path(path).name for path in removed if Path(path).parent == tmp_path / folder]
        assert sorted(ours) == sorted(NAMES)
        assert ours[0] == ".metadata"


def test_on_any_file_system_of_fsspec(workers: ThreadWorkers) -> None:
    """The marker is removed first, though others stand before it in any order of names."""
    removed: list[str] = []

    class Noting(Memory):
        def rm_file(self, path: str) -> None:
            removed.append(path.rpartition("/")[2])
            super().rm_file(path)

    file_system = Noting()
    for name in NAMES:
        file_system.make(f"/run/step-1/{name}", b"x")
    place = Location(url="double://run/step-1", path="/run/step-1", key="step-1", group="double")
    anyio.run(generic(file_system, workers).delete, place)
    assert sorted(removed) == sorted(NAMES)
    assert removed[0] == ".metadata"
    assert file_system.names == []
