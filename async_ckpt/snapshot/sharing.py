"""Whether the memory of a snapshot that is held anyway can serve another save: where every byte is the same.

Guarantees: only the bytes themselves prove that (S1), for version counters know nothing of a write through ``.data``
or a numpy alias; what cannot be compared where it lies, on a device or scattered, counts as different. Sources are
read through const access only.

What does not belong here: who holds the memory and for how long (`host_pool`, the dispatcher).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from async_ckpt.snapshot.host_pool import HostBuffer, aligned
from async_ckpt.snapshot.lifting import Lifted
from async_ckpt.snapshot.parallel_copy import PIECE_BYTES, const_address, work_together

__all__ = ["NOTHING", "Outline", "are_same", "outline", "resembles", "sizes_of"]

_SAMPLES = 16
_SAMPLE_BYTES = 64
_SMALL_BYTES = 64 << 10  # below this, threads would spend their time on handing the interpreter to each other

_memcmp = ctypes.CDLL(None).memcmp  # lets other threads run meanwhile
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Outline(NamedTuple):
    """What of a snapshot tells at once that another one's bytes differ, in the ordinary case.

    Attributes:
        sizes: of all that is in the buffer, storages and then arrays, in its order.
        samples: a few bytes from the middle of some of them.
    """

    sizes: tuple[int, ...]
    samples: tuple[bytes, ...]


NOTHING = Outline((), ())


def sizes_of(lifted: Lifted) -> tuple[int, ...]:
    """Return the sizes of what goes into the buffer, in its order."""
    return (*lifted.sizes, *(data.nbytes for _, data in lifted.arrays))


def outline(sizes: tuple[int, ...], starts: Sequence[int], buffer: HostBuffer) -> Outline:
    """Return the outline of the snapshot in *buffer*, whose regions begin at *starts*."""
    samples = []
    for index in _sampled(sizes):
        middle = starts[index] + sizes[index] // 2
        samples.append(buffer.memory[middle : min(middle + _SAMPLE_BYTES, starts[index] + sizes[index])])
    return Outline(sizes, tuple(samples))


def resembles(lifted: Lifted, sizes: tuple[int, ...], other: Outline) -> bool:
    """Tell, in microseconds, whether it is worth while to compare all bytes."""
    if sizes != other.sizes or lifted.remotes or not set(lifted.locations) <= {"cpu"}:
        return False
    for index, sample in zip(_sampled(sizes), other.samples, strict=True):
        if not sample:
            continue
        address = _address_of(lifted, index, sizes[index])
        if address is None or ctypes.string_at(address + sizes[index] // 2, len(sample)) != sample:
            return False
    return True


def are_same(lifted: Lifted, sizes: tuple[int, ...], buffer: HostBuffer) -> bool:
    """Return whether *buffer* holds exactly the bytes of what was lifted; of what `resembles` it."""
    begin = buffer.as_tensor().data_ptr()
    large: list[tuple[int, int, int]] = []
    start = 0
    for index, nbytes in enumerate(sizes):
        if nbytes:
            address = _address_of(lifted, index, nbytes)
            if address is None:
                return False
            if nbytes > _SMALL_BYTES:
                large.append((address, begin + start, nbytes))
            elif _memcmp(address, begin + start, nbytes):  # at once: it may save us the large ones
                return False
        start += aligned(nbytes)
    return _all_same(large, held=(lifted, buffer))


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


def _address_of(lifted: Lifted, index: int, nbytes: int) -> int | None:
    """Return where the bytes of a storage or an array lie, ``None`` where that is no longer, or not in one piece."""
    if index < len(lifted.storages):
        view = lifted.storages[index]
        return const_address(view) if view.numel() == nbytes == lifted.owners[index].nbytes() else None
    _, data = lifted.arrays[index - len(lifted.storages)]
    array, flags = data.array, data.array.flags
    is_whole = data.is_still(array) and (flags.c_contiguous or flags.f_contiguous)
    return int(array.ctypes.data) if is_whole else None
