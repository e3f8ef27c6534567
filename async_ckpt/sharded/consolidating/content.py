"""The one file, as a store reads it: each part is made when it is asked for.

Guarantees: what a part takes in memory it takes once, until the store has sent it. Each part is made once, unless the
store asks for it again. A part that needs the checksums of others waits for them; they come, or it fails as they do.

What does not belong here: when and in which order parts are asked for, which stores decide: in the order of the file,
some at a time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from async_ckpt.format.checksum import crc32
from async_ckpt.format.writing.frame import Frame
from async_ckpt.sharded.consolidating.gathering import Gatherer, Range
from async_ckpt.sharded.consolidating.tensors import Tensor

__all__ = ["Consolidated"]


class _UnreadableError(Exception):
    """A part could not be made: of no kind for which a store tries again, as what was read has been tried again."""


class Consolidated:
    """A file of ``torch.save``; satisfies ``stores.base.Content``.

    Args:
        frame: the file but for the bytes of the tensors.
        tensors: those, by the numbers of their storages.
        gatherer: gets the bytes.

    Attributes:
        failure: why a part could not be made.
    """

    def __init__(self, frame: Frame, tensors: Sequence[Tensor], gatherer: Gatherer) -> None:
        self.failure: BaseException | None = None
        self._frame = frame
        self._tensors = tensors
        self._gatherer = gatherer
        self._made: dict[tuple[int, int], memoryview] = {}  # to be read
        self._checksums: dict[int, int] = {}
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self._frame.nbytes

    def read(self, start: int, stop: int) -> Sequence[memoryview]:
        """Return the bytes *start* to *stop*."""
        memory = self._made.pop((start, stop), None)
        return [(self._make(start, stop) if memory is None else memory).toreadonly()]

    def crc32(self, start: int, stop: int) -> int:
        """Return their CRC-32, and keep them for the `read` that follows."""
        memory = self._made[start, stop] = self._make(start, stop)
        return crc32(memory, 0)

    def _make(self, start: int, stop: int) -> memoryview:
        memory = memoryview(bytearray(stop - start))
        try:
            self._gatherer.gather(self._ranges(start, stop, memory))
        except BaseException as error:
            with self._changed:
                self.failure = self.failure or error
                self._changed.notify_all()
            raise _UnreadableError(str(error)) from error
        with self._changed:
            self._changed.notify_all()
        self._frame.fill(start, stop, memory, self._checksum)
        return memory

    def _ranges(self, start: int, stop: int, memory: memoryview) -> Iterator[Range]:
        """Yield what of the tensors lies between *start* and *stop*."""
        frame = self._frame
        for index in range(max(0, bisect_right(frame.starts, start) - 1), len(frame.starts)):
            begins = frame.starts[index]
            if begins >= stop:
                return
            first, end = max(start, begins), min(stop, frame.stops[index])
            if first < end:
                yield Range(
                    tensor=self._tensors[frame.storages[index]],
                    start=first - begins,
                    stop=end - begins,
                    memory=memory[first - start : end - start],
                )

    def _checksum(self, storage: int) -> int:
        """Return the CRC-32 of a storage once all of it has come."""
        value = self._checksums.get(storage)
        if value is None:
            sums, nbytes = self._tensors[storage].sums, self._tensors[storage].nbytes
            with self._changed:
                while (value := sums.total(0, nbytes)) is None:
                    if self.failure is not None:
                        raise _UnreadableError(str(self.failure)) from self.failure
                    self._changed.wait()
            self._checksums[storage] = value
        return value
