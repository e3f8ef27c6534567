"""The guard, for tests with packages that keep threads and files of their own: only ours are looked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a thread of ours, or a temporary file."""
    yield
    threads = [each.name for each in threading.enumerate() if each.name.startswith("async_ckpt")]
    assert threads == []
    assert list(tmp_path.rglob(".async_ckpt*")) == []
