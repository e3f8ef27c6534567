"""A log handler of the program's own that raises, as on a closed stream, ends neither the loop nor a request."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from async_ckpt import CheckpointService, RemovalDroppedError, State, StoreError
from async_ckpt.events import Event
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, MemoryStore, gated, state


class Broken(logging.Handler):
    """A handler that raises whatever it is given."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("I/O operation on closed file.")


@pytest.fixture(autouse=True)
def broken() -> Iterator[None]:
    """Have everything that this package logs end in an error."""
    logger, handler = logging.getLogger("async_ckpt"), Broken(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_a_dropped_removal_ends() -> None:
    """A removal that is dropped, which is logged, ends, and so does what comes after it (D3, D4)."""
    gate, hold = gated("commit", [1])
    fail = Fault(operation="commit", calls=[1], error=lambda: StoreError("no more room"))
    with Harness(hold, fail, memory=True) as harness:
        failing = harness.service.save(state(1), "memory://a")
        removal = harness.service.remove("memory://b")
        gate.open()
        with pytest.raises(StoreError, match="no more room"):
            failing.wait(PATIENCE_SECONDS)
        with pytest.raises(RemovalDroppedError):
            removal.wait(PATIENCE_SECONDS)
        assert harness.service.save(state(2), "memory://a").wait(PATIENCE_SECONDS).state is State.DURABLE


def test_a_broken_observer_and_a_broken_handler() -> None:
    """What an observer raises may be lost where it cannot be logged; the save is not."""

    def observer(event: Event) -> None:
        raise ValueError("broken")

    with Harness(memory=True, observer=observer) as harness:
        assert harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS).state is State.DURABLE


def test_a_broken_callback_and_a_broken_handler() -> None:
    """A callback that raises keeps nobody else from being told of the end, whatever becomes of its error."""
    gate, hold = gated("commit")
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        handle.add_done_callback(lambda _: 1 / 0)
        gate.open()
        assert handle.wait(PATIENCE_SECONDS).state is State.DURABLE
        harness.service.wait(PATIENCE_SECONDS)


def test_stores_that_cannot_be_closed_and_a_broken_handler() -> None:
    """Every store is asked to close, though what one raises cannot be logged, either (B2)."""
    asked: list[object] = []

    class Unclosable(MemoryStore):
        async def aclose(self) -> None:
            asked.append(self)
            raise OSError("no more room")

    service = CheckpointService(store_factory=lambda *_: Unclosable())
    for url in ("memory://a/x.ckpt", "s3://b/x.ckpt"):
        service.save(state(1), url).wait(PATIENCE_SECONDS)
    service.close()
    assert len(set(asked)) == 2
