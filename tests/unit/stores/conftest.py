"""What the tests of single stores share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from async_ckpt.testing import ThreadWorkers


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for the stores of one test."""
    pool = ThreadWorkers(4)
    yield pool
    pool.close()
