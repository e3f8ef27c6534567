"""The S3 store keeps what ``async_ckpt.stores.base`` promises, on a real server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import s3fs

from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.s3 import S3Store
from async_ckpt.stores.s3.journal import Entry, Journal
from async_ckpt.testing import StoreConformance
from stress.servers import s3
from stress.servers.process import Server
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration


class TestS3Store(StoreConformance):
    """SeaweedFS, which checks signatures, checksums, part sizes and conditions as S3 does."""

    server: Server
    bucket: str
    folder: Path

    @pytest.fixture(autouse=True)
    def _place(self, seaweedfs: Server, tmp_path: Path) -> None:
        self.server, self.bucket, self.folder = seaweedfs, fresh_bucket(seaweedfs), tmp_path

    def make_store(self, workers: Workers) -> Store:
        """Return the store under test."""
        return self._make(workers)

    def make_careful_store(self, workers: Workers) -> Store:
        """Return one that replaces nothing."""
        return self._make(workers, overwrite=False)

    def locate(self, name: str) -> Location:
        """Return a location in the empty bucket."""
        return locate(f"s3://{self.bucket}/{name}", storage_options=self.server.storage_options)

    def leftovers(self) -> Sequence[str]:
        """Return the open uploads, and the journals."""
        uploads = re.findall("<Key>(.*?)</Key>", self._ask("GET", "?uploads="))
        return [*uploads, *(path.name for path in self.folder.iterdir())]

    def strand(self) -> str:
        """Leave an open upload, and the journal, which nobody holds, of the process that had begun it."""
        begun = self._ask("POST", "dead.ckpt?uploads=")
        (upload_id,) = re.findall("<UploadId>(.*?)</UploadId>", begun)
        entry = Entry(endpoint=self.server.url, bucket=self.bucket, key="dead.ckpt", upload_id=upload_id)
        journal = Journal(self.folder)
        journal.opened(entry)
        journal.close()
        return f"{entry.key} (upload {entry.upload_id})"

    def _ask(self, method: str, target: str) -> str:
        return s3.call(self.server.url, method, f"{self.bucket}/{target}").decode()

    def _make(self, workers: Workers, **options: Any) -> Store:
        return S3Store(
            s3fs.S3FileSystem,
            dict(self.server.storage_options),
            workers=workers,
            retry=RetryPolicy(),
            journal=Journal(self.folder),
            **options,
        )
