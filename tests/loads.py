"""Loads of bytes, from a store that counts what moves."""

from __future__ import annotations

from typing import Any

import torch

from async_ckpt import CheckpointService
from async_ckpt.stores.base import Location
from tests.support import MemorySource, MemoryStore

FAR = "memory://x.ckpt"
NEAR = "/nowhere/x.ckpt"
PADDING: dict[str, Any] = {
    "a": torch.arange(150_000),
    "b": [torch.full((20_000,), number) for number in range(20)],
}


class Counting(MemoryStore):
    """A store whose sources are kept."""

    def __init__(self, data: bytes, *more: bytes) -> None:
        super().__init__()
        self._contents = [data, *more]
        self.sources: list[MemorySource] = []

    async def source(self, location: Location) -> MemorySource:
        self.sources.append(MemorySource(self._contents[min(len(self.sources), len(self._contents) - 1)]))
        return self.sources[-1]

    @property
    def moved(self) -> int:
        """Bytes that were read."""
        return sum(stop - start for source in self.sources for start, stop in source.reads)


def load(data: bytes, url: str = FAR, **options: Any) -> Any:
    """Load a file of these bytes."""
    with CheckpointService(store_factory=lambda *_: Counting(data)) as service:
        return service.load(url, **options)
