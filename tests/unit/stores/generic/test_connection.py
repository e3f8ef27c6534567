"""The generic store on file systems whose connection is lost, and which are made anew."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from fsspec.implementations.memory import MemoryFile

from async_ckpt.errors import StoreError
from async_ckpt.retry import Retrying, RetryPolicy, is_transient
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.testing import BytesContent, ManualClock, ThreadWorkers
from tests.generic_doubles import HALVES, NEW, OLD, TARGET, Client, Memory, save


class Remote:
    """A server of files, and the connections to it.

    Attributes:
        files: what it holds.
        made: every file system that was connected.
        cuts: when a connection is lost: before or after the call, by its name and number.
        replaces: whether it moves a file onto another.
    """

    def __init__(self, *, cuts: tuple[tuple[str, str, int], ...] = (), replaces: bool = True) -> None:
        self.files: dict[str, Any] = {}
        self.made: list[Connected] = []
        self.cuts = set(cuts)
        self.calls: dict[str, int] = {}
        self.replaces = replaces

    def connect(self) -> Connected:
        """Make another file system."""
        self.made.append(Connected(self))
        return self.made[-1]

    def store(self, workers: ThreadWorkers) -> GenericStore:
        """Return a store that connects to this, and waits for nothing."""
        clock = ManualClock()
        retrying = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 1.0)
        return GenericStore(None, workers=workers, retrying=retrying, connect=self.connect)

    def put(self, data: bytes) -> None:
        """Let the target be there."""
        self.files[TARGET.path] = MemoryFile(Memory(), TARGET.path, data)

    @property
    def contents(self) -> dict[str, bytes]:
        """What it holds, as bytes."""
        return {name: file.getvalue() for name, file in self.files.items()}


class Connected(Memory):
    """A file system at the end of a connection, which may break at any call."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.remote = remote
        self.store = remote.files
        self.ftp = Client()

    def _during(self, name: str, call: Callable[[], Any]) -> Any:
        if self.ftp.sock is None:
            raise AttributeError("'NoneType' object has no attribute 'sendall'")  # as ftplib
        number = self.remote.calls[name] = self.remote.calls.get(name, 0) + 1
        if ("before", name, number) in self.remote.cuts:
            raise EOFError
        result = call()
        if ("after", name, number) in self.remote.cuts:
            raise EOFError
        return result

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file."""
        return self._during("info", lambda: Memory.info(self, path, **kwargs))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self._during(f"open {mode}", lambda: Memory._open(self, path, mode, **kwargs))

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self._during("rm", lambda: Memory.rm_file(self, path))

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Move a file."""

        def move() -> None:
            if path2 in self.store and not self.remote.replaces:
                raise FileExistsError(errno.EEXIST, "File exists")
            self.store[path2] = self.store.pop(path1)

        self._during("mv", move)


def points(name: str, most: int) -> list[tuple[str, str, int]]:
    """Return each moment at which one of the first calls can be cut."""
    return [(when, name, number) for number in range(1, most + 1) for when in ("before", "after")]


async def outcome(store: GenericStore) -> StoreError | None:
    """Save, and return the error if there was one."""
    try:
        await save(store)
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("cut", [*points("mv", 3), *points("info", 14), *points("rm", 2)])
def test_a_commit_that_is_cut(workers: ThreadWorkers, cut: tuple[str, str, int], replaces: bool) -> None:
    """Whichever call the connection breaks at, the file is in or not even begun, and nothing is beside it (D2, E3)."""
    remote = Remote(cuts=(cut,), replaces=replaces)
    remote.put(OLD)
    store = remote.store(workers)
    result = anyio.run(outcome, store)
    assert remote.contents == {TARGET.path: NEW if result is None else OLD}
    assert result is None or (result.stage == "begin" and is_transient(result))  # the writer begins again
    anyio.run(store.aclose)
    assert [one.ftp.sock for one in remote.made] == [None] * len(remote.made)


@pytest.mark.parametrize("moves", [(3,), (3, 4)])
def test_the_earlier_file_comes_back_at_last(workers: ThreadWorkers, moves: tuple[int, ...]) -> None:
    """If the new file does not get in, the earlier one is put back, however often the connection breaks (D2)."""

    class Refusing(Connected):
        def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
            if path2 == TARGET.path and ".tmp" in path1 and TARGET.path not in self.store:
                raise OSError(errno.EIO, "Input/output error")
            super().mv(path1, path2, **kwargs)

    remote = Remote(cuts=tuple(("before", "mv", number) for number in moves), replaces=False)
    remote.connect = lambda: Refusing(remote)  # type: ignore[method-assign]
    remote.put(OLD)
    with pytest.raises(StoreError):
        anyio.run(save, remote.store(workers))
    assert remote.contents == {TARGET.path: OLD}


def test_a_handle_of_a_lost_connection(workers: ThreadWorkers) -> None:
    """A handle is of no use once another save has lost its connection: that is told as transient, for both to go on."""

    async def lose() -> None:
        store = remote.store(workers)
        upload = await store.begin(TARGET, len(NEW))
        await upload.put(HALVES[0], BytesContent(NEW))
        remote.cuts.add(("before", "info", remote.calls["info"] + 1))
        assert not await store.exists(TARGET)  # by another connection
        with pytest.raises(StoreError) as caught:
            await upload.put(HALVES[1], BytesContent(NEW))
        await upload.abort()
        await store.aclose()
        assert is_transient(caught.value)

    remote = Remote()
    anyio.run(lose)
    assert remote.contents == {}
    assert len(remote.made) == 2


class Paramiko:
    """A handle that takes a broken line for the end of the file, as that of SFTP."""

    def __init__(self, data: bytes, breaks: Callable[[], bool]) -> None:
        self._data, self._position, self._breaks = data, 0, breaks

    def seek(self, offset: int, whence: int = 0) -> None:
        """Seek."""
        self._position = offset + (len(self._data) if whence else 0)

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, nbytes: int) -> bytes:
        """Read at most 100 bytes, or nothing."""
        data = b"" if self._breaks() else self._data[self._position :][: min(nbytes, 100)]
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close."""


def test_a_broken_line_that_looks_like_the_end(workers: ThreadWorkers) -> None:
    """A read that ends early because the line broke is gone on with, though the handle told of no error (E3)."""
    reads: list[None] = []
    data = bytes(index % 251 for index in range(3000))

    class Handing(Connected):
        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            return Paramiko(data, self.breaks)

        def breaks(self) -> bool:
            reads.append(None)
            if len(reads) == 7:
                remote.cuts.add(("before", "info", remote.calls["info"] + 1))
                return True
            return False

    async def read() -> bytes:
        store = remote.store(workers)
        source = await store.source(TARGET)
        try:
            target = bytearray(source.nbytes)
            await source.read_into(0, memoryview(target))
            return bytes(target)
        finally:
            await source.aclose()
            await store.aclose()

    remote = Remote()
    remote.connect = lambda: Handing(remote)  # type: ignore[method-assign]
    remote.put(data)
    assert anyio.run(read) == data
    assert len(reads) == 1 + len(data) // 100  # what had come is not read again


def test_a_connection_that_ended_while_it_was_idle(workers: ThreadWorkers) -> None:
    """The next call connects first: none is spent on finding out, so none can be answered by a goodbye."""

    async def ask() -> bool:
        assert await store.exists(TARGET)
        remote.made[-1].ftp.close()
        return await store.exists(TARGET)

    remote = Remote()
    remote.put(OLD)
    retrying = Retrying(RetryPolicy(attempts=1))
    store = GenericStore(None, workers=workers, retrying=retrying, connect=remote.connect)
    assert anyio.run(ask)
    assert len(remote.made) == 2


def test_a_goodbye_for_an_answer(workers: ThreadWorkers) -> None:
    """Where a file system says that nothing is there because its connection has just ended, it is asked again (E3)."""

    class Ending(Connected):
        def info(self, path: str, **kwargs: Any) -> Any:
            if len(remote.made) == 1:
                self.ftp.close()
                raise FileNotFoundError(path)
            return super().info(path, **kwargs)

    def connect() -> Connected:
        remote.made.append(Ending(remote))
        return remote.made[-1]

    remote = Remote()
    remote.connect = connect  # type: ignore[method-assign]
    remote.put(OLD)
    assert anyio.run(remote.store(workers).exists, TARGET)


def test_a_permanent_error_keeps_the_connection(workers: ThreadWorkers) -> None:
    """What is refused is raised at once, and nothing is connected anew."""

    class Refusing(Connected):
        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied")

    remote, made = Remote(), []

    def connect() -> Refusing:
        made.append(Refusing(remote))
        return made[-1]

    remote.connect = connect  # type: ignore[method-assign]
    store = remote.store(workers)
    with pytest.raises(StoreError) as caught:
        anyio.run(save, store)
    assert not is_transient(caught.value)
    assert len(made) == 1


def test_a_file_system_of_the_callers_is_left_alone(workers: ThreadWorkers) -> None:
    """Of a file system that was given, nothing is ended and nothing made anew."""
    remote = Remote(cuts=(("before", "info", 1),))
    given = remote.connect()
    store = GenericStore(given, workers=workers, retrying=Retrying(RetryPolicy(attempts=1)))
    with pytest.raises(StoreError):
        anyio.run(store.exists, TARGET)
    assert not anyio.run(store.exists, TARGET)
    anyio.run(store.aclose)
    assert given.ftp.sock is not None


def test_what_is_connected_after_the_closing_is_ended(workers: ThreadWorkers) -> None:
    """A worker that was still connecting when the store was closed leaves no connection, nor does a later call (B2)."""
    connecting, closed = threading.Event(), threading.Event()
    remote = Remote()

    def slowly() -> Connected:
        connecting.set()
        assert closed.wait(10)
        return Remote.connect(remote)

    async def close_meanwhile(store: GenericStore) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, store)
            await anyio.to_thread.run_sync(connecting.wait, 10)
            await store.aclose()
            closed.set()

    async def ask(store: GenericStore) -> None:
        with pytest.raises(StoreError, match="has been closed"):
            await store.exists(TARGET)

    remote.connect = slowly  # type: ignore[method-assign]
    store = remote.store(workers)
    anyio.run(close_meanwhile, store)
    anyio.run(ask, store)
    assert [one.ftp.sock for one in remote.made] == [None]
