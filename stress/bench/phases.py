"""Where a stall goes: the two phases of ours that depend on the state, measured by themselves."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

from async_ckpt.snapshot import HostPool, capture
from async_ckpt.snapshot.budget import Budget

__all__ = ["capture_and_copy_seconds"]

_REPEATS = 7


def capture_and_copy_seconds(state: Any) -> tuple[float, float]:
    """Return the median seconds of the walk over *state* and of the copy into warm memory."""
    pool = HostPool(Budget(1 << 40))
    captures, copies = [], []
    for _ in range(1 + _REPEATS):
        start = perf_counter()
        captured = capture(state)
        walked = perf_counter()
        buffer = pool.lease(captured.nbytes)
        assert buffer is not None
        leased = perf_counter()
        snapshot = captured.stage(buffer)
        copies.append(perf_counter() - leased)
        captures.append(walked - start)
        snapshot.close()
        pool.release(buffer)
    pool.close()
    return median(captures[1:]), median(copies[1:])
