"""The thread that calls the group's store, so that no other thread has to wait for it.

Guarantees: jobs are done in order. A job that fails is repeated until it succeeds, with a new connection and after
growing pauses. Results are passed to the driver's thread. If a call never returns, only this thread hangs, and it is
left behind.

What does not belong here: the content of the messages.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from async_ckpt.sharded.agreement.wire import Wire
from async_ckpt.system import threads

__all__ = ["Callback", "Poll", "StoreThread"]

logger = logging.getLogger(__name__)

_SHORTEST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 1.0
_END_SECONDS = 1.0
_GROWTH = 1.1

Callback = Callable[[], None]
"""Called on the driver's thread when a job has been done."""

Poll = Callable[[Wire], "Callback | None"]
"""Looks for messages; returns a function that receives them, if there are any."""


class StoreThread:
    """One thread that calls the store while a save is in progress. Only the driver's thread calls its methods.

    Args:
        wire: calls the store.
        post: schedules a call on the driver's thread.
        disconnected: called there when the store did not answer.
        pauses_seconds: the shortest and the longest time between two polls that find nothing.

    Attributes:
        next_poll_seconds: when to poll again.
        is_busy: whether an exchange is in progress.
    """

    def __init__(
        self,
        wire: Wire,
        post: Callable[[Callback], None],
        disconnected: Callback,
        *,
        pauses_seconds: tuple[float, float],
    ) -> None:
        self._wire = wire
        self._post = post
        self._disconnected = disconnected
        self._pauses_seconds = pauses_seconds
        self._pause_seconds = pauses_seconds[0]
        self._outbox: deque[Poll] = deque()
        self._rounds: SimpleQueue[Poll | None] = SimpleQueue()
        self.is_busy = False
        self._has_ended = False
        self._started_seconds = 0.0
        self.next_poll_seconds = 0.0
        self._retry_seconds = 0.0
        self._thread: threading.Thread | None = None

    @property
    def has_backlog(self) -> bool:
        """Whether earlier jobs have not been done yet."""
        return bool(self._outbox)

    @property
    def is_idle(self) -> bool:
        """Whether all jobs have been done."""
        return not self._outbox and not self.is_busy

    def is_connected(self, now: float, patience_seconds: float) -> bool:
        """Return whether the store answered its last call, or has not had *patience_seconds* for an answer yet.

        While the first connection is being made, this is true, because that may take many seconds.
        """
        if self._retry_seconds:
            return False
        is_recent = now - self._started_seconds < patience_seconds
        return is_recent or not self.is_busy or not self._wire.has_connected

    def send(self, job: Poll) -> None:
        """Do *job* at the next exchange; a function that it returns is called on the driver's thread."""
        self._outbox.append(job)
        if not self._retry_seconds:
            self._poll_soon()

    def exchange(self, now: float, poll: Poll) -> None:
        """Do all jobs, then *poll*, unless an exchange is in progress or the next poll is not due."""
        if self.is_busy or (now < self.next_poll_seconds and not (self._outbox and not self._retry_seconds)):
            return
        if self._thread is None:
            # A daemon thread: if the store's host hangs, a call never returns, and Python's exit would wait for it.
            self._thread = threading.Thread(target=self._main, name="async_ckpt-group-store", daemon=True)
            threads.start(self._thread)
        self.is_busy = True
        self._started_seconds = now
        self._rounds.put(poll)

    def end(self) -> bool:
        """End the thread; return whether it has ended, or else is left behind."""
        self._has_ended = True
        self._rounds.put(None)
        if self._thread is None:
            return True
        self._thread.join(_END_SECONDS)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while (poll := self._rounds.get()) is not None:
            try:
                while self._outbox and not self._has_ended:
                    then = self._outbox[0](self._wire)
                    self._outbox.popleft()
                    if then is not None:
                        self._post(then)
                self._post(partial(self._exchanged, poll(self._wire)))
            except Exception as error:
                self._wire.disconnect()
                self._post(partial(self._failed, error))

    def _exchanged(self, news: Callback | None) -> None:
        self.is_busy = False
        self._retry_seconds = 0.0
        self._pause_seconds = min(self._pause_seconds * _GROWTH, self._pauses_seconds[1])
        self.next_poll_seconds = self._started_seconds + self._pause_seconds
        if news is not None:
            self._poll_soon()
            news()

    def _poll_soon(self) -> None:
        """Poll again soon: after a message, another one or an answer is likely."""
        self._pause_seconds = self._pauses_seconds[0]
        self.next_poll_seconds = self._started_seconds + self._pause_seconds

    def _failed(self, error: Exception) -> None:
        if not self._retry_seconds:
            logger.info("the process group's store does not answer: %s", error)
        self.is_busy = False
        self._retry_seconds = min(
            max(2 * self._retry_seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS
        )
        self.next_poll_seconds = self._started_seconds + self._retry_seconds
        self._disconnected()
