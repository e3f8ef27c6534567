"""One large copy in host memory, or another pass over it, made by a few threads that take pieces from one list.

Guarantees: when `work_together` returns or raises, no thread of its touches the memory any more; sources are
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import torch

from async_ckpt.system import threads

__all__ = ["PIECE_BYTES", "const_address", "copy_together", "populate", "work_together"]

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
        sources: the same, pairwise of one length.
        fresh: the targets' pages do not exist yet; they are made piece by piece, in one call each, which is
            faster than one fault for each page.
    """
    pieces = iter([piece for pair in zip(targets, sources, strict=True) for piece in _pieces(*pair)])

    def copy(piece: _Piece) -> None:
        target, source, nbytes = piece
        if fresh:
            populate(target, nbytes)
        ctypes.memmove(target, source, nbytes)

    work_together(pieces, copy, nbytes=sum(target.numel() for target in targets), held=(targets, sources))


def work_together(pieces: Iterator[T], work: Callable[[T], object], *, nbytes: int, held: Any) -> None:
    """Do *work* on every piece, on as many threads as it is worth.

    Args:
        pieces: a list's iterator: several threads may take from it.
        work: lets other threads run while it is busy.
        nbytes: what the pieces amount to.
        held: the owners of the memory.
    """
    errors: list[BaseException] = []

    def take(held: object) -> None:
        try:
            for piece in pieces:
                work(piece)
        except BaseException as error:
            errors.append(error)

    count = min(torch.get_num_threads(), _MOST_THREADS, nbytes // _ALONE_BYTES) - 1
    # Holding the memory: should an interruption come even between here and the join, it is neither freed nor the
    # buffer reused before the thread has ended.
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


def _pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[_Piece]:
    if target.numel() != source.numel():
        raise ValueError(f"cannot copy {source.numel()} bytes into {target.numel()}")
    from_address, address = const_address(source), target.data_ptr()
    for start in range(0, target.numel(), PIECE_BYTES):
        yield address + start, from_address + start, min(PIECE_BYTES, target.numel() - start)


def const_address(tensor: torch.Tensor) -> int:
    """Return where the data is, for reading: ``data_ptr()`` would make a copy-on-write tensor own its memory."""
    return int(getattr(tensor, "const_data_ptr", tensor.data_ptr)())


def _end(pieces: Iterator[Any], helpers: Sequence[threading.Thread], errors: list[BaseException]) -> None:
    """Leave the threads nothing to do, not even one that has yet to start; join them, however often interrupted."""
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
    """Have the pages of fresh memory made before they are written to, while other threads run."""
    if _madvise is not None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(start, address + nbytes - start, _POPULATE_WRITE)


# By ctypes, which lets other threads run meanwhile; mmap's own method does not.
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
