"""Random states, and random uses of the pool."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_ckpt.format import lay_out, plan_parts
from async_ckpt.snapshot import HostBuffer, HostPool, capture
from async_ckpt.snapshot.budget import Budget

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


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Numpy arrays of any shape and order, some of them scattered."""
    array = numpy.full(
        draw(st.lists(st.integers(0, 4), max_size=3)), 7, draw(st.sampled_from(["f4", ">i2", "c8"]))
    )
    array = array.T if draw(st.booleans()) else array
    return array[::2] if array.ndim and draw(st.booleans()) else array


class Thing:
    """An object that is pickled in one of the ways there are."""

    def __init__(self, value: Any, way: int) -> None:
        self.value = value
        self.way = way

    def __reduce__(self) -> Any:
        made = [
            (Thing, (self.value, self.way)),
            (Thing, (None, self.way), {"value": self.value}),
            (list, (), None, iter([self.value, self.value])),
            (OrderedDict, (), None, None, iter([(self.way, self.value)])),
            (Thing, (None, self.way), {"value": self.value}, None, None, setattr),
        ]
        return made[self.way]


WORDS: list[Any] = [
    *("cpu", "storage", "latin1", "0", "1", "7", "10", "x", "", "a\nb", "Q", "K\x01Q"),
    *(b"", b"5", b"K\x01Q", b"cpu", b"abc", b"x" * 70_000, "y" * 70_000, "é" * 65_536),
    *(1 << 40, -(1 << 200), 1 << 3000, 255, 256, 65_535, 65_536, -1),
    *(
        OrderedDict,
        torch.FloatStorage,
        torch.UntypedStorage,
        torch.float8_e5m2,
        torch.float32,
        torch._utils._rebuild_tensor_v2,
    ),
    *(numpy.dtype("f8"), numpy.dtype([("a", "i4")]), numpy.float32(2), len, frozenset({"cpu", 3})),
    *(numpy.array([(1, 2.0)], [("a", "i1"), ("b", "f8")]), numpy.array(["ab", None]), numpy.array([7], "i1")),
]


def tied(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor twice, and a view of all of it."""
    return [tensor, tensor, tensor.detach().expand(2, *tensor.shape)]


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.binary(max_size=5).map(bytearray),
    tensors(),
    tensors().map(tied),
    arrays(),
    st.sampled_from(WORDS),
    st.lists(tensors(), min_size=12, max_size=40),  # names of storages of two digits, numbers of two bytes
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        inner.map(lambda value: [value, value]),
        st.builds(Thing, inner, st.integers(0, 4)),
    ),
    max_leaves=12,
)


def overwrite(state: Any) -> None:
    """Change everything in a state that can be changed, inside out."""
    if isinstance(state, torch.Tensor):
        torch.empty(0, dtype=torch.uint8).set_(state.untyped_storage()).fill_(171)
    elif isinstance(state, numpy.ndarray):
        if not any(state is word for word in WORDS):
            state[...] = 11
    elif isinstance(state, Thing):
        overwrite(state.value)
        state.value = None
    elif isinstance(state, (list, tuple, dict)):
        for inner in state.values() if isinstance(state, dict) else state:
            overwrite(inner)
    if isinstance(state, (list, dict, bytearray)):
        state.clear()


@given(STATES, st.integers(1, 500))
def test_any_state_becomes_the_file_that_torch_save_writes(state: Any, part_size: int) -> None:
    """A file put together from parts of any size equals torch.save's, whatever became of the state since (S1)."""
    file = io.BytesIO()
    torch.save(state, file)
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    overwrite(state)
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
    def share(self, data: st.DataObject) -> None:
        """Let one more hold a buffer."""
        self.leases.append(data.draw(st.sampled_from(self.leases)))
        self.pool.share(self.leases[-1])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give one back."""
        self.pool.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(nbytes=st.integers(0, 5 << 20))
    def keep(self, nbytes: int) -> None:
        """Keep something, if there is room beside what is leased."""
        self.pool.keep("kept", nbytes)

    @rule()
    def close(self) -> None:
        """Free what is idle."""
        self.pool.close()

    @invariant()
    def bounded(self) -> None:
        """Never is more held than the limit, but by one buffer alone; every byte is accounted for, once (B1)."""
        leased = {id(buffer): buffer.nbytes for buffer in self.leases}
        assert self.budget.held_bytes == sum(leased.values()) + self.pool.idle_bytes
        alone = len(leased) == 1 and not self.pool.idle_bytes
        assert self.budget.held_bytes <= self.LIMIT_BYTES or alone

    @invariant()
    def apart(self) -> None:
        """No two buffers on lease share memory, and none is idle too."""
        leased = {id(buffer): buffer for buffer in self.leases}.values()
        assert len({id(buffer.memory) for buffer in leased}) == len(leased)
        assert all(int(buffer.as_tensor()[0]) == id(buffer) % 251 for buffer in leased)
        assert not any(buffer in self.pool._idle for buffer in leased)


TestPool = PoolMachine.TestCase
