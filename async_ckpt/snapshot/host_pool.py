"""Host buffers that are reused from save to save.

Guarantees: two leases never share memory, nor views that an earlier holder has kept, except by `HostPool.share`: a
shared buffer counts once, and its lease ends with the last holder. What is kept for later counts against the budget
(B1). A forked child, such as a data loader's, keeps no copy of the memory, which reads as zeros there from Linux 4.14
on, unless a base CheckpointIO uses it (L1).

What does not belong here: the copies (`copying`), waiting for room. The pool is not thread-safe: the loop's thread owns
it.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from contextlib import suppress
from typing import Any

import torch

from async_ckpt.snapshot.budget import Budget

__all__ = ["ALIGNMENT", "MOST_KEPT_BYTES", "HostBuffer", "HostPool", "aligned"]

logger = logging.getLogger("async_ckpt.snapshot")

ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
_WASTE_FLOOR_BYTES = 1 << 20
MOST_KEPT_BYTES = 64 << 20
_WIPE_ON_FORK, _KEEP_ON_FORK = 18, 19  # of madvise, from Linux 4.14 on


def aligned(nbytes: int) -> int:
    """Round *nbytes* up to the alignment of a buffer's regions."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """Page-aligned anonymous memory; a page is allocated when it is first written.

    Args:
        nbytes: its least size in bytes.

    Attributes:
        nbytes: its size in bytes.
        is_fresh: whether nothing has been copied into it yet.
        written: what a writer remembers of a file with these bytes; not used here.
        later: what is copied into it after the call; not used here.
    """

    __slots__ = ("_map", "_pid", "_pinned", "_shown", "is_fresh", "later", "nbytes", "written")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = capacity_for(nbytes)
        self.is_fresh = True
        self.written: object = None
        self.later: Any = None
        self._map: mmap.mmap | None = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pid = os.getpid()
        self._pinned: bool | None = None
        self._shown = True
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
        """Whether a view, a tensor or an array still refers to the memory."""
        return self._map is not None and sys.getrefcount(self._map) > 2  # ours and the call's

    def as_tensor(self) -> torch.Tensor:
        """Return the whole memory as a tensor of bytes."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def pin(self) -> bool:
        """Page-lock the memory for CUDA, once.

        Returns:
            Whether it is page-locked; if CUDA refuses, the reason is logged, and copies still work.
        """
        if self._pinned is None:
            status = int(torch.cuda.cudart().cudaHostRegister(self.as_tensor().data_ptr(), self.nbytes, 0))
            self._pinned = status == 0
            self._advise()
            if not self._pinned:
                logger.warning(
                    "cannot page-lock %d bytes of host memory (CUDA error %d): copies from the GPU will be "
                    "slower; raise the limit on locked memory (ulimit -l)",
                    self.nbytes,
                    status,
                )
        return self._pinned

    def show_to_children(self, shown: bool) -> None:
        """Set whether processes that are forked from now on see the content of the memory, or zeros.

        If they see it, the next save leaves each of them with a copy of the last snapshot. MADV_DONTFORK would leave a
        gap in the child's address space: another mapping may be put there, and be unmapped with the object that the
        child inherits. If CUDA has set that, it is undone.
        """
        if shown != self._shown:
            self._shown = shown
            self._advise()

    def _advise(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # an older kernel
                self.memory.madvise(_KEEP_ON_FORK if self._shown else _WIPE_ON_FORK)
                self.memory.madvise(mmap.MADV_DOFORK)

    def close(self) -> None:
        """Release the memory; it is unmapped once nothing refers to it any more. Idempotent."""
        if self._map is not None and self._pinned and self._pid == os.getpid():
            torch.cuda.cudart().cudaHostUnregister(self.as_tensor().data_ptr())
        self._map = None


def capacity_for(nbytes: int) -> int:
    """Return the size of the buffer for a request of *nbytes*.

    Up to a 64th is reserved for growth: a state with a growing list would otherwise need another buffer at every save.
    """
    step = max(_PAGE, (1 << nbytes.bit_length()) // 128)
    return max(1, -(-nbytes // step)) * step


class HostPool:
    """Buffers that are reused from save to save, within a budget.

    Args:
        budget: counts every buffer, leased or idle.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._idle: list[HostBuffer] = []  # the longest idle first
        self._leased: dict[HostBuffer, int] = {}  # how many hold it
        self._kept: object = None
        self._kept_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """The bytes of what is kept for reuse."""
        return sum(buffer.nbytes for buffer in self._idle) + self._kept_bytes

    @property
    def kept(self) -> object:
        """What was last given to `keep`, if it is still there."""
        return self._kept

    def keep(self, value: object, nbytes: int) -> None:
        """Keep *value*, instead of what was kept before, until a lease needs the memory or the pool is closed.

        Args:
            value: any object; ``None`` for none.
            nbytes: what it takes. More than 64 MiB, or than is left of the budget, are not kept.
        """
        self._budget.release(self._kept_bytes)
        self._kept, self._kept_bytes = None, 0
        left = self._budget.limit_bytes - self._budget.held_bytes
        if value is not None and nbytes <= min(left, MOST_KEPT_BYTES):
            self._budget.reserve(nbytes)
            self._kept, self._kept_bytes = value, nbytes

    def lease(self, nbytes: int, *, force: bool = False) -> HostBuffer | None:
        """Lease a buffer of at least *nbytes*.

        The smallest idle buffer that fits without wasting more than a quarter is reused. Otherwise a new one replaces
        an idle one that is too small, and more of them, longest idle first, until it fits the budget.

        Args:
            nbytes: what the snapshot needs.
            force: whether to exceed the limit rather than refuse.

        Returns:
            The buffer, to be released once; ``None`` if it does not fit now.
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
            if not self._budget.fits(capacity):
                self.keep(None, 0)
            self._budget.reserve(capacity)
            try:
                buffer = HostBuffer(nbytes)
            except BaseException:
                self._budget.release(capacity)
                raise
        self._leased[buffer] = 1
        return buffer

    def share(self, buffer: HostBuffer) -> None:
        """Add a holder to *buffer*, which is on lease; each holder releases it once."""
        self._leased[buffer] += 1

    def would_fit(self, nbytes: int, *, without: HostBuffer | None = None) -> bool:
        """Return whether a buffer would fit if all idle ones were dropped.

        Args:
            nbytes: what the snapshot needs.
            without: a buffer on lease, counted as if one holder had released it.
        """
        others = self._budget.held_bytes - self.idle_bytes
        if without is not None and self._leased[without] == 1:
            others -= without.nbytes
        return self._budget.fits(capacity_for(nbytes), beside=others)

    def release(self, buffer: HostBuffer) -> None:
        """Take back a leased buffer from one holder.

        After the last holder, it is kept for the next save, if that is within the limit.

        Args:
            buffer: the result of `lease`.

        Raises:
            ValueError: it is not on lease from this pool.
        """
        if buffer not in self._leased:
            raise ValueError("the buffer is not on lease from this pool")
        self._leased[buffer] -= 1
        if self._leased[buffer]:
            return
        del self._leased[buffer]
        buffer.written = buffer.later = None
        if buffer.is_aliased:  # someone kept a view of it: its bytes must never change under them
            logger.debug("a buffer of %d bytes is not reused, as its holder kept views of it", buffer.nbytes)
            self._drop(buffer)
        elif self._budget.held_bytes > self._budget.limit_bytes:  # it was let in alone; it may not stay
            self._drop(buffer)
        else:
            self._idle.append(buffer)

    def close(self) -> None:
        """Free all that is kept; leased buffers are freed when their holders release them. Idempotent."""
        self.keep(None, 0)
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, buffer: HostBuffer) -> None:
        buffer.close()
        self._budget.release(buffer.nbytes)
