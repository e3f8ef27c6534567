"""A server's process: known to serve inside its block, and gone after it, however that ends."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from stress.servers import install
from stress.servers.process import ServerError, StartedServer, run_server
from tests.support import PATIENCE_SECONDS, start_python

pytestmark = pytest.mark.integration

#: To be run with a port: a web server of an empty folder.
SERVE = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def serve(ports: tuple[int, ...], _: Path) -> list[str]:
    """Return the command of a server."""
    return [*SERVE, str(ports[0])]


def check(started: StartedServer) -> None:
    """Ask it for its listing."""
    urllib.request.urlopen(started.url, timeout=PATIENCE_SECONDS).close()


def alive(pid: int) -> bool:
    """Return whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_serves_and_ends() -> None:
    """Inside the block the server answers; after it the process and its folder are gone."""
    with run_server(serve, ports=1, check=check) as started:
        check(started)
        assert alive(started.pid)

    assert not alive(started.pid)
    assert not started.folder.exists()


def test_a_server_ends_with_an_error_in_the_block() -> None:
    """An error in the block is the caller's own, and the server has ended."""
    with pytest.raises(LookupError):
        with run_server(serve, ports=1, check=check) as started:
            raise LookupError

    assert not alive(started.pid)


def test_a_server_that_does_not_listen_to_sigterm() -> None:
    """A server that ignores SIGTERM is killed."""
    run = "runpy.run_module('http.server', alter_sys=True, run_name='__main__')"
    code = f"import signal, runpy; signal.signal(signal.SIGTERM, signal.SIG_IGN); {run}"

    def stubborn(ports: tuple[int, ...], _: Path) -> list[str]:
        return [sys.executable, "-c", code, "--bind", "127.0.0.1", str(ports[0])]

    with run_server(stubborn, ports=1, check=check) as started:
        pass

    assert not alive(started.pid)


def test_what_a_failing_server_wrote_is_told() -> None:
    """The error of a server that does not come up ends with what it wrote."""
    failing = [sys.executable, "-c", "import sys; sys.exit('bad configuration')"]

    with pytest.raises(ServerError, match=r"(?s)code 1.*bad configuration"):
        with run_server(lambda *_: failing, ports=1, check=check):
            pass


def test_a_port_that_was_taken_meanwhile() -> None:
    """A server that finds its port taken is started again on another."""
    tried: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def first_taken(ports: tuple[int, ...], folder: Path) -> list[str]:
            tried.append(ports[0])
            return serve((taken.getsockname()[1],) if len(tried) == 1 else ports, folder)

        with run_server(first_taken, ports=1, check=check) as started:
            assert started.ports == (tried[1],)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no kernel kills a child with its parent")
def test_a_server_dies_with_its_parent() -> None:
    """When the process that runs a server is killed, the server ends too."""
    code = """
        import sys
        from tests.unit.stress.test_server_process import check, run_server, serve
        with run_server(serve, ports=1, check=check) as started:
            print(started.pid, started.folder.parent, flush=True)
            sys.stdin.read()
    """
    with start_python(code, stdin=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        server = os.pidfd_open(int(pid))
        try:
            parent.send_signal(signal.SIGKILL)
            assert select.select([server], [], [], PATIENCE_SECONDS)[0] == [server]
        finally:
            os.close(server)
            shutil.rmtree(folder)  # who was killed could not


@pytest.mark.parametrize("named", ["", "/nowhere"])
def test_missing_servers_are_told(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the variable names no servers, the error says what to run."""
    monkeypatch.setenv(install.VARIABLE, named)

    with pytest.raises(install.ServersMissing, match=r"python -m stress.servers.install FOLDER"):
        install.program("weed")


def test_an_installed_folder_is_left_alone(tmp_path: Path) -> None:
    """Installing into a folder that is complete does nothing."""
    for step, what in {"wheels": install.WHEELS, "azurite": (install.AZURITE, install.NPM_BEFORE)}.items():
        (tmp_path / f".installed-{step}").write_text("\n".join(what))
    before = sorted(tmp_path.iterdir())

    assert install.install(tmp_path) is False
    assert sorted(tmp_path.iterdir()) == before
