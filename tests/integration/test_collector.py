"""Saves and loads of very many tensors do not send Python's garbage collector through the whole program."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService

_COUNT = 5_000
_OLDEST = 2


@contextmanager
def full_passes() -> Iterator[list[float]]:
    """Note each pass through the whole program, after one that leaves nothing to be done."""
    found: list[float] = []

    def note(phase: str, told: dict[str, Any]) -> None:
        if phase == "stop" and told["generation"] == _OLDEST:
            found.append(told["collected"])

    gc.collect()
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
def test_many_tensors(tmp_path: Path, sharded: bool) -> None:
    """Before, there was one in every second file, and two in each sharded save."""
    state = {f"layers.{number}.weight": torch.zeros(16) for number in range(_COUNT)}
    with CheckpointService() as service:
        save = service.save_sharded if sharded else service.save
        save(state, tmp_path / "first").wait()
        with full_passes() as found:
            for _ in range(8):
                save(state, tmp_path / "first").wait()
            if sharded:
                service.load_sharded(state, tmp_path / "first")
            assert found == []
