"""The pending requests of a process group's ranks, visible to all ranks.

Only the rank that saves knows that a file is pending. It counts its accepted and its ended requests in the group's
store, in total and per location; the other ranks compare the two counts.

Guarantees: a rank waits for storage, never for another rank to reach some point, so no two ranks wait for each other;
it gives up when nothing has moved on any rank for ``flush_timeout``, or when the store is gone. Each request costs the
training thread one exchange with the store, about a millisecond. A process without a group does none of this.

What does not belong here: how the ranks leave a fit (exit_barrier).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from async_ckpt.errors import FlushTimeoutError, RankError
from async_ckpt.lightning.group import GroupStore, UnreachableError, store_of_group
from async_ckpt.system.processes import process_id
from async_ckpt.telemetry.patience import Limit, Patience

__all__ = ["Announcement", "GroupPending", "pending_of_group", "wait_for_other_ranks"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ALL = "all"
_BEAT_SECONDS = 5.0
_SHORTEST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.25


class Announcement:
    """One request that was announced to the other ranks.

    Args:
        store: of the group.
        name: identifies its location.
        numbers: how many requests there are up to this one, in total and for its location; ``None`` if the store is
            gone.
    """

    def __init__(self, store: GroupStore, name: str, numbers: tuple[int, int] | None) -> None:
        self._store = store
        self._name = name
        self._numbers = numbers
        self._has_ended = False

    def end(self, failure: str | None = None) -> None:
        """Announce, once, that the request has ended; *failure* describes its failure."""
        if self._has_ended:
            return
        self._has_ended = True
        name, numbers = self._name, self._numbers

        def operation(store: Any) -> None:
            if (
                failure is not None and numbers is not None
            ):  # first: a rank that sees the end looks for the failure
                of_all, of_location = numbers
                store.set(f"async_ckpt/failed/{name}/{of_location}", json.dumps([of_all, failure]))
            for each in (name, _ALL):
                store.add(f"async_ckpt/ended/{each}", 1)

        self._store.tell(operation)


class GroupPending:
    """The pending requests of a group's ranks.

    Args:
        store: of the group.

    Attributes:
        store: the same.
    """

    def __init__(self, store: GroupStore) -> None:
        self.store = store
        self._fits = 0
        self._own: Counter[str] = Counter()
        self._raised = 0  # all failures among this many requests were raised on this rank
        self._raised_single: set[int] = set()
        self._beat_at_seconds = 0.0
        self._is_cut_off = False

    def next_fit(self) -> int:
        """Return the number of a fit that begins; it is the same on all ranks."""
        self._fits += 1
        return self._fits

    # -- the rank that saves

    def announce(self, key: str) -> Announcement:
        """Announce a request for the location with *key* to the other ranks, before it is made."""
        name = _name(key)

        def operation(store: Any) -> tuple[int, int]:
            return (
                store.add(f"async_ckpt/accepted/{_ALL}", 1),
                store.add(f"async_ckpt/accepted/{name}", 1),
            )

        numbers = None
        if not self._is_cut_off:  # otherwise each request would wait again
            try:
                numbers = self.store.ask(operation)
                self._own[name] += 1
                self._own[_ALL] += 1
            except UnreachableError as error:
                self._is_cut_off = True
                logger.warning(
                    "the other ranks cannot be told which checkpoints are pending, and will not wait for them: %s",
                    error,
                )
        return Announcement(self.store, name, numbers)

    def beat(self) -> None:
        """Announce that bytes move; rate-limited, however often it is called."""
        now = monotonic()
        if now - self._beat_at_seconds >= _BEAT_SECONDS:
            self._beat_at_seconds = now
            self.store.tell(lambda store: store.add("async_ckpt/beats", 1))

    # -- the others

    def wait_for(self, key: str, url: str, *, limit: Limit) -> None:
        """Wait until the requests that other ranks have accepted for a location have ended.

        Args:
            key: the location's key.
            url: the location, for messages.
            limit: how long to wait.

        Raises:
            RankError: the last request failed, and this rank has not raised that yet; or its rank has ended.
            FlushTimeoutError: *limit* has passed, and nothing moved on any rank.
        """
        name = _name(key)
        number = self._wait(name, repr(url), limit)
        found = self.ask_quietly(lambda store: read(store, f"async_ckpt/failed/{name}/{number}"))
        if number is None or found is None:
            return
        of_all, failure = json.loads(found)
        if of_all > self._raised and of_all not in self._raised_single:
            self._raised_single.add(of_all)
            raise RankError(f"the rank that writes {url!r} failed: {failure}")

    def wait_for_all(self, *, limit: Limit) -> None:
        """Wait until everything that other ranks have accepted so far has ended, successfully or not.

        Raises:
            RankError: a rank ended meanwhile.
            FlushTimeoutError: *limit* has passed, and nothing moved on any rank.
        """
        self._wait(_ALL, "checkpoints", limit)

    def count_as_raised(self) -> None:
        """Consider all failures so far as raised on this rank."""
        self._raised = (
            self.ask_quietly(lambda store: store.add(f"async_ckpt/accepted/{_ALL}", 0)) or self._raised
        )

    def _wait(self, name: str, what: str, limit: Limit) -> int | None:
        """Return the number of requests; ``None`` if all of them are this rank's own."""

        def look(store: Any) -> tuple[int, int]:
            return store.add(f"async_ckpt/accepted/{name}", 0), store.add(f"async_ckpt/ended/{name}", 0)

        first = self.ask_quietly(look)
        if first is None or first[0] <= self._own[name]:
            return None
        accepted, ended = first
        if ended < accepted:
            self.poll(lambda store: look(store)[1] >= accepted or None, f"{what} pending", limit=limit)
        return int(accepted)

    def poll(self, look: Callable[[Any], T | None], what: str, *, limit: Limit) -> T:
        """Call *look* with the store until it returns something other than ``None``.

        Args:
            look: returns ``None`` to go on.
            what: what is awaited, for messages.
            limit: how long to wait.

        Raises:
            RankError: the store is gone, and with it the rank that hosts it.
            FlushTimeoutError: *limit* has passed, and nothing moved on any rank.
        """
        moved, moved_seconds = -1, monotonic()
        patience = Patience(limit, lambda: moved_seconds)
        for pause in self._pauses():
            try:
                found, moves = self.store.ask(lambda store: (look(store), _moves(store)))
            except UnreachableError as error:
                raise RankError(f"another rank, which has {what}, does not answer: {error}") from error
            if found is not None:
                return found
            if moves != moved:
                moved, moved_seconds = moves, monotonic()
            left = patience.left()
            if left <= 0:
                raise FlushTimeoutError(f"another rank has {what} still{patience.told}")
            sleep(min(pause, left))
        raise AssertionError("the pauses never end")

    def can_ask(self) -> bool:
        """Return whether the store still answers."""
        return self.ask_quietly(lambda store: store.add(f"async_ckpt/accepted/{_ALL}", 0)) is not None

    def _pauses(self) -> Iterator[float]:
        """Yield growing pauses; the longest is longer if many ranks poll one host."""
        longest = max(_LONGEST_PAUSE_SECONDS, self.store.world_size / 1000)
        pause = _SHORTEST_PAUSE_SECONDS
        while True:
            yield pause
            pause = min(pause * 1.5, longest)

    def ask_quietly(self, operation: Callable[[Any], T]) -> T | None:
        """Return the result of *operation*; ``None`` if the store is gone, as its host may leave before us."""
        try:
            return self.store.ask(operation)
        except UnreachableError as error:
            logger.info("cannot find out which checkpoints of other ranks are pending: %s", error)
            return None


def read(store: Any, key: str) -> str | None:
    """Return the value of *key* in torch's *store*, or ``None``; the store's ``get`` would wait for the key."""
    return store.get(key).decode() if store.check([key]) else None


_known: WeakKeyDictionary[Any, tuple[int, GroupPending]] = WeakKeyDictionary()
"""The pending requests by torch's store of a group, with the process that the connection belongs to."""


def pending_of_group() -> GroupPending | None:
    """Return the pending requests of this process's group; ``None`` if there is no other rank."""
    group = store_of_group()
    if group is None:
        return None
    store, rank, world_size = group
    known = _known.get(store)
    if known is None:
        pending = GroupPending(GroupStore(store, rank=rank, world_size=world_size))
        known = _known.setdefault(store, (process_id(), pending))
    process, pending = known
    # A forked child, such as a data loader's, is not a rank: two processes must not share a connection.
    return pending if process == process_id() else None


def wait_for_other_ranks(limit: Limit, in_flight: BaseException | None = None) -> None:
    """Wait for other ranks' pending requests; an error that is *in_flight* is not replaced (E2).

    It waits even if an error is in flight, because a launcher may kill the rank that writes when this process fails.
    """
    group = pending_of_group()
    if group is None:
        return
    group.store.finish()
    try:
        group.wait_for_all(limit=limit)
    except (RankError, FlushTimeoutError) as error:
        if in_flight is None:
            raise
        logger.error("%s", error)


@atexit.register
def _finish() -> None:
    for process, pending in list(_known.values()):
        if process == process_id():
            pending.store.finish()


def _moves(store: Any) -> int:
    """Return a number that changes while bytes move for any rank."""
    return int(store.add(f"async_ckpt/ended/{_ALL}", 0) + store.add("async_ckpt/beats", 0))


def _name(key: str) -> str:
    """Return a digest of a location's key, which may be long and contain secrets."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]
