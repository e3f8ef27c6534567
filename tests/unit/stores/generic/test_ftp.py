"""The generic store on fsspec's file system for FTP, with a server's answers in place of a server."""

from __future__ import annotations

import errno
import ftplib
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from fsspec.implementations.ftp import FTPFileSystem

from async_ckpt.errors import StoreError
from async_ckpt.retry import Retrying, RetryPolicy, is_transient
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.testing import ManualClock, ThreadWorkers
from tests.generic_doubles import NEW, OLD, TARGET, save


class Server:
    """What a server holds, and the errors that its next answers are, by the command."""

    def __init__(self, *, there: bool = True, knows_mlsd: bool = True, folder: str = "/run") -> None:
        self.files = {TARGET.path: OLD} if there else {}
        self.knows_mlsd = knows_mlsd
        self.folder = folder
        self.errors: dict[str, list[Exception]] = {"MLSD": [], "STOR": [], "DELE": []}
        self.asked: list[str] = []
        self.made = 0
        self.hangs_up = False

    def connect(self) -> FTPFileSystem:
        """Make a file system."""
        server = self

        class Connected(FTPFileSystem):  # type: ignore[misc]
            def _connect(self) -> None:
                server.made += 1
                self.ftp = Client(server)

        return Connected("double", skip_instance_cache=True, block_size=len(NEW))

    def store(self, workers: ThreadWorkers, *, overwrite: bool = True) -> GenericStore:
        """Return a store that connects to this, and waits for nothing."""
        clock = ManualClock()
        retrying = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 1.0)
        return GenericStore(
            None, workers=workers, retrying=retrying, overwrite=overwrite, connect=self.connect
        )


class Client:
    """As much of ``ftplib.FTP`` as is used."""

    def __init__(self, server: Server) -> None:
        self.sock: object | None = object()
        self._server = server

    def close(self) -> None:
        """Close."""
        self.sock = None

    def _ask(self, command: str) -> None:
        self._server.asked.append(command)
        if self._server.errors[command]:
            if self._server.hangs_up:
                self.sock = None
            raise self._server.errors[command].pop(0)

    def mlsd(self, path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
        """List a directory."""
        if not self._server.knows_mlsd:
            raise ftplib.error_perm("500 Unknown command.")
        self._ask("MLSD")
        if path == "/":
            yield "run", {"type": "dir"}
            return
        if path != self._server.folder:
            raise ftplib.error_perm("550 No such directory.")
        for name, data in self._server.files.items():
            yield name.removeprefix("/run/"), {"type": "file", "size": str(len(data))}

    def dir(self, path: str, callback: Callable[[str], object]) -> None:
        """List a directory for people."""
        for name, data in self._server.files.items():
            callback(f"-rw-r--r-- 1 me us {len(data)} Jan 01 00:00 {name.removeprefix('/run/')}")

    def storbinary(self, command: str, data: Any, **kwargs: Any) -> None:
        """Store a file."""
        content = data.read()
        self._ask("STOR")
        self._server.files[command.removeprefix("STOR ")] = content

    def rename(self, path1: str, path2: str) -> None:
        """Move a file."""
        self._server.files[path2] = self._server.files.pop(path1)

    def delete(self, path: str) -> None:
        """Remove a file."""
        self._ask("DELE")
        if self._server.files.pop(path, None) is None:
            raise ftplib.error_perm("550 No such file.")


async def opened_and_closed(store: GenericStore) -> None:
    """Open the file for reading, and close it."""
    source = await store.source(TARGET)
    await source.aclose()
    assert source.nbytes == len(OLD)


@pytest.mark.parametrize("answer", ["421 Bye.", "425 No data.", "426 Aborted.", "450 Busy.", "451 Error."])
def test_a_listing_that_fails_is_no_empty_one(workers: ThreadWorkers, answer: str) -> None:
    """That a file is there is found out though a listing failed for once, which fsspec takes for an empty one (E3)."""
    server = Server()
    server.errors["MLSD"] = [ftplib.error_temp(answer), ftplib.error_temp(answer)]
    store = server.store(workers)
    assert anyio.run(store.exists, TARGET)
    server.errors["MLSD"] = [ftplib.error_temp(answer)]
    assert anyio.run(store.exists, TARGET)  # found by the listing that should confirm that it is not there
    server.errors["MLSD"] = [ftplib.error_temp(answer)]
    anyio.run(opened_and_closed, store)
    anyio.run(store.aclose)


def test_a_listing_that_always_fails(workers: ThreadWorkers) -> None:
    """What cannot be told is an error, be it asked for, to be removed, or not to be replaced; nothing is touched."""
    server = Server()

    def failing() -> None:
        server.errors["MLSD"] = [ftplib.error_temp("450 Busy.")] * 100

    store = server.store(workers, overwrite=False)
    for call in (store.exists, store.delete):
        failing()
        with pytest.raises(StoreError, match="450 Busy"):
            anyio.run(call, TARGET)
    failing()
    with pytest.raises(StoreError, match="450 Busy"):
        anyio.run(save, store)
    anyio.run(store.aclose)
    assert server.files == {TARGET.path: OLD}


def test_an_answer_that_fits_no_question(workers: ThreadWorkers) -> None:
    """A connection that has lost step while it listed is made anew, not believed."""
    server = Server()
    server.errors["MLSD"] = [ftplib.error_reply("200 Done."), ftplib.error_reply("200 Done.")]
    store = server.store(workers)
    assert anyio.run(store.exists, TARGET)
    anyio.run(store.aclose)
    assert server.made == 2


@pytest.mark.parametrize("folder", ["/run", "/other"])
@pytest.mark.parametrize("knows_mlsd", [True, False])
def test_what_is_not_there(workers: ThreadWorkers, knows_mlsd: bool, folder: str) -> None:
    """A missing file, and a missing directory, are told at once, by old servers, too."""
    server = Server(there=False, knows_mlsd=knows_mlsd, folder=folder)
    store = server.store(workers)
    assert not anyio.run(store.exists, TARGET)
    with pytest.raises(FileNotFoundError):
        anyio.run(store.source, TARGET)
    anyio.run(store.delete, TARGET)
    anyio.run(store.aclose)
    assert server.made == 1


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_full_disk(workers: ThreadWorkers, hangs_up: bool) -> None:
    """A 426, as a full disk is answered, is final: the file is not sent anew, unless the server hung up with it."""
    server = Server()
    server.hangs_up = hangs_up
    server.errors["STOR"] = [ftplib.error_temp("426 None; transfer aborted.")]
    store = server.store(workers)
    with pytest.raises(StoreError, match="426 None") as caught:
        anyio.run(save, store)
    anyio.run(store.aclose)
    assert is_transient(caught.value) is hangs_up
    assert caught.value.errno != errno.ECONNABORTED
    assert server.files == {TARGET.path: OLD}
