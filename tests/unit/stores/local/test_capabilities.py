"""What a directory lets be done, and the way that a save takes there: on a disk that refuses what a test says."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import aside_of, name_aside
from async_ckpt.stores.local.capabilities import UNRESTRICTED, Capabilities, CapabilityCache
from async_ckpt.stores.local.link import Links
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.strategy import Existing, NoStrategyError, WriteStrategy, choose_strategy
from async_ckpt.stores.local.upload import LocalUpload
from async_ckpt.testing import BytesContent, FaultyDisk, ThreadWorkers
from tests.local_saves import NEW, OLD, Known, save
from tests.support import python


class Refusing(Disk):
    """A disk that refuses what a place does.

    Args:
        place: what it refuses.

    Attributes:
        written: how many bytes have been.
    """

    def __init__(self, place: Capabilities) -> None:
        self.place = place
        self.written = 0
        self.calls: list[str] = []

    def create(self, path: str) -> int:
        self._refuse(self.place.create)
        return super().create(path)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        if offset != os.fstat(fd).st_size:
            self._refuse(self.place.offset)
        done = super().write(fd, pieces, offset)
        self.written += done
        return done

    def preallocate(self, fd: int, nbytes: int) -> None:
        if self.place.offset:
            raise AssertionError("it would be longer than what has been written")

    def replace(self, source: str, target: str) -> None:
        self.calls.append("replace")
        self._refuse(self.place.replace if os.path.lexists(target) else self.place.rename)
        super().replace(source, target)

    def link(self, source: str, target: str) -> None:
        self._refuse(errno.EPERM)

    def unlink(self, path: str) -> None:
        self._refuse(self.place.unlink)
        super().unlink(path)

    def _refuse(self, number: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))


REFUSALS = [
    UNRESTRICTED,
    Capabilities(offset=errno.EINVAL),
    Capabilities(replace=errno.EEXIST),
    Capabilities(replace=errno.EIO, offset=errno.EIO),
    Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS),
    Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS, unlink=errno.EPERM, offset=errno.EINVAL),
    Capabilities(replace=errno.EPERM, unlink=errno.EPERM),
    Capabilities(create=errno.EROFS),
]


@pytest.mark.parametrize("place", REFUSALS)
def test_what_is_refused_is_found_out(tmp_path: Path, place: Capabilities) -> None:
    """One trial with an empty file tells what a directory refuses, and leaves nothing that can be removed."""
    disk = Refusing(place)
    assert CapabilityCache().of(str(tmp_path), disk) == place
    assert disk.written <= 1
    left = os.listdir(tmp_path)
    assert bool(left) == bool(place.unlink)
    for name in left:
        assert (tmp_path / name).stat().st_size == 0
        (tmp_path / name).unlink()


def test_it_is_asked_once(tmp_path: Path) -> None:
    """What a directory does is not asked again, nor of one just made in it; what it refuses is, after a while."""
    seconds = [0.0]
    capability_cache = CapabilityCache(clock=lambda: seconds[0])
    disk = Refusing(UNRESTRICTED)
    capability_cache.of(str(tmp_path), disk)
    (tmp_path / "made").mkdir()
    capability_cache.of(str(tmp_path / "made"), disk, parent=str(tmp_path))
    asked = len(disk.calls)
    seconds[0] = 1e6
    capability_cache.of(str(tmp_path), disk)
    capability_cache.of(str(tmp_path / "made"), disk)
    assert len(disk.calls) == asked == 2

    (tmp_path / "other").mkdir()
    disk.place = Capabilities(replace=errno.EEXIST)
    assert capability_cache.of(str(tmp_path / "other"), disk) == disk.place
    disk.place = UNRESTRICTED
    assert capability_cache.of(str(tmp_path / "other"), disk) != UNRESTRICTED
    seconds[0] += 1e4
    assert capability_cache.of(str(tmp_path / "other"), disk) == UNRESTRICTED


def test_another_directory_by_the_name_is_asked_anew(tmp_path: Path) -> None:
    """A directory is known by what it is, not by its name."""
    capability_cache = CapabilityCache()
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    capability_cache.of(str(tmp_path / "run"), Refusing(UNRESTRICTED))
    (tmp_path / "run").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "run")
    refusing = Refusing(Capabilities(replace=errno.EEXIST))
    assert capability_cache.of(str(tmp_path / "run"), refusing) == refusing.place


@pytest.mark.parametrize("call", ["create", "write", "replace"])
def test_no_room_is_no_refusal(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """A full disk ends the trial as it ends a save: it says nothing about what the place can."""
    capability_cache = CapabilityCache()
    disk = FaultyDisk({call: (1, errno.ENOSPC)})
    with pytest.raises(StoreError, match="Free space") as caught:
        anyio.run(
            save,
            LocalStore(workers=workers, disk=disk, capability_cache=capability_cache),
            tmp_path / "x.ckpt",
        )
    assert caught.value.stage == "begin"
    assert os.listdir(tmp_path) == []
    assert disk.open_descriptors == 0
    anyio.run(save, LocalStore(workers=workers, capability_cache=capability_cache), tmp_path / "x.ckpt")


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_a_trial_whose_file_is_swept_is_made_again(tmp_path: Path, call: str) -> None:
    """Nobody locks the files of a trial, so a sweeper may take them; that says nothing about the place."""
    disk = FaultyDisk({call: (1, errno.ENOENT)})
    assert CapabilityCache().of(str(tmp_path), disk) == UNRESTRICTED
    disk = FaultyDisk({"replace": (0, errno.ENOENT)})
    with pytest.raises(OSError, match="vanishes"):
        CapabilityCache().of(str(tmp_path), disk)


@pytest.mark.parametrize(
    ("place", "found", "way"),
    [
        (UNRESTRICTED, Existing(), WriteStrategy()),
        (UNRESTRICTED, Existing(taken=True), WriteStrategy()),
        (Capabilities(offset=1), Existing(taken=True), WriteStrategy(in_order=True)),
        (Capabilities(replace=1), Existing(taken=True), WriteStrategy()),
        (Capabilities(unlink=1), Existing(taken=True), WriteStrategy()),
        (Capabilities(replace=1, unlink=1), Existing(), WriteStrategy()),
        (Capabilities(replace=1, unlink=1), Existing(taken=True), None),
        (Capabilities(rename=1, replace=1), Existing(), None),
        (Capabilities(rename=1, replace=1), Existing(taken=True), None),
        (UNRESTRICTED, Existing(taken=True, fixed=errno.EBUSY), None),
        (UNRESTRICTED, Existing(taken=True, fixed=errno.EPERM), None),
        (Capabilities(create=1), Existing(taken=True), None),
    ],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_the_safest_way_is_taken(
    place: Capabilities, found: Existing, way: WriteStrategy | None, in_place: bool
) -> None:
    """In place only where nothing else is left, and only if that is allowed."""
    if way is not None or in_place:
        assert choose_strategy(place, found, in_place=in_place) == (way or WriteStrategy(in_place=True))
        return
    with pytest.raises(NoStrategyError) as caught:
        choose_strategy(place, found, in_place=in_place)
    assert 'in_place="allow"' in caught.value.advice
    assert caught.value.errno


def test_where_no_file_can_be_made_nothing_helps() -> None:
    """A new name where no file can be made is refused whatever is allowed."""
    with pytest.raises(NoStrategyError, match="Read-only"):
        choose_strategy(Capabilities(create=errno.EROFS), Existing(), in_place=True)


@pytest.mark.parametrize("place", [place for place in REFUSALS if not place.rename and not place.create])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_save_where_something_is_refused(
    tmp_path: Path, workers: ThreadWorkers, place: Capabilities, earlier: bool
) -> None:
    """Whatever of it is refused, a save gets there as long as a file can be renamed, and the way is free."""
    target = tmp_path / "x.ckpt"
    if earlier:
        target.write_bytes(OLD)
    store = LocalStore(workers=workers, disk=Refusing(place), capability_cache=Known(place))
    if earlier and place.replace and place.unlink:
        with pytest.raises(StoreError, match="stays in the way"):
            anyio.run(save, store, target)
        assert target.read_bytes() == OLD
    else:
        anyio.run(save, store, target)
        assert target.read_bytes() == NEW
        assert os.listdir(tmp_path) == ["x.ckpt"]


def test_where_it_cannot_be_renamed_no_byte_is_written(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A save that could not end well ends before its first byte, with advice; the old file is whole."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    disk = Refusing(Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS))
    with pytest.raises(StoreError, match="refuses to rename") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=CapabilityCache()), target)
    assert (caught.value.stage, caught.value.errno) == ("begin", errno.ENOSYS)
    assert disk.written == 1  # the trial's
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_in_place_where_it_is_allowed(tmp_path: Path, workers: ThreadWorkers) -> None:
    """In place a file keeps its inode, its mode and its other names, as one that ``open`` overwrites does."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    target.chmod(0o604)
    os.link(target, tmp_path / "other")
    before = target.stat()
    place = Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS)
    store = LocalStore(workers=workers, disk=Refusing(place), capability_cache=Known(place), in_place=True)
    anyio.run(save, store, target)
    assert (target.read_bytes(), (tmp_path / "other").read_bytes()) == (NEW, NEW)
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)


def test_in_place_does_not_write_through_a_link(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A link that is to be replaced is, also in place: what it leads to stays as it was."""
    (tmp_path / "best.ckpt").write_bytes(OLD)
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    place = Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS)

    async def save_link() -> None:
        store = LocalStore(
            workers=workers, disk=Refusing(place), capability_cache=Known(place), in_place=True
        )
        upload = await store.begin(locate(tmp_path / "last.ckpt", follow=False), len(NEW))
        part = Part(index=0, start=0, stop=len(NEW))
        await upload.commit([await upload.put(part, BytesContent(NEW))])

    anyio.run(save_link)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "last.ckpt").read_bytes() == NEW
    assert (tmp_path / "best.ckpt").read_bytes() == OLD


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("removable", [True, False])
def test_in_place_that_fails(
    tmp_path: Path, workers: ThreadWorkers, call: str, removable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failure in place nothing half has the name; and what was lost is said."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    place = Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS)
    disk = FaultyDisk({call: (1, errno.EIO), **({} if removable else {"unlink": (0, errno.EBUSY)})})
    store = LocalStore(workers=workers, disk=disk, capability_cache=Known(place), in_place=True)
    with pytest.raises(StoreError):
        anyio.run(save, store, target)
    assert target.exists() != removable
    if not removable:
        assert target.read_bytes() == b""
    assert "the earlier file is lost" in caplog.text
    assert disk.open_descriptors == 0


def test_in_place_that_is_not_begun(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Until the first byte comes, what is in place is untouched."""
    target = tmp_path / "x.ckpt"
    target.write_bytes(OLD)
    place = Capabilities(rename=errno.ENOSYS, replace=errno.ENOSYS)

    async def begin() -> None:
        store = LocalStore(workers=workers, capability_cache=Known(place), in_place=True)
        upload = await store.begin(locate(target), 10)
        await upload.abort()
        await upload.abort()

    anyio.run(begin)
    assert target.read_bytes() == OLD


# -- the earlier file aside


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


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.EINVAL])
def test_a_refusal_that_comes_late_has_advice(tmp_path: Path, workers: ThreadWorkers, number: int) -> None:
    """What only the commit shows is told with advice, and the place is asked anew by the next save."""
    capability_cache = CapabilityCache()
    target = tmp_path / "x.ckpt"
    anyio.run(save, LocalStore(workers=workers, capability_cache=capability_cache), target, OLD)
    disk = FaultyDisk({"replace": (0, number)})
    with pytest.raises(StoreError, match=r"refuses to replace the file.*in_place") as caught:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=capability_cache), target)
    assert caught.value.stage == "commit"
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x.ckpt"]
    with pytest.raises(StoreError) as again:
        anyio.run(save, LocalStore(workers=workers, disk=disk, capability_cache=capability_cache), target)
    assert again.value.stage == "begin"


def test_a_link_where_no_file_replaces_another(tmp_path: Path) -> None:
    """A second name gets there by the same ways: the earlier one aside, a copy where there are no links."""
    (tmp_path / "best.ckpt").write_bytes(NEW)
    (tmp_path / "last.ckpt").write_bytes(OLD)
    Links("fsync", Refusing(Capabilities(replace=errno.EEXIST))).make(
        locate(tmp_path / "last.ckpt", follow=False), locate(tmp_path / "best.ckpt"), asked_ns=1
    )
    assert (tmp_path / "last.ckpt").read_bytes() == NEW
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize(("place", "at_a_time"), [(UNRESTRICTED, 4), (Capabilities(offset=errno.EINVAL), 1)])
def test_parts_go_one_by_one_where_offsets_are_refused(
    tmp_path: Path,
    workers: ThreadWorkers,
    monkeypatch: pytest.MonkeyPatch,
    place: Capabilities,
    at_a_time: int,
) -> None:
    """A place that takes bytes in order is given one part at a time, in order; a part out of turn is refused."""
    monkeypatch.setattr(LocalUpload, "max_concurrent_parts", 4)  # whatever this machine has

    async def begin() -> None:
        upload = await LocalStore(workers=workers, capability_cache=Known(place)).begin(
            locate(tmp_path / "x"), 20
        )
        assert upload.max_concurrent_parts == at_a_time
        second = Part(index=1, start=10, stop=20)
        if place.offset:
            with pytest.raises(StoreError, match="out of order"):
                await upload.put(second, BytesContent(bytes(20)))
        else:
            await upload.put(second, BytesContent(bytes(20)))
        await upload.abort()

    anyio.run(begin)
    assert os.listdir(tmp_path) == []
