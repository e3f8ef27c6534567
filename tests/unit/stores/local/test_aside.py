"""The earlier file is put aside where a rename replaces no file, and comes back unless the new one gets its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import aside_of, name_aside
from async_ckpt.stores.local.capabilities import Capabilities
from async_ckpt.stores.local.link import Links
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import FaultyDisk, ThreadWorkers
from tests.local_saves import NEW, OLD, Known, save
from tests.support import python
from tests.unit.stores.local.refusing import Refusing


def test_a_move_that_fails_puts_the_earlier_file_back(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If the new file does not get in, the earlier one is back under its name, whole (D2)."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)

    class Failing(Refusing):
        def replace(self, source: str, target: str) -> None:
            if self.calls.append("replace") or len(self.calls) == 3:  # aside is the second
                raise OSError(errno.EIO, "no answer")
            super().replace(source, target)

    place = Capabilities(replace=errno.EEXIST)
    disk = Failing(place)
    disk.calls.clear()
    with pytest.raises(StoreError):
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=Known(place)), target)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_what_cannot_be_put_back_is_named(tmp_path: Path, workers: ThreadWorkers) -> None:
    """If it cannot be put back either, the error says where the earlier file is, and the next process puts it back."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = FaultyDisk()
    moves: list[str] = []

    def replace(source: str, onto: str) -> None:
        moves.append(onto)
        if len(moves) == 2:
            os.replace(source, onto)
        else:
            raise OSError(errno.EEXIST if len(moves) == 1 else errno.EIO, "no")

    disk.replace = replace  # type: ignore[method-assign]
    place = Capabilities(replace=errno.EEXIST)
    with pytest.raises(StoreError, match=r"whole, at .*x\.ckpt\.previous-") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=Known(place)), target)
    (left,) = os.listdir(tmp_path)
    assert left in str(caught.value)
    assert (tmp_path / left).read_bytes() == OLD
    assert aside_of(left) == "x.ckpt"


def test_overwriting_nothing_moves_nothing_aside(tmp_path: Path, workers: ThreadWorkers) -> None:
    """With ``overwrite=False`` a file that appears meanwhile stays where a file can only be renamed to a free name."""
    target = tmp_path / "x.ckpt"
    place = Capabilities(replace=errno.EEXIST)

    class Late(Refusing):
        def fsync(self, fd: int) -> bool:
            target.write_bytes(OLD)
            return super().fsync(fd)

    store = LocalStore(workers=workers, disk=Late(place), capability_cache=Known(place), overwrite=False)
    with pytest.raises(CheckpointExistsError):
        anyio.run(save, store, target)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_what_a_living_process_has_aside_is_read_there(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Only a dead process's is given its name back; one that may live has the earlier file aside, where it is read."""
    aside = tmp_path / name_aside("x.ckpt")
    aside.write_bytes(OLD)
    anyio.run(save, LocalStore(workers=workers), tmp_path / "y.ckpt")
    assert read(tmp_path / "x.ckpt", workers) == OLD
    assert sorted(os.listdir(tmp_path)) == [aside.name, "y.ckpt"]


def test_what_is_moved_in_just_then_is_read(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A name that is free as another process replaces its file, and taken at the next look, is not missed."""
    target = tmp_path / "x.ckpt"

    class Late(Disk):
        def names(self, path: str) -> list[str]:
            target.write_bytes(NEW)
            return super().names(path)

    assert read(target, workers, Late()) == NEW


def read(path: Path, workers: ThreadWorkers, disk: Disk | None = None) -> bytes:
    """Return what a store reads at *path*."""

    async def read() -> bytes:
        source = await LocalStore(workers=workers, disk=disk).source(locate(path))
        found = bytearray(source.nbytes)
        await source.read_into(0, memoryview(found))
        await source.aclose()
        return bytes(found)

    return anyio.run(read)


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_aside_of_a_removed_name_does_not_come_back(
    tmp_path: Path, workers: ThreadWorkers, taken: bool
) -> None:
    """A removal takes what a process has aside as well, also where this one looked for such files before that died."""
    place = Capabilities(replace=errno.EEXIST)
    store = LocalStore(workers=workers, disk=Refusing(place), capability_cache=Known(place))
    anyio.run(save, store, tmp_path / "y.ckpt")
    (tmp_path / name_aside("x.ckpt")).write_bytes(OLD)
    if taken:
        (tmp_path / "x.ckpt").write_bytes(NEW)
    anyio.run(store.delete, locate(tmp_path / "x.ckpt", follow=False))
    assert os.listdir(tmp_path) == ["y.ckpt"]


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
@pytest.mark.parametrize("by", ["load", "save"])
def test_the_newest_of_several_that_are_aside_comes_back(
    tmp_path: Path, workers: ThreadWorkers, numbers: tuple[int, int], by: str
) -> None:
    """Where one process died before it removed what it had replaced, and the next before it moved its own file in."""
    dead = python("from async_ckpt.stores.leftovers import name_aside; print(name_aside('x.ckpt'))").stdout
    for number, content in zip(numbers, (OLD, NEW), strict=True):
        aside = tmp_path / f"{dead.strip()[:-1]}{number}"
        aside.write_bytes(content)
        os.utime(aside, (number, 1 if content == OLD else 2))
    if by == "save":
        anyio.run(save, LocalStore(workers=workers), tmp_path / "y.ckpt")
    assert read(tmp_path / "x.ckpt", workers) == NEW
    assert not [name for name in os.listdir(tmp_path) if "previous" in name]


@pytest.mark.parametrize("step", ["aside", "in"])
def test_two_processes_that_replace_one_file(tmp_path: Path, workers: ThreadWorkers, step: str) -> None:
    """Where another process has put the file aside, or its own in, in between, one of both is there, and no error."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)

    class Shared(Refusing):
        def replace(self, source: str, onto: str) -> None:
            is_aside = aside_of(os.path.basename(onto)) is not None
            if is_aside and step == "aside" and self.calls.count("other") == 0:
                self.calls.append("other")
                os.unlink(target)  # it is elsewhere by now
            super().replace(source, onto)
            if is_aside and step == "in" and self.calls.count("other") == 0:
                self.calls.append("other")
                target.write_bytes(b"another's")

    place = Capabilities(replace=errno.EEXIST)
    anyio.run(save, LocalStore(workers=workers, disk=Shared(place), capability_cache=Known(place)), target)
    assert target.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_link_where_no_file_replaces_another(tmp_path: Path) -> None:
    """A second name gets there by the same ways: the earlier one aside, a copy where there are no links."""
    (tmp_path / "best.ckpt").write_bytes(NEW)
    (tmp_path / "last.ckpt").write_bytes(OLD)
    Links("fsync", Refusing(Capabilities(replace=errno.EEXIST))).make(
        locate(tmp_path / "last.ckpt", follow=False), locate(tmp_path / "best.ckpt"), asked_ns=1
    )
    assert (tmp_path / "last.ckpt").read_bytes() == NEW
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]
