"""What a sharded save calls to carry out its part in the agreement and to learn how the save has ended on all ranks.

Guarantees: `agree` returns once the save is durable on every rank; if it has failed, it raises the same
`ShardedSaveError` on each rank (E4), within bounds (E5). No collective operation is used, and the training thread never
waits (T1). If it is cancelled, as when the service closes, it tells the other ranks first.

What does not belong here: what is written, and where; a `Task` does that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import anyio

from async_ckpt.errors import ShardedSaveError
from async_ckpt.options import ServiceOptions
from async_ckpt.sharded.agreement.driver import Driver
from async_ckpt.sharded.agreement.executor import Offer, Replies
from async_ckpt.sharded.agreement.group import Group, find_group
from async_ckpt.sharded.agreement.messages import Ready
from async_ckpt.sharded.agreement.protocol import (
    Action,
    Bounds,
    Commit,
    End,
    LookUp,
    Plan,
    Stop,
    Undo,
    Write,
)
from async_ckpt.sharded.agreement.wire import Wire
from async_ckpt.sharded.leftovers import new_run
from async_ckpt.system.processes import process_id

__all__ = ["Offer", "Ready", "Rendezvous", "Task"]

logger = logging.getLogger(__name__)

_FINAL_SEND_SECONDS = 1.0
_POLL_SECONDS = 0.005


class Task(Protocol):
    """One rank's work for one save. All methods are called on the loop that awaits `Rendezvous.agree`.

    Attributes:
        offer: the description that this rank announces; ``offer.plan`` is called on another thread.
    """

    @property
    def offer(self) -> Offer: ...  # noqa: D102  # an attribute

    async def plan(self, readies: Mapping[int, Ready]) -> Mapping[int, bytes] | None:
        """Return what each rank is to write; ``None`` repeats the work of the last save.

        Called only on the coordinator. Each ``Ready`` contains its plan, even if only its fingerprint was sent.
        """

    async def write(self, work: bytes | None) -> None:
        """Write this rank's object, and return when it is durable; ``None`` repeats the last work."""

    async def commit(self, readies: Mapping[int, Ready]) -> None:
        """Commit the checkpoint, and return when that is durable. Called only on the coordinator."""

    async def look_up(self, save_id: str) -> bool | None:
        """Return whether the checkpoint in storage is that of save *save_id*; ``None`` if that is unknown."""

    async def undo(self) -> None:
        """Delete what this rank has written; called only if it is certain that no checkpoint refers to it."""


class Rendezvous:
    """Connects one service with the corresponding services on the other ranks.

    Args:
        group: the ranks that take part.
        bounds: the time limits of waits.
        clock: returns the time in seconds.

    Attributes:
        rank: the rank of this process.
        world_size: the number of ranks.
    """

    def __init__(self, group: Group, *, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self.rank = group.rank
        self.world_size = group.world_size
        self._run: str | None = new_run() if group.rank == 0 else None
        self._process = process_id()
        wire = None
        if group.connect is not None:
            wire = Wire(group.connect, rank=group.rank, world_size=group.world_size)
        self._driver = Driver(
            wire,
            rank=group.rank,
            world_size=group.world_size,
            run=self._run or "",
            bounds=bounds,
            clock=clock,
        )
        self._beat_seconds = bounds.heartbeat_seconds / 2
        self._close_seconds = bounds.silence_seconds + 2 * _FINAL_SEND_SECONDS

    @classmethod
    def open(cls, process_group: Any, store: Any, options: ServiceOptions) -> Rendezvous:
        """Return the rendezvous of a service of *process_group*, without communication.

        All ranks must open the rendezvous of one group in the same order.

        Args:
            process_group: ``None`` means the default group or, without one, this process alone.
            store: ``None`` means the store that the group was initialized with.
            options: contain the time limits.

        Raises:
            OptionError: there is a group but no store, or a store but no group.
        """
        bounds = Bounds(silence_seconds=options.silence_timeout, lateness_seconds=options.agreement_timeout)
        return cls(find_group(process_group, store), bounds=bounds)

    @property
    def run(self) -> str:
        """A name that is unique to this run and equal on all ranks; known once a save has begun to write."""
        assert self._run is not None, "no save has begun to write"
        return self._run

    def save_id(self, number: int) -> str:
        """Return a name that is unique to save *number*; known once that save has begun to write."""
        return f"{self.run}-{number}"

    async def agree(self, number: int, task: Task) -> None:
        """Do this rank's part of the group's save *number*, and return when it is durable on every rank.

        Args:
            number: of the save, counted by this service; the same on all ranks.
            task: this rank's work.

        Raises:
            ShardedSaveError: it is not durable; the same on every rank.
        """
        location = task.offer.location
        if self._process != process_id():
            raise ShardedSaveError.of(
                location, {self.rank: "a forked process takes no part in a process group"}
            )
        part = _TaskExecutor(number, task, self._driver, self._know_save)
        failures = await part.run(self._beat_seconds)
        if failures:
            raise ShardedSaveError.of(location, failures) from part.error

    def fail(self, number: int, why: str) -> None:
        """Tell the other ranks that this one does not take part in save *number*; any thread may call it."""
        if self._process == process_id():
            self._driver.post(partial(self._driver.refuse, number, why))

    async def aclose(self) -> None:
        """Wait, for a bounded time, until this rank's messages are sent, and end its saves."""
        if self._process != process_id():
            return
        with anyio.move_on_after(self._close_seconds):
            await self._end()
        self._driver.post(self._driver.leave)
        with anyio.move_on_after(2 * _FINAL_SEND_SECONDS + 1, shield=True):
            await self._end()

    async def _end(self) -> None:
        while self._driver.is_running:  # noqa: ASYNC110  # what ends is a thread
            await anyio.sleep(_POLL_SECONDS)

    def _know_save(self, save_id: str) -> None:
        self._run = save_id.rpartition("-")[0]


class _TaskExecutor:
    """Carries out the actions of the agreement for one save on one rank, on the service's loop."""

    def __init__(self, number: int, task: Task, driver: Driver, know_save: Callable[[str], None]) -> None:
        self.number = number
        self.offer = task.offer
        self.error: Exception | None = None  # this rank's own
        self._task = task
        self._driver = driver
        self._know_save = know_save
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[Action, Replies | None]] = asyncio.Queue()
        self._scope: anyio.CancelScope | None = None
        self._is_idle = anyio.Event()
        self._is_idle.set()

    def deliver(self, action: Action, replies: Replies | None) -> None:
        """Schedule *action*; called on the driver's thread."""
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (action, replies))
        except RuntimeError:  # the loop has ended, and with it the caller of `run`
            logger.debug("%s is not carried out: the loop has ended", type(action).__name__)

    async def run(self, heartbeat_seconds: float) -> Mapping[int, str]:
        """Return the failures; empty if the checkpoint is durable."""
        self._driver.post(partial(self._driver.begin, self))
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._beat, heartbeat_seconds)
                while True:
                    action, replies = await self._inbox.get()
                    match action:
                        case End(failures):
                            await self._stop()
                            tasks.cancel_scope.cancel()
                            return failures
                        case Stop():
                            await self._stop()
                        case Undo():
                            await self._undo()
                        case _:
                            await self._is_idle.wait()
                            self._is_idle, self._scope = anyio.Event(), anyio.CancelScope()
                            tasks.start_soon(self._do, action, replies, self._scope, self._is_idle)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._give_up(f"given up: {type(error).__name__}")
            raise
        raise AssertionError("the loop above ends by an End")

    async def _beat(self, seconds: float) -> None:
        while True:
            await anyio.sleep(seconds)
            self._driver.post(partial(self._driver.beat, self.number))

    async def _do(
        self, action: Action, replies: Replies | None, scope: anyio.CancelScope, done: anyio.Event
    ) -> None:
        assert replies is not None
        try:
            with scope:
                try:
                    result = await self._done(action)
                except Exception as error:
                    if not isinstance(action, LookUp):
                        self.error = error
                    self._reply(partial(replies.failed, f"{type(error).__name__}: {error}"))
                else:
                    self._reply(partial(replies.done, *result))
        finally:
            done.set()

    async def _done(self, action: Action) -> tuple[Any, ...]:
        """Carry out *action*; return what to report of it."""
        task = self._task
        match action:
            case Plan(readies):
                return (await task.plan(readies),)
            case Write(work, save_id):
                self._know_save(save_id)
                await task.write(work)
            case Commit(readies):
                await task.commit(readies)
            case LookUp(save_id):
                return (await task.look_up(save_id),)
        return ()

    def _reply(self, actions: Callable[[], list[Action]]) -> None:
        self._driver.post(partial(self._driver.reply, self.number, actions))

    async def _stop(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            await self._is_idle.wait()

    async def _undo(self) -> None:
        try:
            await self._task.undo()
        except Exception as error:  # the next start sweeps it
            logger.warning(
                "this rank's part of the failed sharded save stays at %r until a later save deletes it: %s",
                self.offer.location,
                error,
            )

    async def _give_up(self, why: str) -> None:
        """Tell the other ranks that this one gives up; wait a limited time until that is sent."""
        sent = asyncio.Event()

        def then() -> None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(sent.set)

        self._driver.post(partial(self._driver.give_up, self.number, why, then))
        with anyio.move_on_after(_FINAL_SEND_SECONDS):
            await sent.wait()
