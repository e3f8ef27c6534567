"""Files from before torch wrote archives: two kinds of streams of pickles, and the tar files of torch 0.1.

Guarantees: no more memory is taken for a read than the file is long. ``torch.load`` is given a tar file as one that it
could read by its descriptor, as it wants it, but what that leads to is empty.

What does not belong here: whether such a file may be read (`unpickling`).
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from async_ckpt.format.reading.file import CheckpointFile

__all__ = ["is_tar", "opened_old"]

_BUFFER_BYTES = 1 << 20


class _Buffered(io.BufferedReader):
    """A file of the old format, whose pickles say how much of it is to be read."""

    raw: CheckpointFile

    def read(self, nbytes: int | None = -1, /) -> bytes:
        """Return up to *nbytes* bytes, for which no more memory is taken than the file is long."""
        if nbytes is not None and nbytes > _BUFFER_BYTES:
            nbytes = min(nbytes, max(0, self.raw.nbytes - self.tell()))
        return super().read(nbytes)


class _Tar(_Buffered):
    """One that torch looks into only if it has a descriptor, of which it then makes no use."""

    def __init__(self, file: CheckpointFile, descriptor: int) -> None:
        super().__init__(file, _BUFFER_BYTES)
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return that of another file."""
        return self._descriptor


def is_tar(block: bytes) -> bool:
    """Return whether a file whose first 512 bytes these are is a tar."""
    if len(block) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False  # also of zeros, of which tarfile makes an empty one: it is no file of torch's
    return True


@contextmanager
def opened_old(file: CheckpointFile, *, tar: bool) -> Iterator[io.BufferedReader]:
    """Give *file*, from its beginning, as ``torch.load`` reads one that is no zip archive."""
    file.seek(0)
    with tempfile.TemporaryFile() if tar else nullcontext() as empty:
        buffered = _Buffered(file, _BUFFER_BYTES) if empty is None else _Tar(file, empty.fileno())
        try:
            yield buffered
        finally:
            buffered.detach()
