"""What thousands of pending operations cost: the CPU time of the loop thread, which holds the GIL meanwhile.

"queue" is the deciding alone; the others are the whole service. Beside it stands what the calls themselves take of the
caller's thread.

    python -m stress.bench.pending [--operations 10000] [--rounds 5]

A save is held up in storage, and everything else waits behind it; then it is let go, and all come to their end. Storage
takes no time, so what is measured is accepting, ordering and ending. In "rotation" half of the operations are saves,
which take their snapshot and are cancelled as they wait. The times are each thread's own.

The goal is a second of the loop thread for 10,000 operations, and growth no faster than their number.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from async_ckpt import CheckpointService
from async_ckpt.engine.queue import Admit, Kind, Lane, Op, Phase, Queue, Start
from async_ckpt.stores.base import Receipt
from async_ckpt.testing import Fault, FaultyStore, Gate
from stress.bench.harness import table

Program = Callable[[CheckpointService, int], None]


def removals(service: CheckpointService, number: int) -> None:
    """Removals of different files."""
    for index in range(number):
        service.remove(f"memory://run/{index}")


def rotation(service: CheckpointService, number: int) -> None:
    """Save a new one, remove the one before."""
    state = {"weights": torch.zeros(64)}
    for index in range(number // 2):
        service.save(state, f"memory://run/{index}")
        service.remove(f"memory://run/{index - 1}")


def directories(service: CheckpointService, number: int) -> None:
    """Removals in a directory, and of the directory itself."""
    for index in range(number):
        service.remove(f"memory://run/{index}" if index % 10 else "memory://run")


PROGRAMS: dict[str, Program] = {each.__name__: each for each in (removals, rotation, directories)}


def seconds(program: Program, number: int) -> tuple[float, float]:
    """Return the CPU seconds of the loop thread and the caller's, from the first of *number* operations to the end."""
    with held_up(number) as (service, gate):
        runtime = service._resources.running()
        began, called = runtime.call(time.thread_time), time.thread_time()
        program(service, number)
        calls = time.thread_time() - called
        gate.open()
        service.wait()
        return runtime.call(time.thread_time) - began, calls


@contextmanager
def held_up(number: int) -> Iterator[tuple[CheckpointService, Gate]]:
    """Give a service that has room for *number* saves, and what opens the storage that holds up its first."""
    gate = Gate()
    store = FaultyStore(_Nowhere(), [Fault(operation="begin", calls=[1], gate=gate)])
    with CheckpointService(
        queue_depth=number + 1, store_factory=lambda *_: store, durability="process", memory_limit="4GiB"
    ) as service:
        service.save({"weights": torch.zeros(64)}, "memory://held")
        yield service, gate


def queue_seconds(number: int) -> float:
    """Return the CPU seconds in which the queue takes *number* removals in behind a save, and sees them end."""
    queue = Queue()
    lane = Lane(queue_depth=1, max_concurrent_saves=1, overflow="block")
    running: deque[Op] = deque()

    def pump() -> None:
        while (action := queue.decide(lambda *_: True)) is not None:
            action.op.phase = Phase.STAGING if isinstance(action, Admit) else Phase.RUNNING
            if isinstance(action, Start):
                running.append(action.op)

    began = time.thread_time()
    save = Op(id=1, lane=lane, kind=Kind.SAVE, key="run/held", phase=Phase.WAITING, thread=1)
    queue.add(save)
    pump()
    save.phase = Phase.QUEUED
    pump()
    for index in range(2, number + 2):
        queue.add(Op(id=index, lane=lane, kind=Kind.REMOVE, key=f"run/{index}", phase=Phase.QUEUED, thread=1))
        pump()
    while running:
        queue.durable(running.popleft())
        pump()
    assert not len(queue)
    return time.thread_time() - began


class _Nowhere:
    """Storage that takes no time and keeps nothing."""

    repeats_parts = True
    part_size = None
    max_concurrent_parts = None
    is_paced = False
    swept = ()

    async def begin(self, location: Any, nbytes: int) -> _Nowhere:
        return self

    async def put(self, part: Any, content: Any) -> Any:
        return Receipt(index=part.index)

    async def nothing(self, *_: Any) -> None:
        return

    commit = abort = delete = aclose = nothing


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = [options.operations // 2, options.operations, options.operations * 2]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for size in sizes:
            found.setdefault(("queue", size), []).append((queue_seconds(size), 0.0))
            for name, program in PROGRAMS.items():
                found.setdefault((name, size), []).append(seconds(program, size))
    rows = []
    for name in ("queue", *PROGRAMS):
        loop = [median(times[0] for times in found[name, size]) for size in sizes]
        calls = [median(times[1] for times in found[name, size]) for size in sizes]
        rows.append(
            [
                name,
                *(f"{each:.2f} s" for each in loop),
                *(f"{each[-1] / sizes[-1] * 1e6:.0f} µs" if each[-1] else "" for each in (loop, calls)),
            ]
        )
    print(table(["pending", *map(str, sizes), "each", "each call"], rows))


if __name__ == "__main__":
    main()
