"""How a sharded save ends on its first rank: what comes after the commit changes nothing any more (E4)."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import anyio
import torch

from async_ckpt import CheckpointService
from async_ckpt.handle import State
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Child, Location, Store, Workers


class Unlisted:
    """A store that can be asked for everything but what is in a directory."""

    def __init__(self, inner: Store, listing: Callable[[], Any]) -> None:
        self._inner = inner
        self._listing = listing

    async def list(self, location: Location, *, starting_with: str = "") -> AsyncGenerator[list[Child], None]:
        await self._listing()
        yield []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def service_that_lists(listing: Callable[[], Any]) -> CheckpointService:
    """Return a service whose stores do that where they are to list."""

    def make(location: Location, workers: Workers) -> Store:
        return Unlisted(open_store(location, workers=workers), listing)  # type: ignore[return-value]  # it is one

    return CheckpointService(store_factory=make)


def test_an_error_after_the_commit_is_none_of_the_save(tmp_path: Path) -> None:
    """A store that cannot list what is left over, for whatever reason, does not fail what is durable."""

    async def refuse() -> None:
        raise RuntimeError("no listings here")

    with service_that_lists(refuse) as service:
        assert service.save_sharded({"a": torch.ones(3)}, tmp_path / "it").wait(60).state is State.DURABLE


def test_closing_after_the_commit_does_not_call_it_lost(tmp_path: Path) -> None:
    """A service that is closed while it looks for leftovers reports what all ranks know: durable."""
    has_come = threading.Event()

    async def hang() -> None:
        has_come.set()
        await anyio.sleep_forever()

    service = service_that_lists(hang)
    handle = service.save_sharded({"a": torch.ones(3)}, tmp_path / "it")
    assert has_come.wait(60)
    service.close(timeout=0.1)
    assert handle.wait(60).state is State.DURABLE
