"""The history of a run: every request and its outcome, for the checker.

Guarantees: one counter numbers what happens, over all threads, so "ended before the other began" can be
read off the numbers. Nothing is judged here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeAlias

from async_ckpt.events import Abandoned, Accepted, Cancelled, Durable, Event, Failed, Superseded

__all__ = ["ABSENT", "Failure", "History", "Kind", "Operation", "Outcome", "leaves"]

ABSENT = "absent"
"""What is read where there is no file; every other content is the digest of a saved state."""

Kind: TypeAlias = Literal["save", "remove", "load"]
Outcome: TypeAlias = Literal[
    "durable", "removed", "read", "failed", "superseded", "cancelled", "dropped", "refused", "unknown"
]
"""``refused``: it was not accepted. ``unknown``: the call raised an earlier error, so nobody has its handle."""

_ENDS_OF_SAVES = (Durable, Superseded, Cancelled, Failed, Abandoned)


@dataclass(slots=True, kw_only=True, eq=False)
class Failure:
    """An error of a request, and how often it was raised: by its own handle, and by other calls."""

    url: str
    error: BaseException
    told_by_handle: int = 0
    told_by_calls: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Operation:
    """One call, and what it came to.

    Attributes:
        thread: who called.
        kind: what was called.
        path: of which checkpoint.
        content: the digest of what was saved, or read.
        called: when the call began.
        returned: when it returned or raised.
        ended: when its request ended, where that is known.
        outcome: how it ended.
    """

    thread: str
    kind: Kind
    path: str
    called: int
    content: str = ""
    returned: int = -1
    ended: int = -1
    outcome: Outcome = "unknown"

    def __str__(self) -> str:
        name = self.path.rsplit("/", 1)[-1]
        what = f"{self.kind:6} {name:8} {self.outcome:10} {self.content[:8]:8}"
        return f"[{self.called:5} {self.returned:5} {self.ended:5}] {self.thread:9} {what}".rstrip()


class History:
    """All of it; its methods may be called from every thread.

    Attributes:
        operations: in the order in which they were called.
        seen: the path and content that readers beside the service found.
        failures: by the identity of the error.
        endings: how often each accepted save ended, by its id.
        most_accepted: the most saves that were accepted and not ended at one time.
        strays: errors that are nobody's.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.seen: set[tuple[str, str]] = set()
        self.failures: dict[int, Failure] = {}
        self.endings: Counter[int] = Counter()
        self.most_accepted = 0
        self.strays: list[BaseException] = []
        self._lock = threading.Lock()
        self._clock = count()

    def now(self) -> int:
        """Return the next number."""
        return next(self._clock)

    def call(self, kind: Kind, path: str, content: str = "") -> Operation:
        """Note that a call begins."""
        thread = threading.current_thread().name
        with self._lock:
            operation = Operation(thread=thread, kind=kind, path=path, content=content, called=self.now())
            self.operations.append(operation)
        return operation

    def observe(self, event: Event) -> None:
        """Take note of an event; the service's observer."""
        if isinstance(event, Accepted):
            self.endings[event.request_id] = 0
            accepted = sum(1 for times in self.endings.values() if not times)
            self.most_accepted = max(self.most_accepted, accepted)
        elif isinstance(event, _ENDS_OF_SAVES) and event.request_id in self.endings:
            self.endings[event.request_id] += 1
        if isinstance(event, Failed):
            self.failures[id(event.error)] = Failure(url=event.url, error=event.error)

    def tell(self, error: BaseException, *, by_handle: bool = False) -> None:
        """Note that a call raised *error*."""
        for leaf in leaves(error):
            told = self.failures.get(id(leaf))
            if told is None:
                self.strays.append(leaf)
                continue
            with self._lock:
                told.told_by_handle += by_handle
                told.told_by_calls += not by_handle

    def is_known(self, error: BaseException) -> bool:
        """Return whether all of *error* is the failure of some request."""
        return all(id(leaf) in self.failures for leaf in leaves(error))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors of a group, or the error itself."""
    group = getattr(error, "exceptions", None)
    if group is None:
        yield error
    else:
        for each in group:
            yield from leaves(each)
