"""What a directory refuses is found out by trying, and decides the strategy of a save."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores.local.capabilities import UNRESTRICTED, Capabilities, CapabilityCache
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.strategy import Existing, NoStrategyError, WriteStrategy, choose_strategy
from async_ckpt.testing import FaultyDisk, ThreadWorkers
from tests.local_saves import save
from tests.unit.stores.local.refusing import REFUSALS, Refusing


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
