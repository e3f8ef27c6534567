"""How remote stores make their requests."""

from __future__ import annotations

import errno

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.errors import StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.base import Location
from async_ckpt.stores.requests import Pace, Requests, Verdict, stall_timeout
from stress.virtual_time import virtual_loop

HERE = Location(url="s3://bucket/x.ckpt", path="bucket/x.ckpt", key="x", group="s3")
AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0.0, stall_seconds=20.0)


def explain(error: Exception) -> Verdict:
    """Explain some errors."""
    if isinstance(error, KeyError):
        return Verdict(missing=True)
    if isinstance(error, ConnectionError):
        return Verdict(kind=TransientStoreError, advice="Wait.")
    return Verdict(reason="because") if isinstance(error, ValueError) else Verdict()


class Failing:
    """Raises one after the other, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


# -- pace


def run_many(pace: Pace, count: int, failing: int = 0) -> int:
    """Take *count* turns, of which the first *failing* are throttled; return how many ran at a time."""
    running = most = 0
    failures = [ThrottledError("slow down")] * failing

    async def take() -> None:
        nonlocal running, most
        try:
            async with pace.turn():
                running += 1
                most = max(most, running)
                try:
                    for _ in range(3 * count):  # until as many run as may
                        await anyio.lowlevel.checkpoint()
                    if failures:
                        raise failures.pop()
                finally:
                    running -= 1
        except ThrottledError:
            pass

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(take)

    anyio.run(run)
    return most


def test_pace_bounds() -> None:
    """No more run at a time than were allowed at first, and that many do."""
    assert run_many(Pace(4), 20) == 4


def test_pace_slows_and_recovers() -> None:
    """A throttled request halves the pace; as many successes as then run at a time add one."""
    pace = Pace(8)
    run_many(pace, 1, failing=1)
    assert pace.allowed == 4
    assert run_many(pace, 5) == 4
    assert pace.allowed == 5
    run_many(pace, 200)
    assert pace.allowed == 8


def test_one_round_of_refusals_slows_once() -> None:
    """Requests that were under way together and are all refused say one thing, not eight."""
    pace = Pace(8)
    run_many(pace, 8, failing=8)
    assert pace.allowed == 4


def test_pace_never_stops() -> None:
    """However often it is throttled, one runs."""
    pace = Pace(8)
    for _ in range(10):
        run_many(pace, 1, failing=1)
    assert pace.allowed == 1
    assert run_many(pace, 1) == 1


def test_cancelled_turns_are_given_back() -> None:
    """Who is cancelled, waiting or having its turn, takes no place with it."""
    pace = Pace(2)

    async def take() -> None:
        async with pace.turn():
            await anyio.sleep_forever()

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(take)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()

    anyio.run(run)
    assert run_many(pace, 5) == 2


def starts(pace: Pace, count: int, *, apart_seconds: float, after: float = 0.0) -> list[float]:
    """Return when requests start that are all wanted at once, on a clock of their own."""
    found: list[float] = []

    async def request() -> None:
        async with pace.turn(apart_seconds=apart_seconds):
            found.append(anyio.current_time())

    async def run() -> None:
        await anyio.sleep(after)
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(request)

    with virtual_loop() as loop:
        loop.run_until_complete(run())
    return found


def test_requests_keep_their_distance() -> None:
    """The first request starts somewhere within the distance, and each other one so long after the one before."""
    found = starts(Pace(8, random=lambda: 0.25), 4, apart_seconds=2.0)
    assert found == pytest.approx([0.5, 2.5, 4.5, 6.5])


def test_after_a_pause_the_start_is_drawn_anew() -> None:
    """Time that has passed without a request is not made up for, and not all processes start at its end."""
    draws = iter([0.0, 0.5])
    pace = Pace(8, random=lambda: next(draws))
    assert starts(pace, 2, apart_seconds=2.0) == pytest.approx([0.0, 2.0])
    assert starts(pace, 2, apart_seconds=2.0, after=50.0) == pytest.approx([51.0, 53.0])


def test_without_a_distance_nothing_waits() -> None:
    """A single writer's requests start at once."""
    assert starts(Pace(8), 4, apart_seconds=0.0) == [0.0] * 4


# -- stalled requests


def test_patience_ends() -> None:
    """What does not move for so long fails with a timeout."""

    async def run() -> None:
        with stall_timeout(0.01):
            await anyio.sleep_forever()

    with pytest.raises(TimeoutError, match="no byte was transferred"):
        anyio.run(run)


def test_movement_renews_patience() -> None:
    """What moves goes on, however long it takes in all."""

    async def run() -> None:
        deadlines = []
        with stall_timeout(20.0) as moved:
            for _ in range(2):
                deadlines.append(anyio.current_effective_deadline())
                while anyio.current_time() + 20.0 <= deadlines[-1]:
                    await anyio.lowlevel.checkpoint()
                moved()
        assert deadlines[0] < deadlines[1]

    anyio.run(run)


def test_other_cancellations_pass() -> None:
    """A cancellation from outside is not taken for a stall."""

    async def run() -> bool:
        with anyio.move_on_after(0.01) as scope:
            with stall_timeout(20.0):
                await anyio.sleep_forever()
        return scope.cancelled_caught

    assert anyio.run(run)


# -- requests


def test_transient_failures_are_repeated() -> None:
    """A step is made again after what may pass, and its errors name location, stage and advice."""
    step = Failing(ConnectionError("lost"), ConnectionError("lost"))
    assert anyio.run(Requests(explain, AT_ONCE).step, "begin", HERE, step) == "done"
    step = Failing(*[ConnectionError("lost")] * 9)
    with pytest.raises(
        TransientStoreError, match=r"cannot begin 's3://bucket/x.ckpt': lost. Wait\."
    ) as caught:
        anyio.run(Requests(explain, AT_ONCE).step, "begin", HERE, step)
    assert step.calls == 3
    assert (caught.value.stage, caught.value.location) == ("begin", HERE.url)


def test_other_failures_are_not() -> None:
    """What will not pass is raised at once, with the reason that the store gives."""
    step = Failing(ValueError("obscure"))
    with pytest.raises(StoreError, match="because"):
        anyio.run(Requests(explain, AT_ONCE).step, "begin", HERE, step)
    assert step.calls == 1


def test_missing() -> None:
    """Nothing to read is FileNotFoundError; for anything else it is an error of the store."""
    requests = Requests(explain, AT_ONCE)
    with pytest.raises(FileNotFoundError) as caught:
        anyio.run(requests.once, "read", HERE, Failing(KeyError()))
    assert caught.value.filename == HERE.url
    with pytest.raises(StoreError):
        anyio.run(requests.once, "begin", HERE, Failing(KeyError()))


def test_our_own_errors_stay() -> None:
    """An error that is translated already is not translated again."""
    error = StoreError("mine")
    with pytest.raises(StoreError) as caught:
        anyio.run(Requests(explain, AT_ONCE).once, "begin", HERE, Failing(error))
    assert caught.value is error


def test_a_small_request_may_not_stall() -> None:
    """A small request as a whole has the time in which something must move."""
    requests = Requests(explain, RetryPolicy(attempts=1, stall_seconds=0.01))
    with pytest.raises(StoreError, match="no byte was transferred"):
        anyio.run(requests.step, "begin", HERE, anyio.sleep_forever)


# -- what became of a commit


def test_the_last_look_at_a_commit_is_repeated() -> None:
    """What the look returns after transient errors, is returned."""
    look = Failing(ConnectionResetError(errno.ECONNRESET, "gone"))
    requests = Requests(explain, AT_ONCE)

    async def settle() -> str:
        doubt = TransientStoreError.during("commit", HERE.url, OSError("no answer"))
        return await requests.look_up_outcome(HERE, doubt, lambda: requests.once("read", HERE, look))

    assert anyio.run(settle) == "done"
    assert look.calls == 2


def test_a_commit_that_cannot_be_looked_at() -> None:
    """The error says, once each, what failed, that the outcome is not known, and why not; it came of the commit's."""
    look = Failing(PermissionError("not yours"))
    requests = Requests(explain, AT_ONCE)
    doubt = TransientStoreError.during("commit", HERE.url, OSError("no answer"), "Wait.")

    async def settle() -> None:
        await requests.look_up_outcome(HERE, doubt, lambda: requests.once("read", HERE, look))

    with pytest.raises(StoreError) as told:
        anyio.run(settle)
    assert str(told.value) == (
        "cannot commit 's3://bucket/x.ckpt': no answer. Wait. "
        "It is unknown whether it took effect, because the look-up failed: not yours"
    )
    assert told.value.__cause__ is doubt
