"""A bucket for each test of S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from async_ckpt.testing import ThreadWorkers
from stress.servers.process import Server
from tests.integration.s3.place import Place
from tests.servers import fresh_bucket


@pytest.fixture
def place(seaweedfs: Server, tmp_path: Path) -> Iterator[Place]:
    """A bucket of one's own."""
    workers = ThreadWorkers(4)
    with ExitStack() as stack:
        stack.callback(workers.close)
        bucket = fresh_bucket(seaweedfs)
        yield Place(server=seaweedfs, bucket=bucket, folder=tmp_path, workers=workers, stack=stack)
