"""Lays out a file by torch's own writer, which gets the pickle and the lengths of the storages, not their bytes.

Guarantees: the segments are those of the file that ``torch.save`` would have written at the time of the snapshot. For a
torch that cannot skip the bytes of storages, `recorder` provides stand-ins.

What does not belong here: the records, which the snapshot provides; checksums (`layout`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from async_ckpt.format.writing.recorder import INLINE_BYTES, Pictured, Reference, Segment, record_writing
from async_ckpt.snapshot import Snapshot
from async_ckpt.snapshot.torch_format import Record, open_writer

__all__ = ["skip_writing", "write", "write_records"]


def write(snapshot: Snapshot) -> list[Segment]:
    """Return the segments of the file of *snapshot*, without checksums.

    Args:
        snapshot: small storages are copied, others are referred to.
    """
    if snapshot.file is not None:
        return [bytearray(snapshot.file)]
    return write_records(snapshot, snapshot.records())


def write_records(snapshot: Pictured, records: Sequence[Record]) -> list[Segment]:
    """Return the file that holds *records*, checksums missing.

    Args:
        snapshot: small storages are copied, others are referred to.
        records: what the archive is to hold.
    """
    return skip_writing(snapshot, records) or record_writing(snapshot, records)


def skip_writing(snapshot: Pictured, records: Sequence[Record]) -> list[Segment] | None:
    """Like ``write``, by letting torch skip storages; return ``None`` if it cannot.

    Args:
        snapshot: small storages are copied, others are referred to.
        records: what the archive is to hold.
    """
    if not hasattr(torch._C.PyTorchFileWriter, "write_record_metadata"):
        return None
    headers = _Headers()
    writer = open_writer(headers, snapshot.alignment)
    skipped: list[Reference] = []
    for name, content in records:
        if not isinstance(content, int):
            writer.write_record(name, content, len(content))
        elif (nbytes := snapshot.storages[content].nbytes) <= INLINE_BYTES:
            writer.write_record(name, bytes(snapshot.view(content)), nbytes)
        else:
            skipped.append(Reference(storage=content, start=0, stop=nbytes))
            writer.write_record_metadata(name, nbytes)
    writer.write_end_of_file()
    if headers.skips != [(len(each), io.SEEK_CUR) for each in skipped]:
        return None
    return headers.segments(skipped)


class _Headers(io.BytesIO):
    """A file object for torch's writer, without the bytes that it skips.

    Attributes:
        skips: the positions and lengths that were skipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skips: list[tuple[int, int]] = []
        self._gaps: list[int] = []

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Note the skip, and keep the position."""
        self.skips.append((offset, whence))
        self._gaps.append(self.tell())
        return self._gaps[-1]

    def segments(self, skipped: list[Reference]) -> list[Segment]:
        """Return the written segments, with *skipped* in the gaps."""
        segments: list[Segment] = []
        at, written = 0, self.getbuffer()
        for gap, reference in zip(self._gaps, skipped, strict=True):
            segments += bytearray(written[at:gap]), reference
            at = gap
        return [*segments, bytearray(written[at:])]
