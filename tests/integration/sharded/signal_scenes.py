"""Saves in the midst of saves, as a signal handler makes them: what each of several processes does in a test."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

import async_ckpt
from async_ckpt import CheckpointService, Handle, ShardedSaveError
from tests.integration.sharded.states import Training

PACKAGE = Path(async_ckpt.__file__).parent
#: What a call runs through on its caller's thread, but for what plain saves run through as well.
WALKED = {str(PACKAGE / "service.py"), str(PACKAGE / "engine" / "submission.py")} | {
    str(file) for room in ("agreement", "writing") for file in (PACKAGE / "sharded" / room).glob("*.py")
}
PATIENCE_SECONDS = 20.0


@contextmanager
def _signal_at(number: int) -> Iterator[list[int]]:
    """Send this process a signal before the *number*-th line that this thread runs in the walked files; count them."""
    lines = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in WALKED:
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == number:
                os.kill(os.getpid(), signal.SIGUSR2)
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(None)


def interrupted(folder: Path, *, trials: int, ranks: list[int], seed: int = 0) -> Any:
    """Save, with a signal at some line whose handler saves, too; tell how each save ended, and how long it took.

    Args:
        folder: for the checkpoints.
        trials: how often.
        ranks: who gets the signal.
        seed: of the lines.
    """
    rank, training = dist.get_rank(), Training()
    chance = random.Random(seed * 10 + rank)
    told = []
    longest = _lines(folder, training)
    for trial in range(trials):
        number = chance.randrange(1, longest + 1) if rank in ranks else 0
        told.append(_interrupted_once(folder / f"trial-{trial}", training, number))
        dist.barrier()
    training.step()
    with CheckpointService() as service:
        service.save_sharded(training.state(), folder / "afterwards").wait(PATIENCE_SECONDS)
    return told


def _interrupted_once(folder: Path, training: Training, number: int) -> dict[str, Any]:
    training.step()
    state, began = training.state(), time.monotonic()
    service = CheckpointService(queue_depth=4, agreement_timeout=3.0, on_error="warn")
    service.save_sharded(state, folder / "before").wait(PATIENCE_SECONDS)
    handles: dict[str, Handle] = {}

    def save(name: str) -> None:
        handles[name] = service.save_sharded(state, folder / name)

    with _handling(lambda: save("handler")), _signal_at(number):
        save("loop")
    told: dict[str, Any] = {name: _end(each) for name, each in handles.items()}
    told["seconds"] = time.monotonic() - began
    with suppress(Exception):
        service.close()
    return told


def _lines(folder: Path, training: Training) -> int:
    """Return how many lines a save takes that is not a service's first."""
    with CheckpointService() as service:
        service.save_sharded(training.state(), folder / "first").wait(PATIENCE_SECONDS)
        with _signal_at(0) as lines:
            handle = service.save_sharded(training.state(), folder / "counted")
        handle.wait(PATIENCE_SECONDS)
    return lines[0]


def _end(handle: Handle) -> str:
    try:
        return handle.wait(PATIENCE_SECONDS).state.value
    except ShardedSaveError as error:
        return f"failed: {error}"


@contextmanager
def _handling(act: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR2, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)
