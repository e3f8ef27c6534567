"""The body of an upload request: a part of the snapshot, by reference, which can be sent again.

Guarantees: the bytes are sent in slices as the connection accepts them, so that the part is not copied and the event
loop is not blocked; sending starts at the first byte every time (E3).

aiohttp passes a body of bytes to its transport whole, which copies what the socket does not accept at once; a generator
can be sent only once. Hence a payload of our own (aiohttp.payload.Payload).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

__all__ = ["PartPayload"]

_SLICE_BYTES = 256 << 10  # seen to have moved as a whole; larger ones cost as much


def _ignore() -> None:
    pass


class PartPayload(Payload):
    """A scatter list as a request's body.

    It is also a seekable binary file, as botocore demands of a body.

    Args:
        pieces: the scatter list; it must not change until the request is answered.
        moved: called after each slice that the connection has accepted.
    """

    def __init__(self, pieces: Sequence[memoryview], *, moved: Callable[[], None] = _ignore) -> None:
        super().__init__(pieces, content_type="application/octet-stream")
        self._pieces = [piece.cast("B") for piece in pieces if piece.nbytes]
        self._moved = moved
        self._position = 0
        self._size = sum(piece.nbytes for piece in self._pieces)

    def __len__(self) -> int:
        return self._size or 0

    def __bool__(self) -> bool:
        return True  # an empty body is a body

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Raise, as these bytes are not text."""
        raise TypeError("a checkpoint's bytes are not text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send all bytes."""
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Send the first *content_length* bytes, or all bytes."""
        left = len(self) if content_length is None else content_length
        for piece in self._slices(0):
            if left <= 0:
                return
            await writer.write(piece[:left])
            left -= len(piece)
            self._moved()

    # -- a binary file

    def read(self, size: int | None = -1) -> bytes:
        """Return up to *size* bytes from the position on."""
        left = len(self) - self._position if size is None or size < 0 else size
        taken = []
        for piece in self._slices(self._position):
            if left <= 0:
                break
            taken.append(bytes(piece[:left]))
            left -= len(taken[-1])
        data = b"".join(taken)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self)}[whence]
        self._position = min(max(0, base + offset), len(self))
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def _slices(self, start: int) -> Iterator[bytes | memoryview]:
        """Yield slices from *start* on; small neighbours are joined, as every write has a cost."""
        small: list[memoryview] = []
        waiting = 0
        for piece in self._pieces:
            if start >= piece.nbytes:
                start -= piece.nbytes
                continue
            piece, start = piece[start:], 0
            if small and waiting + piece.nbytes > _SLICE_BYTES:
                yield b"".join(small)
                small, waiting = [], 0
            if piece.nbytes <= _SLICE_BYTES:
                small.append(piece)
                waiting += piece.nbytes
                continue
            for offset in range(0, piece.nbytes, _SLICE_BYTES):
                yield piece[offset : offset + _SLICE_BYTES]
        if small:
            yield b"".join(small)
