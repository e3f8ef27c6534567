"""What is loaded is what torch.load returns, for any state, in any kind of file, from any kind of store."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt import CheckpointService
from async_ckpt.stores.base import Location
from tests.archives import edited, written
from tests.support import MemorySource, MemoryStore

SHARED = torch.arange(300_000.0)  # so much that storages are filled after torch.load


class File(MemoryStore):
    """A store of one file."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    async def source(self, location: Location) -> MemorySource:
        return MemorySource(self._data)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of their own, and views of one that they share."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64]))
    numel = draw(st.sampled_from([0, 1, 9, 3000, 300_000]))
    tensor = SHARED if draw(st.booleans()) else torch.arange(numel).to(dtype)
    tensor = tensor[draw(st.integers(0, 3)) :: draw(st.integers(1, 3))]
    if tensor.numel() % 2 == 0 and draw(st.booleans()):
        tensor = tensor.view(2, -1).t()
    if tensor.is_complex() and draw(st.booleans()):
        return tensor.conj()
    if tensor.is_floating_point() and draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


STATES = st.dictionaries(
    st.sampled_from(["a", "b", "a.b", "c[0]", "*"]),
    st.recursive(
        st.one_of(tensors(), st.none(), st.integers(), st.text(max_size=3)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(st.integers(0, 3), st.sampled_from(["m", "v"])), inner, max_size=3),
            inner.map(lambda value: (value, value)),
        ),
        max_leaves=6,
    ),
    min_size=1,
)


@given(STATES, st.sampled_from(["archive", "stored", "packed", "old format"]), st.booleans())
def test_any_state_in_any_file(state: Any, kind: str, is_near: bool) -> None:
    """It saves to the same bytes, so values, types, strides and what is shared are the same; each part as well."""
    data = written(state, _use_new_zipfile_serialization=kind != "old format")
    if kind in ("stored", "packed"):
        data = edited(data, lambda _, content: content, compression=8 if kind == "packed" else 0)
    expected = torch.load(io.BytesIO(data), weights_only=True)
    url = "/nowhere/x.ckpt" if is_near else "memory://x.ckpt"
    key = next(iter(state))
    with CheckpointService(store_factory=lambda *_: File(data)) as service:
        assert written(service.load(url)) == written(expected)
        part = service.load(url, keys="[*]" if key == "*" else key)
    assert written(part[key]) == written(expected[key])
