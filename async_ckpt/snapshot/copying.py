"""Copies the bulk data of a state into a host buffer.

Guarantees: sources are only read through const access, so copy-on-write sources stay shared. When the copy returns, its
sources may be changed.

What does not belong here: what is copied and why (`capture`), the buffers (`host_pool`).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Collection, Sequence
from itertools import compress

import torch

from async_ckpt.snapshot.host_pool import HostBuffer
from async_ckpt.snapshot.parallel_copy import copy_memory
from async_ckpt.snapshot.sources import Sources, without_modes

__all__ = ["copy_sources"]

_SMALL_BYTES = (
    16 << 10
)  # below it, a call that lets the GIL go, or goes through torch, takes longer than the copy
_AT_ONCE = 256  # so many small ones, 4 MiB at most, are copied before another thread may have the GIL

_is_cpu = torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_memcpy = ctypes.PyDLL(None).memcpy  # keeps the GIL
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = None


def copy_sources(
    sources: Sources, starts: Sequence[int], buffer: HostBuffer, later: Collection[int] = ()
) -> None:
    """Copy pieces of memory on any device into *buffer*; pieces on the meta device are left out.

    Args:
        sources: the pieces.
        starts: where in the buffer each of them begins; others may follow.
        buffer: large enough.
        later: the numbers of large ones in host memory that are left out, too.
    """
    sizes = sources.sizes
    if not any(sizes):
        return
    streams: dict[torch.device, torch.cuda.Stream] = {}
    starts = starts[: len(sizes)]
    with without_modes(), torch.no_grad():
        whole = buffer.as_tensor()
        on_cpu = list(map(_is_cpu, sources.aliases))
        try:
            if not all(on_cpu):
                for index, start in enumerate(starts):
                    if not on_cpu[index]:
                        _from_device(
                            sources.view(index), whole[start : start + sizes[index]], buffer, streams
                        )
            _from_host(sources, starts, on_cpu, whole.data_ptr(), later, fresh=buffer.is_fresh)
            buffer.is_fresh = False
        finally:
            for stream in streams.values():
                stream.synchronize()


def _from_host(
    sources: Sources,
    starts: Sequence[int],
    on_cpu: Sequence[bool],
    base: int,
    later: Collection[int],
    *,
    fresh: bool,
) -> None:
    regions = [list(map(base.__add__, starts)), sources.addresses(), sources.sizes]
    small = [
        is_here and nbytes <= _SMALL_BYTES for is_here, nbytes in zip(on_cpu, sources.sizes, strict=True)
    ]
    if not all(small):
        large = list(map(int.__gt__, on_cpu, small))
        for index in later:
            large[index] = False
        copy_memory(list(compress(zip(*regions, strict=True), large)), fresh=fresh, held=sources)
        regions = [list(compress(column, small)) for column in regions]
    for first in range(0, len(regions[0]), _AT_ONCE):
        deque(map(_memcpy, *(column[first : first + _AT_ONCE] for column in regions)), maxlen=0)


def _from_device(
    view: torch.Tensor,
    target: torch.Tensor,
    buffer: HostBuffer,
    streams: dict[torch.device, torch.cuda.Stream],
) -> None:
    if view.is_cuda:
        with torch.cuda.stream(_side_stream(view.device, streams)):
            target.copy_(view, non_blocking=buffer.pin())
    elif not view.is_meta:
        target.copy_(view)


def _side_stream(device: torch.device, streams: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
    """Return a stream of our own that waits for the work queued on the current stream so far."""
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
        streams[device].wait_stream(torch.cuda.current_stream(device))
    return streams[device]
