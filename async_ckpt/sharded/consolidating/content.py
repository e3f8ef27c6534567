"""The content of the file; each part is made when the store asks for it.

Guarantees: a part takes its length in memory, until the store has sent it. It is made once, unless the store asks for
it again. A part that depends on the checksums of earlier parts waits for them, and fails if one of those fails.

What does not belong here: the order of parts. Stores begin them in the order of the file, some at a time.
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
    """A part could not be made. Stores do not retry it: the reads have been retried already."""


class Consolidated:
    """A file of ``torch.save``; satisfies ``stores.base.Content``.

    Args:
        frame: the file without the bytes of the tensors.
        tensors: the tensors, by the numbers of their storages.
        gatherer: fetches their bytes.

    Attributes:
        failure: the error because of which a part could not be made, if there was one.
    """

    def __init__(self, frame: Frame, tensors: Sequence[Tensor], gatherer: Gatherer) -> None:
        self.failure: BaseException | None = None
        self._frame = frame
        self._tensors = tensors
        self._gatherer = gatherer
        self._made: dict[tuple[int, int], memoryview] = {}  # between `crc32` and `read`
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

    def steps(self, start: int, stop: int, step_bytes: int) -> Iterator[Sequence[memoryview]]:
        """Yield the bytes *start* to *stop*, all at once: they are fetched together."""
        yield self.read(start, stop)

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of the bytes *start* to *stop*, and keep them for the `read` that follows."""
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
        """Yield the ranges of tensors between *start* and *stop* in the file."""
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
        """Return the CRC-32 of a storage; wait until all of it has been gathered."""
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
