"""When a request is tried again, and when not."""

from __future__ import annotations

import errno

import anyio
import pytest

from async_ckpt.errors import OptionError, StoreError, ThrottledError
from async_ckpt.retry import Retrying, RetryPolicy, call_with_retry, is_transient
from async_ckpt.testing import ManualClock


class Flaky:
    """Fails so many times with the same error, then returns its argument."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    async def __call__(self, value: str) -> str:
        """Fail or return *value*."""
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return value


def retrying(policy: RetryPolicy, clock: ManualClock) -> Retrying:
    """Return a retrying that always waits for as long as it may."""
    return Retrying(policy, sleep=clock.sleep, clock=clock, random=lambda: 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"attempts": True},
        {"initial_seconds": -1},
        {"maximum_seconds": float("inf")},
        {"deadline_seconds": float("nan")},
        {"deadline_seconds": "1"},
    ],
)
def test_bad_values(options: dict[str, object]) -> None:
    """A value that cannot work is refused, and the message names the option."""
    with pytest.raises(OptionError, match=next(iter(options))):
        RetryPolicy(**options)  # type: ignore[arg-type]


def test_delays_double_up_to_the_maximum() -> None:
    """The bound of the wait doubles from call to call and stops at maximum_seconds."""
    policy = RetryPolicy(initial_seconds=0.5, maximum_seconds=3.0)
    assert [policy.delay(attempt, lambda: 1.0) for attempt in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert policy.delay(5000, lambda: 1.0) == 3.0


def test_full_jitter() -> None:
    """A wait is drawn from all of zero to the bound."""
    policy = RetryPolicy(initial_seconds=2.0)
    assert policy.delay(1, lambda: 0.0) == 0.0
    assert policy.delay(1, lambda: 0.25) == 0.5


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.ETIMEDOUT, "x"),
        OSError(errno.EINTR, "x"),
        OSError(errno.EAGAIN, "x"),
        StoreError.during("write", "u", OSError(errno.ECONNRESET, "x")),
    ],
)
def test_transient_errors(error: Exception) -> None:
    """Lost connections, timeouts and a busy system are worth another try."""
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "x"),
        FileNotFoundError(errno.ENOENT, "x"),
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EROFS, "x"),
        OSError(errno.EDQUOT, "x"),
        IsADirectoryError(errno.EISDIR, "x"),
        OSError("no number"),
        ValueError("x"),
        StoreError("x"),
    ],
)
def test_permanent_errors(error: Exception) -> None:
    """Missing permission, nothing there, no room and wrong arguments are not."""
    assert not is_transient(error)


def test_a_translated_error_is_judged_by_its_cause() -> None:
    """A StoreError without a number is as transient as what it was raised from."""
    error = StoreError("x")
    error.__cause__ = ConnectionError("reset, says a client that has no numbers")
    assert is_transient(error)


def test_succeeds_after_transient_errors() -> None:
    """A call that fails twice and then works returns its result, after two waits."""
    clock, flaky = ManualClock(), Flaky(2, ConnectionError())
    assert anyio.run(retrying(RetryPolicy(initial_seconds=1.0), clock).call, flaky, "done") == "done"
    assert clock.naps == [1.0, 2.0]


def test_gives_up_after_so_many_attempts() -> None:
    """After ``attempts`` calls the last error itself is raised."""
    clock, error = ManualClock(), ConnectionError()
    flaky = Flaky(99, error)
    with pytest.raises(ConnectionError) as caught:
        anyio.run(retrying(RetryPolicy(attempts=3), clock).call, flaky, "done")
    assert caught.value is error
    assert flaky.calls == 3


def test_throttling_uses_up_no_attempts() -> None:
    """Who is told to wait waits until the deadline; the attempts are for what fails otherwise (E3)."""
    clock = ManualClock()
    flaky = Flaky(30, ThrottledError("SlowDown"))
    policy = RetryPolicy(attempts=2, deadline_seconds=600.0)
    assert anyio.run(retrying(policy, clock).call, flaky, "x") == "x"
    assert flaky.calls == 31

    flaky = Flaky(1000, ThrottledError("SlowDown"))
    started = clock()
    with pytest.raises(ThrottledError):
        anyio.run(retrying(policy, clock).call, flaky, "x")
    assert 590 < clock() - started <= 600


def test_what_fails_between_two_throttled_calls_counts() -> None:
    """Attempts are counted across throttled calls: two other failures are one too many for two attempts."""
    errors: list[Exception] = [ThrottledError("SlowDown"), ConnectionResetError(), ThrottledError("SlowDown")]
    errors += [ConnectionResetError("the second"), AssertionError("called again")]

    async def fail() -> None:
        raise errors.pop(0)

    clock = ManualClock()
    with pytest.raises(ConnectionResetError, match="the second"):
        anyio.run(retrying(RetryPolicy(attempts=2), clock).call, fail)


def test_one_attempt_is_one_call() -> None:
    """``attempts=1`` never calls again, throttled or not."""
    flaky = Flaky(1, ThrottledError("SlowDown"))
    with pytest.raises(ThrottledError):
        anyio.run(retrying(RetryPolicy(attempts=1), ManualClock()).call, flaky, "x")


def test_the_default_outlasts_a_restart() -> None:
    """By default, a server that refuses, as while it starts again, is given a quarter of a minute on average."""
    clock, flaky = ManualClock(), Flaky(99, ConnectionRefusedError())
    halves = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 0.5)
    with pytest.raises(ConnectionRefusedError):
        anyio.run(halves.call, flaky, "done")
    assert 15 < sum(clock.naps) < 20


def test_what_gets_on_has_not_failed() -> None:
    """Attempts and time are counted from where something last moved, so ever new progress never gives up."""
    clock, moved, ends = ManualClock(), [0], iter([1, 2, 3, 4])

    async def broken_line() -> str:
        moved[0] = next(ends)
        if moved[0] < 4:
            raise ConnectionResetError
        return "done"

    policy = RetryPolicy(attempts=2, initial_seconds=3.0, deadline_seconds=4.0)
    assert anyio.run(retrying(policy, clock).advance, lambda: moved[0], broken_line) == "done"
    assert clock.naps == [3.0] * 3


def test_what_stays_where_it_is_has_failed() -> None:
    """A line that breaks twice at the same place ends two attempts."""
    clock, flaky = ManualClock(), Flaky(99, ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        anyio.run(retrying(RetryPolicy(attempts=2), clock).advance, lambda: 7, flaky, "done")
    assert flaky.calls == 2


def test_permanent_errors_fail_at_once() -> None:
    """A permanent error is raised after one call and no wait (E3)."""
    clock, flaky = ManualClock(), Flaky(1, PermissionError(errno.EACCES, "x"))
    with pytest.raises(PermissionError):
        anyio.run(retrying(RetryPolicy(), clock).call, flaky, "done")
    assert (flaky.calls, clock.naps) == (1, [])


def test_no_wait_goes_past_the_deadline() -> None:
    """The wait that would end after deadline_seconds is not begun."""
    clock, flaky = ManualClock(), Flaky(99, TimeoutError())
    policy = RetryPolicy(attempts=99, initial_seconds=4.0, maximum_seconds=4.0, deadline_seconds=10.0)
    with pytest.raises(TimeoutError):
        anyio.run(retrying(policy, clock).call, flaky, "done")
    assert clock.naps == [4.0, 4.0]


def test_call_with_retry_needs_no_doubles() -> None:
    """The short form waits on the real clock."""
    policy = RetryPolicy(initial_seconds=0.0)
    assert anyio.run(call_with_retry, policy, Flaky(1, TimeoutError()), "done") == "done"
