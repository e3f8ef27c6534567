"""Decides whether another save can share the memory of a snapshot that is held anyway: if every byte is the same.

Guarantees: all bytes are compared (S1), as version counters miss writes through ``.data`` or a numpy alias, but for
those that the first save, too, takes for unchanged by their versions until a step (`lazy`); data that
cannot be compared in place, on a device or not contiguous, counts as different. Sources are read through const access
only.

What does not belong here: holding the memory (`host_pool`, the dispatcher).
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from async_ckpt.snapshot.extraction import Extracted
from async_ckpt.snapshot.host_pool import HostBuffer, aligned
from async_ckpt.snapshot.parallel_copy import PIECE_BYTES, work_together

__all__ = ["NOTHING", "Outline", "address_of", "are_same", "outline", "resembles", "sizes_of"]

_SAMPLES = 16
_SAMPLE_BYTES = 64
_SMALL_BYTES = 64 << 10  # below this, threads would spend their time on handing the interpreter to each other

_memcmp = ctypes.CDLL(None).memcmp  # lets other threads run meanwhile
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Outline(NamedTuple):
    """A few values of a snapshot by which most differences are found at once.

    Attributes:
        sizes: the sizes of all regions of the buffer: storages, then arrays.
        samples: a few bytes from the middle of some regions.
    """

    sizes: tuple[int, ...]
    samples: tuple[bytes, ...]


NOTHING = Outline((), ())


def sizes_of(extracted: Extracted) -> tuple[int, ...]:
    """Return the sizes of the buffer's regions, in order."""
    return (*extracted.sources.sizes, *(data.nbytes for _, data in extracted.arrays))


def outline(
    extracted: Extracted,
    sizes: tuple[int, ...],
    starts: Sequence[int],
    buffer: HostBuffer,
    later: Collection[int],
) -> Outline:
    """Return the outline of the snapshot in *buffer*: its regions begin at *starts*, and are copied but for *later*."""
    samples = []
    for index in _sampled(sizes):
        length = min(_SAMPLE_BYTES, sizes[index] - sizes[index] // 2)
        address = address_of(extracted, index, sizes[index]) if index in later else None
        if address is not None:
            samples.append(ctypes.string_at(address + sizes[index] // 2, length))
        else:
            middle = starts[index] + sizes[index] // 2
            samples.append(buffer.memory[middle : middle + length])
    return Outline(sizes, tuple(samples))


def resembles(extracted: Extracted, sizes: tuple[int, ...], other: Outline) -> bool:
    """Return, within microseconds, whether comparing all bytes is worthwhile."""
    if sizes != other.sizes or extracted.remotes or not set(extracted.locations) <= {"cpu"}:
        return False
    for index, sample in zip(_sampled(sizes), other.samples, strict=True):
        if not sample:
            continue
        address = address_of(extracted, index, sizes[index])
        if address is None or ctypes.string_at(address + sizes[index] // 2, len(sample)) != sample:
            return False
    return True


def are_same(
    extracted: Extracted, sizes: tuple[int, ...], buffer: HostBuffer, but: Collection[int] = ()
) -> bool:
    """Return whether *buffer* holds exactly the extracted bytes; called if it `resembles` them.

    Args:
        extracted: the bytes.
        sizes: of the regions.
        buffer: of the other snapshot.
        but: the numbers of regions that are known to be the same.
    """
    begin = buffer.as_tensor().data_ptr()
    large: list[tuple[int, int, int]] = []
    start = 0
    for index, nbytes in enumerate(sizes):
        if nbytes and index not in but:
            address = address_of(extracted, index, nbytes)
            if address is None:
                return False
            if nbytes > _SMALL_BYTES:
                large.append((address, begin + start, nbytes))
            elif _memcmp(address, begin + start, nbytes):  # at once: it may save us the large ones
                return False
        start += aligned(nbytes)
    return _all_same(large, held=(extracted, buffer))


def _all_same(regions: Sequence[tuple[int, int, int]], held: Any) -> bool:
    pieces = iter([piece for region in regions for piece in _pieces(*region)])
    different: list[bool] = []

    def compare(piece: tuple[int, int, int]) -> None:
        if _memcmp(*piece):
            different.append(True)
            for _ in pieces:  # nobody needs to look at the others
                pass

    work_together(pieces, compare, nbytes=sum(region[2] for region in regions), held=held)
    return not different


def _pieces(address: int, other: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, nbytes, PIECE_BYTES):
        yield address + start, other + start, min(PIECE_BYTES, nbytes - start)


def _sampled(sizes: Sequence[int]) -> range:
    return range(0, len(sizes), max(1, len(sizes) // _SAMPLES))


def address_of(extracted: Extracted, index: int, nbytes: int) -> int | None:
    """Return the address of a storage or an array; ``None`` if it is freed, resized or not contiguous."""
    sources = extracted.sources
    if index < len(sources.sizes):
        return sources.address(index) if sources.is_there(index) else None
    _, data = extracted.arrays[index - len(sources.sizes)]
    array, flags = data.array, data.array.flags
    is_whole = data.is_still(array) and (flags.c_contiguous or flags.f_contiguous)
    return int(array.ctypes.data) if is_whole else None
