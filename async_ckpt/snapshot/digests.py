"""Digests of bulk data: shows, for who debugs it, that a snapshot is not what was there at the call.

It reads everything twice, and finds what no version counts, such as a write through ``.data`` or a numpy array. Data on
a device, or not contiguous, has no digest. What does not belong here: what a difference means (`snapshot`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from zlib import crc32

from async_ckpt.snapshot.extraction import Extracted
from async_ckpt.snapshot.host_pool import HostBuffer, aligned
from async_ckpt.snapshot.sharing import address_of

__all__ = ["differing", "digests_of"]


def digests_of(extracted: Extracted, sizes: Sequence[int]) -> list[int | None]:
    """Return the digests of all regions, as the data is now, in order."""
    return [_digest(extracted, index, nbytes) for index, nbytes in enumerate(sizes)]


def differing(digests: Sequence[int | None], sizes: Sequence[int], buffer: HostBuffer) -> Iterator[int]:
    """Yield the numbers of the regions of *buffer* that have another digest."""
    start = 0
    for index, (digest, nbytes) in enumerate(zip(digests, sizes, strict=True)):
        if digest is not None:
            with memoryview(buffer.memory) as memory, memory[start : start + nbytes] as region:
                if crc32(region) != digest:
                    yield index
        start += aligned(nbytes)


def _digest(extracted: Extracted, index: int, nbytes: int) -> int | None:
    aliases = extracted.sources.aliases
    if index < len(aliases) and not aliases[index].is_cpu:
        return None
    address = address_of(extracted, index, nbytes) if nbytes else None
    return None if address is None else crc32((ctypes.c_char * nbytes).from_address(address))
