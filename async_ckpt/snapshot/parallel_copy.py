"""Copies or compares large host memory on a few threads, which take pieces from one list.

Guarantees: when `work_together` returns or raises, none of its threads touches the memory any more; sources are read
through const access only, if torch has it.

torch's own threads wait for each other at the end of every tensor: beside busy processes, such as data loaders, a
series of copies takes several times as long. Here, a thread that is delayed delays one piece, once.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import torch

from async_ckpt.snapshot.sources import address_of
from async_ckpt.system import threads

__all__ = ["PIECE_BYTES", "copy_memory", "copy_together", "populate", "work_together"]

T = TypeVar("T")
_Piece: TypeAlias = tuple[int, int, int]  # target address, source address, bytes

PIECE_BYTES = 8 << 20
_ALONE_BYTES = 16 << 20  # below this a second thread is not worth its start
_MOST_THREADS = 8
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; older kernels refuse it, which does no harm


def copy_together(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, fresh: bool = False
) -> None:
    """Copy each source into its target.

    Args:
        targets: contiguous host tensors of bytes.
        sources: tensors of the same lengths.
        fresh: whether the targets' pages are not allocated yet; then each piece is populated by one call, which is
            faster than a fault for each page.
    """
    wrong = [pair for pair in zip(targets, sources, strict=True) if pair[0].numel() != pair[1].numel()]
    if wrong:
        raise ValueError(f"cannot copy {wrong[0][1].numel()} bytes into {wrong[0][0].numel()}")
    copy_memory(
        [
            (target.data_ptr(), address_of(source), target.numel())
            for target, source in zip(targets, sources, strict=True)
        ],
        fresh=fresh,
        held=(targets, sources),
    )


def copy_memory(regions: Sequence[_Piece], *, fresh: bool, held: Any) -> None:
    """Copy regions of memory.

    Args:
        regions: the target address, the source address and the length of each.
        fresh: as above.
        held: the owners of the memory, which are kept alive.
    """
    pieces = iter([piece for region in regions for piece in _pieces(*region)])

    def copy(piece: _Piece) -> None:
        target, source, nbytes = piece
        if fresh:
            populate(target, nbytes)
        ctypes.memmove(target, source, nbytes)

    work_together(pieces, copy, nbytes=sum(region[2] for region in regions), held=held)


def work_together(
    pieces: Iterator[T], work: Callable[[T], object], *, nbytes: int, held: Any, spared: int = 0
) -> None:
    """Call *work* for every piece, on as many threads as are worthwhile.

    Args:
        pieces: an iterator of a list: several threads may take from it.
        work: processes one piece; releases the GIL.
        nbytes: the total size of the pieces.
        held: the owners of the memory, which are kept alive.
        spared: how many fewer threads than that.
    """
    errors: list[BaseException] = []

    def take(held: object) -> None:
        try:
            for piece in pieces:
                work(piece)
        except BaseException as error:
            errors.append(error)

    count = min(torch.get_num_threads(), _MOST_THREADS, nbytes // _ALONE_BYTES) - 1 - spared
    # The threads hold the memory: even if an interruption comes between here and the join, it is not freed, nor the
    # buffer reused, before they have ended.
    helpers = [
        threading.Thread(target=take, args=(held,), name="async_ckpt-copy", daemon=True) for _ in range(count)
    ]
    try:
        with suppress(RuntimeError):  # the system allows no more threads: those that there are do it all
            threads.start(*helpers)
        take(held)
    except BaseException as error:
        errors.append(error)
    finally:
        _end(pieces, helpers, errors)
    if errors:
        raise errors[0]


def _pieces(target: int, source: int, nbytes: int) -> Iterator[_Piece]:
    for start in range(0, nbytes, PIECE_BYTES):
        yield target + start, source + start, min(PIECE_BYTES, nbytes - start)


def _end(pieces: Iterator[Any], helpers: Sequence[threading.Thread], errors: list[BaseException]) -> None:
    """Take the remaining work from the threads, even from one yet to start; join them despite interruptions."""
    while True:
        try:
            for _ in pieces:
                pass
            for thread in helpers:
                if thread.is_alive():
                    thread.join()
            return
        except BaseException as error:
            errors.append(error)


def populate(address: int, nbytes: int) -> None:
    """Allocate the pages of fresh memory before they are written to, without the GIL."""
    if _madvise is not None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(start, address + nbytes - start, _POPULATE_WRITE)


# By ctypes, which releases the GIL; mmap's own method does not.
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
