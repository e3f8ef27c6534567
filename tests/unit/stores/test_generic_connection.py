"""The generic store on file systems whose connection is lost, and which are made anew."""

from __future__ import annotations

import errno
import ftplib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from fsspec.implementations.memory import MemoryFile

from async_ckpt.errors import StoreError
from async_ckpt.retry import Retrying, RetryPolicy, is_transient
from async_ckpt.stores.fsspec_calls import end_connection, has_ended, marks_lost
from async_ckpt.stores.generic import GenericStore
from async_ckpt.testing import BytesContent, ManualClock, ThreadWorkers
from tests.generic_doubles import HALVES, NEW, OLD, TARGET, Memory, save


class Client:
    """The client inside a file system, as FTP's; `sock` is None once it has been closed."""

    def __init__(self) -> None:
        self.sock: object | None = object()

    def close(self) -> None:
        """Close."""
        self.sock = None


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


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that are connected."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_goodbye_is_seen(ends: tuple[socket.socket, socket.socket]) -> None:
    """An idle connection lives; one on which the server said something unasked, or ended, does not."""

    class FileSystem:
        ftp = Client()

    client, server = ends
    client.settimeout(30)
    FileSystem.ftp.sock = client
    assert not has_ended(FileSystem)
    assert client.gettimeout() == 30
    server.sendall(b"421 Timeout.\r\n")
    server.close()
    assert has_ended(FileSystem)
    client.close()
    assert has_ended(FileSystem)
    assert not has_ended(Memory())


def raised(error: Exception, meanwhile: Exception, *cause: Exception | None) -> Exception:
    """Return *error* as it is raised while another is handled, maybe from a third."""
    try:
        try:
            raise meanwhile
        except Exception:
            if cause:
                raise error from cause[0]
            raise error  # noqa: B904
    except Exception as caught:
        return caught


def circle(*errors: Exception) -> Exception:
    """Return the last of *errors*, each of which is the cause of the next, and that of the first."""
    for cause, error in zip(errors, (*errors[1:], errors[0]), strict=True):
        error.__cause__ = cause
    return errors[-1]


def named(name: str, base: type[Exception]) -> Exception:
    """Return an error as that of a library that need not be installed."""
    module, _, bare = name.rpartition(".")
    error: Exception = type(bare, (base,), {"__module__": module})("x")
    return error


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (EOFError(), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("timed out"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (ftplib.error_temp("421 Timeout."), True),
        (ftplib.error_temp("425 Cannot open data connection."), True),
        (ftplib.error_reply("227 Entering passive mode"), True),
        (raised(ValueError("x"), EOFError()), True),
        (raised(ValueError("x"), KeyError("y"), EOFError()), True),
        (circle(EOFError(), ValueError("x"), ValueError("y")), True),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), True),
        (ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed"), True),
        (named("paramiko.ssh_exception.NoValidConnectionsError", OSError), True),
        (raised(named("httpcore.ConnectError", Exception), EOFError(), None), True),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), False),
        (named("requests.exceptions.HTTPError", OSError), False),
        (ftplib.error_temp("426 None; transfer aborted."), False),
        (ftplib.error_temp("452 Insufficient storage space."), False),
        (ftplib.error_perm("530 Login incorrect."), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError("Failure"), False),
        (raised(ValueError("x"), KeyError("y")), False),
        (raised(ValueError("x"), EOFError(), None), False),
        (raised(ValueError("x"), EOFError(), KeyError("y")), False),
        (circle(ValueError("x")), False),
        (circle(ValueError("x"), ValueError("y"), ValueError("z")), False),
    ],
)
def test_what_marks_a_lost_connection(error: Exception, is_lost: bool) -> None:
    """Errors of lines and of answers that do not fit are told from refusals, whatever hides them."""
    assert marks_lost(error) is is_lost


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (named("paramiko.ssh_exception.NoValidConnectionsError", OSError), 3),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 3),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), 3),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
        (named("requests.exceptions.HTTPError", OSError), 1),
    ],
)
def test_how_often_a_file_system_is_made(workers: ThreadWorkers, error: Exception, attempts: int) -> None:
    """A server that is away is tried again; one that refuses, or has no such name, is not (E3)."""
    made: list[None] = []

    def connect(**options: Any) -> Any:
        made.append(None)
        raise error

    policy = RetryPolicy(attempts=3, initial_seconds=0.001)
    store = GenericStore.connect(connect, {}, TARGET, workers=workers, retry=policy)
    with pytest.raises(StoreError, match="Check storage_options"):
        anyio.run(store.exists, TARGET)
    assert len(made) == attempts


def test_a_client_that_cannot_be_asked_for() -> None:
    """What ends a connection never raises: it is called while a more telling error is on its way."""

    class FileSystem:
        @property
        def client(self) -> object:
            raise RuntimeError("not connected")

    end_connection(FileSystem())
