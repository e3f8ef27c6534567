"""Mounts that refuse one thing or another, by a file system of the tests' own, with the whole service on top."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService, StoreError
from async_ckpt.errors import CheckpointExistsError
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Workers
from async_ckpt.testing import Fault, FaultyStore
from tests.fuse.mounted import Mount, mounted, why_not
from tests.fuse.places import ALLUXIO, EXPRESS, HDFS, MOUNTPOINT, PLAIN, VOLUMES, Rules
from tests.support import python

pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is")]

PART = 256 << 10
KINDS = {
    "plain": PLAIN,
    "Mountpoint for a directory bucket": EXPRESS,
    "HDFS": HDFS,
    "Alluxio": ALLUXIO,
    "a Databricks volume": VOLUMES,
}


def state(step: int, nbytes: int = 3 << 20) -> dict[str, Any]:
    """Return something to save, of several parts."""
    return {"step": step, "weights": torch.arange(nbytes // 8) + step}


def step_in(path: Path) -> int:
    """Return which state a plain ``torch.load`` finds, whole."""
    found = torch.load(path)
    assert torch.equal(found["weights"], state(found["step"])["weights"])
    return int(found["step"])


def service(**options: Any) -> CheckpointService:
    """Return a service of many small parts."""
    return CheckpointService(part_size=PART, **options)


def save(path: Path, step: int = 1, **options: Any) -> None:
    """Save in a service of its own."""
    with service(**options) as saving:
        saving.save(state(step), path).wait(timeout=60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("durability", ["fsync", "process"])
def test_a_place_that_can_rename(kind: str, durability: str) -> None:
    """A checkpoint is saved, replaced, loaded and removed wherever a file can be renamed; nothing else is left."""
    with mounted(KINDS[kind]) as mount, service(durability=durability) as saving:
        path = mount.path / "run" / "x.ckpt"
        for step in (1, 2, 3):
            saving.save(state(step), path).wait(timeout=60)
            assert step_in(path) == step
            assert os.listdir(path.parent) == ["x.ckpt"]
        assert saving.load(path)["step"] == 3
        saving.remove(path).wait(timeout=60)
        assert os.listdir(path.parent) == []


def test_a_directory_is_tried_once() -> None:
    """What a directory can is learnt by one trial, whatever is saved there, and by another service as well."""
    with mounted(PLAIN) as mount:
        save(mount.path / "a.ckpt")
        first = len(mount.asked("rename"))
        save(mount.path / "b.ckpt")
        save(mount.path / "a.ckpt", 2)
        assert (first, len(mount.asked("rename"))) == (3, 5)


@pytest.mark.parametrize("rules", [MOUNTPOINT, MOUNTPOINT.but(unlink=0), PLAIN.but(rename=errno.EOPNOTSUPP)])
def test_a_place_that_cannot_rename_refuses_before_the_first_byte(rules: Rules) -> None:
    """The save ends with advice, not with gigabytes; not even a byte of it is written, and nothing appears."""
    with mounted(rules) as mount:
        path = mount.path / "x.ckpt"
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r'refuses to rename a file.*s3://.*in_place="allow"'
            ) as caught:
                save(path)
            assert caught.value.stage == "begin"
            assert caught.value.errno == rules.rename
        assert not path.exists()
        assert sum(int(line.split()[2]) for line in mount.asked("write")) <= 1  # the trial's
        left = os.listdir(mount.path)
        assert len(left) <= (1 if rules.unlink else 0)
        assert all(os.stat(mount.path / name).st_size == 0 for name in left)


@pytest.mark.parametrize("rules", [MOUNTPOINT, MOUNTPOINT.but(unlink=0)])
def test_in_place_where_it_is_allowed(rules: Rules) -> None:
    """A new name is written in place, in order and through one descriptor, where the user allows it."""
    with mounted(rules) as mount:
        save(mount.path / "x.ckpt", 1, in_place="allow")
        assert step_in(mount.path / "x.ckpt") == 1
        with pytest.raises(StoreError, match=r"existing files to be overwritten.*--allow-overwrite"):
            save(mount.path / "x.ckpt", 2, in_place="allow")
        assert step_in(mount.path / "x.ckpt") == 1


@pytest.mark.parametrize(
    "rules", [PLAIN, PLAIN.but(direct=errno.EINVAL), PLAIN.but(direct_write=errno.EINVAL)]
)
def test_past_the_page_cache(rules: Rules) -> None:
    """A mount with direct I/O is written to so if asked; one that refuses it is asked once, and no save fails of it."""
    with mounted(rules) as mount:
        for step in (1, 2):
            save(mount.path / "x.ckpt", step, page_cache="drop")
            assert step_in(mount.path / "x.ckpt") == step
        directly, refused = mount.asked("directly"), bool(rules.direct or rules.direct_write)
        assert len(mount.asked("direct")) == (1 if refused else 2)
        assert (
            all("EINVAL" in line for line in directly) if refused else len(directly) >= 2 * (3 << 20) // PART
        )
        save(mount.path / "y.ckpt")  # what is not told is not tried
        assert len(mount.asked("direct")) == (1 if refused else 2)


def test_in_place_over_an_earlier_file() -> None:
    """Where the place lets a file be overwritten, and the user, an earlier checkpoint is, once the first byte comes."""
    with mounted(MOUNTPOINT.but(overwrite=0)) as mount:
        path = mount.path / "x.ckpt"
        save(path, 1, in_place="allow")
        save(path, 2, in_place="allow")
        assert step_in(path) == 2
        with pytest.raises(CheckpointExistsError):
            save(path, 3, in_place="allow", overwrite=False)
        assert step_in(path) == 2


def test_in_place_is_the_last_resort() -> None:
    """Where a file can be renamed, allowing it changes nothing."""
    with mounted(HDFS) as mount:
        for step in (1, 2):
            save(mount.path / "x.ckpt", step, in_place="allow")
        assert not [line for line in mount.asked("create") if line.split()[1] == "x.ckpt"]
        assert not [line for line in mount.asked("overwrite") if "[" not in line]
        assert step_in(mount.path / "x.ckpt") == 2


@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_the_earlier_file_is_aside(number: int) -> None:
    """A process that dies between the moves leaves the earlier file or the new one, and a load finds it (D2)."""
    with mounted(HDFS) as quiet:
        save(quiet.path / "x.ckpt", 1)
        save(quiet.path / "x.ckpt", 2)
        moves = len(quiet.asked("rename")) - sum("EIO" in line for line in quiet.asked("rename"))
    program = """
import sys
from pathlib import Path
from tests.integration.test_mounts import save
save(Path(sys.argv[1]), 1)
save(Path(sys.argv[1]), 2)
"""
    # Of the successful renames the last two are: the earlier file aside, the new one in.
    with mounted(HDFS.but(kill=("rename", moves - 2 + number))) as mount:
        path = mount.path / "x.ckpt"
        done = python(program, path)
        assert done.returncode == -9, done.stderr
        left = sorted(os.listdir(mount.path))
        assert len([name for name in left if ".previous-" in name]) == 1
        assert path.exists() == (number == 2)
        with service() as saving:
            assert saving.load(path)["step"] == number
            assert step_in(path) == number
            saving.save(state(3), mount.path / "y.ckpt").wait(timeout=60)
        assert sorted(os.listdir(mount.path)) == ["x.ckpt", "y.ckpt"]
        assert step_in(path) == number


def test_a_replaced_file_that_was_aside_does_not_come_back() -> None:
    """A removal by the next process takes the name, not only the file: what had been put aside does not take it."""
    with mounted(HDFS) as mount:
        path = mount.path / "x.ckpt"
        save(path)
        dead = python(
            "from async_ckpt.stores.leftovers import name_aside; print(name_aside('x.ckpt'))"
        ).stdout.strip()
        (mount.path / dead).write_bytes(b"earlier")
        with service() as saving:
            saving.remove(path).wait(timeout=60)
            saving.save(state(1), mount.path / "y.ckpt").wait(timeout=60)
        assert os.listdir(mount.path) == ["y.ckpt"]


def broken(**options: Any) -> CheckpointService:
    """Return a service whose third part cannot be written."""

    def make(location: Location, workers: Workers) -> FaultyStore:
        fault = Fault(operation="put", calls=[3], error=lambda: OSError(errno.EIO, "no more"))
        return FaultyStore(open_store(location, workers=workers, part_size=PART, **options), [fault])

    return service(store_factory=make)


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_fails_in_the_middle(kind: str) -> None:
    """A save that is given up leaves the earlier file and no other, where bytes go in order, too (D2)."""
    with mounted(KINDS[kind]) as mount:
        path = mount.path / "x.ckpt"
        save(path, 1)
        with broken() as saving, pytest.raises(OSError, match="no more"):
            saving.save(state(2), path).wait(timeout=60)
        assert os.listdir(mount.path) == ["x.ckpt"]
        assert step_in(path) == 1


def test_what_cannot_be_removed_is_emptied() -> None:
    """Where nothing can be removed, a save that fails leaves no hidden file with anything in it."""
    with mounted(PLAIN.but(unlink=errno.EPERM)) as mount:
        with broken() as saving, pytest.raises(OSError, match="no more"):
            saving.save(state(1), mount.path / "x.ckpt").wait(timeout=60)
        assert {(mount.path / name).stat().st_size for name in os.listdir(mount.path)} == {0}


def test_a_failure_in_place_leaves_nothing() -> None:
    """What was written in place is taken away after a failure: no half file has the name."""
    with mounted(MOUNTPOINT.but(unlink=0)) as mount:
        with broken(in_place="allow") as saving, pytest.raises(OSError, match="no more"):
            saving.save(state(1), mount.path / "x.ckpt").wait(timeout=60)
        assert os.listdir(mount.path) == []


def test_killed_in_place() -> None:
    """A process that is killed in place leaves a torn file, which does not load; that much is given up."""
    program = """
import sys
from pathlib import Path
from tests.integration.test_mounts import save
save(Path(sys.argv[1]), 1, in_place="allow")
"""
    with mounted(MOUNTPOINT.but(overwrite=0, kill=("write", 5))) as mount:
        path = mount.path / "x.ckpt"
        assert python(program, path).returncode == -9
        assert 0 < path.stat().st_size < 1 << 20
        with pytest.raises(RuntimeError):
            torch.load(path)
        save(path, 2, in_place="allow")
        assert step_in(path) == 2


def test_a_place_that_removes_nothing() -> None:
    """A removal that the place refuses fails with advice, and the file stays."""
    with mounted(PLAIN.but(unlink=errno.EPERM)) as mount:
        save(mount.path / "x.ckpt")
        with service() as saving, pytest.raises(StoreError, match="refuses to remove"):
            saving.remove(mount.path / "x.ckpt").wait(timeout=60)
        assert step_in(mount.path / "x.ckpt") == 1


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Mount]:
    """A place where no file can be made."""
    with mounted(PLAIN.but(create=errno.EROFS)) as mount:
        yield mount


def test_a_place_that_takes_no_file(read_only: Mount) -> None:
    """A read-only mount that shows it only when a file is made is refused with advice, at the save's begin."""
    with pytest.raises(StoreError, match="No file can be made") as caught:
        save(read_only.path / "x.ckpt")
    assert (caught.value.stage, caught.value.errno) == ("begin", errno.EROFS)
