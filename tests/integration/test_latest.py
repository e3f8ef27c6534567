"""``latest`` finds the newest complete checkpoint of a directory, wherever that is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from upath import UPath

import async_ckpt
from async_ckpt import CheckpointService, StoreError
from async_ckpt.stores.base import Location, Workers
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import FaultyStore
from stress.servers import s3
from stress.servers.process import Server
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Place:
    """An empty directory somewhere."""

    url: str
    options: dict[str, Any]

    def write(self, *names: str) -> None:
        """Write a file of each name, one after the other."""
        with CheckpointService(storage_options=self.options) as service:
            for name in names:
                service.save({"name": name}, f"{self.url}/{name}").wait(60)

    def latest(self) -> str | None:
        """Return what is the newest, without the directory."""
        found = async_ckpt.latest(self.url, storage_options=self.options)
        return None if found is None else found.removeprefix(f"{self.url}/")


@pytest.fixture(params=["disk", "memory", "seaweedfs", "fake_gcs", "azurite", "sftp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """One on each kind of storage."""
    if request.param == "disk":
        return Place(str(tmp_path / "run"), {})
    if request.param == "memory":
        return Place(f"memory://{uuid4().hex}/run", {})
    server: Server = request.getfixturevalue(request.param)
    bucket = fresh_bucket(server)
    host = "" if request.param != "sftp" else server.url.rpartition("/")[2] + "/"
    return Place(f"{server.protocol}://{host}{bucket}/run", dict(server.storage_options))


def test_of_files_and_directories_what_was_written_last(place: Place) -> None:
    """What has been written last is found, and loads; what is no checkpoint, or none yet, is not found."""
    assert place.latest() is None
    place.write("notes.txt", "hparams.yaml", "step-8/__0_0.distcp", "step-7/.metadata.tmp")
    assert place.latest() is None
    place.write("step-9.ckpt")
    assert place.latest() == "step-9.ckpt"
    place.write("step-10/__0_0.distcp", "step-10/__1_0.distcp")
    assert place.latest() == "step-9.ckpt"
    place.write("step-10/.metadata")
    assert place.latest() == "step-10"
    place.write("step-11.pt", "step-12/nested/step-13.ckpt", ".step-14.ckpt")
    found = async_ckpt.latest(place.url, storage_options=place.options)
    assert found == f"{place.url}/step-11.pt"
    assert async_ckpt.load(found, storage_options=place.options) == {"name": "step-11.pt"}


def test_a_directory_that_is_a_checkpoint(place: Place) -> None:
    """It is the newest there is; a ``meta.pt`` in it, as Lightning's, is none."""
    place.write(".metadata", "meta.pt")
    assert place.latest() == place.url


def test_the_time_counts_before_the_name(tmp_path: Path) -> None:
    """The marker's time is that of a directory; names decide between equals, with numbers as numbers."""
    for name in ("epoch=9.ckpt", "epoch=10.ckpt", "last.ckpt"):
        torch.save(name, tmp_path / name)
        os.utime(tmp_path / name, (1000, 1000))
    os.utime(tmp_path / "last.ckpt", (999, 999))
    assert async_ckpt.latest(tmp_path) == tmp_path / "epoch=10.ckpt"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".metadata").write_bytes(b"x")
    os.utime(tmp_path / "a" / ".metadata", (1001, 1001))
    os.utime(tmp_path / "a", (1, 1))
    assert async_ckpt.latest(tmp_path) == tmp_path / "a"
    os.utime(tmp_path / "a" / ".metadata", (998, 998))
    os.utime(tmp_path / "a", (2000, 2000))
    assert async_ckpt.latest(tmp_path) == tmp_path / "epoch=10.ckpt"
    (tmp_path / "a" / ".metadata").write_bytes(b"")  # a disk that was full
    assert async_ckpt.latest(tmp_path) == tmp_path / "epoch=10.ckpt"


def test_it_returns_what_it_was_given(tmp_path: Path) -> None:
    """A str for a str, a Path for a Path, a UPath with its options for a UPath; links lead on."""
    torch.save(1, tmp_path / "x.ckpt")
    assert async_ckpt.latest(f"{tmp_path}/") == f"{tmp_path}/x.ckpt"
    os.symlink(tmp_path, tmp_path / "linked")
    assert async_ckpt.latest(tmp_path / "linked") == tmp_path / "linked" / "x.ckpt"
    url = f"memory://{uuid4().hex}"
    with CheckpointService() as service:
        service.save(1, f"{url}/x.ckpt")
    found = async_ckpt.latest(UPath(url))
    assert isinstance(found, UPath)
    assert async_ckpt.load(found) == 1


def test_how_often_it_asks(tmp_path: Path) -> None:
    """The directory is listed once, and each one in it; a directory of another's counts for nothing."""
    stores = []

    def make(location: Location, workers: Workers) -> FaultyStore:
        stores.append(FaultyStore(LocalStore(workers=workers)))
        return stores[-1]

    for number in range(40):
        (tmp_path / f"step-{number}").mkdir()
        (tmp_path / f"step-{number}" / ".metadata").write_bytes(b"x")
        torch.save(1, tmp_path / f"step-{number}.ckpt")
    with CheckpointService(store_factory=make) as service:
        assert service.newest(tmp_path) is not None
    assert stores[0].calls == {"list": 41}


def test_where_nobody_can_be_asked(seaweedfs: Server) -> None:
    """A bucket that is not there, and one that is not ours, is an error, not an empty directory."""
    options = dict(seaweedfs.storage_options)
    with pytest.raises(StoreError, match="NoSuchBucket"):
        async_ckpt.latest("s3://there-is-none/run", storage_options=options)
    bucket = fresh_bucket(seaweedfs)
    with pytest.raises(StoreError, match="cannot list"):
        async_ckpt.latest(f"s3://{bucket}/run", storage_options={**options, "secret": "wrong"})
    assert async_ckpt.latest(f"s3://{bucket}", storage_options=options) is None


def test_a_directory_of_more_than_a_page(seaweedfs: Server) -> None:
    """All pages of a listing are looked at."""
    bucket = fresh_bucket(seaweedfs)
    for number in range(1010):
        s3.call(seaweedfs.url, "PUT", f"{bucket}/run/{number:05}.txt", b"x")
    place = Place(f"s3://{bucket}/run", dict(seaweedfs.storage_options))
    assert place.latest() is None
    place.write("x.ckpt")
    assert place.latest() == "x.ckpt"
