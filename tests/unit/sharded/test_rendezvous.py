"""Ranks that meet over a real store, all in this process: how each save ends for them, and what stays behind."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import torch.distributed as dist

from async_ckpt.errors import OptionError, ShardedSaveError
from async_ckpt.options import ServiceOptions
from async_ckpt.sharded.agreement.group import Group
from async_ckpt.sharded.agreement.protocol import Bounds
from async_ckpt.sharded.agreement.rendezvous import Rendezvous
from tests.sharded_tasks import DoubleTask, Offer, Storage

WORLD = 3
BOUNDS = Bounds(silence_seconds=1.0, lateness_seconds=1.5)
WORKS = {rank: b"work of %d" % rank for rank in range(WORLD)}


def keys(store: Any) -> Any:
    """Return what is in the store; how much, where torch does not tell which."""
    return sorted(store.list_keys()) if hasattr(store, "list_keys") else store.num_keys()


@asynccontextmanager
async def ranks(
    store: Any, bounds: Bounds = BOUNDS, *, connecting: Callable[[int], None] = lambda rank: None
) -> AsyncIterator[list[Rendezvous]]:
    """Yield one rendezvous a rank, and close them; nothing may stay in the store.

    Args:
        store: where they meet.
        bounds: how long they wait.
        connecting: called on its store thread as a rank connects.
    """
    before = keys(store)

    def connect(rank: int) -> Any:
        connecting(rank)
        return dist.PrefixStore("group", store)

    met = [
        Rendezvous(Group(rank=rank, world_size=WORLD, connect=partial(connect, rank)), bounds=bounds)
        for rank in range(WORLD)
    ]
    try:
        yield met
    finally:
        await asyncio.gather(*(each.aclose() for each in met))
    assert keys(store) == before


async def agree(
    met: Sequence[Rendezvous], number: int, tasks: Sequence[DoubleTask]
) -> list[BaseException | None]:
    """Return how a save ended for each of *tasks*."""
    with anyio.fail_after(20):
        return await asyncio.gather(
            *(met[task.rank].agree(number, task) for task in tasks), return_exceptions=True
        )


def tasks_of(storage: Storage, **more: Any) -> list[DoubleTask]:
    """Return a task for each rank."""
    return [DoubleTask(rank, storage, Offer(), works=WORKS, **more) for rank in range(WORLD)]


def failures_of(ends: Sequence[BaseException | None]) -> dict[int, str]:
    """Return the failures that all *ends* name, which must be the same."""
    errors = [end for end in ends if isinstance(end, ShardedSaveError)]
    assert len(errors) == len(ends), ends
    assert all(error.failures == errors[0].failures for error in errors), errors
    return errors[0].failures


def raising(error: Exception) -> Callable[[], Awaitable[None]]:
    """Return a step that raises *error*."""

    async def step() -> None:
        raise error

    return step


async def hang() -> None:
    """Be at it until cancelled."""
    await asyncio.Event().wait()


FULL = OSError(errno.ENOSPC, "No space left on device")
WHY = "OSError: [Errno 28] No space left on device"


def test_all_write_then_one_commits() -> None:
    """Each rank writes the work that it was given, rank 0 commits once, and all end well (D5)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            assert await agree(met, 0, tasks) == [None] * WORLD
            assert [task.work for task in tasks] == list(WORKS.values())
            assert [task.done for task in tasks] == [["plan", "write", "commit"], ["write"], ["write"]]
            assert len({each.save_id(0) for each in met}) == 1
        assert storage.committed == ["yes"]

    asyncio.run(main())


def test_plans_cross_the_wire_once() -> None:
    """From the second save of a shape on no plan is asked for, and the work is that of last time (B3)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            assert await agree(met, 0, tasks_of(storage)) == [None] * WORLD
            tasks = tasks_of(storage)
            tasks[0].works = None
            assert await agree(met, 1, tasks) == [None] * WORLD
            assert [task.offer.plans for task in tasks] == [0] * WORLD
            assert [task.work for task in tasks] == [None] * WORLD
            assert {ready.plan for ready in tasks[0].readies.values()} == {b"plan"}

    asyncio.run(main())


def test_a_new_shape_of_one_rank_is_told() -> None:
    """A rank whose shapes have changed sends its plan; rank 0 still knows those of the others (B3)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            assert await agree(met, 0, tasks_of(storage)) == [None] * WORLD
            tasks = tasks_of(storage)
            tasks[1].offer = Offer(fingerprint=b"others", content=b"another plan")
            assert await agree(met, 1, tasks) == [None] * WORLD
            assert [task.offer.plans for task in tasks] == [0, 1, 0]
            plans = [ready.plan for _, ready in sorted(tasks[0].readies.items())]
            assert plans == [b"plan", b"another plan", b"plan"]

    asyncio.run(main())


def test_who_missed_the_last_work_is_given_it() -> None:
    """After a save that failed in the middle, the work of last time is sent to whoever may not have it."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            assert await agree(met, 0, tasks_of(storage)) == [None] * WORLD
            tasks = tasks_of(storage)
            tasks[2].steps = {"write": raising(FULL)}
            failures_of(await agree(met, 1, tasks))
            tasks = tasks_of(storage)
            tasks[0].works = None
            assert await agree(met, 2, tasks) == [None] * WORLD
            assert [task.work for task in tasks] in ([None] * WORLD, list(WORKS.values()))

    asyncio.run(main())


def test_values_of_any_size() -> None:
    """Plans and works beyond what a store takes as one value arrive whole."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            large = bytes(range(256)) * (36 << 10)  # 9 MiB
            tasks[1].offer = Offer(content=large)
            tasks[0].works = {0: b"", 1: b"small", 2: large}
            assert await agree(met, 0, tasks) == [None] * WORLD
            assert tasks[0].readies[1].plan == large
            assert [task.work for task in tasks] == [b"", b"small", large]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("rank", "step"), [(0, "plan"), (0, "write"), (1, "write"), (2, "write"), (0, "commit")]
)
def test_an_error_reaches_everybody(rank: int, step: str) -> None:
    """Whatever raises, on whichever rank: all ranks end with the same error, and nothing of the save stays (E4)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            tasks[rank].steps = {step: raising(FULL)}
            started = asyncio.get_running_loop().time()
            ends = await agree(met, 0, tasks)
            assert asyncio.get_running_loop().time() - started < 1
            assert failures_of(ends) == {rank: WHY}
            assert ends[rank].__cause__ is FULL  # type: ignore[union-attr]
            assert not storage.objects
            assert not storage.committed
            assert await agree(met, 1, tasks_of(storage)) == [None] * WORLD  # the next one works

    asyncio.run(main())


def test_who_writes_is_stopped() -> None:
    """The others stop writing when one has failed, rather than finish what nobody will use."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage, steps={"write": hang})
            tasks[1].steps = {"write": raising(FULL)}
            assert failures_of(await agree(met, 0, tasks)) == {1: WHY}
            assert [task.done[-2:] for task in tasks] == [["write", "undo"]] * WORLD

    asyncio.run(main())


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_refusal_counts_before_and_after_the_others_come(rank: int) -> None:
    """A rank that refuses a save on the caller's thread fails it for all, whoever comes first (E4)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            others = [task for task in tasks_of(storage) if task.rank != rank]
            met[rank].fail(0, "QueueFullError: no room")
            assert failures_of(await agree(met, 0, others)) == {rank: "QueueFullError: no room"}
            refuse = asyncio.get_running_loop().call_later
            refuse(0.05, met[rank].fail, 1, "QueueFullError: no room")
            assert failures_of(await agree(met, 1, others)) == {rank: "QueueFullError: no room"}
            assert await agree(met, 2, tasks_of(storage)) == [None] * WORLD

    asyncio.run(main())


def test_ranks_with_other_locations_fail_both_named() -> None:
    """A save that ranks make to different locations fails, and both are named (O4)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            tasks[2].offer = Offer(location="s3://bucket/elsewhere")
            failures = failures_of(await agree(met, 0, tasks))
            assert set(failures) == {0, 2} or set(failures) == {1, 2}
            assert all("elsewhere" in why and "step-1" in why for why in failures.values())

    asyncio.run(main())


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_late_rank_fails_the_save_and_is_told(rank: int) -> None:
    """A rank that does not come fails the save within the bound; when it comes at last, it learns so at once (E5)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore()) as met:
            others = [task for task in tasks_of(storage) if task.rank != rank]
            clock = asyncio.get_running_loop().time
            started = clock()
            failures = failures_of(await agree(met, 0, others))
            assert BOUNDS.lateness_seconds <= clock() - started < BOUNDS.lateness_seconds + 1
            assert failures == {rank: "did not begin this save within 1.5 s"}
            started = clock()
            (end,) = await agree(met, 0, [DoubleTask(rank, storage, Offer(), works=WORKS)])
            assert isinstance(end, ShardedSaveError)
            assert clock() - started < 0.5
            assert not storage.objects

    asyncio.run(main())


@pytest.mark.parametrize("rank", range(WORLD))
def test_who_connects_slowly_is_waited_for(rank: int) -> None:
    """A rank that takes longer than the silence bound to connect is late, not silent, so the save succeeds."""
    connected = threading.Event()

    async def main() -> None:
        storage = Storage()
        bounds = Bounds(silence_seconds=0.3, lateness_seconds=20.0)
        connecting = lambda who: connected.wait(20) if who == rank else None
        async with ranks(dist.HashStore(), bounds, connecting=connecting) as met:  # type: ignore[arg-type]
            asyncio.get_running_loop().call_later(3 * bounds.silence_seconds, connected.set)
            assert await agree(met, 0, tasks_of(storage)) == [None] * WORLD

    asyncio.run(main())


@pytest.mark.parametrize("rank", range(WORLD))
def test_who_connects_too_late_has_the_error_of_the_others(rank: int) -> None:
    """A rank that connects as the others have just given it up learns what they have ended with (E4)."""
    connected = threading.Event()

    async def main() -> None:
        storage = Storage()
        connecting = lambda who: connected.wait(20) if who == rank else None
        async with ranks(dist.HashStore(), connecting=connecting) as met:  # type: ignore[arg-type]
            tasks = tasks_of(storage)
            late = asyncio.create_task(agree(met, 0, [tasks.pop(rank)]))
            ends = await agree(met, 0, tasks)
            connected.set()
            failures = failures_of([*ends, *await late])
            assert failures == {rank: "did not begin this save within 1.5 s"}
            assert not storage.objects

    asyncio.run(main())


@pytest.mark.parametrize("rank", range(WORLD))
def test_who_gives_up_tells_the_others_first(rank: int) -> None:
    """A cancelled rank says so: the others end at once, not after the silence bound (E5)."""

    async def main() -> None:
        storage = Storage()
        async with ranks(dist.HashStore(), Bounds()) as met:
            begun = asyncio.Event()

            async def begin() -> None:
                begun.set()
                await hang()

            tasks = tasks_of(storage)
            tasks[rank].steps = {"write": begin}
            one = asyncio.create_task(met[rank].agree(0, tasks[rank]))
            rest = asyncio.create_task(agree(met, 0, [task for task in tasks if task.rank != rank]))
            await begun.wait()
            one.cancel()
            failures = failures_of(await rest)
            assert set(failures) == {rank}
            assert "given up" in failures[rank]
            with pytest.raises(asyncio.CancelledError):
                await one

    asyncio.run(main())


def test_an_answer_that_got_lost_is_looked_up() -> None:
    """A commit that took place and raised all the same is a success on every rank (E4)."""

    async def main() -> None:
        storage = Storage()

        async def commit_and_lose_the_answer() -> None:
            storage.committed.append("yes")
            raise ConnectionError("reset")

        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            tasks[0].steps = {"commit": commit_and_lose_the_answer}
            assert await agree(met, 0, tasks) == [None] * WORLD
            assert len(storage.objects) == WORLD

    asyncio.run(main())


def test_objects_stay_where_nobody_can_tell() -> None:
    """Where even storage does not say whether the commit took place, no rank deletes what it wrote (D5)."""

    async def main() -> None:
        storage = Storage(is_gone=True)
        async with ranks(dist.HashStore()) as met:
            tasks = tasks_of(storage)
            tasks[0].steps = {"commit": raising(ConnectionError("reset"))}
            failures = failures_of(await agree(met, 0, tasks))
            assert failures == {
                0: "ConnectionError: reset; it is unknown whether the checkpoint was committed"
            }
            assert len(storage.objects) == WORLD

    asyncio.run(main())


def test_a_world_of_one_needs_no_store() -> None:
    """A process on its own agrees with itself, through the same steps and no store, and ends its thread (B2)."""

    async def main() -> None:
        storage = Storage()
        met = Rendezvous.open(None, None, ServiceOptions())
        assert (met.rank, met.world_size) == (0, 1)
        task = DoubleTask(0, storage, Offer(), works={0: b"all"})
        await met.agree(0, task)
        assert task.done == ["plan", "write", "commit"]
        with pytest.raises(ShardedSaveError) as raised:
            await met.agree(1, DoubleTask(0, storage, works={0: b""}, steps={"write": raising(FULL)}))
        assert raised.value.failures == {0: WHY}
        await met.aclose()
        assert not [thread for thread in threading.enumerate() if "agreement" in thread.name]

    asyncio.run(main())


def test_a_store_without_a_group_needs_to_know_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store alone does not say which rank this is: the environment does, or the error says what to do."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match=r"initialize torch\.distributed, or set RANK"):
        Rendezvous.open(None, dist.HashStore(), ServiceOptions())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Rendezvous.open(None, dist.HashStore(), ServiceOptions()).rank == 1
