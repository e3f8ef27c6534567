"""A sharded save's part on one rank, as a double: it notes what it is asked to do, and fails where it is told to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from async_ckpt.sharded.agreement.messages import Ready

Step = Callable[[], Awaitable[None]]


@dataclass
class Offer:
    """What a rank says of itself."""

    location: str = "s3://bucket/step-1"
    fingerprint: bytes = b"shapes"
    sizes: tuple[int, ...] = (3, 5)
    content: bytes = b"plan"
    plans: int = 0  # how often it was asked for

    def plan(self) -> bytes:
        self.plans += 1
        return self.content


@dataclass
class Storage:
    """Where all ranks write to."""

    objects: dict[int, bytes] = field(default_factory=dict)
    committed: list[str] = field(default_factory=list)
    is_gone: bool = False


@dataclass
class DoubleTask:
    """One rank's part in a save; *steps* are done in place of, or before, its own of that name."""

    rank: int
    storage: Storage
    offer: Offer = field(default_factory=Offer)
    steps: Mapping[str, Step] = field(default_factory=dict)
    works: Mapping[int, bytes] | None = None
    done: list[str] = field(default_factory=list)
    readies: Mapping[int, Ready] = field(default_factory=dict)
    work: bytes | None = b"never"

    async def plan(self, readies: Mapping[int, Ready]) -> Mapping[int, bytes] | None:
        self.readies = readies
        await self._do("plan")
        return self.works

    async def write(self, work: bytes | None) -> None:
        self.work = work
        await self._do("write")
        self.storage.objects[self.rank] = work or b""

    async def commit(self, readies: Mapping[int, Ready]) -> None:
        assert set(self.storage.objects) == set(readies), "D5"
        await self._do("commit")
        self.storage.committed.append("yes")

    async def look_up(self, save_id: str) -> bool | None:
        await self._do("look_up")
        return None if self.storage.is_gone else bool(self.storage.committed)

    async def undo(self) -> None:
        await self._do("undo")
        self.storage.objects.pop(self.rank, None)

    async def _do(self, step: str) -> None:
        self.done.append(step)
        if step in self.steps:
            await self.steps[step]()
