"""What the tests of the local store share: a save as a writer makes it."""

from __future__ import annotations

from pathlib import Path

from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.capabilities import UNRESTRICTED, Capabilities, CapabilityCache
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import BytesContent


class Known(CapabilityCache):
    """Directories of which it is known what they refuse, so that a save's own system calls are the only ones.

    Args:
        place: what they refuse.
    """

    def __init__(self, place: Capabilities = UNRESTRICTED) -> None:
        super().__init__()
        self._place = place

    def of(self, directory: str, disk: Disk, *, parent: str | None = None) -> Capabilities:
        return self._place

    def known(self, directory: str, disk: Disk) -> Capabilities:
        return self._place


KNOWN = Known()
OLD, NEW = b"old" * 1000, b"new" * 2000


async def save(store: LocalStore, path: Path, data: bytes = NEW) -> tuple[str, ...]:
    """Save as a writer does: abort after any error. Return what was swept."""
    upload = await store.begin(locate(path), len(data))
    try:
        half = len(data) // 2
        parts = [Part(index=0, start=0, stop=half), Part(index=1, start=half, stop=len(data))]
        await upload.commit([await upload.put(part, BytesContent(data)) for part in parts])
    except BaseException:
        await upload.abort()
        raise
    return upload.swept
