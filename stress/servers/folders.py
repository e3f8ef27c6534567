"""Servers of a folder: SFTP by asyncssh, FTP by pyftpdlib, WebDAV by WsgiDAV. None shares code with its client.

What is stored is seen in the folder at once, and what is put there is served. WsgiDAV may give a file that is replaced
by one of its length within a second the same tag: it makes tags of inode, length and whole seconds.
"""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stress.servers import install, sftp_program
from stress.servers.process import HOST, Server, StartedServer, run_server

__all__ = ["FolderServer", "start_ftp", "start_sftp", "start_webdav"]

USER = "tests"
PASSWORD = "secret"
CALL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class FolderServer(Server):
    """A running server of a folder, whose buckets are directories.

    Attributes:
        folder: What it serves as its root.
    """

    folder: Path


@contextmanager
def start_sftp() -> Iterator[FolderServer]:
    """Run an SFTP server for the time of a block."""
    command = [install.program("python"), "-I", sftp_program.__file__, HOST, USER, PASSWORD]
    with run_server(
        lambda ports, folder: [*command, str(ports[0]), str(folder)], ports=1, check=_greeted(b"SSH-2.0-")
    ) as started:
        # Else the client tries the keys of whoever runs the tests first.
        yield _describe("sftp", started, {**_login(started), "look_for_keys": False, "allow_agent": False})


@contextmanager
def start_ftp() -> Iterator[FolderServer]:
    """Run an FTP server for the time of a block."""
    command = [install.program("python"), "-I", "-m", "pyftpdlib", "--write", "-i", HOST]
    command += ["-u", USER, "-P", PASSWORD]
    with run_server(
        lambda ports, folder: [*command, "-p", str(ports[0]), "-d", str(folder)],
        ports=1,
        check=_greeted(b"220 "),
    ) as started:
        yield _describe("ftp", started, _login(started))


@contextmanager
def start_webdav() -> Iterator[FolderServer]:
    """Run a WebDAV server for the time of a block."""
    command = [install.program("wsgidav"), "--no-config", "--auth=anonymous", f"--host={HOST}"]
    with run_server(
        lambda ports, folder: [*command, f"--port={ports[0]}", f"--root={folder}"], ports=1, check=_listed
    ) as started:
        yield _describe("webdav", started, {"base_url": started.url})


def _login(started: StartedServer) -> dict[str, Any]:
    return {"host": HOST, "port": started.ports[0], "username": USER, "password": PASSWORD}


def _describe(protocol: str, started: StartedServer, options: dict[str, Any]) -> FolderServer:
    return FolderServer(
        protocol=protocol,
        url=f"{protocol}://{HOST}:{started.ports[0]}",
        storage_options=options,
        environment={f"FSSPEC_{protocol.upper()}": json.dumps(options)},
        make_bucket=lambda name: (started.folder / name).mkdir(),
        pid=started.pid,
        folder=started.folder,
    )


def _greeted(greeting: bytes) -> Callable[[StartedServer], None]:
    """Return a check that the server speaks first, and what it should."""

    def check(started: StartedServer) -> None:
        with socket.create_connection((HOST, started.ports[0]), timeout=CALL_SECONDS) as connection:
            if not (said := connection.recv(64)).startswith(greeting):
                raise ConnectionError(f"a stranger answered: {said!r}")

    return check


def _listed(started: StartedServer) -> None:
    urllib.request.urlopen(started.url, timeout=CALL_SECONDS).close()
