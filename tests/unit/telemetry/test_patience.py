"""How long a wait lasts: while something gets on, unless it is limited."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading

import pytest

from async_ckpt.engine.workers import PoolWorkers
from async_ckpt.handle import Outcome
from async_ckpt.stores.requests import stall_timeout
from async_ckpt.telemetry.patience import Limit, Patience, Progress, moved, moving
from async_ckpt.testing import ManualClock
from tests.support import PATIENCE_SECONDS


class Waiting:
    """A wait on a clock set by hand, for something that moves when told to."""

    def __init__(self, limit: Limit) -> None:
        self.now = 100.0
        self.moved = -math.inf
        self.asked = 0
        self.patience = Patience(limit, self._ask, clock=lambda: self.now)

    def _ask(self) -> float:
        self.asked += 1
        return self.moved

    def left_at(self, now: float) -> float:
        self.now = now
        return self.patience.left()


def test_it_begins_anew_while_something_moves() -> None:
    """What moved last decides when it is over, however long it has lasted already."""
    waiting = Waiting(Limit(idle_seconds=30))
    assert waiting.left_at(129) == 1
    for now in range(130, 10_000, 29):
        waiting.moved = now - 5
        assert 0 < waiting.left_at(now) <= 25 + 29
    waiting.moved = 9_990
    assert waiting.left_at(10_021) == -1
    assert waiting.patience.told == " after 30 s without progress"


def test_what_moved_before_it_began_gives_it_no_less_time() -> None:
    """A wait has its whole time though nothing has moved for long."""
    waiting = Waiting(Limit(idle_seconds=30))
    waiting.moved = 1.0
    assert waiting.left_at(129.5) == 0.5
    assert waiting.left_at(130) == 0


def test_a_hard_limit_holds_whatever_moves() -> None:
    """A limit in any case is one; nobody even asks what moved."""
    waiting = Waiting(Limit.hard(30))
    waiting.moved = 1e9
    assert waiting.left_at(129) == 1
    assert waiting.left_at(131) == -1
    assert waiting.asked == 0
    assert waiting.patience.told == " after 30 s"


def test_the_earlier_of_both_decides() -> None:
    """With both limits, the one that comes first ends it, and is the one that is told."""
    waiting = Waiting(Limit(idle_seconds=30, total_seconds=70))
    waiting.moved = 129
    assert waiting.left_at(130) == 29
    assert waiting.left_at(159) == 0
    assert waiting.patience.told == " after 30 s without progress"
    waiting.moved = 169
    assert waiting.left_at(169.5) == 0.5
    assert waiting.left_at(170) == 0
    assert waiting.patience.told == " after 70 s"


def test_no_time_is_not_told() -> None:
    """Who does not wait at all is not told how long."""
    patience = Patience(Limit.hard(0.0), lambda: 0.0)
    with pytest.raises(TimeoutError):
        patience.wait(Outcome())
    assert patience.told == ""
    done: Outcome[None] = Outcome()
    done.set_result(None)
    patience.wait(done)


def test_it_waits_on_the_real_clock() -> None:
    """A wait outlasts its limit as long as another thread moves something, and ends once that stops."""
    progress, outcome, rounds = Progress(), Outcome[None](), [0]

    def ask() -> float:
        rounds[0] += 1
        if rounds[0] < 5:
            progress.note()
        return progress.seconds

    with pytest.raises(TimeoutError):
        Patience(Limit(idle_seconds=0.01), ask).wait(outcome)
    assert rounds[0] >= 5


def test_what_moves_is_noted_where_the_request_is() -> None:
    """Bytes that move in a task, in one that it began, or in a worker count for that request, and for no other."""
    ours, others = Progress(), Progress()
    workers = PoolWorkers(1)

    async def body() -> list[float]:
        seen: list[float] = []
        with moving(ours):
            tasks = [asyncio.create_task(workers.run(moved))]
            await tasks[0]
            seen.append(ours.seconds)
            with stall_timeout(PATIENCE_SECONDS) as has_moved:
                seen.append(ours.seconds)
                has_moved()
            seen.append(ours.seconds)
        moved()
        return seen

    seen = asyncio.run(body())
    assert workers.close(PATIENCE_SECONDS)
    assert -math.inf < seen[0] == seen[1] < seen[2] == ours.seconds, (
        "a request that has but begun is no progress"
    )
    assert others.seconds == -math.inf
    contextvars.copy_context().run(moved)
    threading.Thread(target=moved).start()
    assert ours.seconds == seen[2]


def test_the_clock_of_the_tests_is_one() -> None:
    """The shipped clock can be given."""
    assert Patience(Limit.hard(5.0), lambda: 0.0, clock=ManualClock()).left() == 5.0
