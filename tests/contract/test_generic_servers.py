"""The generic store keeps what ``async_ckpt.stores.base`` promises, on real SFTP, FTP and WebDAV servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.errors import StoreError
from async_ckpt.events import Event
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import StoreConformance
from stress.servers.folders import FolderServer
from tests.contract.test_stores import name_of_the_dead, temporary_files
from tests.servers import fresh_bucket
from tests.support import python

pytestmark = pytest.mark.integration


SAVE_AND_LOAD = """
    import sys
    import torch
    from async_ckpt import CheckpointService
    state = {"step": 3, "weights": torch.arange(300_000.0), "other": torch.ones(5)}
    for folder in sys.argv[1:]:
        kept, removed = f"{folder}/kept.ckpt", f"{folder}/removed.ckpt"
        with CheckpointService() as service:
            service.save(state, kept)
            service.save(state, removed)
            whole, part = service.load(kept), service.load(kept, keys="other")
            service.remove(removed)
        print(torch.equal(whole["weights"], state["weights"]), list(part))
"""


class OnServer(StoreConformance):
    """What the suite needs to know of a store on a server of a folder."""

    kind: str
    server: FolderServer
    bucket: str

    @pytest.fixture(autouse=True)
    def _bucket(self, request: pytest.FixtureRequest) -> None:
        self.server = request.getfixturevalue(self.kind)
        self.bucket = fresh_bucket(self.server)

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return self._store(workers, overwrite=True)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return self._store(workers, overwrite=False)

    def _store(self, workers: Workers, *, overwrite: bool) -> Store:
        options = self.server.storage_options
        return open_store(self.locate("any"), workers=workers, storage_options=options, overwrite=overwrite)

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(url_of(self.server, self.bucket, name), storage_options=self.server.storage_options)

    def leftovers(self) -> Sequence[str]:
        """Return the temporary files at the place."""
        return temporary_files(self._folder)

    def strand(self) -> str:
        """Leave a temporary file."""
        name = name_of_the_dead()
        (self._folder / name).write_bytes(b"partial")
        return name

    @property
    def _folder(self) -> Path:
        return self.server.folder / self.bucket


def url_of(server: FolderServer, bucket: str, name: str) -> str:
    """Return the URL of *name* in *bucket*; of WebDAV the options alone tell the host."""
    return (
        f"{server.protocol}://{bucket}/{name}"
        if server.protocol == "webdav"
        else f"{server.url}/{bucket}/{name}"
    )


class TestSFTP(OnServer):
    """paramiko's client, asyncssh's server."""

    kind = "sftp"


class TestFTP(OnServer):
    """ftplib's client, pyftpdlib's server."""

    kind = "ftp"


class TestWebDAV(OnServer):
    """webdav4's client, WsgiDAV's server; what they cannot do is named."""

    kind = "webdav"

    @pytest.mark.xfail(raises=StoreError, reason="webdav4 cannot seek to the end of an empty file")
    def test_exact_bytes(self) -> None:
        super().test_exact_bytes()

    @pytest.mark.xfail(raises=StoreError, reason="webdav4 lets '?' and '[' into a URL as they are")
    def test_unusual_names(self) -> None:
        super().test_unusual_names()

    @pytest.mark.skip(
        reason="WsgiDAV's tags are of inode, length and second, so the clock decides whether it holds"
    )
    def test_a_file_that_is_replaced_while_it_is_read(self) -> None:
        super().test_a_file_that_is_replaced_while_it_is_read()


def test_checkpoints_on_servers(sftp: FolderServer, ftp: FolderServer, webdav: FolderServer) -> None:
    """A process that is told of servers by fsspec's variables saves there, loads all and a part, removes, and ends."""
    servers = {fresh_bucket(server): server for server in (sftp, ftp, webdav)}
    folders = [server.folder / bucket / "run" for bucket, server in servers.items()]
    environment = {name: value for server in servers.values() for name, value in server.environment.items()}

    urls = [url_of(server, bucket, "run") for bucket, server in servers.items()]
    ran = python(SAVE_AND_LOAD, *urls, env=environment)

    assert ran.stdout == "True ['other']\n" * 3, ran.stderr
    assert ran.stderr == ""
    assert [torch.load(folder / "kept.ckpt")["step"] for folder in folders] == [3, 3, 3]
    assert [os.listdir(folder) for folder in folders] == [["kept.ckpt"]] * 3


@pytest.mark.parametrize("earlier", [None, 0o600, 0o664])
def test_a_checkpoint_over_sftp_is_private_until_it_is_whole(sftp: FolderServer, earlier: int | None) -> None:
    """On the server, too, others read no byte that is not to be theirs; a replaced checkpoint keeps its mode."""
    bucket = fresh_bucket(sftp)
    folder = sftp.folder / bucket
    new = folder / "new"
    new.touch()
    if earlier is not None:
        (folder / "x.ckpt").touch()
        (folder / "x.ckpt").chmod(earlier)
    seen: list[int] = []

    def look(event: Event) -> None:
        if type(event).__name__ in ("Begun", "PartWritten"):
            seen.extend(path.stat().st_mode & 0o777 for path in folder.glob(".async_ckpt.*"))

    with CheckpointService(storage_options=sftp.storage_options, observer=look) as service:
        service.save({"weights": torch.ones(1000)}, url_of(sftp, bucket, "x.ckpt"))
    assert seen == [0o600, 0o600]
    wanted = new.stat().st_mode & 0o777 if earlier is None else earlier
    assert (folder / "x.ckpt").stat().st_mode & 0o777 == wanted
