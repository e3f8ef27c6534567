"""A state as it was at one instant, in host memory that nothing else writes to (S1).

Guarantees: a snapshot holds no reference to the live state; storages are given up one by one, and the
memory is given back once, with the last of them. ``rebuild`` runs no code of the state.

What does not belong here: how the bytes came here (`copying`), what is done with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from async_ckpt.snapshot.copying import HostBuffer
from async_ckpt.snapshot.entries import Entry
from async_ckpt.snapshot.locations import mark
from async_ckpt.snapshot.rebuild import INERT, LIVE, Rebuilder
from async_ckpt.snapshot.sharing import NOTHING, Outline

__all__ = ["Snapshot", "SnapshotStorage", "Storages"]


class SnapshotStorage(NamedTuple):
    """One storage of the state; its number is its place among the snapshot's storages.

    Attributes:
        nbytes: its size.
        location: where the original is, as ``torch.save`` writes it: ``"cpu"``, ``"cuda:0"``, …
        start: where its bytes begin in the host buffer.
    """

    nbytes: int
    location: str
    start: int


class Storages:
    """All storages of a state, as columns: thousands of objects, kept, would have Python's collector run more often.

    Args:
        sizes: in bytes.
        locations: where the originals are.
        starts: where each one's bytes begin in the host buffer.
    """

    def __init__(self, sizes: Sequence[int], locations: Sequence[str], starts: Sequence[int]) -> None:
        self._sizes = sizes
        self._locations = locations
        self._starts = starts

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[SnapshotStorage]:
        return map(SnapshotStorage, self._sizes, self._locations, self._starts)

    def __getitem__(self, index: int) -> SnapshotStorage:
        return SnapshotStorage(self._sizes[index], self._locations[index], self._starts[index])


class Snapshot:
    """The picture of a state; made by ``Capture.stage`` and ``Capture.share``.

    Args:
        skeleton: the pickled state, bulk data lifted out.
        entries: what the skeleton refers to.
        storages: where each storage's bytes are.
        buffer: the leased memory.
        nbytes: what the snapshot needs of host memory.
        outline: by which one of other bytes is told from it; stays when the snapshot is closed.
    """

    def __init__(
        self,
        *,
        skeleton: bytes,
        entries: Sequence[Entry],
        storages: Storages,
        buffer: HostBuffer,
        nbytes: int,
        outline: Outline = NOTHING,
    ) -> None:
        self.nbytes = nbytes
        self.outline = outline
        self.storages = storages
        self._skeleton = skeleton
        self._entries = tuple(entries)
        self._buffer: HostBuffer | None = buffer
        self._view: memoryview | None = memoryview(buffer.memory).toreadonly()
        self._held = set(range(len(self.storages)))
        self._lock = threading.Lock()

    @property
    def written(self) -> object:
        """What a writer left here for who shares the memory: of a file that has these bytes."""
        return None if self._buffer is None else self._buffer.written

    @written.setter
    def written(self, written: object) -> None:
        if self._buffer is not None:
            self._buffer.written = written

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the state consists of, beside what pickle itself makes."""
        return self._entries

    def view(self, index: int) -> memoryview:
        """Return the bytes of a storage, read-only.

        Args:
            index: the storage's number.

        Returns:
            A view that must be let go of before the snapshot is closed, for its buffer to be reused.

        Raises:
            ValueError: the storage has been released.
        """
        view = self._view
        if view is None or index not in self._held:
            raise ValueError(f"storage {index} of the snapshot has been released")
        storage = self.storages[index]
        return view[storage.start : storage.start + storage.nbytes]

    def release(self, index: int) -> None:
        """Give up one storage's bytes. Idempotent; the last one closes the snapshot."""
        with self._lock:
            self._held.discard(index)
            last = not self._held
        if last:
            self.close()

    def close(self) -> None:
        """Give up everything. Idempotent."""
        with self._lock:
            self._buffer = None
            self._view = None
            self._held.clear()
            self._entries = ()
            self._skeleton = b""

    def picture(self) -> Any:
        """Return an inert picture of the state, with the entries of tensors and storages in their places.

        Plain arrays and builtin containers are themselves; any other object is a
        `async_ckpt.snapshot.reduced.Reduced`, which pickles to what the object would have pickled to. Two things
        may differ in the bytes, neither in what is loaded: the order of a set, and whether an attribute's name and
        an equal string elsewhere are written once or twice.

        Returns:
            The picture.

        Raises:
            ValueError: the snapshot has been closed.
        """
        return self._unpickle(None, INERT)

    def rebuild(self, storage_for: Callable[[int], torch.UntypedStorage]) -> Any:
        """Return what `picture` does, with tensors and storages over storages of the caller's choice.

        Args:
            storage_for: gives the storage with a number, of the right size; called once for each
                number that is needed.

        Returns:
            The picture, of which ``torch.save`` writes what it would have written of the state.

        Raises:
            ValueError: the snapshot has been closed.
        """
        return self._unpickle(lambda index: mark(storage_for(index), self.storages[index].location), INERT)

    def state(self) -> Any:
        """Return the state itself, rebuilt over the snapshot's memory.

        Its tensors lie on the CPU, but ``torch.save`` of it writes the locations of the originals; of HPUs' the
        CPU's, where Lightning's CheckpointIO for HPUs would have moved them first. A buffer to which anything
        refers when the snapshot is closed is not reused.

        Returns:
            A state equal to the captured one.

        Raises:
            ValueError: the snapshot has been closed.
        """
        self._open_buffer().show_to_children(True)  # the base may fork processes to write it
        return self._unpickle(self._over_memory, LIVE)

    def _unpickle(
        self,
        storage_for: Callable[[int], torch.UntypedStorage] | None,
        globals_: dict[tuple[str, str], Any],
    ) -> Any:
        memory = self._open_buffer().memory
        with torch.no_grad():
            return Rebuilder(self._skeleton, self._entries, globals_, storage_for, memory).load()

    def _over_memory(self, index: int) -> torch.UntypedStorage:
        storage = self.storages[index]
        location = "cpu" if storage.location.startswith("hpu") else storage.location
        if storage.nbytes == 0:
            return mark(torch.UntypedStorage(0, device="cpu"), location)
        memory, count, start = self._open_buffer().memory, storage.nbytes, storage.start
        host = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=start).untyped_storage()
        return mark(host, location)

    def _open_buffer(self) -> HostBuffer:
        if self._buffer is None:
            raise ValueError("the snapshot has been closed")
        return self._buffer
