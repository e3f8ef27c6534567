"""What the tests of the generic store share: file systems in memory, and a save as a writer makes it."""

from __future__ import annotations

from typing import Any

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Location, Part
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.testing import BytesContent, ManualClock, ThreadWorkers

OLD, NEW = b"old" * 1000, b"new" * 1000  # of one length, as checkpoints of one model are
HALVES = [Part(index=0, start=0, stop=1500), Part(index=1, start=1500, stop=3000)]
TARGET = Location(url="double://run/x.ckpt", path="/run/x.ckpt", key="x", group="double")


class Client:
    """The client inside a file system, as FTP's; `sock` is None once it has been closed."""

    def __init__(self) -> None:
        self.sock: object | None = object()

    def close(self) -> None:
        """Close."""
        self.sock = None


class Memory(MemoryFileSystem):  # type: ignore[misc]
    """A memory file system of its own."""

    cachable = False

    def __init__(self, **files: bytes) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        for name, data in files.items():
            self.make(f"/run/{name}.ckpt", data)

    def make(self, path: str, data: bytes) -> None:
        """Make a file, past all handles."""
        self.store[path] = MemoryFile(self, path, data)

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return sorted(self.store)


def generic(
    file_system: Any, workers: ThreadWorkers, clock: ManualClock | None = None, *, overwrite: bool = True
) -> GenericStore:
    """Return a store that waits for nothing."""
    clock = clock or ManualClock()
    retrying = Retrying(RetryPolicy(), sleep=clock.sleep, clock=clock, random=lambda: 1.0)
    return GenericStore(file_system, workers=workers, retrying=retrying, overwrite=overwrite)


async def save(store: GenericStore, location: Location = TARGET) -> tuple[str, ...]:
    """Save as a writer does: abort after any error. Return what was swept."""
    upload = await store.begin(location, len(NEW))
    try:
        await upload.commit([await upload.put(part, BytesContent(NEW)) for part in HALVES])
    except BaseException:
        await upload.abort()
        raise
    return upload.swept


class Unsteady(Memory):
    """A file system whose first calls of some methods fail."""

    def __init__(self, failing: dict[str, list[Exception]], **files: bytes) -> None:
        self.failing: dict[str, list[Exception]] = {}
        super().__init__(**files)
        self.failing = failing

    def _fail(self, name: str) -> None:
        if self.failing.get(name):
            raise self.failing[name].pop(0)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._fail(f"open {mode}")
        return super()._open(path, mode, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file, if it does not fail."""
        self._fail("info")
        return super().info(path, **kwargs)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy, and lose the answer."""
        self._fail("cp_file before")
        super().cp_file(path1, path2, **kwargs)
        self._fail("cp_file after")
