"""A container for each test of Azure, behind a proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stress.proxy import FaultProxy
from stress.servers.process import Server
from tests.integration.azure.network import (
    Network,
    Traffic,
)


@pytest.fixture
def network(azurite: Server) -> Iterator[Network]:
    """Azurite behind a proxy."""
    traffic = Traffic()
    with FaultProxy(azurite.url, answer=traffic.on_request, lose_answer=traffic.on_answer) as proxy:
        yield Network(azurite, proxy, traffic)
