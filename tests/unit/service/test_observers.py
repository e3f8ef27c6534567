"""What an observer sees, and what it cannot break."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import pytest

from async_ckpt import CheckpointService, State
from async_ckpt.engine import runtime
from async_ckpt.events import Event, PartWritten
from tests.support import PATIENCE_SECONDS, Harness, state
from tests.unit.service.calls import CLOSED_CALLS, loaded


def test_events_are_in_order() -> None:
    """An observer sees every state of a save once, in order, under one id (D4)."""
    with Harness(memory=True, part_size="64KiB", max_concurrent_parts=1) as harness:
        harness.service.save(state(1, nbytes=200_000), "memory://a").wait(PATIENCE_SECONDS)
        harness.service.remove("memory://a").wait(PATIENCE_SECONDS)
        parts = [event for event in harness.events if isinstance(event, PartWritten)]
        assert harness.names() == [
            "Accepted",
            "Staged",
            "Writing",
            "LaidOut",
            "Begun",
            *["PartWritten"] * len(parts),
            "Committing",
            "Durable",
            "Removed",
        ]
        assert [part.index for part in parts] == [0, 1, 2, 3]
        assert len({event.request_id for event in harness.events}) == 2


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_broken_observer_harms_nothing(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """What an observer raises is logged, and the save becomes durable all the same."""

    def observer(event: Event) -> None:
        raise error("broken")

    with Harness(memory=True, observer=observer) as harness:
        assert harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS).state is State.DURABLE
    assert {record.name for record in caplog.records} == {"async_ckpt.engine.request"}
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


CALLS_BACK: dict[str, Callable[[CheckpointService], object]] = {
    **CLOSED_CALLS,
    "wait": lambda service: service.wait(),
    "close": lambda service: service.close(),
    "pending": lambda service: service.pending,
}


@pytest.mark.parametrize("call", CALLS_BACK)
def test_an_observer_that_calls_back_is_told_off(call: str) -> None:
    """An observer that calls its service gets a RuntimeError instead of a deadlock; the service is unharmed (B2)."""
    errors: list[BaseException] = []

    def observer(event: Event) -> None:
        try:
            CALLS_BACK[call](harness.service)
        except RuntimeError as error:
            errors.append(error)

    with Harness(memory=True, observer=observer) as harness:
        harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        harness.service.save(state(2), "memory://a").wait(PATIENCE_SECONDS)
        assert loaded(harness, "memory://a") == 2
    assert "observer or a callback" in str(errors[0])
    assert len(errors) == 16


@pytest.mark.parametrize("call", CALLS_BACK)
def test_an_observer_that_calls_another_service_holds_no_thread(call: str) -> None:
    """A call that is refused there takes nothing: the loop ends with the service that is observed (B2)."""
    others: list[Harness] = []

    def observer(event: Event) -> None:
        other = Harness(memory=True)
        with suppress(RuntimeError):
            CALLS_BACK[call](other.service)
        others.append(other)

    with Harness(memory=True, observer=observer) as harness:
        harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
    assert runtime.current() is None
    assert others
    assert not any(other.service.is_running for other in others)
