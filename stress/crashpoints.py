"""Processes killed at random moments of their saves, and what they leave.

The process keeps two checkpoints: it saves the next one and asks for the deletion of the one before the
last. Before and after each step it says so. Whatever the moment of its death, then:

* **D1**: what it was told to be durable, and had not asked to delete, is there and whole.
* **D3**: once one checkpoint was durable, there is one.
* **D2**: nothing that is visible is torn, and a later save sweeps what is not visible.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import torch

from async_ckpt import CheckpointService

__all__ = ["kill_once"]

_FLOATS = 500_000
_LONGEST_LIFE_SECONDS = 0.5
_LEFTOVERS = ".async_ckpt.*.tmp"


def kill_once(directory: Path, random: Random) -> list[str]:
    """Let a process save into *directory*, kill it, and return what is wrong with what it left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["async_ckpt"])
    ours, its = context.Pipe(duplex=False)
    with ours:
        process = context.Process(target=_save_for_ever, args=(directory, its))
        process.start()
        its.close()
        try:
            said = list(_words(ours, seconds=random.uniform(0.0, _LONGEST_LIFE_SECONDS)))
        finally:
            process.kill()
            process.join()
        said += _words(ours, seconds=0.0)
    return [*_broken(directory, said), *_unswept(directory)]


def _save_for_ever(directory: Path, parent: Connection) -> None:
    torch.set_num_threads(1)
    sending = threading.Lock()

    def say(word: str, step: int) -> None:
        with sending:
            parent.send((word, step))

    def say_durable(step: int) -> Callable[[object], None]:
        return lambda _: say("durable", step)

    with CheckpointService(part_size="256KiB", max_concurrent_saves=2) as service:
        step = 0
        while True:
            service.save(_state(step), directory / f"{step}.ckpt").add_done_callback(say_durable(step))
            if step >= 2:
                say("deleting", step - 2)
                service.remove(directory / f"{step - 2}.ckpt")
            step += 1


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": [torch.full((_FLOATS,), float(step)) for _ in range(3)]}


def _words(ours: Connection, *, seconds: float) -> Iterator[tuple[str, int]]:
    """Yield what the process says, until it is dead or *seconds* after its first word have passed."""
    deadline = None
    try:
        while ours.poll(None if deadline is None else max(0.0, deadline - monotonic())):
            yield ours.recv()
            deadline = deadline or monotonic() + seconds
    except (EOFError, OSError):  # dead, perhaps in the middle of a word
        return


def _broken(directory: Path, said: list[tuple[str, int]]) -> Iterator[str]:
    deleting = {step for word, step in said if word == "deleting"}
    durable = {step for word, step in said if word == "durable"}
    for step in durable - deleting:
        if not (directory / f"{step}.ckpt").exists():
            yield f"D1: {step}.ckpt was durable, and is gone"
    if durable and not any(directory.glob("*.ckpt")):
        yield "D3: a checkpoint was durable, and there is none"
    for file in directory.glob("*.ckpt"):
        try:
            state = torch.load(file, weights_only=True)
            whole = state["step"] == int(file.stem)
            whole = whole and all(bool((weight == state["step"]).all()) for weight in state["weights"])
        except Exception as error:  # torn, whatever it is that torch says of it
            yield f"D2: {file.name} is torn: {error!r}"
        else:
            if not whole:
                yield f"D2: {file.name} holds another state"


def _unswept(directory: Path) -> Iterator[str]:
    with CheckpointService() as service:
        service.save({}, directory / "next.ckpt").wait()
    for name in directory.glob(_LEFTOVERS):
        yield f"D2: {name.name} was not swept"
