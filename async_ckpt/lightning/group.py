"""The key-value store of torch's process group, through which ranks communicate without collective operations.

Every process group has one: its ranks found each other through it. A rank that never answers does no harm there; a
collective operation that one rank does not join breaks the group for training, too.

Guarantees: a request waits a bounded time, even if the process that hosts the store has died or is stopped, and Ctrl-C
interrupts it; the connection is our own, if torch can make one, so our calls do not delay training's; in a process
without a group nothing is imported and nothing is done. No lock is waited for, so a signal handler may run at any line
(L1).

What does not belong here: what the ranks communicate.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import ref

__all__ = ["GroupStore", "UnreachableError", "store_of_group"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ANSWER_SECONDS = 20.0
"""The limit for an answer that normally takes microseconds."""


class UnreachableError(Exception):
    """The store does not answer: its host has ended, or is stopped."""


class GroupStore:
    """A connection to the store of a process group.

    Args:
        store: torch's store.
        rank: of this process.
        world_size: the number of ranks.
        answer_seconds: the limit for an answer.
    """

    def __init__(
        self, store: Any, *, rank: int, world_size: int, answer_seconds: float = _ANSWER_SECONDS
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = ref(store)  # weakly, so that rank 0 stops hosting it when the group has ended
        self._answer_seconds = answer_seconds
        self._connection: Any = None
        self._to_send: deque[Callable[[Any], object]] = deque()
        self._is_sending = threading.Lock()  # never waited for: only a flag that one thread can win
        self._sender: threading.Thread | None = None

    def ask(self, operation: Callable[[Any], T]) -> T:
        """Call *operation* with the store, on a thread of its own, and return its result.

        Raises:
            UnreachableError: the store did not answer.
        """
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def run() -> None:
            try:
                answers.put((operation(self._connected()), None))
            except Exception as error:
                answers.put((None, error))

        try:
            _start(run)
            answer, error = answers.get(timeout=self._answer_seconds)
        except (Empty, RuntimeError) as none:  # no answer; no thread
            raise UnreachableError("the process group's store does not answer") from none
        if error is not None:
            raise UnreachableError(f"the process group's store does not answer: {error}") from error
        return answer  # type: ignore[no-any-return]

    def tell(self, operation: Callable[[Any], object]) -> None:
        """Call *operation* with the store soon, after all earlier ones; never waits."""
        self._to_send.append(operation)
        if self._is_sending.acquire(blocking=False):
            try:
                self._sender = _start(self._send_all)
            except BaseException:
                self._is_sending.release()
                raise

    def finish(self) -> None:
        """Wait, a bounded time, until everything passed to ``tell`` so far has been sent."""
        teller = self._sender
        if teller is not None:
            teller.join(self._answer_seconds)

    def _send_all(self) -> None:
        while True:
            with suppress(IndexError):
                while True:
                    operation = self._to_send.popleft()
                    try:
                        operation(self._connected())
                    except Exception as error:
                        logger.debug("a message to the other ranks was not sent: %s", error)
            self._is_sending.release()
            # An operation that was added before the release relies on this thread.
            if not self._to_send or not self._is_sending.acquire(blocking=False):
                return

    def _connected(self) -> Any:
        connection = self._connection
        if connection is None:
            store: Any = self._store()
            try:
                connection = store.clone()
            except (AttributeError, NotImplementedError):  # an older torch, or a store of the user's own
                connection = store
            if connection is None:
                raise UnreachableError("the process group has ended")
            self._connection = connection
        return connection


def store_of_group() -> tuple[Any, int, int] | None:
    """Return torch's store of this process's group, the rank and the number of ranks.

    ``None`` if there is no other rank, or the group has no store, like MPI's.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    world_size = distributed.get_world_size()
    if world_size < 2:
        return None
    try:
        store = distributed.distributed_c10d._get_default_store()
    except Exception:
        return None
    return None if store is None else (store, distributed.get_rank(), world_size)


def _start(run: Callable[[], None]) -> threading.Thread:
    # The only daemon thread of this package: if the host is stopped, a call never returns, and Python would wait for it
    # at exit. Everything else that this thread does has been waited for by then.
    thread = threading.Thread(target=run, name="async_ckpt-ranks", daemon=True)
    thread.start()
    return thread
