"""The S3 store keeps what ``async_ckpt.stores.base`` promises, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
import s3fs

from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.s3 import S3Store
from async_ckpt.stores.s3.journal import Entry, Journal
from async_ckpt.testing import StoreConformance
from stress.servers.process import Server
from tests.servers import fresh_bucket

T = TypeVar("T")

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

        async def ask() -> list[str]:
            client = await self._file_system().set_session()
            try:
                answer: dict[str, Any] = await client.list_multipart_uploads(Bucket=self.bucket)
            finally:
                await client.close()
            return [str(each["Key"]) for each in answer.get("Uploads", ())]

        return [*_in_a_thread(ask), *(path.name for path in self.folder.iterdir())]

    def strand(self) -> str:
        """Leave an open upload, and the journal, which nobody holds, of the process that had begun it."""

        async def begin() -> Entry:
            client = await self._file_system().set_session()
            try:
                answer = await client.create_multipart_upload(Bucket=self.bucket, Key="dead.ckpt")
            finally:
                await client.close()
            return Entry(
                endpoint=str(client.meta.endpoint_url),
                bucket=self.bucket,
                key="dead.ckpt",
                upload_id=answer["UploadId"],
            )

        entry = _in_a_thread(begin)
        journal = Journal(self.folder)
        journal.opened(entry)
        journal.close()
        return f"{entry.key} (upload {entry.upload_id})"

    def _file_system(self) -> Any:
        return s3fs.S3FileSystem(**self.server.storage_options, asynchronous=True, skip_instance_cache=True)

    def _make(self, workers: Workers, **options: Any) -> Store:
        return S3Store(
            s3fs.S3FileSystem,
            dict(self.server.storage_options),
            workers=workers,
            retry=RetryPolicy(),
            journal=Journal(self.folder),
            **options,
        )


def _in_a_thread(ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run *ask* on a loop of its own: the suite calls from within one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, ask).result()
