"""Where the ranks of a process group meet for a sharded save, and learn how it has ended for all of them.

Guarantees: `agree` returns once the save is durable on every rank; if it has failed, it raises the same
`ShardedSaveError` on each rank (E4), within bounds (E5). No collective operation is used, and the training thread never
waits (T1). If it is cancelled, as when the service closes, it tells the other ranks first.

What does not belong here: what is written, and where. A `Task` knows that.
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
from async_ckpt.sharded.agreement.driver import Driver, Offer, Replies
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

_LAST_WORDS_SECONDS = 1.0
_POLL_SECONDS = 0.005


class Task(Protocol):
    """What one save is on one rank. Everything is called on the loop that awaits `Rendezvous.agree`.

    Attributes:
        offer: what this rank says of itself; its ``plan`` is called on another thread.
    """

    @property
    def offer(self) -> Offer: ...  # noqa: D102  # an attribute

    async def plan(self, readies: Mapping[int, Ready]) -> Mapping[int, bytes] | None:
        """Return what each rank is to write; ``None`` for the work of last time, whoever may not have it.

        On the coordinator alone. Every ``Ready`` has its plan, whether it crossed the wire or not.
        """

    async def write(self, work: bytes | None) -> None:
        """Write this rank's object, and return when it is durable. ``None`` is the work that came last."""

    async def commit(self, readies: Mapping[int, Ready]) -> None:
        """Commit the checkpoint, and return when that is durable. Called only on the coordinator."""

    async def look_up(self, save_id: str) -> bool | None:
        """Return whether the checkpoint that storage shows is that save; ``None`` if storage does not say."""

    async def undo(self) -> None:
        """Delete what this rank has written: it is certain that no checkpoint refers to it."""


class Rendezvous:
    """One service's meetings with the same service on the other ranks.

    Args:
        group: who takes part.
        bounds: how long to wait.
        clock: seconds.

    Attributes:
        rank: of this process.
        world_size: how many there are.
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
        self._beat_seconds = bounds.beat_seconds / 2
        self._close_seconds = bounds.silence_seconds + 2 * _LAST_WORDS_SECONDS

    @classmethod
    def open(cls, process_group: Any, store: Any, options: ServiceOptions) -> Rendezvous:
        """Return the meetings of a service of *process_group*; no other rank is asked for anything.

        Every rank opens its rendezvous of one group in the same order.

        Args:
            process_group: ``None`` is the default group, or this process alone.
            store: ``None`` is the one through which the group's ranks found each other.
            options: for how long to wait.

        Raises:
            OptionError: there is a group, and no store is to be had; or a store, and no group.
        """
        bounds = Bounds(silence_seconds=options.silence_timeout, lateness_seconds=options.agreement_timeout)
        return cls(find_group(process_group, store), bounds=bounds)

    @property
    def run(self) -> str:
        """A name that is unique to this run and equal on all ranks; known once the first save may write."""
        assert self._run is not None, "no save has come to its writing"
        return self._run

    def save_id(self, number: int) -> str:
        """Return a name that is unique to this save; known once it may write."""
        return f"{self.run}-{number}"

    async def agree(self, number: int, task: Task) -> None:
        """Do this rank's part of the group's save *number*, and return when it is durable on every rank.

        Args:
            number: how many sharded saves this service has been asked for before; the same on all ranks.
            task: what to do.

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
        """Tell the other ranks that this one takes no part in save *number*; from any thread, without waiting."""
        if self._process == process_id():
            self._driver.post(partial(self._driver.refuse, number, why))

    async def aclose(self) -> None:
        """Wait, for a bounded time, until this rank's messages are sent, and end its saves."""
        if self._process != process_id():
            return
        with anyio.move_on_after(self._close_seconds):
            await self._end()
        self._driver.post(self._driver.leave)
        with anyio.move_on_after(2 * _LAST_WORDS_SECONDS + 1, shield=True):
            await self._end()

    async def _end(self) -> None:
        while self._driver.is_running:  # noqa: ASYNC110  # what ends is a thread
            await anyio.sleep(_POLL_SECONDS)

    def _know_save(self, save_id: str) -> None:
        self._run = save_id.rpartition("-")[0]


class _TaskExecutor:
    """One save on one rank, on the service's loop: performs the actions of the agreement."""

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
        except RuntimeError:  # the loop has ended, and with it who would have wanted to know
            logger.debug("nobody is left to do %s", type(action).__name__)

    async def run(self, beat_seconds: float) -> Mapping[int, str]:
        """Return the failures; empty if the checkpoint is durable."""
        self._driver.post(partial(self._driver.begin, self))
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._beat, beat_seconds)
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
        raise AssertionError("it ends by its verdict")

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
        """Perform *action*, and return its outcome."""
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
            logger.warning("a part of a failed sharded save stays at %r: %s", self.offer.location, error)

    async def _give_up(self, why: str) -> None:
        """Send this to the other ranks; wait for that for a bounded time."""
        said = asyncio.Event()

        def then() -> None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(said.set)

        self._driver.post(partial(self._driver.give_up, self.number, why, then))
        with anyio.move_on_after(_LAST_WORDS_SECONDS):
            await said.wait()
