"""One large copy in host memory, made by a few threads that take pieces from one list.

Guarantees: when `copy_together` returns or raises, no thread of its touches the memory any more; sources are
read through const access only, where torch has that.

torch's own threads would do, but they wait for each other at the end of every tensor: beside busy processes,
such as data loaders, many copies in a row then take several times as long. Here a thread that is held up
holds up one piece, once.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

__all__ = ["copy_together", "populate"]

_Piece: TypeAlias = tuple[int, int, int]  # target address, source address, bytes

_PIECE_BYTES = 8 << 20
_ALONE_BYTES = 16 << 20  # below this a second thread is not worth its start
_MOST_THREADS = 8
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; older kernels refuse it, which does no harm


def copy_together(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, fresh: bool = False
) -> None:
    """Copy each source into its target.

    Args:
        targets: contiguous host tensors of bytes.
        sources: the same, pairwise of one length.
        fresh: the targets' pages do not exist yet; they are made piece by piece, in one call each, which is
            faster than one fault for each page.
    """
    pieces = iter([piece for pair in zip(targets, sources, strict=True) for piece in _pieces(*pair)])
    errors: list[BaseException] = []

    def copy(*held: object) -> None:
        try:
            for target, source, nbytes in pieces:  # a list's iterator: several threads may take from it
                if fresh:
                    populate(target, nbytes)
                ctypes.memmove(target, source, nbytes)
        except BaseException as error:
            errors.append(error)

    nbytes = sum(target.numel() for target in targets)
    helpers = min(torch.get_num_threads(), _MOST_THREADS, nbytes // _ALONE_BYTES) - 1
    threads: list[threading.Thread] = []
    try:
        for _ in range(helpers):
            # Holding both: should an interruption come even between here and the join, neither memory is freed
            # nor the buffer reused before the thread has ended.
            threads.append(threading.Thread(target=copy, args=(targets, sources), name="async_ckpt-copy"))
            threads[-1].start()
        copy()
    except BaseException as error:
        errors.append(error)
    finally:
        _end(pieces, threads, errors)
    if errors:
        raise errors[0]


def _pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[_Piece]:
    if target.numel() != source.numel():
        raise ValueError(f"cannot copy {source.numel()} bytes into {target.numel()}")
    # data_ptr() would make a copy-on-write source own its memory
    const_address = getattr(source, "const_data_ptr", source.data_ptr)()
    address = target.data_ptr()
    for start in range(0, target.numel(), _PIECE_BYTES):
        yield address + start, const_address + start, min(_PIECE_BYTES, target.numel() - start)


def _end(pieces: Iterator[_Piece], threads: Sequence[threading.Thread], errors: list[BaseException]) -> None:
    """Leave the threads nothing more to do, and join them, however often that is interrupted."""
    while any(thread.is_alive() for thread in threads):
        try:
            for _ in pieces:
                pass
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        except BaseException as error:
            errors.append(error)


def populate(address: int, nbytes: int) -> None:
    """Have the pages of fresh memory made before they are written to, while other threads run."""
    if _madvise is not None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(start, address + nbytes - start, _POPULATE_WRITE)


# By ctypes, which lets other threads run meanwhile; mmap's own method does not.
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
