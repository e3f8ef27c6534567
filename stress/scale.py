"""Thousands of ranks that save to one prefix of S3, in one process and in virtual time.

``python -m stress.scale --worlds 8 256 4096``. The agreement's coordinator and participants are real, and so are their
encoded messages, the retries, and the pacing of requests to a store that throttles. Simulated are the time, the group's
store, whose host serves one call at a time, each as long as measured, and S3, which accepts a limited number of writes
per second for one prefix and refuses the others. Some ranks die at random. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio

from async_ckpt.errors import StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.sharded.agreement.coordinator import Coordinator
from async_ckpt.sharded.agreement.messages import FromCoordinator, Ready, ToCoordinator, encode
from async_ckpt.sharded.agreement.participant import Participant
from async_ckpt.sharded.agreement.protocol import (
    COMMIT,
    COORDINATOR,
    Action,
    Bounds,
    Broadcast,
    Claim,
    Commit,
    End,
    Plan,
    PlanCache,
    Scatter,
    Send,
    SentPlan,
    Stop,
    Write,
)
from async_ckpt.stores.requests import Pace
from async_ckpt.stores.s3.sharing import apart_seconds, part_size_for
from stress.simulated_servers import Prefix, StoreHost
from stress.virtual_time import virtual_loop

__all__ = ["Result", "Setting", "main", "simulate"]

_CALLS_UP, _CALLS_DOWN = 5, 2  # of one message: add, set, check, get, delete; check, get
_CONNECTIONS = 4
_PART_BYTES = 128 << 20
_TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated.

    Attributes:
        world: the number of ranks.
        nbytes: the bytes that each rank writes.
        plan_bytes: the length of each rank's plan.
        deaths: how many ranks die while they write.
        do_throttled_count: whether a throttled request uses up an attempt, as in earlier versions.
        is_shared: whether each rank keeps to its share of the requests that S3 accepts, in larger parts, as the package
            does.
        seed: the seed of all random choices.
    """

    world: int
    nbytes: int = 2 << 30
    plan_bytes: int = 20_000
    deaths: int = 0
    do_throttled_count: bool = False
    is_shared: bool = True
    seed: int = 1


@dataclass(kw_only=True)
class Result:
    """The outcome of two saves of the same shapes, one after the other.

    Attributes:
        ends: for each save, the failures by rank.
        seconds: for each save, how long it took.
        verdict_seconds: for each save, the time from the last rank's message, or its death, until all survivors knew
            the verdict.
        refused: how many requests S3 refused.
        gave_up: how many ranks could not write.
        bytes_per_rank: for each save, the bytes of messages of each rank but rank 0, on average.
        messages_per_rank: for each save, the number of these messages.
    """

    ends: list[dict[int, dict[int, str]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    verdict_seconds: list[float] = field(default_factory=list)
    refused: int = 0
    gave_up: int = 0
    bytes_per_rank: list[float] = field(default_factory=list)
    messages_per_rank: list[float] = field(default_factory=list)

    @property
    def not_durable(self) -> int:
        """How many saves failed; only a death should make one fail."""
        return sum(any(failures for failures in ends.values()) for ends in self.ends)


class _Rank:
    """One rank, in all saves."""

    def __init__(self, simulation: _Simulation, rank: int) -> None:
        self.rank = rank
        self.sent_plan = SentPlan()
        self.is_alive = True
        self.participant: Participant | None = None
        self.scope: anyio.CancelScope | None = None
        self._simulation = simulation
        self._pace = Pace(_CONNECTIONS, random=simulation.chance.random)
        self._writers = simulation.setting.world if simulation.setting.is_shared else 1
        self._orders: asyncio.Queue[Participant | None] = asyncio.Queue()

    def begin(self) -> None:
        simulation = self._simulation
        self.participant = Participant(
            self.rank, sent_plan=self.sent_plan, bounds=simulation.bounds, now=simulation.clock()
        )
        content = bytes(simulation.setting.plan_bytes)
        self.carry_out(
            self.participant.begin(location="s3", fingerprint=b"f" * 16, plan=lambda: content, sizes=(900,))
        )
        simulation.later(_TICK_SECONDS, self.tick)

    def tick(self) -> None:
        participant = self.participant
        if not self.is_alive or participant is None:
            return
        self.carry_out(participant.beat())
        self.carry_out(participant.tick(self._simulation.clock()))
        if self.participant is not None:
            self._simulation.later(_TICK_SECONDS, self.tick)

    def receive(self, message: FromCoordinator) -> None:
        if self.is_alive and self.participant is not None:
            self.carry_out(self.participant.receive(message))

    def die(self) -> None:
        self.is_alive = False
        if self.scope is not None:
            self.scope.cancel()

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(message):
                    self._simulation.send(message)
                case Write():
                    self._orders.put_nowait(self.participant)
                case Stop():
                    if self.scope is not None:
                        self.scope.cancel()
                case End(failures):
                    self.participant = None
                    self._simulation.ended(self.rank, dict(failures))

    async def work(self) -> None:
        """Write when it is time to, until told to end."""
        while (participant := await self._orders.get()) is not None:
            await self._write(participant)

    def end(self) -> None:
        """End `work`."""
        self._orders.put_nowait(None)

    async def _write(self, participant: Participant) -> None:
        with anyio.CancelScope() as self.scope:
            try:
                await self._put_all()
            except StoreError as error:
                self._simulation.result.gave_up += 1
                self.carry_out(participant.failed(str(error)))
            else:
                self.carry_out(participant.wrote())

    async def _put_all(self) -> None:
        nbytes = self._simulation.setting.nbytes
        size = part_size_for(nbytes, _PART_BYTES, at_a_time=_CONNECTIONS, writers=self._writers)
        parts = -(-nbytes // size)
        if parts == 1:
            return await self._request(nbytes)
        remaining: Iterator[int] = iter([size] * parts)
        failed: list[StoreError] = []
        await self._request(0)  # begins the upload

        async def put() -> None:
            for nbytes in remaining:
                try:
                    await self._request(nbytes)
                except StoreError as error:
                    failed.append(error)
                    senders.cancel_scope.cancel()

        async with anyio.create_task_group() as senders:
            for _ in range(min(_CONNECTIONS, parts)):
                senders.start_soon(put)
        if failed:
            raise failed[0]
        await self._request(0)  # completes it

    async def _request(self, nbytes: int) -> None:
        simulation = self._simulation

        async def once() -> None:
            try:
                async with self._pace.turn(apart_seconds=apart_seconds(self._writers)):
                    await simulation.prefix.write(nbytes)
            except ThrottledError as error:
                if simulation.setting.do_throttled_count:
                    raise TransientStoreError(str(error)) from error
                raise

        await Retrying(
            RetryPolicy(), sleep=asyncio.sleep, clock=simulation.clock, random=simulation.chance.random
        ).call(once)


class _Simulation:
    """All ranks, and the messages between them."""

    def __init__(self, setting: Setting, loop: asyncio.AbstractEventLoop) -> None:
        self.setting = setting
        self.clock = loop.time
        self.later = loop.call_later
        self.chance = Random(setting.seed)
        self.bounds = Bounds()
        self.result = Result()
        self.prefix = Prefix(self.clock)
        self.ranks = [_Rank(self, rank) for rank in range(setting.world)]
        self._host = StoreHost(self.clock, setting.world, self.chance)
        self._plans = PlanCache()
        self._number = 0
        self._inbox: list[ToCoordinator] = []
        self._coordinator: Coordinator | None = None
        self._ends: dict[int, dict[int, str]] = {}
        self._nbytes = self._messages = 0
        self._last_word_seconds = 0.0
        self._over = anyio.Event()

    async def save(self, deaths: int) -> None:
        """Let all ranks save once; some of them die."""
        started = self.clock()
        self._number += 1
        self._ends, self._inbox, self._nbytes, self._messages = {}, [], 0, 0
        self._over = anyio.Event()
        self._coordinator = Coordinator(
            self._number,
            save_id=f"run-{self._number}",
            world_size=self.setting.world,
            plans=self._plans,
            bounds=self.bounds,
            now=started,
        )
        self.later(self._host.pause_seconds, self._poll)
        for rank in self.ranks:
            self.later(self.chance.random() * 2, rank.begin)
        for rank in self.chance.sample(self.ranks[1:], deaths):
            self.later(2.2 + self.chance.random() * 3, self._kill, rank)
        await self._over.wait()
        others = max(1, self.setting.world - 1)
        self.result.ends.append(self._ends)
        self.result.seconds.append(self.clock() - started)
        self.result.verdict_seconds.append(self.clock() - self._last_word_seconds)
        self.result.bytes_per_rank.append(self._nbytes / others)
        self.result.messages_per_rank.append(self._messages / others)
        self._coordinator = None

    def send(self, message: ToCoordinator) -> None:
        """Deliver *message* to the coordinator after its delay."""
        delay = 0.0
        if message.rank != COORDINATOR:
            self._count(message)
            delay = self._host.delay(_CALLS_UP)
        if type(message).__name__ in ("Wrote", "Failed"):
            self._last_word_seconds = self.clock()
        self.later(delay, self._inbox.append, message)

    def ended(self, rank: int, failures: dict[int, str]) -> None:
        """Note how a save ended for a rank."""
        self._ends[rank] = failures
        if all(each.rank in self._ends or not each.is_alive for each in self.ranks):
            self._over.set()

    def _kill(self, rank: _Rank) -> None:
        self._last_word_seconds = self.clock()
        rank.die()

    def _count(self, message: ToCoordinator | FromCoordinator) -> None:
        self._messages += 1
        self._nbytes += len(encode(self._number, message))

    def _poll(self) -> None:
        coordinator, inbox = self._coordinator, self._inbox
        if coordinator is None:
            return
        self.later(self._host.pause_seconds, self._poll)
        received, inbox[:] = list(inbox), []
        for message in received:
            coordinator.receive(self._plans.complete(message) if isinstance(message, Ready) else message)
        self._carry_out(coordinator.beat())
        self._carry_out(coordinator.tick(self.clock()))

    def _carry_out(self, actions: list[Action]) -> None:
        coordinator = self._coordinator
        assert coordinator is not None
        for action in actions:
            match action:
                case Broadcast(message):
                    self._deliver(dict.fromkeys(range(self.setting.world), message))
                case Scatter(messages):
                    self._deliver(messages)
                case Plan(readies):
                    assert all(
                        len(ready.plan or b"") == self.setting.plan_bytes for ready in readies.values()
                    )
                    is_new = self._number == 1
                    work = bytes(self.setting.plan_bytes)
                    self._carry_out(coordinator.planned(dict.fromkeys(readies, work) if is_new else None))
                case Claim():
                    self._carry_out(coordinator.claimed(COMMIT))
                case Commit():
                    self._carry_out(coordinator.committed())

    def _deliver(self, messages: Any) -> None:
        for rank in self.ranks:
            message = messages[rank.rank]
            if rank.rank != COORDINATOR:
                self._count(message)
            self.later(self._host.delay(_CALLS_DOWN), rank.receive, message)


def simulate(setting: Setting) -> Result:
    """Return the outcome of two saves; the deaths are in the second one."""
    with virtual_loop() as loop:
        return loop.run_until_complete(_simulate(setting, loop))


async def _simulate(setting: Setting, loop: asyncio.AbstractEventLoop) -> Result:
    async with anyio.create_task_group() as tasks:
        simulation = _Simulation(setting, loop)
        for rank in simulation.ranks:
            tasks.start_soon(rank.work)
        await simulation.save(0)
        await simulation.save(setting.deaths)
        for rank in simulation.ranks:
            rank.end()
    simulation.result.refused = simulation.prefix.refused
    return simulation.result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a checkpoint was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 256, 4096])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    print("| ranks | | bytes a rank | messages | seconds | verdict after | refused | saves that failed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lost = 0
    for world in options.worlds:
        for name, more in (
            ("", {}),
            ("no rank keeps to its share of S3's rate", {"is_shared": False}),
            ("and throttled requests use up attempts", {"is_shared": False, "do_throttled_count": True}),
            ("one rank dies", {"deaths": 1}),
            ("one in a hundred dies", {"deaths": max(1, world // 100)}),
        ):
            result = simulate(Setting(world=world, seed=options.seed, **more))
            first, later = result.bytes_per_rank
            print(
                f"| {world} | {name} | {first:,.0f} / {later:,.0f} | {result.messages_per_rank[1]:.1f} "
                f"| {result.seconds[1]:.1f} | {result.verdict_seconds[1]:.2f} | {result.refused} "
                f"| {result.not_durable} |",
                flush=True,
            )
            if not more:
                lost += result.not_durable
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
