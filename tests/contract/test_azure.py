"""The store of Azure keeps what ``async_ckpt.stores.base`` promises, on Azurite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import StoreConformance
from stress.servers.process import Server
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration


class TestAzureStore(StoreConformance):
    """Block blobs, most of several blocks. Nothing can be stranded: Azure itself drops staged blocks, by age."""

    server: Server
    container: str

    @pytest.fixture(autouse=True)
    def _container(self, azurite: Server) -> None:
        self.server = azurite
        self.container = fresh_bucket(azurite)

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return self._open(workers, overwrite=True)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return self._open(workers, overwrite=False)

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(f"abfs://{self.container}/{name}", storage_options=self.server.storage_options)

    def leftovers(self) -> Sequence[str]:
        """Return nothing: what was staged and not committed no listing shows, and Azure lets it expire."""
        return ()

    def _open(self, workers: Workers, *, overwrite: bool) -> Store:
        return open_store(
            self.locate("any.ckpt"),
            workers=workers,
            storage_options=self.server.storage_options,
            overwrite=overwrite,
            part_size=64 * 1024,
        )
