"""A file by torch's own writer, which is given the pickle and told how long the storages are, not what is in them.

Guarantees: the segments are those of the file that ``torch.save`` would have written when the snapshot was taken.
Where this torch cannot skip just the bytes of storages, `recorder` gives it stand-ins for them.

What does not belong here: what is in the archive, which the snapshot says; checksums (`layout`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from async_ckpt.format.writing.recorder import INLINE_BYTES, Pictured, Reference, Segment, record_writing
from async_ckpt.snapshot import Snapshot
from async_ckpt.snapshot.conventions import Record, open_writer

__all__ = ["skip_writing", "write", "write_records"]


def write(snapshot: Snapshot) -> list[Segment]:
    """Return the file of *snapshot*, checksums missing.

    Args:
        snapshot: its small storages are copied, the others referred to.
    """
    if snapshot.file is not None:
        return [bytearray(snapshot.file)]
    return write_records(snapshot, snapshot.records())


def write_records(snapshot: Pictured, records: Sequence[Record]) -> list[Segment]:
    """Return the file that holds *records*, checksums missing.

    Args:
        snapshot: its small storages are copied, the others referred to.
        records: what the archive is to hold.
    """
    return skip_writing(snapshot, records) or record_writing(snapshot, records)


def skip_writing(snapshot: Pictured, records: Sequence[Record]) -> list[Segment] | None:
    """Do so by having torch skip storages; return ``None`` where it cannot.

    Args:
        snapshot: its small storages are copied, the others referred to.
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
    """A file to torch's writer, without the bytes that it skips.

    Attributes:
        skips: what `seek` was called with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skips: list[tuple[int, int]] = []
        self._gaps: list[int] = []

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Note what is skipped and where, and stay there."""
        self.skips.append((offset, whence))
        self._gaps.append(self.tell())
        return self._gaps[-1]

    def segments(self, skipped: list[Reference]) -> list[Segment]:
        """Return what was written, with *skipped* where something was skipped."""
        segments: list[Segment] = []
        at, written = 0, self.getbuffer()
        for gap, reference in zip(self._gaps, skipped, strict=True):
            segments += bytearray(written[at:gap]), reference
            at = gap
        return [*segments, bytearray(written[at:])]
