"""Random states, and random uses of the pool."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_ckpt.budget import Budget
from async_ckpt.format import lay_out, plan_parts
from async_ckpt.snapshot import HostBuffer, HostPool, capture

DTYPES = [
    torch.float32,
    torch.int64,
    torch.bfloat16,
    torch.bool,
    torch.complex64,
    torch.float8_e5m2,
    torch.uint8,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any type and shape, some of them views with strides of their own."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = torch.Size(shape).numel()
    tensor = torch.randint(0, 2, (numel,)).to(draw(st.sampled_from(DTYPES)))
    tensor = tensor.view(shape)
    if draw(st.booleans()):
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, tensor.shape[0])) :]
    if tensor.is_floating_point() and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor)
    return tensor


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    tensors(),
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        inner.map(lambda value: [value, value]),
    ),
    max_leaves=12,
)


@given(STATES, st.integers(1, 500))
def test_any_state_becomes_the_file_that_torch_save_writes(state: Any, part_size: int) -> None:
    """A file put together from parts of any size equals torch.save's of the state at the time of the snapshot."""
    file = io.BytesIO()
    torch.save(state, file)
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    layout = lay_out(snapshot)
    parts = plan_parts(layout.nbytes, part_size)
    content = {part.index: b"".join(layout.read(part.start, part.stop)) for part in reversed(parts)}
    snapshot.close()
    assert b"".join(content[part.index] for part in parts) == file.getvalue()


class PoolMachine(RuleBasedStateMachine):
    """Leases and releases in any order."""

    LIMIT_BYTES = 4 << 20

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(self.LIMIT_BYTES)
        self.pool = HostPool(self.budget)
        self.leases: list[HostBuffer] = []

    @rule(nbytes=st.integers(0, 6 << 20))
    def lease(self, nbytes: int) -> None:
        """Lease a buffer, and write one's own mark all over its first bytes."""
        buffer = self.pool.lease(nbytes)
        if buffer is not None:
            assert buffer.nbytes >= nbytes
            self.leases.append(buffer)
            buffer.as_tensor()[:64] = id(buffer) % 251

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give one back."""
        self.pool.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule()
    def close(self) -> None:
        """Free what is idle."""
        self.pool.close()

    @invariant()
    def bounded(self) -> None:
        """Never is more held than the limit, but by one buffer alone; every byte is accounted for (B1)."""
        leased = sum(buffer.nbytes for buffer in self.leases)
        assert self.budget.held_bytes == leased + self.pool.idle_bytes
        alone = len(self.leases) == 1 and not self.pool.idle_bytes
        assert self.budget.held_bytes <= self.LIMIT_BYTES or alone

    @invariant()
    def apart(self) -> None:
        """No two leases share memory."""
        assert len({id(buffer.memory) for buffer in self.leases}) == len(self.leases)
        assert all(int(buffer.as_tensor()[0]) == id(buffer) % 251 for buffer in self.leases)


TestPool = PoolMachine.TestCase
