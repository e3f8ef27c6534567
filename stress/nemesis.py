"""The nemesis: storage that fails or is slow at calls that are drawn in advance from a seed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from random import Random
from typing import Any

from async_ckpt.service import StoreFactory
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing.faults import Fault, FaultyStore, Operation

__all__ = ["INJECTED", "faulty_stores"]

INJECTED = "injected"
"""In the message of every error that is the nemesis's."""

_CALLS = 4000
_ERROR_RATES: dict[Operation, float] = {
    "begin": 0.02,
    "put": 0.01,
    "commit": 0.04,
    "delete": 0.05,
    "source": 0.03,
    "read": 0.01,
}
_TRANSIENT_PUT_RATE = 0.05
_DELAY_RATE = 0.1
_LONGEST_DELAY_SECONDS = 0.02


def faulty_stores(random: Random, storage_options: Mapping[str, Any]) -> StoreFactory:
    """Return a factory of real stores with faults around them.

    Args:
        random: decides which calls fail or wait.
        storage_options: what the remote file system is reached with.
    """

    def make(location: Location, workers: Workers) -> Store:
        store = open_store(location, workers=workers, storage_options=storage_options)
        return FaultyStore(store, _faults(random))

    return make


def _faults(random: Random) -> Iterator[Fault]:
    numbers = count(1)
    for operation, rate in _ERROR_RATES.items():
        permanent = _error(errno.EIO, numbers)
        yield Fault(operation=operation, calls=_some_calls(random, rate), error=permanent)
        delay = random.uniform(0.0, _LONGEST_DELAY_SECONDS)
        yield Fault(operation=operation, calls=_some_calls(random, _DELAY_RATE), delay_seconds=delay)
    for lost_answer in (False, True):
        transient = _error(errno.ECONNRESET, numbers)
        calls = _some_calls(random, _TRANSIENT_PUT_RATE)
        yield Fault(operation="put", calls=calls, error=transient, after=lost_answer)


def _some_calls(random: Random, rate: float) -> frozenset[int]:
    return frozenset(number for number in range(1, _CALLS) if random.random() < rate)


def _error(number: int, serial: Iterator[int]) -> Callable[[], BaseException]:
    return lambda: OSError(number, f"{INJECTED} error {next(serial)}: {os.strerror(number)}")
