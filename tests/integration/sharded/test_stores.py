"""Sharded saves to real servers: torch's own reader finds in the bucket what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from stress.servers.process import Server
from tests.integration.sharded.launching import all_well, play
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration

WORLD_SIZE = 2


@pytest.mark.parametrize("name", ["seaweedfs", "fake_gcs", "azurite", "sftp"])
def test_save_again_and_remove(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """Each save can be loaded, the second has replaced the first, and a removal by one rank leaves nothing."""
    server: Server = request.getfixturevalue(name)
    host = "" if name != "sftp" else server.url.rpartition("/")[2] + "/"
    url = f"{server.protocol}://{host}{fresh_bucket(server)}/run/step-1"
    options = dict(server.storage_options)
    for told in all_well(play("on_a_store", WORLD_SIZE, tmp_path, url=url, options=options)):
        assert told == {"1.0": [], "2.0": [], "files": WORLD_SIZE + 1, "is left": False}
