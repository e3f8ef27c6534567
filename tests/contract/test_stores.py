"""Every store of ours keeps what ``async_ckpt.stores.base`` promises."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from async_ckpt.stores import locate
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.stores.leftovers import is_leftover, temporary_name
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import FaultyStore, StoreConformance


def temporary_files(folder: Path) -> list[str]:
    """Return everything below *folder* that is neither a checkpoint nor a directory."""
    return [
        name for _, _, names in os.walk(folder) for name in names if is_leftover(name) or ".previous-" in name
    ]


def name_of_the_dead() -> str:
    """Return a name such as a process that has ended gave to its temporary file."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return temporary_name().replace(f".{os.getpid()}.", f".{child.pid}.")


class OnDisk(StoreConformance):
    """What the suite needs to know of stores that end up in ``tmp_path``."""

    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(self.folder / name)

    def leftovers(self) -> Sequence[str]:
        """Return the temporary files at the place."""
        return temporary_files(self.folder)

    def strand(self) -> str:
        """Leave a temporary file."""
        name = name_of_the_dead()
        (self.folder / name).write_bytes(b"partial")
        return name


class TestLocalStore(OnDisk):
    """The local store that syncs."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return LocalStore(workers=workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return LocalStore(workers=workers, overwrite=False)


class TestLocalStoreOfTheProcess(OnDisk):
    """The local store that leaves syncing to the kernel."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return LocalStore(workers=workers, durability="process")

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return LocalStore(workers=workers, overwrite=False, durability="process")


class TestLocalStorePastThePageCache(OnDisk):
    """The local store that writes past the page cache where it can."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return LocalStore(workers=workers, page_cache="drop")

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return LocalStore(workers=workers, overwrite=False, page_cache="drop")


class TestFaultyStoreWithoutFaults(OnDisk):
    """The store for tests, as long as nothing befalls it."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return FaultyStore(LocalStore(workers=workers))

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return FaultyStore(LocalStore(workers=workers, overwrite=False))


class TestGenericStoreOnMemory(StoreConformance):
    """fsspec's memory file system, whose move is a copy and a removal."""

    root: str

    @pytest.fixture(autouse=True)
    def _root(self) -> Iterator[None]:
        self.root = f"/{uuid.uuid4().hex}"
        yield
        memory = fsspec.filesystem("memory")
        if memory.exists(self.root):
            memory.rm(self.root, recursive=True)

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return GenericStore(fsspec.filesystem("memory", skip_instance_cache=True), workers=workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return GenericStore(
            fsspec.filesystem("memory", skip_instance_cache=True), workers=workers, overwrite=False
        )

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(f"memory:/{self.root}/{name}")

    def leftovers(self) -> Sequence[str]:
        """Return the temporary files at the place."""
        names = [path.rpartition("/")[2] for path in fsspec.filesystem("memory").find(self.root)]
        return [name for name in names if is_leftover(name) or ".previous-" in name]

    def strand(self) -> str:
        """Leave a temporary file."""
        name = name_of_the_dead()
        fsspec.filesystem("memory").pipe_file(f"{self.root}/{name}", b"partial")
        return name


class TestGenericStoreOnFiles(OnDisk):
    """fsspec's local file system, whose handles are plain files and whose move is a rename."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return GenericStore(LocalFileSystem(skip_instance_cache=True), workers=workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return GenericStore(LocalFileSystem(skip_instance_cache=True), workers=workers, overwrite=False)


class TestGenericStoreOnDirectory(OnDisk):
    """fsspec's directory view of another file system, whose paths are relative."""

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        inner = LocalFileSystem(skip_instance_cache=True)
        return GenericStore(DirFileSystem(path=str(self.folder), fs=inner), workers=workers)

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return Location(url=name, path=name, key=name, group="dir")


class RefusingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A file system that will not move a file onto another, as those of some protocols."""

    def mv(self, path1: str, path2: str, **kwargs: object) -> None:
        """Move, or raise FileExistsError."""
        if self.exists(path2):
            raise FileExistsError(17, "File exists", path2)
        super().mv(path1, path2)


class SilentlyRefusingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A file system that answers nothing at all when it will not move a file onto another."""

    def mv(self, path1: str, path2: str, **kwargs: object) -> None:
        """Move, or do nothing."""
        if not self.exists(path2):
            super().mv(path1, path2)


class TestGenericStoreThatCannotReplace(OnDisk):
    """A file system that will not replace a file."""

    replaces_in_one_step = False

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return GenericStore(RefusingFileSystem(skip_instance_cache=True), workers=workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return GenericStore(RefusingFileSystem(skip_instance_cache=True), workers=workers, overwrite=False)


class TestGenericStoreThatSilentlyKeeps(OnDisk):
    """A file system that says nothing when it does not replace a file."""

    replaces_in_one_step = False

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return GenericStore(SilentlyRefusingFileSystem(skip_instance_cache=True), workers=workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return GenericStore(
            SilentlyRefusingFileSystem(skip_instance_cache=True), workers=workers, overwrite=False
        )
