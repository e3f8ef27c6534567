"""One server as a process: started on free loopback ports, known to serve, and gone afterwards.

Guarantees: the block is entered only when the server answers a real call; what a server wrote is in the error if it
does not come up; after the block its process has ended and its folder is removed; should our own process be killed,
the kernel kills the server. What each server is told, and what it is asked to see whether it serves, belongs in its
own module.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from stress.servers import watchdog

__all__ = ["HOST", "Server", "ServerError", "StartedServer", "run_server"]

HOST = "127.0.0.1"
START_SECONDS = 90.0
#: What a server holds is thrown away, so none is given long; SeaweedFS waits for its clients to go.
STOP_SECONDS = 1.0
#: Another process may take a free port before the server does.
START_ATTEMPTS = 3
LOG_TAIL_BYTES = 4000
POLL_SECONDS = 0.05


class ServerError(RuntimeError):
    """A server did not come up; the message ends with what it wrote."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, as whoever uses fsspec sees it.

    Attributes:
        protocol: What a URL begins with: ``s3``, ``gs``, ``abfs``.
        url: The endpoint.
        storage_options: What s3fs, gcsfs or adlfs is given to reach it.
        environment: Variables that have the same effect, for a subprocess.
        make_bucket: Makes a bucket, or a container, of a name that is not taken.
        pid: The server's process, for its memory and CPU time.
    """

    protocol: str
    url: str
    storage_options: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    make_bucket: Callable[[str], None] = field(repr=False)
    pid: int


@dataclass(frozen=True, kw_only=True)
class StartedServer:
    """What a process was started with, for its module to make a `Server` of.

    Attributes:
        ports: Free when they were chosen.
        folder: Empty and its own.
        pid: The process.
    """

    ports: tuple[int, ...]
    folder: Path
    pid: int

    @property
    def url(self) -> str:
        """The endpoint at the first port."""
        return f"http://{HOST}:{self.ports[0]}"


@contextmanager
def run_server(
    command: Callable[[tuple[int, ...], Path], list[str]],
    *,
    ports: int,
    check: Callable[[StartedServer], None],
    environment: Mapping[str, str] | None = None,
) -> Iterator[StartedServer]:
    """Run a server for the time of a block.

    On Linux it ends with the thread that entered, so enter from one that lives as long as the block.

    Args:
        command: Makes the command of free ports and an empty folder; the first port is the one served.
        ports: How many ports it needs.
        check: Makes one real call, and raises an OSError (as all of urllib's errors are) while nobody serves it.
        environment: Variables for the server beside ours.

    Yields:
        The ports, folder and process.

    Raises:
        ServerError: It ended or did not serve in time.
    """
    with ExitStack() as stack:
        yield _start(stack, command, ports, check, environment or {})


def _start(
    stack: ExitStack,
    command: Callable[[tuple[int, ...], Path], list[str]],
    ports: int,
    check: Callable[[StartedServer], None],
    environment: Mapping[str, str],
) -> StartedServer:
    """Try until no port was taken by another in the meantime."""
    for _ in range(START_ATTEMPTS - 1):
        try:
            return stack.enter_context(_attempt(command, ports, check, environment))
        except ServerError as error:
            if "address already in use" not in str(error).lower():
                raise
    return stack.enter_context(_attempt(command, ports, check, environment))


@contextmanager
def _attempt(
    command: Callable[[tuple[int, ...], Path], list[str]],
    ports: int,
    check: Callable[[StartedServer], None],
    environment: Mapping[str, str],
) -> Iterator[StartedServer]:
    folder = Path(tempfile.mkdtemp(prefix="async_ckpt-server-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        data = folder / "data"
        data.mkdir()
        log = folder / "log"
        free = _free_ports(ports)
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), *command(free, data)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                cwd=data,
                start_new_session=True,  # Ctrl-C is ours to handle: the server must outlive the clean-up
            )
        stack.callback(_stop, process)
        started = StartedServer(ports=free, folder=data, pid=process.pid)
        _wait_until_served(process, started, check, log)
        yield started


def _wait_until_served(
    process: subprocess.Popen[bytes],
    started: StartedServer,
    check: Callable[[StartedServer], None],
    log: Path,
) -> None:
    deadline = monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise ServerError(f"the server ended with code {process.returncode}:\n{_tail(log)}")
        try:
            socket.create_connection((HOST, started.ports[0]), timeout=1.0).close()
            check(started)
        except OSError as error:
            if monotonic() > deadline:
                raise ServerError(
                    f"the server did not serve in {START_SECONDS:.0f} s: {error}\n{_tail(log)}"
                ) from error
            sleep(POLL_SECONDS)
        else:
            if process.poll() is None:  # else it was another's port, and the next turn says so
                return


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, kindly if it can."""
    try:
        process.terminate()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _free_ports(count: int) -> tuple[int, ...]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind((HOST, 0))
        return tuple(one.getsockname()[1] for one in found)


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
