"""Legacy files, older than torch's zip archives: two kinds of pickle streams, and the tar files of torch 0.1.

Guarantees: a read takes no more memory than the length of the file. ``torch.load`` wants a tar file with a descriptor,
so it gets one, of an empty file.

What does not belong here: whether such a file may be read (`unpickling`).
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from async_ckpt.format.reading.file import CheckpointFile

__all__ = ["is_tar", "open_legacy"]

_BUFFER_BYTES = 1 << 20


class _Buffered(io.BufferedReader):
    """A file of the legacy format, whose pickles say how many bytes to read."""

    raw: CheckpointFile

    def read(self, nbytes: int | None = -1, /) -> bytes:
        """Return up to *nbytes* bytes; takes no more memory than the length of the file."""
        if nbytes is not None and nbytes > _BUFFER_BYTES:
            nbytes = min(nbytes, max(0, self.raw.nbytes - self.tell()))
        return super().read(nbytes)


class _Tar(_Buffered):
    """A tar file; torch demands a descriptor, but does not use it."""

    def __init__(self, file: CheckpointFile, descriptor: int) -> None:
        super().__init__(file, _BUFFER_BYTES)
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor of another file."""
        return self._descriptor


def is_tar(block: bytes) -> bool:
    """Return whether *block*, the first 512 bytes of a file, is a tar header."""
    if len(block) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False  # also of zeros, of which tarfile makes an empty one: it is no file of torch's
    return True


@contextmanager
def open_legacy(file: CheckpointFile, *, tar: bool) -> Iterator[io.BufferedReader]:
    """Yield *file*, at its beginning, in the form that ``torch.load`` needs for legacy files."""
    file.seek(0)
    with tempfile.TemporaryFile() if tar else nullcontext() as empty:
        buffered = _Buffered(file, _BUFFER_BYTES) if empty is None else _Tar(file, empty.fileno())
        try:
            yield buffered
        finally:
            buffered.detach()
