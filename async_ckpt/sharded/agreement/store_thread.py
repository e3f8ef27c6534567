"""The thread that calls the group's store, so that no other thread has to wait for it.

Guarantees: jobs are done in order. Each is repeated until it succeeds, with a new connection and growing pauses after a
failure. Results are passed to the driver's thread. If a call never returns, only this thread hangs, and it is left
behind.

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

__all__ = ["Look", "StoreThread", "Then"]

logger = logging.getLogger(__name__)

_SHORTEST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 1.0
_END_SECONDS = 1.0
_GROWTH = 1.1

Then = Callable[[], None]
"""What the driver does when a job has been done."""

Look = Callable[[Wire], "Then | None"]
"""Looks for news; returns what takes them in, if there are any."""


class StoreThread:
    """One thread that speaks with the store, while something is under way.

    Args:
        wire: to the store.
        post: has something called on the driver's thread; all methods here are for that thread.
        cut_off: called there when the store did not answer.
        pauses_seconds: the shortest and the longest between two looks that find nothing.

    Attributes:
        next_seconds: when to look again.
        is_out: whether an exchange is under way.
    """

    def __init__(
        self, wire: Wire, post: Callable[[Then], None], cut_off: Then, *, pauses_seconds: tuple[float, float]
    ) -> None:
        self._wire = wire
        self._post = post
        self._cut_off = cut_off
        self._pauses_seconds = pauses_seconds
        self._pause_seconds = pauses_seconds[0]
        self._outbox: deque[Look] = deque()
        self._rounds: SimpleQueue[Look | None] = SimpleQueue()
        self.is_out = False
        self._has_ended = False
        self._started_seconds = 0.0
        self.next_seconds = 0.0
        self._retry_seconds = 0.0
        self._thread: threading.Thread | None = None

    @property
    def is_behind(self) -> bool:
        """Whether there is more to be sent than this moment's."""
        return bool(self._outbox)

    @property
    def is_done(self) -> bool:
        """Whether all has been sent."""
        return not self._outbox and not self.is_out

    def is_in_touch(self, now: float, patience_seconds: float) -> bool:
        """Return whether the store has answered when it was last asked, or has been asked only just now.

        As long as the first connection is being made, nothing is wrong yet: that may take many seconds.
        """
        if self._retry_seconds:
            return False
        is_recent = now - self._started_seconds < patience_seconds
        return is_recent or not self.is_out or not self._wire.has_connected

    def send(self, job: Look) -> None:
        """Have *job* done at the next exchange, and what it returns called on the driver's thread."""
        self._outbox.append(job)
        if not self._retry_seconds:
            self._hurry()

    def exchange(self, now: float, look: Look) -> None:
        """Do all jobs, then *look*, unless that is under way, or has just been done in vain."""
        if self.is_out or (now < self.next_seconds and not (self._outbox and not self._retry_seconds)):
            return
        if self._thread is None:
            # A daemon: where the store's host stands still, a call never returns, and Python would wait for it.
            self._thread = threading.Thread(target=self._main, name="async_ckpt-group-store", daemon=True)
            threads.start(self._thread)
        self.is_out = True
        self._started_seconds = now
        self._rounds.put(look)

    def end(self) -> bool:
        """End the thread; return whether it has ended, and did not have to be left behind."""
        self._has_ended = True
        self._rounds.put(None)
        if self._thread is None:
            return True
        self._thread.join(_END_SECONDS)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while (look := self._rounds.get()) is not None:
            try:
                while self._outbox and not self._has_ended:
                    then = self._outbox[0](self._wire)
                    self._outbox.popleft()
                    if then is not None:
                        self._post(then)
                self._post(partial(self._came_back, look(self._wire)))
            except Exception as error:
                self._wire.disconnect()
                self._post(partial(self._failed, error))

    def _came_back(self, news: Then | None) -> None:
        self.is_out = False
        self._retry_seconds = 0.0
        self._pause_seconds = min(self._pause_seconds * _GROWTH, self._pauses_seconds[1])
        self.next_seconds = self._started_seconds + self._pause_seconds
        if news is not None:
            self._hurry()
            news()

    def _hurry(self) -> None:
        """Look again soon: there is often more where something was, and an answer to what was sent."""
        self._pause_seconds = self._pauses_seconds[0]
        self.next_seconds = self._started_seconds + self._pause_seconds

    def _failed(self, error: Exception) -> None:
        if not self._retry_seconds:
            logger.info("the process group's store does not answer: %s", error)
        self.is_out = False
        self._retry_seconds = min(
            max(2 * self._retry_seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS
        )
        self.next_seconds = self._started_seconds + self._retry_seconds
        self._cut_off()
