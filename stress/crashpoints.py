"""Kills processes at random moments of their saves, and checks what they leave.

The process keeps two checkpoints: it saves the next one and asks for the deletion of the one before the
last. Before and after each step it says so. Whatever the moment of its death, then:

* **D1**: what it was told to be durable, and had not asked to delete, is there and whole.
* **D3**: once one checkpoint was durable, there is one.
* **D2**: nothing that is visible is torn, and a later save sweeps what is not visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import torch

from async_ckpt import CheckpointService
from async_ckpt.options import PageCache
from stress.children import Say, child
from stress.environment import Environment

__all__ = ["kill_once"]

_FLOATS = 500_000
_LONGEST_LIFE_SECONDS = 0.5


def kill_once(where: Environment, random: Random) -> list[str]:
    """Let a process save, kill it, and return the violations in what it left."""
    base = where.fresh()
    page_cache: PageCache = random.choice(
        ["keep", "drop"]
    )  # where that is of no disk, it makes no difference
    with child(_save_for_ever, base, dict(where.storage_options), page_cache) as process:
        said = list(process.words(seconds=random.uniform(0.0, _LONGEST_LIFE_SECONDS)))
        said += process.kill()
    return [*_broken(where, base, said), *_unswept(where, base, said)]


def _save_for_ever(say: Say, base: str, storage_options: Mapping[str, Any], page_cache: PageCache) -> None:
    torch.set_num_threads(1)

    def say_durable(step: int) -> Callable[[object], None]:
        return lambda _: say(("durable", step))

    with CheckpointService(
        part_size="256KiB", max_concurrent_saves=2, page_cache=page_cache, storage_options=storage_options
    ) as service:
        step = 0
        while True:
            service.save(_state(step), f"{base}/{step}.ckpt").add_done_callback(say_durable(step))
            if step >= 2:
                say(("deleting", step - 2))
                service.remove(f"{base}/{step - 2}.ckpt")
            step += 1


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": [torch.full((_FLOATS,), float(step)) for _ in range(3)]}


def _broken(where: Environment, base: str, said: list[tuple[str, int]]) -> Iterator[str]:
    deleting = {step for word, step in said if word == "deleting"}
    durable = {step for word, step in said if word == "durable"}
    there = set()
    for step in range(_beyond(said)):
        try:
            state = where.state_at(f"{base}/{step}.ckpt")
            whole = state["step"] == step
            whole = whole and all(bool((weight == step).all()) for weight in state["weights"])
        except FileNotFoundError:
            continue
        except Exception as error:  # torn, whatever it is that torch says of it
            yield f"D2: {step}.ckpt is torn: {error!r}"
        else:
            if not whole:
                yield f"D2: {step}.ckpt holds another state"
        there.add(step)
    for step in durable - deleting - there:
        yield f"D1: {step}.ckpt was durable, and is gone"
    if durable and not there:
        yield "D3: a checkpoint was durable, and there is none"


def _unswept(where: Environment, base: str, said: list[tuple[str, int]]) -> Iterator[str]:
    with CheckpointService(storage_options=where.storage_options) as service:
        service.save({}, f"{base}/next.ckpt").wait()
        for name in where.leftovers():
            yield f"D2: {name} was not swept"
        for step in range(_beyond(said)):
            service.remove(f"{base}/{step}.ckpt")


def _beyond(said: list[tuple[str, int]]) -> int:
    """Return a step that the process cannot have come to: the queue is not so deep."""
    return max((step for _, step in said), default=0) + 8
