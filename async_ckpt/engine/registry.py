"""The requests that have not ended, and the only place where requests end.

Guarantees: a request ends exactly once (D4), in this order: it is removed from here, its memory is released, its handle
is set, and callers that wait for its service to drain are notified. Its error is given to those who wait on the handle,
or else to the service (E1).

What does not belong here: the request's place in the queue, which the dispatcher removes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from async_ckpt.engine.queue import LINK, Lane, Op
from async_ckpt.engine.request import Account, Request
from async_ckpt.handle import Failure, Outcome, Report, State

__all__ = ["Registry"]


class Registry:
    """All requests in progress.

    Attributes:
        announced: requests that were sent to the loop, whether or not they are in the queue yet; callers add to it.
        announced_links: the links among them.
    """

    def __init__(self) -> None:
        self.announced: set[Request] = set()
        self.announced_links: set[Request] = set()
        self._requests: dict[int, Request] = {}
        self._drains: list[tuple[set[int], Outcome[None]]] = []

    def announce(self, request: Request) -> None:
        """Note that *request* is about to be sent to the loop; called on any thread."""
        if request.op.kind is LINK:
            self.announced_links.add(request)  # first: code that sees it in one set sees it in the other
        self.announced.add(request)

    def disregard(self, request: Request) -> None:
        """Note that *request* will not arrive, or has ended."""
        self.announced.discard(request)
        if request.op.kind is LINK:
            self.announced_links.discard(request)

    def add(self, request: Request) -> None:
        """Add a request whose operation has been given its id."""
        self._requests[request.op.id] = request

    def __contains__(self, request: Request) -> bool:
        return request.op.id in self._requests

    def of(self, op: Op) -> Request:
        """Return the request of *op*."""
        return self._requests[op.id]

    def accounts(self, lanes: set[Lane]) -> set[Account]:
        """Return the accounts in *lanes* that have requests in progress."""
        return {request.account for request in self._requests.values() if request.account.lane in lanes}

    def finish(self, request: Request, state: State, error: Exception | None = None, nbytes: int = 0) -> None:
        """End a request, and set its handle."""
        self._release(request)
        request.handle._state = state
        if error is not None:
            request.outcome.set_exception(error)
        else:
            report = Report(
                url=request.location.url,
                state=state,
                nbytes=nbytes,
                stall_seconds=request.stall_seconds,
                seconds=monotonic() - request.started_seconds,
            )
            request.outcome.set_result(report)
        self._notify_drains(request)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error that has to be reported."""
        failure = Failure(request.handle, error)
        request.handle._failure = failure
        request.account.failures.add(failure)
        self.finish(request, State.FAILED, error)

    def forget(self, request: Request) -> None:
        """End a request whose handle was never returned."""
        self._release(request)
        self._notify_drains(request)

    def drain(self, ops: Iterable[Op]) -> Outcome[None]:
        """Return an outcome that is set when all of *ops* have ended."""
        remaining = {op.id for op in ops}
        drained: Outcome[None] = Outcome()
        if remaining:
            self._drains.append((remaining, drained))
        else:
            drained.set_result(None)
        return drained

    def _release(self, request: Request) -> None:
        del self._requests[request.op.id]
        self.disregard(request)
        if request.snapshot is not None:
            request.snapshot.close()
            request.snapshot = None
        newest = request.account.newest
        if newest is not None and newest[0] is request:
            request.account.newest = None
        request.release_buffer()

    def _notify_drains(self, request: Request) -> None:
        is_over = False
        for remaining, drained in self._drains:
            remaining.discard(request.op.id)
            if not remaining:
                is_over = True
                drained.set_result(None)
        if is_over:
            self._drains = [drain for drain in self._drains if drain[0]]
