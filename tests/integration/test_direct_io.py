"""Files written past the page cache, on file systems of many kinds, and what is on the disk when they are durable."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService, CorruptCheckpointError, load, load_sharded
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import is_leftover
from async_ckpt.stores.local.direct import LEAST_BYTES
from tests.direct_disk import cached_bytes
from tests.fuse.mounted import mounted, why_not
from tests.fuse.places import ALLUXIO, PLAIN, VOLUMES
from tests.support import PATIENCE_SECONDS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="direct I/O is Linux's"),
]

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
IMAGE_BYTES = 384 << 20  # the least that every one of these file systems takes


def state(number: int, nbytes: int = 20 << 20) -> dict[str, Any]:
    """Return something to save: one large tensor, many small ones, and none of a round length."""
    torch.manual_seed(number)
    small = {f"small{size}": torch.randn(size) for size in range(0, 700, 7)}
    return {"number": number, "large": torch.randn(nbytes // 4 + 3), **small}


def bytes_of(number: int) -> bytes:
    """Return what ``torch.save`` makes of a state."""
    file = io.BytesIO()
    torch.save(state(number), file)
    return file.getvalue()


def has_direct_io(folder: Path) -> bool:
    """Return whether the system tells that files there have it."""
    probe = folder / "probe"
    probe.touch()
    about = Disk().alignment(str(probe))
    probe.unlink()
    return about is not None and about.memory > 0


def run(*command: object) -> None:
    """Run a program of the system's.

    Raises:
        OSError: it failed.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


@contextmanager
def mount(folder: Path, *arguments: object) -> Iterator[Path]:
    """Mount something, or skip the test where that cannot be done."""
    folder.mkdir(exist_ok=True)
    try:
        run("mount", *arguments, folder)
    except OSError as error:
        pytest.skip(f"{error}")
    try:
        yield folder
    finally:
        run("umount", folder)


@contextmanager
def made(kind: str, folder: Path) -> Iterator[Path]:
    """Make a file system in a file, and mount it."""
    program = shutil.which(f"mkfs.{kind}")
    if program is None:
        pytest.skip(f"no mkfs.{kind} here")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run(program, "-q", image)
    try:
        with mount(folder / "mounted", "-o", "loop", image) as place:
            yield place
    finally:
        image.unlink(missing_ok=True)


@contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """Mount a directory over another."""
    parts = [folder / name for name in ("lower", "upper", "work")]
    for each in parts:
        each.mkdir()
    lower, upper, work = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    with mount(folder / "mounted", "-t", "overlay", "-o", options, "overlay") as place:
        yield place


@contextmanager
def fuse(rules: Any) -> Iterator[Path]:
    """Mount the tests' own."""
    if reason := why_not():
        pytest.skip(reason)
    with mounted(rules) as mount:
        yield mount.path


PLACES: dict[str, Callable[[Path], Any]] = {
    "where tests run": nullcontext,
    "tmpfs": lambda folder: mount(folder / "mounted", "-t", "tmpfs", "none"),
    "overlay": overlay,
    **{kind: lambda folder, kind=kind: made(kind, folder) for kind in ("ext4", "xfs", "btrfs")},
    "FUSE": lambda _: fuse(PLAIN),
    "FUSE like Alluxio": lambda _: fuse(ALLUXIO),
    "FUSE like a volume of Databricks": lambda _: fuse(VOLUMES),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of some kind."""
    with PLACES[request.param](tmp_path) as folder:
        yield folder


@pytest.mark.parametrize("page_cache", ["keep", "drop"])
def test_any_file_system(place: Path, page_cache: str) -> None:
    """Whatever the file system makes of it, checkpoints are torch's own, one replaces another, and nothing is left."""
    with CheckpointService(page_cache=page_cache) as service:
        for number in (1, 2):
            service.save(state(number), place / "x.ckpt").wait(timeout=PATIENCE_SECONDS)
            assert (place / "x.ckpt").read_bytes() == bytes_of(number)
    assert not [name for name in os.listdir(place) if is_leftover(name)]


@NEEDS_ROOT
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("page_cache", ["keep", "drop"])
def test_durable_is_on_the_disk(tmp_path: Path, kind: str, page_cache: str) -> None:
    """A copy of the disk, taken as soon as a save is durable, has the whole checkpoint (D1).

    The copy has nothing of what the kernel still has in memory for the file system: it is what a loss of power leaves.
    """
    with made(kind, tmp_path) as place:
        with CheckpointService(page_cache=page_cache, part_size=1_000_000) as service:
            for number in range(3):
                service.save(state(number), place / "run" / "x.ckpt").wait(timeout=PATIENCE_SECONDS)
                shutil.copyfile(tmp_path / "image", tmp_path / f"copy{number}")
    for number in range(3):
        copy = tmp_path / f"copy{number}"
        with mount(tmp_path / "later", "-o", "loop,nouuid" if kind == "xfs" else "loop", copy) as later:
            assert (later / "run" / "x.ckpt").read_bytes() == bytes_of(number)
        copy.unlink()


@NEEDS_ROOT
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Where there is no room, the save says so, and the earlier checkpoint is whole (D2)."""
    with made("ext4", tmp_path) as place, CheckpointService(page_cache="drop") as service:
        service.save(state(1), place / "x.ckpt").wait(timeout=PATIENCE_SECONDS)
        with pytest.raises(OSError, match="No space left"):
            service.save(state(2, nbytes=IMAGE_BYTES), place / "x.ckpt").wait(timeout=PATIENCE_SECONDS)
        assert (place / "x.ckpt").read_bytes() == bytes_of(1)
        assert os.listdir(place) == [name for name in os.listdir(place) if name in ("x.ckpt", "lost+found")]


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    """A rank's file of a sharded checkpoint is the same either way, and loads."""
    found = []
    for page_cache in ("keep", "drop"):
        with CheckpointService(page_cache=page_cache, part_size=1_000_000) as service:
            service.save_sharded(state(1), tmp_path / page_cache).wait(timeout=PATIENCE_SECONDS)
        (file,) = (tmp_path / page_cache).glob("*.distcp")
        if page_cache == "drop" and has_direct_io(tmp_path):
            assert cached_bytes(file) == 0
        found.append(file.read_bytes())
    assert found[0] == found[1]
    loaded = {"large": torch.zeros_like(state(1)["large"]), "small0": torch.empty(0)}
    load_sharded(loaded, tmp_path / "drop")
    assert torch.equal(loaded["large"], state(1)["large"])


def test_damage_is_found(tmp_path: Path) -> None:
    """One wrong bit anywhere in a large tensor is found when the file is loaded: its checksum is that of its bytes."""
    path = tmp_path / "x.ckpt"
    with CheckpointService(page_cache="drop") as service:
        service.save(state(1), path).wait(timeout=PATIENCE_SECONDS)
    assert load(path)["number"] == 1
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(5):
        damaged = bytearray(whole)
        damaged[chance.randrange(1 << 20, 19 << 20)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError):
            load(path)


def test_nothing_is_kept_of_a_large_file(tmp_path: Path) -> None:
    """By default, a large checkpoint does not push anything out of the page cache, where that can be avoided."""
    with CheckpointService() as service:
        service.save(state(1, nbytes=LEAST_BYTES), tmp_path / "x.ckpt").wait(timeout=PATIENCE_SECONDS)
        service.save({"small": torch.zeros(1 << 18)}, tmp_path / "y.ckpt").wait(timeout=PATIENCE_SECONDS)
    if not has_direct_io(tmp_path):
        pytest.skip("no direct I/O in the directory for tests")
    assert cached_bytes(tmp_path / "x.ckpt") <= 64 << 10
    assert cached_bytes(tmp_path / "y.ckpt") >= 1 << 20
