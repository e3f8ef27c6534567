"""Saves and loads on real SFTP, FTP and WebDAV servers go on where the line to them breaks, as such servers let it."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.errors import StoreError
from async_ckpt.events import Begun, Committing, Event, LaidOut, PartWritten
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Part, Store
from async_ckpt.testing import BytesContent, ThreadWorkers
from stress.proxy import FaultProxy
from stress.servers.folders import FolderServer
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration

QUICKLY = RetryPolicy(initial_seconds=0.001)
NBYTES = 400_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A way to an empty folder of a server, through a proxy."""

    proxy: FaultProxy
    url: str
    options: dict[str, Any]
    folder: Path

    def cut(self) -> None:
        """Reset every connection there is."""
        self.proxy.set(refuse=True)
        self.proxy.clear()

    def cut_after(self, nbytes: int) -> None:
        """Reset the connection once so many bytes more have passed; of another, so many as of this in all."""
        self.proxy.set(reset_after=self._moved + nbytes)

    def stall(self) -> None:
        """Let nothing pass on the connection any more; of another, so much as of this in all."""
        self.proxy.set(stall_after=self._moved)

    @property
    def _moved(self) -> int:
        return self.proxy.bytes_up + self.proxy.bytes_down


@pytest.fixture(params=["sftp", "ftp", "webdav"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """One of each kind."""
    server: FolderServer = request.getfixturevalue(request.param)
    with line_to(server) as line:
        yield line


@contextmanager
def line_to(server: FolderServer) -> Iterator[Line]:
    """Lay a line to a fresh folder of *server*."""
    options, bucket = dict(server.storage_options), fresh_bucket(server)
    with FaultProxy(options.get("base_url", server.url)) as proxy:
        options |= {"base_url": proxy.url} if "base_url" in options else {"port": proxy.port}
        host = "" if "base_url" in options else f"127.0.0.1:{proxy.port}/"
        url = f"{server.protocol}://{host}{bucket}/x.ckpt"
        yield Line(proxy=proxy, url=url, options=options, folder=server.folder / bucket)


def service(line: Line, observer: Callable[[Event], None] | None = None) -> CheckpointService:
    """Return one that sends small parts and does not wait long before it tries again."""
    return CheckpointService(
        storage_options=line.options, retry=QUICKLY, part_size=100_000, observer=observer
    )


def save_over(line: Line, kind: type[Event], act: Callable[[], object]) -> None:
    """Save, and save another in its place, for whose first event of a kind *act* is called."""
    due: list[Callable[[], object]] = []

    def observe(event: Event) -> None:
        if isinstance(event, kind) and due:
            due.pop()()

    with service(line, observe) as saving:
        saving.save(state(0), line.url).wait(timeout=60)
        due.append(act)
        saving.save(state(1), line.url).wait(timeout=60)
    assert not due


def state(step: int) -> dict[str, Any]:
    """Return a state of always the same size."""
    return {"step": step, "weights": torch.full((NBYTES // 4,), float(step))}


def assert_there(line: Line, step: int) -> None:
    """Check that the checkpoint of *step* is there, whole, and nothing else."""
    assert os.listdir(line.folder) == ["x.ckpt"]
    there = torch.load(line.folder / "x.ckpt")
    assert there["step"] == step
    assert torch.equal(there["weights"], state(step)["weights"])


def test_a_line_that_breaks_between_saves(line: Line) -> None:
    """Every save is durable, and loads and removals work, if the server hangs up each time that nothing is asked."""
    with service(line) as saving:
        for step in range(4):
            saving.save(state(step), line.url).wait(timeout=60)
            assert_there(line, step)
            line.cut()
        assert saving.load(line.url)["step"] == 3
        line.cut()
        saving.remove(line.url).wait(timeout=60)
    assert os.listdir(line.folder) == []


@pytest.mark.parametrize("stage", [LaidOut, PartWritten, Committing])
def test_a_line_that_breaks_within_a_save(line: Line, stage: type[Event]) -> None:
    """A save whose line is cut as it begins, writes or commits is durable, and leaves nothing beside."""
    save_over(line, stage, line.cut)
    assert_there(line, 1)


@pytest.mark.parametrize("nbytes", [0, 200, 500, 800, 3000])
def test_a_line_that_breaks_within_a_commit(line: Line, nbytes: int) -> None:
    """Wherever in the commit it is cut, what was asked for or answered: the new file is in, and nothing beside (E3)."""
    save_over(line, Committing, lambda: line.cut_after(nbytes))
    assert_there(line, 1)


@pytest.mark.parametrize("nbytes", [200, 250_000])
def test_a_line_that_breaks_within_a_large_write(line: Line, nbytes: int) -> None:
    """The file is begun again, and what there was of it removed through the new connection (D2)."""
    save_over(line, Begun, lambda: line.cut_after(nbytes))
    assert_there(line, 1)


@pytest.mark.parametrize("nbytes", [0, 500, 250_000])
def test_a_line_that_breaks_within_a_load(line: Line, nbytes: int) -> None:
    """The file is opened again, and read on."""
    with service(line) as saving:
        saving.save(state(1), line.url).wait(timeout=60)
        line.cut_after(nbytes)
        loaded = saving.load(line.url)
    assert torch.equal(loaded["weights"], state(1)["weights"])


def in_store(line: Line, use: Callable[[Store], Awaitable[T]]) -> T:
    """Run *use* with a store at the end of the line."""

    async def run() -> T:
        workers, location = ThreadWorkers(2), locate(line.url, storage_options=line.options)
        try:
            store = open_store(location, workers=workers, storage_options=line.options, retry=QUICKLY)
            try:
                return await use(store)
            finally:
                await store.aclose()
        finally:
            workers.close()

    return anyio.run(run)


def test_an_abort_after_the_line_broke(line: Line) -> None:
    """An upload that is given up once its line is cut leaves no temporary file (D2)."""

    async def give_up(store: Store) -> None:
        upload = await store.begin(locate(line.url, storage_options=line.options), NBYTES)
        await upload.put(Part(index=0, start=0, stop=300_000), BytesContent(bytes(NBYTES)))
        line.cut()
        await upload.abort()

    in_store(line, give_up)
    assert os.listdir(line.folder) == []


def test_a_file_that_is_replaced_while_the_line_is_cut(sftp: FolderServer) -> None:
    """What is opened again must be what was opened first; another file is not read on, but told of."""

    async def read(store: Store) -> None:
        source = await store.source(locate(way.url, storage_options=way.options))
        try:
            os.utime(file, (0, 0))
            way.cut()
            for _ in range(2):  # the second time, too
                with pytest.raises(StoreError, match="replaced while it was read"):
                    await source.read_into(0, memoryview(bytearray(5)))
        finally:
            await source.aclose()

    with line_to(sftp) as way:
        file = way.folder / "x.ckpt"
        file.write_bytes(b"12345")
        in_store(way, read)


def test_a_line_that_carries_nothing_any_more(sftp: FolderServer) -> None:
    """A connection of which a firewall has dropped the memory, unsaid, is given up after ``stall_seconds`` (B2)."""
    with line_to(sftp) as way:
        patience = replace(QUICKLY, stall_seconds=0.5)
        with CheckpointService(storage_options=way.options, retry=patience) as saving:
            saving.save(state(0), way.url).wait(timeout=60)
            way.stall()
            saving.save(state(1), way.url).wait(timeout=60)
        assert_there(way, 1)


class OnRetry(logging.Handler):
    """Does something when the library says that it tries again."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        """Do it."""
        self._act()


def test_a_server_that_is_away_for_a_moment(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """A server that refuses connections, as one that starts again, is tried again, from the very first on (E3)."""

    async def ask(store: Store) -> bool:
        return await store.exists(locate(line.url, storage_options=line.options))

    logger, comes_back = logging.getLogger("async_ckpt.retry"), OnRetry(line.proxy.clear)
    line.proxy.set(refuse=True)
    logger.addHandler(comes_back)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            assert in_store(line, ask) is False
    finally:
        logger.removeHandler(comes_back)
    assert line.proxy.connections > 1


def sockets() -> int:
    """Return how many sockets this process has open."""
    found = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(path) and os.readlink(path).startswith("socket:") for path in found)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not tell what is open")
@pytest.mark.parametrize("password", ["secret", "wrong"])
@pytest.mark.parametrize("kind", ["sftp", "ftp"])
def test_no_connection_is_left_to_the_collector(
    request: pytest.FixtureRequest, kind: str, password: str
) -> None:
    """A closed store has no socket open, though errors were raised, whose tracebacks hold on to file systems (B2)."""
    server: FolderServer = request.getfixturevalue(kind)
    options = {**server.storage_options, "password": password}
    url = f"{server.url}/{fresh_bucket(server)}/x.ckpt"
    errors: list[OSError] = []

    async def look(store: Store) -> None:
        try:
            await store.source(locate(url, storage_options=options))
        except OSError as error:
            errors.append(error)

    before = sockets()
    in_store(Line(proxy=FaultProxy(url), url=url, options=options, folder=server.folder), look)
    assert sockets() <= before
    assert errors
