"""Host memory that is kept from save to save, and the copies into it.

Guarantees: two leases never share memory, not even with what an earlier holder left behind, but for those who
ask to `HostPool.share` one, which is counted once and ends with the last of them; idle
buffers count against the budget (B1); a source is only ever read through const access, so that a
copy-on-write source keeps sharing; when a copy returns, its source may be changed. A forked child, such as a data
loader's, keeps no copy of the memory, which is zero there from Linux 4.14 on, unless a base CheckpointIO has it (L1).

What does not belong here: what is copied and why (`capture`), waiting for room. The pool is for one
thread, the loop's.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch.utils._python_dispatch import _disable_current_modes

from async_ckpt.snapshot.budget import Budget
from async_ckpt.snapshot.parallel_copy import copy_together

__all__ = ["ALIGNMENT", "HostBuffer", "HostPool", "aligned", "bytes_of", "copy_storages"]

logger = logging.getLogger("async_ckpt.snapshot")

ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
_WASTE_FLOOR_BYTES = 1 << 20
_SMALL_BYTES = 16 << 10
_WIPE_ON_FORK, _KEEP_ON_FORK = 18, 19  # of madvise, from Linux 4.14 on
_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
_PADDING = tuple(
    torch.zeros(ALIGNMENT, dtype=torch.uint8, device="cpu")[:length] for length in range(ALIGNMENT)
)


def aligned(nbytes: int) -> int:
    """Round *nbytes* up to the alignment of regions in a buffer."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """Page-aligned anonymous memory; no page of it exists before it is written.

    Args:
        nbytes: how much of it, at least.

    Attributes:
        nbytes: how much of it there is.
        is_fresh: nothing has been copied into it yet.
        written: what a writer knows of a file that has these bytes; nothing here.
    """

    __slots__ = ("_map", "_pid", "_pinned", "_shown", "is_fresh", "nbytes", "written")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = capacity_for(nbytes)
        self.is_fresh = True
        self.written: object = None
        self._map: mmap.mmap | None = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pid = os.getpid()
        self._pinned: bool | None = None
        self.show_to_children(False)

    @property
    def memory(self) -> mmap.mmap:
        """The mapping itself.

        Raises:
            ValueError: the buffer is closed.
        """
        if self._map is None:
            raise ValueError("the host buffer is closed")
        return self._map

    @property
    def is_aliased(self) -> bool:
        """Whether anything outside still refers to the memory: a view, a tensor, an array."""
        return self._map is not None and sys.getrefcount(self._map) > 2  # ours and the call's

    def as_tensor(self) -> torch.Tensor:
        """Return the whole memory as one tensor of bytes."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def pin(self) -> bool:
        """Page-lock the memory for CUDA, once.

        Returns:
            Whether it is page-locked; where CUDA refuses, the reason is logged and copies still work.
        """
        if self._pinned is None:
            status = int(torch.cuda.cudart().cudaHostRegister(self.as_tensor().data_ptr(), self.nbytes, 0))
            self._pinned = status == 0
            self.show_to_children(self._shown)
            if not self._pinned:
                logger.warning(
                    "cannot page-lock %d bytes of host memory (CUDA error %d): copies from the GPU will be "
                    "slower; raise the limit on locked memory (ulimit -l)",
                    self.nbytes,
                    status,
                )
        return self._pinned

    def show_to_children(self, shown: bool) -> None:
        """Say whether processes that are forked from now on find in the memory what is in it, or zeros.

        Where they do, the next save leaves each of them a copy of the last. MADV_DONTFORK would leave them nothing at
        all, in whose place something else may come to lie, to be unmapped with the object that they inherit; where CUDA
        has set that, it is undone.
        """
        self._shown = shown
        if sys.platform == "linux":
            with suppress(OSError):  # an older kernel
                self.memory.madvise(_KEEP_ON_FORK if shown else _WIPE_ON_FORK)
                self.memory.madvise(mmap.MADV_DOFORK)

    def close(self) -> None:
        """Let go of the memory; it is unmapped once nothing refers to it any more. Idempotent."""
        if self._map is not None and self._pinned and self._pid == os.getpid():
            torch.cuda.cudart().cudaHostUnregister(self.as_tensor().data_ptr())
        self._map = None


def capacity_for(nbytes: int) -> int:
    """Return the size of the buffer that a request of *nbytes* gets.

    Up to a 64th is left for growth: a state whose list of losses grows would need another buffer at every save.
    """
    step = max(_PAGE, (1 << nbytes.bit_length()) // 128)
    return max(1, -(-nbytes // step)) * step


class HostPool:
    """Buffers kept from save to save, within a budget.

    Args:
        budget: counts every buffer, leased or idle.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._idle: list[HostBuffer] = []  # the longest idle first
        self._leased: dict[HostBuffer, int] = {}  # how many hold it

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that are kept for reuse."""
        return sum(buffer.nbytes for buffer in self._idle)

    def lease(self, nbytes: int, *, force: bool = False) -> HostBuffer | None:
        """Hand out a buffer of at least *nbytes*.

        The smallest idle buffer that fits without wasting more than a quarter is reused; else a new one takes
        the place of an idle one that was too small, and of more, the longest idle first, until it fits the budget.

        Args:
            nbytes: what the snapshot needs.
            force: go past the limit rather than refuse.

        Returns:
            The buffer, to be given to `release` once; ``None`` where it does not fit now.
        """
        capacity = capacity_for(nbytes)
        most = capacity + max(capacity // 4, _WASTE_FLOOR_BYTES)
        fitting = [buffer for buffer in self._idle if capacity <= buffer.nbytes <= most]
        if fitting:
            buffer = min(fitting, key=lambda idle: idle.nbytes)
            buffer.show_to_children(False)
            self._idle.remove(buffer)
        else:
            if not force and not self.would_fit(nbytes):
                return None  # dropping the idle ones would not help either
            outgrown = next((idle for idle in self._idle if idle.nbytes < capacity), None)
            if outgrown is not None:  # else a state that grows would leave a buffer behind at every save
                self._idle.remove(outgrown)
                self._drop(outgrown)
            while self._idle and not self._budget.fits(capacity):
                self._drop(self._idle.pop(0))
            self._budget.reserve(capacity)
            try:
                buffer = HostBuffer(nbytes)
            except BaseException:
                self._budget.release(capacity)
                raise
        self._leased[buffer] = 1
        return buffer

    def share(self, buffer: HostBuffer) -> None:
        """Let one more hold *buffer*, which is on lease; each of them gives it to `release` once."""
        self._leased[buffer] += 1

    def would_fit(self, nbytes: int, *, without: HostBuffer | None = None) -> bool:
        """Return whether a buffer could be had once all idle ones were dropped.

        Args:
            nbytes: what the snapshot needs.
            without: a buffer on lease, counted as if one who holds it had given it back.
        """
        others = self._budget.held_bytes - self.idle_bytes
        if without is not None and self._leased[without] == 1:
            others -= without.nbytes
        return self._budget.fits(capacity_for(nbytes), beside=others)

    def release(self, buffer: HostBuffer) -> None:
        """Take back a leased buffer from one who holds it.

        From the last of them it is kept for the next save, if that is within the limit.

        Args:
            buffer: what `lease` returned.

        Raises:
            ValueError: it is not on lease from this pool.
        """
        if buffer not in self._leased:
            raise ValueError("the buffer is not on lease from this pool")
        self._leased[buffer] -= 1
        if self._leased[buffer]:
            return
        del self._leased[buffer]
        buffer.written = None
        if buffer.is_aliased:  # someone kept a view of it: its bytes must never change under them
            logger.debug("a holder kept views of a %d byte buffer: not reused", buffer.nbytes)
            self._drop(buffer)
        elif self._budget.held_bytes > self._budget.limit_bytes:  # it was let in alone; it may not stay
            self._drop(buffer)
        else:
            self._idle.append(buffer)

    def close(self) -> None:
        """Free every idle buffer; those on lease are freed by whoever holds them. Idempotent."""
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, buffer: HostBuffer) -> None:
        buffer.close()
        self._budget.release(buffer.nbytes)


def copy_storages(views: Sequence[torch.Tensor], sizes: Sequence[int], buffer: HostBuffer) -> None:
    """Copy storages one after the other, each at the next aligned place, into *buffer*.

    Args:
        views: the bytes of each, on any device; one on the meta device has a place, which is left as it is.
        sizes: their sizes in bytes.
        buffer: large enough for the sum of the aligned sizes.
    """
    if not any(sizes):
        return
    streams: dict[torch.device, torch.cuda.Stream] = {}
    with without_modes(), torch.no_grad():
        runs = list(_runs(views, sizes))
        lengths = [sum(aligned(sizes[index]) for index in run) for run in runs]
        whole = buffer.as_tensor()
        targets = whole[: sum(lengths)].split(lengths)
        large: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        try:
            for run, target in zip(runs, targets, strict=True):
                if len(run) > 1:
                    torch.cat([piece for index in run for piece in _padded(views[index])], out=target)
                    continue
                view, target = views[run.start], target[: sizes[run.start]]
                if view.is_meta:
                    continue
                if view.is_cuda:
                    with torch.cuda.stream(_side_stream(view.device, streams)):
                        target.copy_(view, non_blocking=buffer.pin())
                elif not view.is_cpu:
                    target.copy_(view)
                else:
                    large[0].append(target)
                    large[1].append(view)
            copy_together(*large, fresh=buffer.is_fresh)
            buffer.is_fresh = False
        finally:
            for stream in streams.values():
                stream.synchronize()


@contextmanager
def without_modes() -> Iterator[None]:
    """Have torch do what it is told, whatever modes the program is in: they may replace what any function returns."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the whole storage as a tensor of bytes."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        with without_modes():
            return _bytes_of(storage)
    return _bytes_of(storage)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    if storage.device.type == "cpu":
        return _NOTHING.detach().set_(storage)  # cheaper than a new tensor, and thousands are needed
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _runs(views: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[range]:
    """Group neighbours that are small and on the CPU: together they cost a tenth of one copy each."""
    first = 0
    for index, (view, nbytes) in enumerate(zip(views, sizes, strict=True)):
        if nbytes > _SMALL_BYTES or not view.is_cpu:
            if first < index:
                yield range(first, index)
            yield range(index, index + 1)
            first = index + 1
    if first < len(sizes):
        yield range(first, len(sizes))


def _padded(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return view, _PADDING[-view.numel() % ALIGNMENT]


def _side_stream(device: torch.device, streams: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
    """Return a stream of our own that waits for what the current stream has been given so far."""
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
        streams[device].wait_stream(torch.cuda.current_stream(device))
    return streams[device]
