"""Waits for saves that get on, and for saves that do not: what is said of them is what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

import pytest

from async_ckpt import AbandonedError, CheckpointService, FlushTimeoutError, State
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, accepted, gated, reached, state

PARTS = 12
#: How long each part takes, and for how long nothing may move: the whole takes several times that.
PART_SECONDS, IDLE_SECONDS = 0.1, 0.5


def slow(**options: object) -> Harness:
    """Return a harness on a slow line."""
    each = Fault(operation="put", delay_seconds=PART_SECONDS)
    return Harness(each, memory=True, part_size="64KiB", max_concurrent_parts=1, **options)


WAITS: dict[str, Callable[[CheckpointService], object]] = {
    "wait": lambda service: service.wait(),
    "flush": lambda service: asyncio.run(service.flush()),
    "close": lambda service: service.close(),
    "aclose": lambda service: asyncio.run(service.aclose()),
    "a load of it": lambda service: service.load("memory://a"),
    "a save that needs its place": lambda service: service.save(state(2), "memory://b").wait(
        PATIENCE_SECONDS
    ),
    "the exit": lambda service: service._resources.drain_at_exit(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_save_that_gets_on_is_not_given_up(wait: str) -> None:
    """An upload that takes longer than flush_timeout becomes durable, as long as bytes move (D4)."""
    with slow(flush_timeout=IDLE_SECONDS, queue_depth=1) as harness:
        began = monotonic()
        handle = harness.service.save(state(1, nbytes=PARTS * 65_000), "memory://a")
        WAITS[wait](harness.service)
        assert monotonic() - began > 2 * IDLE_SECONDS
        assert handle.wait(0).state is State.DURABLE


@pytest.mark.parametrize("hard", ["timeout", "flush_deadline"])
def test_a_hard_limit_is_one(hard: str) -> None:
    """What is given as a limit holds though bytes move: for a wait, and for close, which gives up what is not done."""
    limits = {"flush_deadline": 0.3} if hard == "flush_deadline" else {}
    with slow(**limits) as harness:
        handle = accepted(harness.service, state(1, nbytes=10 * PARTS * 65_000), "memory://a")
        for _ in range(2):
            with pytest.raises(FlushTimeoutError, match=r"still pending after 0\.3 s; they go on until"):
                harness.service.wait(0.3 if hard == "timeout" else None)
        with pytest.raises(AbandonedError, match=r"given up after 0\.3 s, because its service was closed"):
            harness.service.close(0.3 if hard == "timeout" else None)
        assert handle.state is State.FAILED


def test_a_save_that_stands_still_is_given_up() -> None:
    """Where nothing moves, flush_timeout ends every wait, and says so in the words that fit what happens next."""
    gate, hold = gated("put")
    with Harness(hold, memory=True, flush_timeout=0.2) as harness:
        accepted(harness.service, state(1), "memory://a")
        reached(gate)
        with pytest.raises(
            FlushTimeoutError, match=r"after 0\.2 s without progress; they go on until their service"
        ):
            harness.service.wait()
        with pytest.raises(
            AbandonedError, match=r"given up after 0\.2 s without progress, because its service"
        ):
            harness.service.close()


def test_anothers_progress_is_not_ours() -> None:
    """A service whose storage hangs is not kept waiting by one that gets on beside it (B2)."""
    gate, hold = gated("put")
    with slow() as other, Harness(hold, memory=True, flush_timeout=0.2) as harness:
        handle = other.service.save(state(1, nbytes=5 * PARTS * 65_000), "memory://other")
        accepted(harness.service, state(1), "memory://a")
        reached(gate)
        with pytest.raises(FlushTimeoutError, match="without progress"):
            harness.service.wait()
        assert not handle.done()
        other.service.close(PATIENCE_SECONDS)


def test_the_progress_of_whom_we_are_behind_is_ours() -> None:
    """A load waits for another service's save of its location as long as that gets on (O1)."""
    with slow() as other, Harness(memory=True, flush_timeout=IDLE_SECONDS) as harness:
        assert other.memory is not None
        assert harness.memory is not None
        harness.memory.files = other.memory.files
        other.service.save(state(1, nbytes=PARTS * 65_000), "memory://a")
        assert harness.service.load("memory://a")["number"] == 1
