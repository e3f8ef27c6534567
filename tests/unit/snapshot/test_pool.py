"""Host buffers and the pool that keeps them (B1)."""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import pytest
import torch

from async_ckpt.snapshot import HostBuffer, HostPool, capture_objects
from async_ckpt.snapshot.budget import Budget
from async_ckpt.snapshot.parallel_copy import copy_together

PAGE = mmap.PAGESIZE
_is_cow: Any = getattr(torch._C, "_is_cow_tensor", None)


def _lease(pool: HostPool, nbytes: int) -> HostBuffer:
    buffer = pool.lease(nbytes)
    assert buffer is not None
    return buffer


def test_a_buffer_is_reused() -> None:
    """The memory of one save serves the next of the same size."""
    pool = HostPool(Budget(1 << 40))
    first = _lease(pool, 10 * PAGE)
    pool.release(first)
    assert _lease(pool, 9 * PAGE) is first


def test_the_smallest_fitting_buffer_is_taken() -> None:
    """Of two idle buffers the one that wastes less is leased."""
    pool = HostPool(Budget(1 << 40))
    buffers = [_lease(pool, pages * PAGE) for pages in (20, 10)]
    for buffer in buffers:
        pool.release(buffer)
    assert _lease(pool, 10 * PAGE) is buffers[1]


def test_a_much_larger_buffer_is_not_wasted() -> None:
    """A small snapshot does not occupy the memory of a large one."""
    pool = HostPool(Budget(1 << 40))
    large = _lease(pool, 16 << 20)
    pool.release(large)
    small = _lease(pool, 2 << 20)
    assert small is not large
    assert small.nbytes == 2 << 20


def test_a_state_that_grows_a_little_keeps_its_buffer() -> None:
    """A list of losses that grows from save to save costs no new memory, up to a 128th of the state."""
    pool = HostPool(Budget(1 << 40))
    first = _lease(pool, (64 << 20) + 1)
    pool.release(first)
    assert _lease(pool, (64 << 20) + (1 << 19)) is first
    assert first.nbytes <= (64 << 20) * 65 // 64


def test_a_state_that_grows_leaves_no_buffers_behind() -> None:
    """A buffer that became too small makes way for the new one, though there would be room for both (B1)."""
    budget = Budget(1 << 40)
    pool = HostPool(budget)
    sizes = [pages * PAGE for pages in range(10, 60)]
    for nbytes in sizes:
        pool.release(_lease(pool, nbytes))
    assert budget.held_bytes == pool.idle_bytes == sizes[-1]


def test_two_sizes_in_turn_keep_a_buffer_each() -> None:
    """Saves of the weights alone between saves of everything take no memory from each other."""
    pool = HostPool(Budget(1 << 40))
    for nbytes in (1 << 20, 30 << 20, 1 << 20):
        pool.release(_lease(pool, nbytes))
    held = pool.idle_bytes
    for nbytes in (30 << 20, 1 << 20) * 3:
        pool.release(_lease(pool, nbytes))
    assert pool.idle_bytes == held == 31 << 20


def test_idle_buffers_make_room() -> None:
    """Idle buffers are dropped, the longest idle first, until a new one fits."""
    budget = Budget(100 << 20)
    pool = HostPool(budget)
    buffers = [_lease(pool, mib << 20) for mib in (30, 31, 32)]
    for buffer in buffers:
        pool.release(buffer)
    _lease(pool, 35 << 20)
    assert budget.held_bytes == (31 + 32 + 35) << 20
    assert _lease(pool, 32 << 20) is buffers[2]


def test_idle_buffers_are_kept_when_dropping_them_would_not_help() -> None:
    """A request that does not fit beside the leases leaves the idle buffers alone."""
    pool = HostPool(Budget(100 << 20))
    leased, idle = _lease(pool, 60 << 20), _lease(pool, 30 << 20)
    pool.release(idle)
    assert pool.lease(50 << 20) is None
    assert pool.idle_bytes == 30 << 20
    forced = pool.lease(50 << 20, force=True)
    assert forced is not None
    assert len({id(leased), id(idle), id(forced)}) == 3


def test_an_oversize_lease_is_alone() -> None:
    """A snapshot above the limit is taken when nothing is leased, and its memory is not kept (B1)."""
    budget = Budget(10 << 20)
    pool = HostPool(budget)
    pool.release(_lease(pool, 5 << 20))
    large = _lease(pool, 20 << 20)
    assert budget.held_bytes == 20 << 20
    assert pool.lease(1) is None
    pool.release(large)
    assert budget.held_bytes == 0


def test_a_buffer_someone_still_looks_at_is_not_reused() -> None:
    """Memory to which a tensor or view still refers is never written by another save."""
    budget = Budget(1 << 40)
    pool = HostPool(budget)
    captured = capture_objects({"w": torch.arange(1000.0)})
    buffer = _lease(pool, captured.nbytes)
    snapshot = captured.stage(buffer)
    kept = snapshot.state()["w"]
    snapshot.close()
    pool.release(buffer)
    assert pool.idle_bytes == budget.held_bytes == 0
    assert torch.equal(kept, torch.arange(1000.0))


def test_a_lease_ends_once() -> None:
    """A buffer is given back once, and to the pool it is from."""
    pool = HostPool(Budget(1 << 40))
    buffer = _lease(pool, 1)
    pool.release(buffer)
    for stranger in (buffer, HostBuffer(1)):
        with pytest.raises(ValueError, match="not on lease"):
            pool.release(stranger)


def test_a_closed_buffer_has_no_memory() -> None:
    """Closing a buffer twice is harmless, using it afterwards is an error, and its memory is gone."""
    buffer = HostBuffer(10)
    memory = weakref.ref(buffer.memory)
    buffer.close()
    buffer.close()
    assert memory() is None
    with pytest.raises(ValueError, match="closed"):
        buffer.as_tensor()


@pytest.mark.parametrize("fresh", [True, False])
def test_large_copies_are_made_together_and_whole(fresh: bool) -> None:
    """Tensors of any length, split over threads and pieces, arrive byte for byte; sharing sources go on sharing."""
    lengths = [0, 1, 15, 17, 40 << 20, (8 << 20) + 5, 8 << 20]
    originals = [torch.randint(256, (length,), dtype=torch.uint8) for length in lengths]
    lazy = [torch.ops.aten._lazy_clone(original) for original in originals]
    buffer = HostBuffer(sum(lengths))
    targets = buffer.as_tensor()[: sum(lengths)].split(lengths)
    copy_together(targets, lazy, fresh=fresh)
    assert all(map(torch.equal, targets, originals))
    if hasattr(torch.Tensor, "const_data_ptr"):
        assert _is_cow(lazy[4])


def test_what_does_not_fit_is_not_copied() -> None:
    """Two lengths are an error, before a byte has moved."""
    target = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="20 bytes into 10"):
        copy_together([target], [torch.ones(20, dtype=torch.uint8)])
    assert not target.any()


# -- what is kept beside buffers


def test_what_is_kept_counts_and_gives_way() -> None:
    """It is in the budget as long as it is there, and a lease that would not fit beside it has the memory (B1)."""
    budget = Budget(100 * PAGE)
    pool = HostPool(budget)
    pool.keep("a layout", 30 * PAGE)
    pool.keep("a newer one", 40 * PAGE)
    assert (pool.kept, budget.held_bytes, pool.idle_bytes) == ("a newer one", 40 * PAGE, 40 * PAGE)
    assert pool.would_fit(90 * PAGE)
    first = _lease(pool, 50 * PAGE)
    assert pool.kept == "a newer one"
    pool.release(first)
    _lease(pool, 80 * PAGE)
    assert pool.kept is None
    assert budget.held_bytes == 80 * PAGE


def test_what_does_not_fit_is_not_kept() -> None:
    """Nothing is kept beyond the budget, beyond 64 MiB, or once the pool is closed; what was before it is dropped."""
    pool = HostPool(Budget(1 << 40))
    pool.keep("a layout", 1)
    pool.keep("a larger one", (64 << 20) + 1)
    assert pool.kept is None
    small = HostPool(Budget(10 * PAGE))
    _lease(small, 8 * PAGE)
    small.keep("a layout", 3 * PAGE)
    assert small.kept is None
    pool.keep("a layout", 1)
    pool.close()
    assert (pool.kept, pool.idle_bytes) == (None, 0)
