"""How deeply a state may be nested."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.snapshot import capture
from tests.unit.snapshot.saving import file_of, file_of_torch


class Nested:
    """Holds another one, and is pickled by a function."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> Any:
        return Nested, (self.inner,)


def _nested(depth: int) -> Any:
    state: Any = torch.ones(1)
    for _ in range(depth):
        state = Nested(state)
    return state


def _deepest(accepts: Callable[[Any], object]) -> int:
    """Return how many levels are accepted."""
    least, most = 0, 40_000
    while least + 1 < most:
        depth = (least + most) // 2
        try:
            accepts(_nested(depth))
        except (RecursionError, UnpicklableStateError):
            most = depth
        else:
            least = depth
    return least


def test_what_torch_save_reaches_is_reached() -> None:
    """A state may be nested as deeply as for torch.save, but for the few calls around it; all of it is written."""
    ours, torchs = _deepest(capture), _deepest(file_of_torch)
    assert ours >= torchs - 20
    both = min(ours, torchs)
    assert file_of(capture(_nested(both))) == file_of_torch(_nested(both))


def test_a_small_stack_bears_what_was_accepted() -> None:
    """However deep a state is for which the caller's stack and recursion limit were enough, any thread lays it out."""
    limit, stack = sys.getrecursionlimit(), threading.stack_size()
    written: list[bytes] = []
    try:
        sys.setrecursionlimit(50_000)
        expected, captured = file_of_torch(_nested(8000)), capture(_nested(8000))
        threading.stack_size(256 << 10)
        thread = threading.Thread(target=lambda: written.append(file_of(captured)))
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(stack)
    assert written == [expected]
