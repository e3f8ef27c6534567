"""What the tests of the service share: a store that fails, and the calls that a closed service refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from async_ckpt import CheckpointService, StoreError
from async_ckpt.testing import Fault
from tests.support import Harness, number_of, state


def failing(*calls: int, operation: Any = "commit") -> Fault:
    """Return the fault of a store that fails for good."""
    return Fault(operation=operation, calls=calls or None, error=lambda: StoreError("no more room"))


def loaded(harness: Harness, url: str) -> float:
    """Return the number of the checkpoint at *url*."""
    return number_of(harness.service.load(url))


CLOSED_CALLS: dict[str, Callable[[CheckpointService], object]] = {
    "save": lambda service: service.save(state(1), "memory://a"),
    "remove": lambda service: service.remove("memory://a"),
    "load": lambda service: service.load("memory://a"),
}
