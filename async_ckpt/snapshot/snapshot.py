"""The snapshot: a state as it was at one instant, in host memory that nothing else writes to (S1).

Guarantees: a snapshot holds no reference to the live state; storages are released one by one, and the memory is
returned once, with the last of them. ``records`` runs no code of the state. What was left to be copied after the call
is copied by ``complete``, at the latest, which tells if it was changed before (S1); no bytes are given before that.

What does not belong here: filling the memory (`capture`, `host_pool`), writing it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from async_ckpt.errors import StateChangedError
from async_ckpt.snapshot.contents import Content, Objects, Records, Unfilled, Whole
from async_ckpt.snapshot.digests import differing
from async_ckpt.snapshot.filling import Filled, fill
from async_ckpt.snapshot.host_pool import HostBuffer
from async_ckpt.snapshot.lazy import DeferredCopy
from async_ckpt.snapshot.locations import mark
from async_ckpt.snapshot.paths import path_of
from async_ckpt.snapshot.rebuild import Rebuilder
from async_ckpt.snapshot.sharing import NOTHING, Outline
from async_ckpt.snapshot.torch_format import Record

__all__ = ["Snapshot", "SnapshotStorage", "Storages"]


_WHILE_COPIED = (
    "was changed between the save and the next step of its optimizer, while it was being copied in the background; "
    "nothing was saved. Change weights in steps of optimizers only until the save is durable, or use snapshot='copy'"
)
_UNSEEN = (
    "does not have the bytes of the call: something wrote to it unseen by torch, such as by .data or through a numpy "
    "array; nothing was saved. Find that, or use snapshot='copy'"
)


class SnapshotStorage(NamedTuple):
    """One storage of the state; its number is its index among the snapshot's storages.

    Attributes:
        nbytes: its size in bytes.
        location: the original's device, as ``torch.save`` writes it: ``"cpu"``, ``"cuda:0"``, …
        start: the offset of its bytes in the host buffer.
    """

    nbytes: int
    location: str
    start: int


class Storages:
    """All storages of a state, as columns: thousands of objects would make Python's garbage collector run more often.

    Args:
        sizes: their sizes in bytes.
        locations: the originals' devices.
        starts: their offsets in the host buffer; others may follow.
    """

    def __init__(self, sizes: Sequence[int], locations: Sequence[str], starts: Sequence[int]) -> None:
        self.sizes = sizes
        self.locations = locations
        self.starts = starts

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[SnapshotStorage]:
        return map(SnapshotStorage, self.sizes, self.locations, self.starts)

    def __getitem__(self, index: int) -> SnapshotStorage:
        return SnapshotStorage(self.sizes[index], self.locations[index], self.starts[index])


class Snapshot:
    """A copy of a state; made by ``Capture.stage`` and ``Capture.share``.

    Args:
        content: everything but the bulk data.
        storages: the storages' regions.
        buffer: the leased memory.
        nbytes: the host bytes that the snapshot needs.
        outline: finds most differences from another state at once; stays when the snapshot is closed.
        digests: what the bytes are compared with when all are there; none if empty.
    """

    def __init__(
        self,
        *,
        content: Content,
        storages: Storages,
        buffer: HostBuffer,
        nbytes: int,
        outline: Outline = NOTHING,
        digests: Sequence[int | None] = (),
    ) -> None:
        self.nbytes = nbytes
        self.outline = outline
        self.storages = storages
        self._content: Content | None = content
        self._buffer: HostBuffer | None = buffer
        self._view: memoryview | None = memoryview(buffer.memory).toreadonly()
        self._held = set(range(len(self.storages)))
        self._lock = threading.Lock()
        self._digests = digests
        self.later: DeferredCopy | None = buffer.later  # and what was copied since
        self._user = None if self.later is None else self.later.join()

    @property
    def has_to_be_completed(self) -> bool:
        """Whether `complete` has anything to do."""
        return self.later is not None or bool(self._digests)

    def complete(self) -> None:
        """Have all bytes copied, and compared with what was there at the call.

        Raises:
            StateChangedError: they are not the same; the message names the tensor.
        """
        if self.later is not None:
            self._refuse_changes(self.later.complete(), _WHILE_COPIED)
        if self._digests:
            sizes = self.outline.sizes
            wrong = differing(self._digests, sizes, self._open_buffer())
            self._refuse_changes([(index, "") for index in wrong], _UNSEEN)
            self._digests = ()

    def check(self) -> None:
        """Look once more, some time after `complete`, whether something was being changed when the copy ended.

        Raises:
            StateChangedError: it was.
        """
        if self.later is not None:
            self._refuse_changes(self.later.look_again(), _WHILE_COPIED)

    def _refuse_changes(self, changed: Sequence[tuple[int, str]], how: str) -> None:
        if not changed:
            return
        index, owner = changed[0]
        where = path_of(self._content, index) or f"storage {index} of the state"
        whose = f" of {owner}" if owner else ""
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise StateChangedError(f"{where}{whose}{more} {how}", where=where)

    @property
    def written(self) -> object:
        """A writer's notes about a file with these bytes, for the next save that shares the memory."""
        return None if self._buffer is None else self._buffer.written

    @written.setter
    def written(self, written: object) -> None:
        if self._buffer is not None:
            self._buffer.written = written

    def view(self, index: int) -> memoryview:
        """Return the bytes of a storage, read-only.

        Args:
            index: the storage's number.

        Returns:
            A view, to be dropped before the snapshot is closed; otherwise the buffer is not reused.

        Raises:
            ValueError: the storage has been released.
        """
        view = self._view
        if view is None or index not in self._held:
            raise ValueError(f"storage {index} of the snapshot has been released")
        self._refuse_unfinished()
        start = self.storages.starts[index]
        return view[start : start + self.storages.sizes[index]]

    def views(self, indices: Sequence[int]) -> list[memoryview]:
        """Like `view`, for many storages."""
        view, starts, sizes = self._view, self.storages.starts, self.storages.sizes
        if view is None or not self._held.issuperset(indices):
            raise ValueError("a storage of the snapshot has been released")
        self._refuse_unfinished()
        return [view[starts[index] : starts[index] + sizes[index]] for index in indices]

    def release(self, index: int) -> None:
        """Release one storage's bytes. Idempotent; the last one closes the snapshot."""
        with self._lock:
            self._held.discard(index)
            last = not self._held
        if last:
            self.close()

    def close(self) -> None:
        """Release everything. Idempotent."""
        self._give_up_copy()
        with self._lock:
            self._buffer = None
            self._view = None
            self._held.clear()
            self._content = None

    def __del__(self) -> None:
        # Of a save that was interrupted before it handed this over.
        self._give_up_copy()

    def _give_up_copy(self) -> None:
        later = getattr(self, "later", None)
        if later is not None:
            later.leave(self._user)

    @property
    def file(self) -> bytes | None:
        """The whole file, if torch had to write it itself; otherwise, see `records`."""
        content = self._open_content()
        return content.file if isinstance(content, Whole) else None

    @property
    def alignment(self) -> int:
        """The alignment of storages in files."""
        content = self._open_content()
        if isinstance(content, Unfilled):
            return content.torch_format.alignment
        assert isinstance(content, Records), "a snapshot for a file"
        return content.alignment

    @property
    def unfilled(self) -> Unfilled | None:
        """The file's pickle, yet to be filled, if it is in the known format of this torch."""
        content = self._open_content()
        return content if isinstance(content, Unfilled) else None

    def filled(self) -> Filled | None:
        """Return the file's pickle, if it is in the known format of this torch."""
        content = self.unfilled
        return None if content is None else fill(content.skeleton, self._bytes_at)

    def records(self, filled: Filled | None = None) -> Sequence[Record]:
        """Return the records that ``torch.save`` would have written; storages are given by their numbers.

        Args:
            filled: the result of `filled`, if it is there already.

        Returns:
            The records, without those that torch's writer adds itself.

        Raises:
            ValueError: the snapshot has been closed.
        """
        content = self._open_content()
        if isinstance(content, Unfilled):
            return content.torch_format.records(filled or fill(content.skeleton, self._bytes_at))
        assert isinstance(content, Records), "a snapshot for a file"
        return content.records

    def state(self) -> Any:
        """Return the state, rebuilt over the snapshot's memory.

        Its tensors are on the CPU, but ``torch.save`` of it writes the originals' locations; for HPUs it writes the
        CPU, as Lightning's CheckpointIO for HPUs moves tensors there first. A buffer that anything refers to when the
        snapshot is closed is not reused.

        Returns:
            A state equal to the captured one.

        Raises:
            ValueError: the snapshot has been closed.
        """
        content = self._open_content()
        assert isinstance(content, Objects), "a snapshot for objects"
        self._refuse_unfinished()
        self._open_buffer().show_to_children(True)  # the base may fork processes to write it
        memory = self._open_buffer().memory
        with torch.no_grad():
            return Rebuilder(content.skeleton, content.entries.listed(), self._over_memory, memory).load()

    def _refuse_unfinished(self) -> None:
        if self.later is not None and not self.later.is_complete:
            raise RuntimeError("the snapshot is not complete")

    def _bytes_at(self, start: int, nbytes: int) -> memoryview:
        return memoryview(self._open_buffer().memory)[start : start + nbytes]

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

    def _open_content(self) -> Content:
        if self._content is None:
            raise ValueError("the snapshot has been closed")
        return self._content
