"""Saves where a directory refuses something: by the safest strategy, in place if that is allowed, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.local.capabilities import UNRESTRICTED, Capabilities, CapabilityCache
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.upload import LocalUpload
from async_ckpt.testing import BytesContent, FaultyDisk, ThreadWorkers
from tests.local_saves import NEW, OLD, Known, save
from tests.unit.stores.local.refusing import REFUSALS, Refusing


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
