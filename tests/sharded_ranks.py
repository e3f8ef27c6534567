"""Real processes as the ranks of a gloo group, each of which saves while its main thread trains.

Guarantees: every process is ended and joined when the test has ended; a rank that is to be killed kills itself, at an
exact step, with SIGKILL.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from async_ckpt.errors import ShardedSaveError
from async_ckpt.options import ServiceOptions
from async_ckpt.sharded.agreement.messages import Ready
from async_ckpt.sharded.agreement.rendezvous import Rendezvous
from tests.sharded_tasks import Offer

__all__ = ["Outcome", "Save", "World", "run_ranks"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.sharded_ranks"])
_JOIN_SECONDS = 60.0
_REDUCTIONS = 50


@dataclass(frozen=True, kw_only=True)
class Save:
    """One sharded save.

    Attributes:
        errors: by rank, at which step it raises: plan, write, commit, late (does not come), refuse, elsewhere.
        kills: by rank, at which step it kills itself: begun, plan, write, written, commit, committed.
        hangs: by rank, for how long its event loop stands still as it writes.
    """

    errors: Mapping[int, str] = field(default_factory=dict)
    kills: Mapping[int, str] = field(default_factory=dict)
    hangs: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a save ended on a rank.

    Attributes:
        failures: ``None`` if it is durable there.
        seconds: that it took.
    """

    failures: dict[int, str] | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class World:
    """What all ranks are told.

    Attributes:
        folder: where all write to.
        saves: one after the other.
        is_host_rank_0: whether the store lives and dies with rank 0; else with the test.
        silence_seconds: the bound for who has come.
        lateness_seconds: the bound for who has not.
        trains: whether the main threads reduce something meanwhile and afterwards.
    """

    folder: Path
    saves: Sequence[Save]
    world_size: int = 3
    is_host_rank_0: bool = False
    silence_seconds: float = 2.0
    lateness_seconds: float = 3.0
    trains: bool = True


class _FileTask:
    """A rank's part in a save of files on a local disk."""

    def __init__(self, world: World, rank: int, number: int, rendezvous: Rendezvous) -> None:
        save = world.saves[number]
        elsewhere = save.errors.get(rank) == "elsewhere"
        self.offer = Offer(location="elsewhere" if elsewhere else "here", content=b"plan of %d" % rank)
        self._world, self._rank, self._number, self._save = world, rank, number, save
        self._rendezvous = rendezvous
        self._marker = world.folder / "metadata"

    async def plan(self, readies: Mapping[int, Ready]) -> Mapping[int, bytes] | None:
        assert all(ready.plan == b"plan of %d" % rank for rank, ready in readies.items())
        await self._come_to("plan")
        return {rank: b"work of %d" % rank for rank in readies}

    async def write(self, work: bytes | None) -> None:
        assert work == b"work of %d" % self._rank
        seconds = self._save.hangs.get(self._rank)
        if seconds is not None:
            time.sleep(seconds)  # noqa: ASYNC251  # it is to stand still
        await self._come_to("write")
        self._object(self._rank).write_bytes(work)
        if self._save.kills.get(self._rank) == "written":
            asyncio.get_running_loop().call_later(0.2, _kill_self)  # when it has said so

    async def commit(self, readies: Mapping[int, Ready]) -> None:
        assert all(self._object(rank).exists() for rank in readies), "D5"
        if self._save.kills.get(1) == "written":
            await asyncio.sleep(0.6)  # until that rank has ended
        await self._come_to("commit")
        self._marker.write_text(self._rendezvous.save_id(self._number))
        await self._come_to("committed")

    async def look_up(self, save_id: str) -> bool | None:
        return self._marker.exists() and self._marker.read_text() == save_id

    async def undo(self) -> None:
        self._object(self._rank).unlink(missing_ok=True)

    def _object(self, rank: int) -> Path:
        return self._world.folder / f"{rank}.{self._rendezvous.save_id(self._number)}"

    async def _come_to(self, step: str) -> None:
        if self._save.kills.get(self._rank) == step:
            _kill_self()
        if self._save.errors.get(self._rank) == step:
            raise OSError(28, "No space left on device")


def run_ranks(world: World) -> list[list[Outcome] | None]:
    """Return how each save ended on each rank; ``None`` for one that was killed.

    Raises:
        AssertionError: training was disturbed, or something is left in the store.
    """
    port = _free_port()
    store = None
    if not world.is_host_rank_0:
        store = dist.TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    processes, ends = [], []
    try:
        for rank in range(world.world_size):
            end, others_end = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank_main, args=(world, rank, port, others_end), daemon=True)
            process.start()
            others_end.close()
            processes.append(process)
            ends.append(end)
        return [_answer(end) for end in ends]
    finally:
        for process in processes:
            process.join(_JOIN_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for end in ends:
            end.close()
        del store


def _answer(end: Connection) -> list[Outcome] | None:
    try:
        assert end.poll(_JOIN_SECONDS), "a rank does not end"
        answer: Any = end.recv()
    except EOFError:
        return None
    if isinstance(answer, str):
        raise AssertionError(answer)
    return answer  # type: ignore[no-any-return]


def _rank_main(world: World, rank: int, port: int, answer: Connection) -> None:
    try:
        answer.send(_run_rank(world, rank, port))
    except BaseException as error:
        answer.send(f"rank {rank}: {type(error).__name__}: {error}")
    answer.close()
    os._exit(0)  # a group of which one rank was killed cannot be ended in an orderly way


def _run_rank(world: World, rank: int, port: int) -> list[Outcome]:
    torch.set_num_threads(1)
    is_host = world.is_host_rank_0 and rank == 0
    store = dist.TCPStore(
        "127.0.0.1", port, None, is_master=is_host, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world.world_size, timeout=timedelta(seconds=20)
    )
    keys = _keys(store)
    outcomes: list[Outcome] = []
    failed: list[BaseException] = []

    def save() -> None:
        try:
            outcomes.extend(asyncio.run(_save_all(world, rank)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    if world.trains:
        _train(world)
    thread.join()
    if failed:
        raise failed[0]
    if world.trains:
        _train(world)
        dist.barrier()
        if rank == 0:
            assert _keys(store) <= keys, _keys(store) - keys
        dist.barrier()
    elif is_host:
        thread.join()
        time.sleep(1.0)  # the store goes with this process, and the others have things to hear
    return outcomes


def _train(world: World) -> None:
    for step in range(_REDUCTIONS):
        value = torch.tensor([float(step + dist.get_rank())])
        dist.all_reduce(value)
        expected = step * world.world_size + sum(range(world.world_size))
        assert value.item() == expected, "training was disturbed"


def _keys(store: Any) -> set[str]:
    return {key for key in store.list_keys() if "async_ckpt" in key} if hasattr(store, "list_keys") else set()


async def _save_all(world: World, rank: int) -> list[Outcome]:
    options = ServiceOptions(silence_timeout=world.silence_seconds, agreement_timeout=world.lateness_seconds)
    rendezvous = Rendezvous.open(None, None, options)
    outcomes = []
    for number, save in enumerate(world.saves):
        task = _FileTask(world, rank, number, rendezvous)
        started = time.monotonic()
        failures: dict[int, str] | None = None
        error = save.errors.get(rank)
        if error == "refuse":
            rendezvous.fail(number, "QueueFullError: no room")
        elif error == "late":
            await asyncio.sleep(world.lateness_seconds + 0.5)
        if save.kills.get(rank) == "begun":
            asyncio.get_running_loop().call_later(0.5, _kill_self)
        elif save.kills and "begun" in save.kills.values():
            await asyncio.sleep(1.0)
        if error != "refuse":
            try:
                await rendezvous.agree(number, task)
            except ShardedSaveError as raised:
                failures = raised.failures
        outcomes.append(Outcome(failures, time.monotonic() - started))
    await rendezvous.aclose()
    return outcomes


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
