"""The real servers: each is reached as an fsspec user reaches its kind of store, and is gone afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from stress.servers import azurite, fake_gcs, folders, seaweedfs
from stress.servers.process import Server
from tests.servers import fresh_bucket, need_servers
from tests.support import python

pytestmark = pytest.mark.integration

#: In a process of its own, so that no client of another test, nor its cache of file systems, has a part in it.
WRITE_AND_READ = """
    import json, sys
    import fsspec
    protocol, bucket, options = sys.argv[1:]
    files = fsspec.filesystem(protocol, **json.loads(options))
    if protocol in ("sftp", "ftp"):  # others have no directories, or make them
        files.makedirs(f"{bucket}/folder")
    files.pipe_file(f"{bucket}/folder/object", b"content")
    part = files.cat_file(f"{bucket}/folder/object", start=3, end=7)
    print(part.decode(), [path.split("/")[-1] for path in files.ls(f"{bucket}/folder", detail=False)])
"""


@pytest.mark.parametrize("how", ["storage_options", "environment"])
@pytest.mark.parametrize("name", ["seaweedfs", "fake_gcs", "azurite", "sftp", "ftp", "webdav"])
def test_fsspec_reaches_a_server(name: str, how: str, request: pytest.FixtureRequest) -> None:
    """A server stores and returns through its fsspec file system, told by options or by the environment."""
    server: Server = request.getfixturevalue(name)
    bucket = fresh_bucket(server)
    options, environment = dict(server.storage_options), {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    if how == "environment":
        options, environment = {}, dict(server.environment)

    ran = python(WRITE_AND_READ, server.protocol, bucket, json.dumps(options), env=environment)

    assert ran.stdout.split("\n")[0] == "tent ['object']", ran.stderr


@pytest.mark.parametrize(
    "start",
    [
        seaweedfs.start,
        fake_gcs.start,
        azurite.start,
        folders.start_sftp,
        folders.start_ftp,
        folders.start_webdav,
    ],
)
def test_a_server_leaves_no_process(start: Callable[[], AbstractContextManager[Server]]) -> None:
    """After its block a server and all that it started have ended."""
    need_servers()
    with start() as server:
        assert session_of(server.pid) != []

    assert session_of(server.pid) == []


def session_of(leader: int) -> list[str]:
    """Return the processes of the session that the process *leader* leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        if int(fields[3]) == leader:
            found.append(stat.parent.name)
    return found
