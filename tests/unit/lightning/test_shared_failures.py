"""Which failures every rank raises at a save: those that the first rank knows of."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_ckpt import CheckpointService, RankError, StoreError
from async_ckpt.handle import Handle
from async_ckpt.lightning.shared_failures import KnownFailures, SharedFailures
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import Fault, FaultyStore


def _failing(location: Location, workers: Workers) -> Store:
    fault = Fault(operation="commit", calls={2, 3}, error=lambda: StoreError("full"))
    return FaultyStore(open_store(location, workers=workers), [fault])


def _at(folder: Path, name: str) -> Location:
    return locate(str(folder / name))


def _end(handle: Handle) -> None:
    handle._outcome.exception(10)  # which tells nobody


def test_the_first_rank_names_the_newest_failure(tmp_path: Path) -> None:
    """It says nothing where all is well, and again once everybody has been told; a rank finds the saves up to there."""
    shared = SharedFailures()
    with CheckpointService(store_factory=_failing, max_concurrent_saves=1) as service:
        handles = [service.submit({}, _at(tmp_path, name), tell=False) for name in "abcd"]
        for handle in handles:
            shared.add(handle)
            _end(handle)
        told = shared.unreported("")
        assert told == KnownFailures(3, "")
        assert shared.handles_up_to(told) == handles[1:3]
        for handle in handles[1:3]:
            with pytest.raises(StoreError):
                handle.wait()
        assert shared.unreported("") is None


def test_what_the_first_rank_alone_has_failed_with() -> None:
    """The others raise that it has, where no save of all failed, and unless they are raising something already."""
    shared = SharedFailures()
    told = shared.unreported("StoreError: no")
    assert told == KnownFailures(0, "StoreError: no")
    with pytest.raises(RankError, match="rank 0 failed in something that only it does: StoreError: no"):
        shared.raise_others(told)
    shared.raise_others(KnownFailures(1, "ShardedSaveError: that"))
    try:
        raise ValueError
    except ValueError:
        shared.raise_others(told)
