"""A snapshot of a state, and what was saved of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from async_ckpt.format import Layout
from async_ckpt.snapshot import Capture, HostBuffer, Snapshot, capture, capture_objects


@pytest.fixture
def take() -> Iterator[Callable[[Any], Snapshot]]:
    """Take snapshots for files, that are closed when the test ends."""
    yield from _taking(capture)


@pytest.fixture
def take_objects() -> Iterator[Callable[[Any], Snapshot]]:
    """Take snapshots of objects, that are closed when the test ends."""
    yield from _taking(capture_objects)


def _taking(capture: Callable[[Any], Capture]) -> Iterator[Callable[[Any], Snapshot]]:
    taken: list[Snapshot] = []

    def take(state: Any) -> Snapshot:
        made = capture(state)
        taken.append(made.stage(HostBuffer(made.nbytes)))
        return taken[-1]

    yield take
    for snapshot in taken:
        snapshot.close()


@pytest.fixture
def saved() -> Callable[[Any], bytes]:
    """Return the bytes that ``torch.save`` writes."""

    def saved(state: Any) -> bytes:
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    return saved


@pytest.fixture
def whole() -> Callable[[Layout], bytes]:
    """Return a whole file, read at once."""
    return lambda layout: b"".join(layout.read(0, layout.nbytes))
