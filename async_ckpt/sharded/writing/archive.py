"""One tensor as a file of ``torch.save``, made from a template: the file without the tensor's bytes and their checksum.

Guarantees: the result is, byte for byte, what ``torch.save`` would write for such a tensor on the CPU. torch's own
writer makes each template, once for each dtype, shape and stride; after that, an item costs microseconds.

What does not belong here: which items a rank writes, and where (`shard`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.format.checksum import crc32
from async_ckpt.format.writing.archive import Records, find_records
from async_ckpt.format.writing.fingerprint import DIGITS, digits, find_fingerprint
from async_ckpt.format.writing.recorder import Reference, Segment
from async_ckpt.format.writing.torch_writer import write_records
from async_ckpt.snapshot import Storages
from async_ckpt.snapshot.torch_format import alignment, torch_records

__all__ = ["Template", "template"]

_KEPT = 16_384
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has a name from Python 3.13 on

_templates: dict[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], Template] = {}


def template(dtype: torch.dtype, sizes: Sequence[int], stride: Sequence[int]) -> Template:
    """Return the template of dense tensors with this dtype, shape and stride.

    Raises:
        AsyncCheckpointError: this torch writes tensors in a way that is not known here.
    """
    key = dtype, tuple(sizes), tuple(stride)
    known = _templates.get(key)
    if known is None:
        if len(_templates) >= _KEPT:
            _templates.clear()
        known = _templates[key] = _make_template(*key)
    return known


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A file with one tensor, without the tensor's bytes.

    Attributes:
        head_nbytes: the number of bytes before those of the tensor.
        data_nbytes: the number of bytes of the tensor.
        nbytes: the length of the file.
    """

    head_nbytes: int
    data_nbytes: int
    nbytes: int
    _head: bytes
    _tail: bytes
    _records: Records
    _checksums: tuple[int, ...]
    _data: int
    _fingerprint: int | None

    def head(self, checksum: Callable[[], int]) -> bytes:
        """Return the bytes before those of the tensor; *checksum* returns the tensor's CRC-32, if that is needed."""
        if self._records.checksum_offsets[self._data] >= self.head_nbytes + self.data_nbytes:
            return self._head
        head = bytearray(self._head)
        _write_checksum(head, 0, self._records, self._data, checksum())
        return bytes(head)

    def tail(self, checksum: int) -> bytes:
        """Return the bytes after those of the tensor; *checksum* is the tensor's CRC-32."""
        records, start = self._records, self.head_nbytes + self.data_nbytes
        tail = bytearray(self._tail)
        _write_checksum(tail, start, records, self._data, checksum)
        last = self._fingerprint
        if last is not None:
            known = [*self._checksums]
            known[self._data] = checksum
            begin = records.starts[last] - start
            tail[begin + DIGITS : begin + 2 * DIGITS] = digits(records, last, known.__getitem__)
            _write_checksum(tail, start, records, last, crc32(tail[begin : begin + 2 * DIGITS], 0))
        return bytes(tail)


def _write_checksum(piece: bytearray, start: int, records: Records, record: int, checksum: int) -> None:
    """Write the checksum of a record to its two places, as far as they are in *piece*, which begins at *start*."""
    for where in (records.checksum_offsets[record], records.central_offsets[record]):
        if 0 <= where - start < len(piece):
            piece[where - start : where - start + 4] = checksum.to_bytes(4, "little")


class _EmptyStorage:
    """A storage of a given size, without memory."""

    def __init__(self, nbytes: int) -> None:
        self.storages = Storages([nbytes], ["cpu"], [0])
        self.alignment = alignment()

    def view(self, index: int) -> memoryview:
        """Return zeros."""
        return memoryview(bytes(self.storages[index].nbytes))


def _make_template(dtype: torch.dtype, sizes: tuple[int, ...], stride: tuple[int, ...]) -> Template:
    nbytes = torch.Size(sizes).numel() * dtype.itemsize
    with torch.inference_mode(mode=False), torch.no_grad():
        asked = torch_records(_virtual_tensor(nbytes, dtype).as_strided(sizes, stride))
    records: list[tuple[str, bytes | str | int]] = [
        (name, 0 if isinstance(content, torch.UntypedStorage) else content) for name, content in asked
    ]
    stored = [name for name, content in records if isinstance(content, int)]
    if len(stored) != 1:
        raise _unknown_format()
    return _template_from(write_records(_EmptyStorage(nbytes), records), f"/{stored[0]}", nbytes)


def _virtual_tensor(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over *nbytes* of virtual memory that occupies no physical memory."""
    if nbytes == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def _template_from(segments: Sequence[Segment], name: str, nbytes: int) -> Template:
    """Make a template from the *segments* of a file; the tensor is the record *name*, with *nbytes* bytes."""
    total = sum(map(len, segments))

    def read(start: int, count: int) -> bytes:
        found, at = bytearray(), 0
        for segment in segments:
            begin, end = max(start - at, 0), min(start + count - at, len(segment))
            if begin < end and not isinstance(segment, Reference):
                found += segment[begin:end]
            at += len(segment)
        return bytes(found)

    records, _ = find_records(total, read)
    data = next((number for number, each in enumerate(records.names) if each.endswith(name)), None)
    if data is None or records.stops[data] - records.starts[data] != nbytes:
        raise _unknown_format()
    start, stop = records.starts[data], records.stops[data]
    fingerprint = find_fingerprint(records, read)
    head, tail = bytearray(read(0, start)), bytearray(read(stop, total - stop))
    checksums = []
    for record, (begin, end) in enumerate(zip(records.starts, records.stops, strict=True)):
        # torch was asked to write no checksums.
        checksums.append(0 if record == data else crc32(read(begin, end - begin), 0))
        if record not in (data, fingerprint):
            _write_checksum(head, 0, records, record, checksums[record])
            _write_checksum(tail, stop, records, record, checksums[record])
    return Template(
        head_nbytes=start,
        data_nbytes=nbytes,
        nbytes=total,
        _head=bytes(head),
        _tail=bytes(tail),
        _records=records,
        _checksums=tuple(checksums),
        _data=data,
        _fingerprint=fingerprint,
    )


def _unknown_format() -> AsyncCheckpointError:
    return AsyncCheckpointError(
        f"cannot save tensors in a sharded checkpoint: torch {torch.__version__} writes them in a way that async_ckpt "
        "does not know. Use a tested version of torch, and do not change how tensors are pickled."
    )
