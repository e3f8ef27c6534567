"""Waits for a service's pending requests, and closes it from an event loop.

Guarantees: every wait ends within the given limit. No wait includes a request that can only end after the call that a
signal handler has interrupted; the handler gets an error instead (L1). The coroutines block no event loop.

What does not belong here: reporting failures (service), how a service is closed (resources).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio

from async_ckpt.engine.resources import Resources
from async_ckpt.handle import Outcome, await_outcome
from async_ckpt.system import threads
from async_ckpt.telemetry.patience import Limit

__all__ = ["aclose", "flush", "wait"]


def wait(resources: Resources, limit: Limit) -> None:
    """Block until everything that the service has accepted so far has ended.

    Raises:
        FlushTimeoutError: *limit* was reached first, or only requests remain for which this wait would never end.
    """
    patience = resources.patience(limit)
    try:
        drained, held_up = resources.drained()
        patience.wait(drained)
    except TimeoutError:
        raise resources.timeout_error(patience) from None
    if held_up:
        raise resources.deadlock_error(held_up)


async def flush(resources: Resources, limit: Limit) -> None:
    """Like `wait`, awaited under asyncio or trio."""
    patience = resources.patience(limit)
    drained, held_up = resources.drained()
    while not drained.done() and (left := patience.left()) > 0:
        with anyio.move_on_after(left):
            await await_outcome(drained)
    if not drained.done():
        raise resources.timeout_error(patience)
    if held_up:
        raise resources.deadlock_error(held_up)


async def aclose(resources: Resources, limit: Limit, *, if_cancelled: Callable[[], None]) -> None:
    """Close *resources* in a thread, and wait for that, under asyncio or trio.

    Args:
        resources: of the service.
        limit: how long to wait for pending requests.
        if_cancelled: called once they are closed, if this wait was cancelled before.
    """
    # Not anyio.to_thread: it starts no thread for a caller that is already cancelled, as an ``async with`` may be.
    closed: Outcome[None] = Outcome()

    def close() -> None:
        try:
            resources.close(limit)
        except BaseException as error:
            closed.set_exception(error)
        else:
            closed.set_result(None)

    threads.start(threading.Thread(target=close, name="async_ckpt-closing", daemon=True))
    try:
        await await_outcome(closed)
    except BaseException:
        closed.add_done_callback(if_cancelled)
        raise
    closed.result()
