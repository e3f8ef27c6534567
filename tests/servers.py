"""Fixtures of real servers, one of each kind a session: of objects ``seaweedfs``, ``fake_gcs`` and ``azurite``, of
files ``sftp``, ``ftp`` and ``webdav``.

Each is a ``stress.servers.process.Server``. Where ``ASYNC_CKPT_SERVERS`` names no folder a test that asks for one is
skipped and says what to run; where it names one (tox does), a server that does not start is an error. Tests share
the servers and so must not share buckets: ``fresh_bucket`` makes one that no one else has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar
from uuid import uuid4

import pytest

from stress.servers import azurite as _azurite
from stress.servers import fake_gcs as _fake_gcs
from stress.servers import folders
from stress.servers import seaweedfs as _seaweedfs
from stress.servers.folders import FolderServer
from stress.servers.install import VARIABLE
from stress.servers.process import Server

__all__ = ["azurite", "fake_gcs", "fresh_bucket", "ftp", "need_servers", "seaweedfs", "sftp", "webdav"]

AnyServer = TypeVar("AnyServer", bound=Server)

# gcsfs reads it as it is imported; else it asks Google's gRPC interface, which the emulator has not, a minute a time.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def fresh_bucket(server: Server) -> str:
    """Make a bucket (or container) on *server* and return its name."""
    name = f"test-{uuid4().hex[:16]}"
    server.make_bucket(name)
    return name


def need_servers() -> None:
    """Skip the test where no servers are installed."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"needs servers: `python -m stress.servers.install FOLDER`, then set {VARIABLE}=FOLDER")


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[Server]:
    """An S3 server."""
    yield from _run(_seaweedfs.start)


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[Server]:
    """A Google Cloud Storage server."""
    yield from _run(_fake_gcs.start)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Server]:
    """An Azure blob server."""
    yield from _run(_azurite.start)


@pytest.fixture(scope="session")
def sftp() -> Iterator[FolderServer]:
    """An SFTP server."""
    yield from _run(folders.start_sftp)


@pytest.fixture(scope="session")
def ftp() -> Iterator[FolderServer]:
    """An FTP server."""
    yield from _run(folders.start_ftp)


@pytest.fixture(scope="session")
def webdav() -> Iterator[FolderServer]:
    """A WebDAV server."""
    yield from _run(folders.start_webdav)


def _run(start: Callable[[], AbstractContextManager[AnyServer]]) -> Iterator[AnyServer]:
    need_servers()
    with start() as server:
        yield server
