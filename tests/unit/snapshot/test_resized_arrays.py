"""Numpy arrays that another thread resizes while they are saved."""

from __future__ import annotations

import io
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.errors import StateChangedError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostBuffer, Snapshot, capture, capture_objects
from tests.support import PATIENCE_SECONDS


def _read_file(snapshot: Snapshot) -> Any:
    layout = lay_out(snapshot)
    return torch.load(io.BytesIO(b"".join(layout.read(0, layout.nbytes))), weights_only=False)


@contextmanager
def _resizing(array: Any) -> Iterator[None]:
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            for length in (401, 400):
                array.resize((length,), refcheck=False)

    thread = threading.Thread(target=resize)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("take", "read"), [(capture, _read_file), (capture_objects, lambda snapshot: snapshot.state())]
)
def test_an_array_that_is_resized_all_the_time(take: Any, read: Callable[[Snapshot], Any]) -> None:
    """What is written has the shape that the array had at one instant, or the save fails and says so."""
    array = numpy.ones(400)
    tally = Counter[str]()
    deadline = monotonic() + PATIENCE_SECONDS
    with _resizing(array):
        while not (tally["refused"] >= 20 and tally["taken"] >= 20) and monotonic() < deadline:
            captured = take({"array": array})
            try:
                snapshot = captured.stage(HostBuffer(captured.nbytes))
            except StateChangedError:
                tally["refused"] += 1
            else:
                tally["taken"] += 1
                found = read(snapshot)["array"]
                assert len(found) in (400, 401)
                snapshot.close()
    assert tally["refused"] >= 20
    assert tally["taken"] >= 20
