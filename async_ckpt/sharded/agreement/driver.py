"""The thread that runs the state machines of one process group: it receives messages, advances clocks, starts actions.

Guarantees:

* It runs while a save is in progress, and ends by itself shortly after (B2).
* It waits only for its inbox. A second thread calls the store, so clocks go on when the store's host does not answer.
  If that thread hangs in a call, it is left behind.
* Any thread may `post`, and so may a signal handler (L1): no lock is waited for.
* Heartbeats prove that the event loop of a rank is running: each one follows a call from that loop.

What does not belong here: decisions (protocol), the representation in the store (wire), and the work itself
(rendezvous).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from async_ckpt.sharded.agreement.coordinator import Coordinator, Phase
from async_ckpt.sharded.agreement.executor import Executor, Replies
from async_ckpt.sharded.agreement.messages import (
    CoordinatorHeartbeat,
    Failed,
    FromCoordinator,
    Heartbeat,
    Ready,
    ToCoordinator,
    Verdict,
)
from async_ckpt.sharded.agreement.participant import Participant, Step
from async_ckpt.sharded.agreement.protocol import (
    COMMIT,
    COORDINATOR,
    Action,
    Bounds,
    Broadcast,
    Claim,
    ClaimHolder,
    CleanUp,
    Commit,
    End,
    LookUp,
    Plan,
    PlanCache,
    Scatter,
    Send,
    SentPlan,
    Write,
)
from async_ckpt.sharded.agreement.store_thread import Callback, Poll, StoreThread
from async_ckpt.sharded.agreement.wire import Wire
from async_ckpt.system import threads

__all__ = ["Driver"]

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (0.002, 0.02)
"""The time between two polls: the shortest, used while messages arrive, and the longest, used after a quiet while."""
_POLLS_PER_SECOND = 20_000
"""How many polls per second all ranks together may send to the host of the store."""
_FINAL_SEND_SECONDS = 2.0
"""How long sending the remaining messages may take once every save has ended."""
_MOST_REMEMBERED = 256


class Driver:
    """Takes this rank's part in all saves of one process group.

    Args:
        wire: sends messages to the other ranks; ``None`` if there are none.
        rank: the rank of this process.
        world_size: the number of ranks.
        run: a name that no other run has; only the coordinator uses it.
        bounds: the time limits of waits.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        wire: Wire | None,
        *,
        rank: int,
        world_size: int,
        run: str,
        bounds: Bounds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wire = wire
        self._rank = rank
        self._world_size = world_size
        self._run = run
        self._bounds = bounds
        self._clock = clock
        least = world_size / _POLLS_PER_SECOND
        self._pauses_seconds = max(_PAUSES_SECONDS[0], least), max(_PAUSES_SECONDS[1], least)
        self._sent_plan = SentPlan()
        self._plans = PlanCache()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._running = threading.Lock()  # never waited for: only a flag that one thread can win
        self._thread: threading.Thread | None = None
        # Only the driver's thread uses the following.
        self._store_thread: StoreThread | None = None
        self._parts: dict[int, tuple[Executor, Participant]] = {}
        self._coordinators: dict[int, Coordinator] = {}
        self._early_messages: dict[int, list[ToCoordinator]] = {}
        self._ended_numbers: deque[int] = deque(maxlen=_MOST_REMEMBERED)
        # The state machines that wait for the answer to a claim, and the numbers of their saves.
        self._claims: dict[Coordinator | Participant, int] = {}

    @property
    def is_running(self) -> bool:
        """Whether anything is in progress."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    # -- for all threads

    def post(self, call: Callable[[], None]) -> None:
        """Schedule *call* on the thread; return at once."""
        self._inbox.put(call)
        if self._running.acquire(blocking=False):
            try:
                # A daemon thread, so that it cannot delay the exit of a process that has not closed its service.
                self._thread = threading.Thread(target=self._main, name="async_ckpt-agreement", daemon=True)
                threads.start(self._thread)
            except BaseException:
                self._running.release()
                raise

    # -- calls to post

    def begin(self, part: Executor) -> None:
        """Begin this rank's part in a save."""
        number, offer = part.number, part.offer
        member = Participant(self._rank, sent_plan=self._sent_plan, bounds=self._bounds, now=self._clock())
        try:
            actions = member.begin(
                location=offer.location, fingerprint=offer.fingerprint, plan=offer.plan, sizes=offer.sizes
            )
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.refuse(number, why)
            part.deliver(End({self._rank: why}), None)
            return
        self._parts[number] = (part, member)
        if self._rank == COORDINATOR:
            self._coordinate(number)
        self._carry_out(number, actions)

    def refuse(self, number: int, why: str) -> None:
        """Announce that this rank does not take part in save *number*, which makes it fail."""
        if self._rank == COORDINATOR:
            self._coordinate(number)
        self._carry_out(number, [Send(Failed(self._rank, why))])

    def beat(self, number: int) -> None:
        """Note that the event loop of a save is alive."""
        if number in self._parts:
            self._carry_out(number, self._parts[number][1].beat())
        if number in self._coordinators:
            self._carry_out(number, self._coordinators[number].beat())

    def reply(self, number: int, actions: Callable[[], list[Action]]) -> None:
        """Receive the outcome of an action."""
        self._carry_out(number, actions())

    def give_up(self, number: int, why: str, then: Callable[[], None]) -> None:
        """End this rank's part in a save because its caller no longer waits; call *then* once the others are told."""
        known = self._parts.pop(number, None)
        if known is not None:
            self._carry_out(number, known[1].give_up(why))
            coordinator = self._coordinators.get(number)
            if coordinator is not None:
                self._carry_out(number, coordinator.commit_failed(why))
        if self._store_thread is None:
            then()
        else:
            self._store_thread.send(lambda wire: then)

    def leave(self) -> None:
        """Stop taking part in saves, for good."""
        if self._wire is not None and self._wire.is_used:
            self._enqueue(Wire.leave)

    # -- the thread

    def _main(self) -> None:
        while True:
            try:
                self._run_until_idle()
            except Exception as error:
                logger.exception("the agreement on sharded saves has failed; please report it")
                self._drop_everything(f"internal error: {type(error).__name__}: {error}")
            self._running.release()
            # A call that was posted before the release relies on this thread.
            if self._inbox.empty() or not self._running.acquire(blocking=False):
                return

    def _run_until_idle(self) -> None:
        idle_since: float | None = None
        try:
            while True:
                self._read_inbox()
                now = self._clock()
                self._tick(now)
                if self._parts or self._coordinators or not self._inbox.empty():
                    idle_since = None
                elif self._store_thread is None or self._store_thread.is_idle:
                    return
                else:
                    idle_since = now if idle_since is None else idle_since
                    if now - idle_since > _FINAL_SEND_SECONDS:
                        return
                if self._store_thread is not None:
                    self._store_thread.exchange(now, self._poll())
        finally:
            if self._store_thread is not None:
                has_ended, self._store_thread = self._store_thread.end(), None
                if self._wire is not None and not has_ended:
                    self._wire = self._wire.reconnected()

    def _tick(self, now: float) -> None:
        is_connected = self._store_thread is None or self._store_thread.is_connected(
            now, self._bounds.longest_poll_seconds
        )
        is_reachable = self._wire is None or self._wire.has_connected
        for number, coordinator in list(self._coordinators.items()):
            if number not in self._parts:
                self._carry_out(number, coordinator.beat())
            due = coordinator.tick(now, is_connected=is_connected, is_reachable=is_reachable)
            self._carry_out(number, due)
            if coordinator.phase is Phase.OVER:
                del self._coordinators[number]
                self._ended_numbers.append(number)
        for number, (_, member) in list(self._parts.items()):
            self._carry_out(number, member.tick(now, is_connected=is_connected))

    def _read_inbox(self) -> None:
        try:
            self._inbox.get(timeout=self._pause_seconds())()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _pause_seconds(self) -> float:
        shortest, longest = self._pauses_seconds
        if self._store_thread is None or self._store_thread.is_busy:
            return longest
        return min(max(self._store_thread.next_poll_seconds - self._clock(), shortest / 4), longest)

    def _drop_everything(self, why: str) -> None:
        for part, _ in self._parts.values():
            part.deliver(End({self._rank: why}), None)
        self._parts.clear()
        self._coordinators.clear()

    # -- actions and messages

    def _coordinate(self, number: int) -> None:
        if number in self._coordinators or number in self._ended_numbers:
            return
        coordinator = self._coordinators[number] = Coordinator(
            number,
            save_id=f"{self._run}-{number}",
            world_size=self._world_size,
            plans=self._plans,
            bounds=self._bounds,
            now=self._clock(),
        )
        if self._wire is not None:
            self._the_store_thread()  # messages of other ranks may be there already
        self._carry_out(number, coordinator.beat())
        for message in self._early_messages.pop(number, []):
            coordinator.receive(message)

    def _carry_out(self, number: int, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(message):
                    self._send_to_coordinator(number, message)
                case Broadcast(message):
                    self._broadcast(number, message)
                case Scatter(messages):
                    if self._wire is not None:
                        self._enqueue(partial(Wire.scatter, number=number, messages=messages))
                    self._receive_from_coordinator(number, messages[self._rank])
                case Claim(claim):
                    self._claim(number, claim)
                case CleanUp(verdict, unacknowledged):
                    if self._wire is not None:
                        self._enqueue(
                            partial(
                                Wire.clean_up, number=number, verdict=verdict, unacknowledged=unacknowledged
                            )
                        )
                case _:
                    self._deliver(number, action)

    def _send_to_coordinator(self, number: int, message: ToCoordinator) -> None:
        if self._rank == COORDINATOR:
            self._receive_from_rank(number, message)
        elif self._wire is not None and not (
            isinstance(message, Heartbeat) and self._the_store_thread().has_backlog
        ):
            self._enqueue(partial(Wire.send, number=number, message=message))

    def _broadcast(self, number: int, message: FromCoordinator) -> None:
        if self._wire is not None and not (
            isinstance(message, CoordinatorHeartbeat) and self._the_store_thread().has_backlog
        ):
            self._enqueue(partial(Wire.broadcast, number=number, message=message))
        self._receive_from_coordinator(number, message)

    def _claim(self, number: int, claim: Any) -> None:
        owner: Coordinator | Participant
        owner = self._coordinators[number] if claim == COMMIT else self._parts[number][1]

        if self._wire is None:
            self._carry_out(number, owner.claimed(claim))
            return
        self._claims[owner] = number

        def ask(wire: Wire) -> Callable[[], None]:
            # The verdict may have arrived while this rank was cut off.
            found: list[Any] = [] if self._rank == COORDINATOR else wire.poll([number])
            is_decided = any(isinstance(message, Verdict) for _, message in found)
            holder = None if is_decided else wire.claim(number, claim)

            def end() -> None:
                self._receive(found)
                self._claimed(owner, holder)

            return end

        self._the_store_thread().send(ask)

    def _claimed(self, owner: Coordinator | Participant, holder: ClaimHolder) -> None:
        number = self._claims.pop(owner, None)
        if number is not None:
            self._carry_out(number, owner.claimed(holder))

    def _deliver(self, number: int, action: Action) -> None:
        known = self._parts.get(number)
        replies = self._replies(number, action)
        if known is None:
            if (
                isinstance(action, LookUp) and replies is not None
            ):  # the executor that could check storage has ended
                self._carry_out(number, replies.done(None))
            return
        part, member = known
        part.deliver(action, replies)
        if member.step is Step.ENDED and isinstance(action, End):
            del self._parts[number]
            if self._wire is not None:
                self._enqueue(partial(Wire.forget, number=number))

    def _replies(self, number: int, action: Action) -> Replies | None:
        coordinator = self._coordinators.get(number)
        member = self._parts[number][1] if number in self._parts else None
        match action:
            case Plan() if coordinator is not None:
                return Replies(coordinator.planned, coordinator.failed)
            case Commit() if coordinator is not None:
                return Replies(coordinator.committed, coordinator.commit_failed)
            case Write() if member is not None:
                return Replies(member.wrote, member.failed)
            case LookUp():
                is_ours = coordinator is not None and coordinator.phase is Phase.LOOKING_UP
                looker = coordinator if is_ours else member
                if looker is not None:
                    found = looker.looked_up
                    return Replies(found, lambda why: found(None))
        return None

    def _receive_from_rank(self, number: int, message: ToCoordinator) -> None:
        self._plans.silent.discard(message.rank)
        if isinstance(message, Ready):
            message = self._plans.complete(message)
        if number in self._coordinators:
            self._coordinators[number].receive(message)
        elif number not in self._ended_numbers and not isinstance(message, Heartbeat):
            self._early_messages.setdefault(number, []).append(message)
            while len(self._early_messages) > _MOST_REMEMBERED:
                del self._early_messages[min(self._early_messages)]

    def _receive_from_coordinator(self, number: int, message: FromCoordinator) -> None:
        known = self._parts.get(number)
        if known is not None:
            self._carry_out(number, known[1].receive(message))

    # -- calls to the store

    def _the_store_thread(self) -> StoreThread:
        assert self._wire is not None
        if self._store_thread is None:
            self._store_thread = StoreThread(
                self._wire, self._inbox.put, self._disconnected, pauses_seconds=self._pauses_seconds
            )
        return self._store_thread

    def _enqueue(self, job: Callable[[Wire], None]) -> None:
        self._the_store_thread().send(job)

    def _poll(self) -> Poll:
        """Return the function that polls for messages, on the store thread."""
        numbers = tuple(self._parts)
        is_coordinator = self._rank == COORDINATOR

        def poll(wire: Wire) -> Callback | None:
            found: list[Any] = wire.collect() if is_coordinator else wire.poll(numbers)
            return partial(self._receive, found) if found else None

        return poll

    def _receive(self, found: list[tuple[int, Any]]) -> None:
        receive: Callable[[int, Any], None]
        receive = self._receive_from_rank if self._rank == COORDINATOR else self._receive_from_coordinator
        for number, message in found:
            receive(number, message)

    def _disconnected(self) -> None:
        """End all waits for the answer to a claim: the store did not answer."""
        for owner in list(self._claims):
            self._claimed(owner, None)
