"""What tells that the connection inside of an fsspec file system is lost, and what does not."""

from __future__ import annotations

import errno
import ftplib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.fsspec_calls import end_connection, has_ended, marks_lost
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.testing import ThreadWorkers
from tests.generic_doubles import TARGET, Client, Memory


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


def test_a_client_that_cannot_be_asked_for() -> None:
    """What ends a connection never raises: it is called while a more telling error is on its way."""

    class FileSystem:
        @property
        def client(self) -> object:
            raise RuntimeError("not connected")

    end_connection(FileSystem())


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
