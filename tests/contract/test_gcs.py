"""The store of Google Cloud Storage keeps what ``async_ckpt.stores.base`` promises, on fake-gcs-server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import StoreConformance
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.strict_gcs import StrictGCS


class TestGCSStore(StoreConformance):
    """Resumable uploads of several requests. Nothing can be stranded: no listing shows them, and they expire."""

    server: Server
    bucket: str

    @pytest.fixture(autouse=True)
    def _bucket(self, fake_gcs: Server) -> None:
        self.server = fake_gcs
        self.bucket = fresh_bucket(fake_gcs)

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test; none with ``overwrite=False``, which this server ignores as uploads end."""
        return open_store(
            self.locate("any.ckpt"),
            workers=workers,
            storage_options=self.server.storage_options,
            part_size=1 << 16,
        )

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(f"gs://{self.bucket}/{name}", storage_options=self.server.storage_options)

    def leftovers(self) -> Sequence[str]:
        """Return nothing: an upload shows nowhere until it is complete, and cannot be listed."""
        return ()


class TestGCSStoreOnAStrictServer(StoreConformance):
    """The same, on a server that checks all that Google's does, preconditions of uploads among it."""

    server: StrictGCS

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with StrictGCS() as self.server:
            yield

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return self._store(workers, overwrite=True)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return self._store(workers, overwrite=False)

    def _store(self, workers: Workers, *, overwrite: bool) -> Store:
        return open_store(
            self.locate("any.ckpt"),
            workers=workers,
            storage_options=self.server.storage_options,
            overwrite=overwrite,
            part_size=1 << 18,
        )

    def locate(self, name: str) -> Location:
        """Return a location in the empty place."""
        return locate(f"gs://bucket/{name}", storage_options=self.server.storage_options)

    def leftovers(self) -> Sequence[str]:
        """Return the uploads that were left open."""
        return self.server.open_sessions
